"""The reader of ``torch.save``'s files: the bits that PyTorch reads, and no hostile file."""

import io
import pickle
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_weights, call, named, refusal_of, rewrite_zip, save, weights

from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.checkpoint_files.refusals import DamagedError
from emanet_triton.models.checkpoint_files.stored import Storage, StoredTensor, stored_tensor
from emanet_triton.models.entries import DEMO
from emanet_triton.models.zoo import read_published

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FLOAT8 = torch.float8_e4m3fn  # PyTorch itself does not read it from a legacy file


def assert_as_torch_reads(path: Path) -> None:
    theirs = torch.load(path, weights_only=True)
    theirs = theirs.get("state_dict", theirs)
    ours = read_checkpoint(path).state_dict
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert ours[key].shape == value.shape, key
        assert torch.equal(bits(ours[key]), bits(value)), key


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_reads_every_protocol(tmp_path, is_zip, protocol):
    path = tmp_path / "x.pth"
    content = {"state_dict": weights(), "meta": {"iter": 3, "big": 2**70, "b": b"x" * 300}}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    checkpoint = read_checkpoint(path)
    assert_weights(checkpoint.state_dict)
    assert checkpoint.meta == {"iter": 3, "big": 2**70}


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [*((dtype, kind) for dtype in FLOATS for kind in ("zip", "legacy")), (FLOAT8, "zip")],
    ids=str,
)
def test_reads_the_bits_that_torch_reads(tmp_path, kind, dtype):
    table = torch.randn(5, 7).to(dtype)
    content = {"a": table, "odd": table[1:, 3:], "c": torch.ones(3, 1, dtype=dtype)}
    assert_as_torch_reads(save(content, tmp_path / "x.pth", kind))


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_reads_tensors_that_share_memory(tmp_path, kind):
    table = torch.randn(50, 70)
    content = {"a": table, "tied": table, "turned": table.T}
    assert_as_torch_reads(save(content, tmp_path / "x.pth", kind))


def test_reads_the_shipped_file_as_torch_does():
    assert_as_torch_reads(read_published(DEMO).path)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_weights_have_storages_of_their_own_and_can_be_saved(tmp_path, kind):
    checkpoint = read_checkpoint(save(weights(), tmp_path / "x.pth", kind))
    for value in checkpoint.state_dict.values():
        assert value.untyped_storage().nbytes() == value.nbytes
        assert value.data_ptr() % value.element_size() == 0
    again = save(checkpoint.state_dict, tmp_path / "y.pth", kind)
    assert_weights(read_checkpoint(again).state_dict)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_reads_parameters_with_attributes(tmp_path, kind):
    parameter = torch.nn.Parameter(torch.arange(3.0))
    parameter.note = "x"
    path = save({"w": parameter}, tmp_path / "x.pth", kind)
    assert read_checkpoint(path).state_dict["w"].tolist() == [0, 1, 2]


class Stored:
    """A storage of floats that a pickle describes."""

    def __init__(self, key: str = "0", numel: object = 6) -> None:
        self.identity = ("storage", torch.FloatStorage, key, "cpu", numel)


class Described:
    """A tensor that a pickle describes, rightly or not."""

    def __init__(self, storage: Stored, offset: int, shape: object, stride: object) -> None:
        self.arguments = (storage, offset, shape, stride, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


def described(content: object, legacy: bool = False) -> bytes:
    """The pickle of an object that holds ``Described`` tensors."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            if not isinstance(obj, Stored):
                return None
            return (*obj.identity, None) if legacy else obj.identity

    stream = io.BytesIO()
    Pickler(stream, 2).dump(content)
    return stream.getvalue()


def write_zip(path: Path, data: bytes, order: bytes = b"little") -> Path:
    """A zip checkpoint of that pickle and one storage, the floats 0 to 5."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/byteorder", order)
        archive.writestr("x/data/0", torch.arange(6.0).numpy().tobytes())
    return path


def write_legacy(path: Path, data: bytes, keys: object, numel: int = 6) -> Path:
    """A legacy checkpoint of that pickle, that list of storages and one storage."""
    machine = {"little_endian": True}
    parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, machine)]
    floats = torch.arange(float(numel)).numpy().tobytes()
    tail = pickle.dumps(keys, 2) + struct.pack("<q", numel) + floats
    path.write_bytes(b"".join(parts) + data + tail)
    return path


ROWS = Described(Stored(), 0, (2, 3), (3, 1))


def test_reads_what_python_2_wrote(tmp_path):
    """Its ordered dict gives all items to the call, and its texts are bytes."""
    tensor = described(ROWS)[2:-1]
    items = b"]" + b"]U\x01wa" + tensor + b"a" + b"a"
    path = write_zip(tmp_path / "x.pth", b"ccollections\nOrderedDict\n" + items + b"\x85R.")
    assert read_checkpoint(path).state_dict["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


class Settings:
    """Stands for a trainer's own class."""


def test_objects_of_unknown_classes_are_left_out(tmp_path):
    content = {"state_dict": weights(), "hyper": Settings(), "path": Path("x"), "seen": {1, 2}}
    assert_weights(read_checkpoint(save(content, tmp_path / "x.pth")).state_dict)


# What is named as such


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in-a-dict"])
def test_names_a_whole_module(tmp_path, kind, inside):
    module = torch.nn.Linear(2, 2)
    path = save({"model": module, "epoch": 1} if inside else module, tmp_path / "x.pth", kind)
    assert refusal_of(path) == (
        "holds a whole module (torch.nn.modules.linear.Linear); expected its weights alone: load "
        "it where it was made and save them, torch.save(model.state_dict(), ...)"
    )


def test_names_torchscript(tmp_path):
    path = tmp_path / "x.pth"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    assert refusal_of(path) == (
        "is TorchScript, a program with weights; expected weights alone: "
        "torch.save(torch.jit.load(...).state_dict(), ...)"
    )


def export(path: Path) -> None:
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), path)


def export_as_before(path: Path) -> None:
    """The names that older versions of PyTorch gave."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("serialized_exported_program.json", "serialized_state_dict.pt", "version"):
            archive.writestr(name, b"{}")


@pytest.mark.parametrize("write", [export, export_as_before])
def test_names_an_exported_program(tmp_path, write):
    path = tmp_path / "x.pt2"
    write(path)
    assert refusal_of(path) == (
        "is of torch.export, a program with weights; expected weights alone: "
        "torch.save(torch.export.load(...).state_dict, ...)"
    )


# Hostile files: each in the pickle of a zip, before the first item


def nested_key() -> bytes:
    return b")" + b"q\x63h\x63\x86" * 200 + b"N"


def item(path: str, *arguments: bytes) -> bytes:
    """Opcodes of an item of a dict: the key 5, and a call."""
    return b"K\x05" + call(named(path), *arguments)


BIG = b"\x8a\x08" + struct.pack("<q", 6 * 10**9)
STRANGE = "expected a state dict of tensors, but 1 of 4 entries are something else, first "


@pytest.mark.parametrize(
    ("opcodes", "expected"),
    [
        (nested_key(), STRANGE + "'key'"),
        (item("builtins.bytearray", BIG), STRANGE + "'5'"),
        (item("torch.Tensor", b"K\x0a"), STRANGE + "'5'"),
        (item("torch.FloatStorage", b"K\x0a"), STRANGE + "'5'"),
        (b"K\x05X\xff\xff\xff\x7f", "the pickle claims more bytes than the file has before byte "),
        (b"(" * 2000, "the pickle is nested too deeply before byte "),
        (b"K\x05" + b"]" * 2_000_000, "the pickle takes more than 2000000 steps before byte "),
        (b"K\x05" + b"ca\nb\n" * 250_000, "the pickle takes more than 2000000 steps before byte "),
        (
            b"K\x05(" + b"K\x01" * 1000 + b"tq\x63" + b"h\x63\x85R" * 1000,
            "the pickle calls something that is no function before byte ",
        ),
        (item("collections.OrderedDict", b"(" + b"]" * 99 + b"l"), "has the unknown opcode 108"),
    ],
    ids=[
        *("nested-key", "bytearray", "tensor", "storage", "long-text", "deep", "many-steps"),
        "many-names",
        *("calls-a-number", "unknown-opcode"),
    ],
)
def test_hostile_pickles_cost_nothing(tmp_path, opcodes, expected):
    path = save(weights(), tmp_path / "x.pth")
    rewrite_zip(path, lambda data: data.replace(b"(", b"(" + opcodes, 1))
    start = time.process_time()
    assert expected in refusal_of(path)
    assert time.process_time() - start < 5


def test_an_integer_key_that_costs_is_not_hashed(tmp_path):
    """All multiples of 2**61 - 1 have the hash 0."""
    keys = [(2**61 - 1) * i for i in range(1, 60_000)]
    path = save({"state_dict": weights(), "x": dict.fromkeys(keys[:2])}, tmp_path / "x.pth")
    items = b"".join(pickle.dumps(key, 2)[2:-1] + b"N" for key in keys)
    rewrite_zip(path, lambda data: data.removesuffix(b"u.") + items + b"u.")
    start = time.process_time()
    assert_weights(read_checkpoint(path).state_dict)
    assert time.process_time() - start < 5


WRONG = [
    (Described(Stored(), 1, (2, 3), (3, 1)), "a tensor of storage 0 reaches beyond it"),
    (Described(Stored(), 0, (2, 4), (3, 1)), "a tensor of storage 0 reaches beyond it"),
    (Described(Stored(), 0, (2, 3), (-3, 1)), "a tensor of storage 0 has impossible sizes"),
    (Described(Stored(), -1, (2, 3), (3, 1)), "a tensor of storage 0 has impossible sizes"),
    (Described(Stored(), 0, (2, -3), (3, 1)), "a tensor of storage 0 has impossible sizes"),
    (Described(Stored(), 0, (2, 3), (3,)), "a tensor of storage 0 has no usable shape"),
    (Described(Stored(), 0, (1,) * 99, (1,) * 99), "a tensor of storage 0 has no usable shape"),
    (Described(Stored(numel=5), 0, (5,), (1,)), "storage 0 has another size than it claims"),
    (Described(Stored(numel=7), 0, (7,), (1,)), "storage 0 has another size than it claims"),
]
WRONG_IDS = [
    *("offset", "size", "negative-stride", "negative-offset", "negative-size", "rank"),
    *("99-dimensions", "storage-shorter", "storage-longer"),
]
DAMAGED = "cannot be read ({}): damaged or not a checkpoint; expected a PyTorch (.pth)"


@pytest.mark.parametrize(("tensor", "reason"), WRONG, ids=WRONG_IDS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_tensors_lie_inside_their_storages(tmp_path, legacy, tensor, reason):
    data = described({"w": tensor}, legacy)
    path = tmp_path / "x.pth"
    write_legacy(path, data, ["0"]) if legacy else write_zip(path, data)
    assert refusal_of(path).startswith(DAMAGED.format(reason))


def test_storages_must_be_in_the_zip(tmp_path):
    data = described({"w": Described(Stored("7"), 0, (2,), (1,))})
    assert "(storage 7 is missing)" in refusal_of(write_zip(tmp_path / "x.pth", data))


def test_names_a_big_endian_file(tmp_path):
    message = refusal_of(write_zip(tmp_path / "x.pth", described({"w": ROWS}), b"big"))
    assert message.startswith("is of a big-endian machine: ")


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ([], "its list of storages does not name those of its tensors"),
        (["1"], "its list of storages does not name those of its tensors"),
        (["0", "0"], "its list of storages does not name those of its tensors"),
        (None, "it has no list of storages"),
    ],
    ids=["short", "other", "twice", "none"],
)
def test_a_legacy_list_of_storages_is_complete(tmp_path, keys, reason):
    """With a short list PyTorch takes memory that nobody has written for weights."""
    path = write_legacy(tmp_path / "x.pth", described({"w": ROWS}, legacy=True), keys)
    assert refusal_of(path).startswith(DAMAGED.format(reason))


def with_view(data: bytes, key: bytes, first: int, numel: int) -> bytes:
    """The pickle; its first tensor without a view now lies in a part of storage 0."""
    view = b"(X" + struct.pack("<I", len(key)) + key + bytes([0x4B, first, 0x4B, numel]) + b"t"
    return data.replace(b"K\x06N", b"K\x06" + view, 1)


def test_reads_a_view_of_a_legacy_storage(tmp_path):
    data = described({"w": Described(Stored(), 1, (2,), (1,))}, legacy=True)
    path = write_legacy(tmp_path / "x.pth", with_view(data, b"v", 2, 4), ["0"])
    assert read_checkpoint(path).state_dict["w"].tolist() == [3, 4]
    write_legacy(path, with_view(data, b"v", 3, 4), ["0"])
    assert refusal_of(path).startswith(DAMAGED.format("storage v is no part of another one"))


@pytest.mark.parametrize("padding", range(4))
@pytest.mark.parametrize("root_first", [True, False], ids=["root-first", "view-first"])
def test_a_view_beside_its_storage_wherever_that_lies(tmp_path, padding, root_first):
    """The storage moves to an aligned place, and the view with it."""
    part = Described(Stored(), 1, (2,), (1,))
    whole = Described(Stored(numel=6), 0, (6,), (1,))
    part.arguments[0].identity = (*part.arguments[0].identity, ("v", 2, 4))
    whole.arguments[0].identity = (*whole.arguments[0].identity, None)
    weights = {"whole": whole, "part": part} if root_first else {"part": part, "whole": whole}
    data = described({"state_dict": weights, "meta": {"note": "x" * padding}})
    path = write_legacy(tmp_path / "x.pth", data, ["0"])
    read = read_checkpoint(path).state_dict
    assert read["whole"].tolist() == [0, 1, 2, 3, 4, 5]
    assert read["part"].tolist() == [3, 4]


def test_a_view_of_a_view_is_refused(tmp_path):
    first = Described(Stored(), 0, (2,), (1,))
    second = Described(Stored("v", 4), 0, (2,), (1,))
    first.arguments[0].identity = (*first.arguments[0].identity, ("v", 2, 4))
    second.arguments[0].identity = (*second.arguments[0].identity, ("w", 0, 2))
    path = write_legacy(tmp_path / "x.pth", described({"a": first, "b": second}), ["0"])
    assert refusal_of(path).startswith(DAMAGED.format("storage v is described in two ways"))


def test_a_tensor_of_a_view_that_begins_inside_an_element():
    root = Storage("0", torch.uint8, 12)
    view = Storage("v", torch.uint8, 8, root, 2)
    with pytest.raises(DamagedError, match=r"^a tensor of storage v begins inside an element$"):
        stored_tensor(view, torch.float32, 0, (2,), (1,))
    found = stored_tensor(view, torch.float16, 1, (2,), (1,))
    assert found == StoredTensor(root, torch.float16, 2, (2,), (1,))


@pytest.mark.parametrize("key", ["\x1b[2J", "a\tb"], ids=["escape", "tab"])
def test_names_of_storages_are_escaped(tmp_path, key):
    data = described({"w": Described(Stored(key), 1, (2, 3), (3, 1))})
    shown = key.encode("unicode_escape").decode()
    reason = f"a tensor of storage {shown} reaches beyond it"
    assert refusal_of(write_zip(tmp_path / "x.pth", data)).startswith(DAMAGED.format(reason))
