"""PyTorch checkpoints of all forms, whole and damaged: containers, streams, opcodes, descriptors.

A whole file must give exactly its weights. If a damaged file is read, its weights must be bytes of
the file. If ``torch.load(weights_only=True)`` reads the file, too, both must give the same weights.
"""

import io
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from emanet_triton.errors import InputError, one_line
from emanet_triton.models.checkpoint import read_checkpoint

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PREFIXES = ("", "", "module.", "_orig_mod.", "module._orig_mod.", "model.net.", "segmentor.")
CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "weights", "module", None)
NUMBERS = (0, 1, 2, 3, 7, 8, 64, 255, 65535, 2**31 - 1, -1, -8, -(2**31))
Weights = dict[str, Tensor]
Pickle = list[bytes]  # one opcode with its argument each


def attempt(seed: int, folder: Path) -> str:
    rng = Random(seed)
    weights = _weights(rng)
    whole = rng.random() < 0.2
    content = _dressed(rng, weights) if whole else {"state_dict": weights, "meta": {"iter": 3}}
    path = _saved(rng, content, folder / "file.pth")
    hostile = False if whole else _damaged(rng, path)
    read = read_unless_refused(path, whole)
    if read is None:
        return "refused"
    if whole:
        read.pop("criterion.weight", None)  # which is left out where the network is known
        assert read.keys() == weights.keys()
        assert all(_same(read[key], value) for key, value in weights.items())
        return "right"
    check_bytes(read, path.read_bytes())
    if not hostile:
        _check_against_torch(read, path)
    return "right"


def read_unless_refused(path: Path, whole: bool) -> Weights | None:
    """The weights of a file, or ``None`` if it is refused in one line, as no whole file may be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read_checkpoint(path).state_dict
    except InputError as error:
        assert not whole, f"refused: {error}"
        assert one_line(str(error)) == str(error)
        return None


def check_bytes(read: Weights, data: bytes) -> None:
    """All weights are finite, consist of bytes of the file, and are not larger than the file."""
    assert sum(value.nbytes for value in read.values()) <= len(data)
    for key, value in read.items():
        if value.is_floating_point():
            assert value.float().isfinite().all(), key
        flat = value.contiguous().as_strided((value.numel(),), (1,)).view(torch.uint8)
        elements = flat.view(-1, value.element_size()).numpy()
        assert all(element.tobytes() in data for element in elements), key


def _check_against_torch(read: Weights, path: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # torch reads fewer files, and says so in many ways
        return
    theirs = theirs.get("state_dict", theirs)
    for key, value in read.items():
        if key in theirs:
            assert _same(value, theirs[key].detach()), key


def _same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def _weights(rng: Random) -> Weights:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    weights = OrderedDict()
    for i in range(rng.randint(1, 5)):
        shape = [rng.randint(1, 5) for _ in range(rng.randint(0, 4))]
        value = torch.randn(shape, generator=generator).to(rng.choice(DTYPES))
        if value.dim() >= 2 and rng.random() < 0.3:
            value = value.transpose(0, 1)
        if rng.random() < 0.2:
            value = torch.nn.Parameter(value)
        weights[f"backbone.layer{i}.weight"] = value
    if rng.random() < 0.5:
        weights["backbone.bn.num_batches_tracked"] = torch.tensor(rng.randrange(10**5))
    if rng.random() < 0.3:  # two views of one storage
        table = torch.randn(4, 6, generator=generator)
        weights["decode_head.a"], weights["decode_head.b"] = table[:2], table[1:, ::2]
    return weights


def _dressed(rng: Random, weights: Weights) -> Any:
    """Weights as people have them: behind wrappers, with copies and counts, in containers."""
    prefix = rng.choice(PREFIXES)
    dressed = OrderedDict((prefix + key, value) for key, value in weights.items())
    if rng.random() < 0.3:
        names = {f"{prefix}ema_{k.replace('.', '_')}": v.clone() for k, v in weights.items()}
        dressed.update(names)
    if rng.random() < 0.3:
        dressed["n_averaged"] = torch.tensor(7)
    if rng.random() < 0.3:
        dressed["criterion.weight"] = torch.ones(19)
    if rng.random() < 0.3:
        dressed[f"{prefix}backbone.x.num_batches_tracked"] = torch.full((1,), torch.inf)
    container = rng.choice(CONTAINERS)
    if container is None:
        return dressed
    beside = {"epoch": 3, "path": Path("x"), "lr": [0.1, 2**70], "data": b"x" * 300, 5: {1, 2}}
    return beside | {container: dressed}


def _saved(rng: Random, content: Any, path: Path) -> Path:
    is_zip, protocol = rng.random() < 0.5, rng.choice((2, 2, 3, 4, 5))
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    return path


def _damaged(rng: Random, path: Path) -> bool:
    """Damage a file; returns whether torch might need too much memory to read it."""
    data = path.read_bytes()
    if rng.random() < 0.1:
        path.write_bytes(scratched(rng, data))
        return False
    change, hostile = (mutated, False) if rng.random() < 0.7 else (with_attack, True)
    if data.startswith(b"PK"):
        entries = _entries(data)
        if hostile or rng.random() < 0.6:
            entries = [(n, change(rng, d) if n.endswith("data.pkl") else d) for n, d in entries]
        else:
            entries = _recordsmutated(rng, entries)
        path.write_bytes(_zipped(rng, entries))
        return hostile
    ends = _pickle_ends(data)
    parts = [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    tail = data[ends[-1] :]
    chosen = 3 if hostile or rng.random() < 0.6 else rng.randrange(6)
    if chosen < 5:
        parts[chosen] = change(rng, parts[chosen])
    else:
        tail = scratched(rng, tail)
    path.write_bytes(b"".join(parts) + tail)
    return hostile


def _entries(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def _zipped(rng: Random, entries: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as archive:
        warnings.simplefilter("ignore")  # of doubled names
        for name, data in entries:
            packed = zipfile.ZIP_DEFLATED if rng.random() < 0.01 else zipfile.ZIP_STORED
            archive.writestr(name, data, packed)
    return stream.getvalue()


def _recordsmutated(rng: Random, entries: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Drop, double, rename, resize or exchange records."""
    i, j = rng.randrange(len(entries)), rng.randrange(len(entries))
    (name, data), kind = entries[i], rng.randrange(6)
    if kind == 0:
        return entries[:i] + entries[i + 1 :]
    if kind == 1:
        return [*entries, (name, scratched(rng, data))]
    changed = list(entries)
    if kind == 2:
        changed[i] = rng.choice((name + "0", name[1:], "y/" + name, "file/code/a.py")), data
    elif kind == 3:
        changed[i] = name, data[: rng.randrange(len(data) + 1)]
    elif kind == 4:
        changed[i] = name, data + bytes(rng.randrange(1, 20))
    else:
        changed[i], changed[j] = (name, entries[j][1]), (entries[j][0], data)
    return changed


def scratched(rng: Random, data: bytes) -> bytes:
    """Change, cut out or add a few bytes."""
    if not data:
        return b"\0"
    position, size = rng.randrange(len(data)), rng.randrange(1, 9)
    new = rng.randbytes(rng.choice((0, size, size, 2 * size)))
    return data[:position] + new + data[position + size :]


def _pickle_ends(data: bytes) -> list[int]:
    """Where the five pickles of a legacy file end."""
    stream, ends = io.BytesIO(data), []
    for _ in range(5):
        for _ in pickletools.genops(stream):
            pass
        ends.append(stream.tell())
    return ends


def _opcodes(data: bytes) -> Pickle:
    starts = [position for _, _, position in pickletools.genops(data)]
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


def mutated(rng: Random, data: bytes) -> bytes:
    """Drop, double, exchange opcodes, or change their numbers, names and texts."""
    codes = _opcodes(data)
    for _ in range(rng.randint(1, 3)):
        i, j = rng.randrange(len(codes)), rng.randrange(len(codes))
        kind = rng.randrange(8)
        if kind == 0:
            del codes[i]
            codes = codes or [b"."]
        elif kind == 1:
            codes.insert(j, codes[i])
        elif kind == 2:
            codes[i], codes[j] = codes[j], codes[i]
        elif kind == 3:
            codes[i] = scratched(rng, codes[i])
        else:
            numbers = [k for k, code in enumerate(codes) if code[:1] in (b"K", b"M", b"J")]
            if numbers:
                codes[rng.choice(numbers)] = b"J" + struct.pack("<i", rng.choice(NUMBERS))
    return b"".join(codes)


def with_attack(rng: Random, data: bytes) -> bytes:
    """Put opcodes that are expensive for torch before the first item of the outermost dict."""
    codes = _opcodes(data)
    marks = [i for i, code in enumerate(codes) if code == b"("]
    place = (marks or [0])[0] + 1
    return b"".join([*codes[:place], rng.choice(ATTACKS)(rng), *codes[place:]])


def _call(path: str, argument: bytes) -> bytes:
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode() + argument + b"\x85R"


def _nested_key(rng: Random) -> bytes:
    return b")" + b"2\x86".replace(b"2", b"q\x63h\x63") * rng.randint(30, 300) + b"N"


def _named(value: Callable[[Random], bytes]) -> Callable[[Random], bytes]:
    return lambda rng: b"X\x01\x00\x00\x00a" + value(rng)


def _integer(rng: Random) -> bytes:
    return b"J" + struct.pack("<i", rng.choice(NUMBERS))


ATTACKS: tuple[Callable[[Random], bytes], ...] = (
    _nested_key,
    _named(lambda rng: _call("builtins.bytearray", b"\x8a\x08" + struct.pack("<q", 6 * 10**9))),
    _named(lambda rng: _call("torch.Tensor", _integer(rng))),
    _named(lambda rng: _call("torch.FloatStorage", _integer(rng))),
    _named(lambda rng: _call("collections.OrderedDict", b"]")),
    _named(lambda rng: _call("collections.OrderedDict", _integer(rng))),
    _named(lambda rng: _call("os.system", b"X\x01\x00\x00\x00a")),
    _named(lambda rng: b"(" * rng.randint(1, 100_000) + b"t"),
    _named(lambda rng: b"]q\x63" + b"(" + b"h\x63" * rng.randint(1, 100_000) + b"e"),
    _named(lambda rng: b"\x8b" + struct.pack("<i", rng.choice(NUMBERS))),
    _named(lambda rng: b"\x8d" + struct.pack("<Q", rng.choice((1, 2**31, 2**62, 2**64 - 1)))),
    _named(lambda rng: b"]" * rng.randint(1, 200_000)),
    _named(lambda rng: _call("torch._utils._rebuild_tensor_v2", _integer(rng))),
    _named(lambda rng: pickle.dumps({rng.random(): (None, {1.5: b"x"})}, rng.choice((2, 4)))[2:-1]),
    _named(
        lambda rng: b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + _integer(rng) * 3 + b"tQ"
    ),
)
