"""Files of paddle.save: pickles of NumPy arrays, read without running code."""

import os
import pickle
import pickletools
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import (
    OTHER_FOLDER,
    SMALL_OTHERS,
    call,
    filled,
    named,
    refusal_of,
)
from golden_data import make_tensor

from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.checkpoint_files import pdparams_file
from emanet_triton.models.checkpoint_files.layouts import translated
from emanet_triton.models.checkpoint_files.pdparams_file import read_pdparams_file
from emanet_triton.models.checkpoint_files.stored import make
from emanet_triton.models.checkpoint_files.weights_in import find_weights

PROTOCOLS = (2, 3, 4, 5)
RANDOM = np.random.RandomState(0)
ARRAYS = {
    "conv.weight": RANDOM.standard_normal((4, 3, 3, 3)).astype(np.float32),
    "conv.bias": RANDOM.standard_normal(19).astype(np.float32),
    "double": RANDOM.standard_normal(3),
    "half": RANDOM.standard_normal((2, 5)).astype(np.float16),
    "scalar": np.array(80000),
    "empty": np.zeros((0, 3), np.float32),
    "flags": np.array([True]),
    "bytes": np.arange(256, dtype=np.uint8).reshape(16, 16),
    "fortran": np.asfortranarray(RANDOM.standard_normal((3, 4))),
    "strided": np.arange(12, dtype=np.int32)[::2],
    "large": RANDOM.standard_normal((300, 300)).astype(np.float32),
}


class Tensor:
    """An imitation of Paddle's class, which paddle.save reduces so inside of nested dicts."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __reduce__(self):
        return tuple, (("conv2d_0.w_0", self.array),)


def pickled(content: object, protocol: int, core: str = "numpy._core") -> bytes:
    """A pickle that names the modules of NumPy as NumPy 1 or NumPy 2 does."""
    data = pickle.dumps(content, protocol)

    def renamed(found: re.Match[bytes]) -> bytes:
        path = core.encode() + found[2]
        return bytes([len(path)]) + path if found[1] else path

    short_text = rb"(?:(?<=\x8c)(.))?numpy\._?core(\.multiarray|\.numeric)"
    return re.sub(short_text, renamed, data, flags=re.DOTALL)


def saved(folder: Path, content: object, protocol: int = 4) -> Path:
    path = folder / "x.pdparams"
    path.write_bytes(pickled(content, protocol))
    return path


def assert_equal(state_dict: dict[str, torch.Tensor], arrays: dict[str, np.ndarray]) -> None:
    assert list(state_dict) == list(arrays)
    for key, array in arrays.items():
        assert torch.equal(state_dict[key], torch.from_numpy(array.copy())), key
        assert state_dict[key].dtype == torch.from_numpy(array.copy()).dtype, key


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reads_arrays(tmp_path, protocol, core):
    path = tmp_path / "x.pdparams"
    path.write_bytes(pickled(ARRAYS, protocol, core))
    assert core.encode() in path.read_bytes()
    assert_equal(read_checkpoint(path).state_dict, ARRAYS)


@pytest.mark.parametrize("protocol", [2, 4])
def test_reads_files_of_paddle_save(protocol):
    """PaddlePaddle 3.3.1 wrote a convolution and a batch norm, filled by ``make_tensor``."""
    state_dict = read_checkpoint(OTHER_FOLDER / f"paddle_protocol{protocol}.pdparams").state_dict
    assert {key: tuple(value.shape) for key, value in state_dict.items()} == {
        "conv.weight": (4, 3, 3, 3),
        "conv.bias": (4,),
        **{f"bn.{name}": (4,) for name in ("weight", "bias", "_mean", "_variance")},
    }
    for key, value in state_dict.items():
        kind = key.replace("_mean", "running_mean").replace("_variance", "running_var")
        assert torch.equal(value, make_tensor(kind, list(value.shape), seed=0)), key


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reads_a_network_of_paddleseg(tmp_path, protocol):
    weights = filled(SMALL_OTHERS["paddleseg"])
    content = {key: value.numpy() for key, value in weights.items()}
    content["StructuredToParameterName@@"] = dict.fromkeys(weights, "conv2d_0.w_0")
    checkpoint = read_checkpoint(saved(tmp_path, content, protocol))
    want, layout = translated(weights)
    assert checkpoint.layout == layout == "paddleseg"
    assert list(checkpoint.state_dict) == list(want)
    assert all(torch.equal(checkpoint.state_dict[key], value) for key, value in want.items())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reads_bfloat16(tmp_path, protocol):
    """NumPy lacks bfloat16: Paddle writes it as uint16."""
    path = saved(tmp_path, {"w": np.array([0x3F80, 0xC020], np.uint16)}, protocol)
    (value,) = read_checkpoint(path).state_dict.values()
    assert value.dtype == torch.bfloat16
    assert value.tolist() == [1.0, -2.5]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reads_nested_tensors(tmp_path, protocol):
    content = {"model": {key: Tensor(array) for key, array in ARRAYS.items()}, "epoch": 3}
    assert_equal(read_checkpoint(saved(tmp_path, content, protocol)).state_dict, ARRAYS)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reads_what_two_names_share(tmp_path, protocol):
    """Paddle's names are left out. A pickle holds a shared array once, and a shared text once."""
    table, one = ARRAYS["conv.bias"], np.array([98], np.uint8)  # the text "b", which NumPy uses
    arrays = {"a": table, "b": one, "c": table, "d": one.copy()}
    content = arrays | {"StructuredToParameterName@@": dict.fromkeys(arrays, "conv2d_0.w_0")}
    assert_equal(read_checkpoint(saved(tmp_path, content, protocol)).state_dict, arrays)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 300])
def test_decodes_texts_in_chunks(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(pdparams_file, "_CHUNK", chunk)
    arrays = {"w": RANDOM.permutation(np.arange(1024) % 256).astype(np.uint8)}
    assert_equal(read_checkpoint(saved(tmp_path, arrays, 2)).state_dict, arrays)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_large_tensors_lie_in_the_memory_of_the_file(protocol):
    arrays = {f"w{i}": np.full(70_000, i, np.uint8) for i in range(3)}
    data = np.frombuffer(bytearray(pickled(arrays, protocol)), np.uint8)
    content = read_pdparams_file(data.data)
    weights = make(data.data, content, find_weights(content.value)[0])
    assert_equal(weights, arrays)
    begin = data.ctypes.data
    assert all(begin <= value.data_ptr() < begin + data.nbytes for value in weights.values())


@pytest.mark.parametrize("shift", range(8))
def test_elements_are_aligned(tmp_path, shift):
    arrays = {"x" * (shift + 1): np.arange(3.0), "a": np.arange(99, dtype=np.float32)}
    state_dict = read_checkpoint(saved(tmp_path, arrays)).state_dict
    assert_equal(state_dict, arrays)
    assert all(value.data_ptr() % value.element_size() == 0 for value in state_dict.values())


W = {"w": np.ones(2, np.float32)}
SOMETHING_ELSE = (
    "expected a state dict of tensors, but 1 of 2 entries are something else, first 'x'"
)
OPTIMIZER = "holds the state of an optimizer, as .pdopt files do; expected the weights"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"w": np.ones(2, ">f4")}, "is of a big-endian machine: "),
        (W | {"x": np.array([None])}, SOMETHING_ELSE),
        (W | {"x": np.array(["a"])}, SOMETHING_ELSE),
        (W | {"x": np.zeros(2, [("a", "f4")])}, SOMETHING_ELSE),
        (W | {"x": np.float32(1)}, SOMETHING_ELSE),
        (W | {"x": Path("a")}, SOMETHING_ELSE),
        (W | {"x": ("a", "b")}, SOMETHING_ELSE),
        ([W], "holds no weights; "),
        ({"a": 1, "b": [1, "a" * 999, b"c"]}, "is a pickle, but not one of torch.save or paddle"),
        (W | {"UnpackBigParamInfor@@": {}}, "holds a parameter of more than 1 GiB in parts; "),
        ({"conv2d_0.w_0_velocity_0": W["w"]}, OPTIMIZER),
        ({"batch_norm2d_1.b_0_beta1_pow_acc_0": W["w"]}, OPTIMIZER),
        (W | {"LR_Scheduler": {"last_lr": 0.1}}, OPTIMIZER),
    ],
)
def test_refuses(tmp_path, content, expected, protocol):
    assert refusal_of(saved(tmp_path, content, protocol)).startswith(expected)


def changed(path: Path, change: tuple[bytes, bytes]) -> str:
    data = path.read_bytes()
    assert data.count(change[0]) == 1
    path.write_bytes(data.replace(*change))
    return refusal_of(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ((b"K\x02\x85", b"K\x03\x85"), "reaches beyond it"),
        ((b"K\x02\x85", b"K\x01\x85"), "has another size than it claims"),
        ((b"K\x02\x85", b"J\xff\xff\xff\xff\x85"), "has impossible sizes"),
        ((b"K\x02\x85", b"\x8a\x10" + b"\xff" * 15 + b"\x7f\x85"), "has impossible sizes"),
        ((b"K\x02\x85", b"N\x85"), "is damaged at byte"),
        ((b"K\x02\x85", b"K\x02"), "is damaged at byte"),
        ((b"u.", b"u.."), "1 bytes follow its pickle"),
        ((b"\x00\x00\xc2\x80?" * 2, b"\x00\x00\xc2\xc2?" * 2), "is damaged at byte"),  # no UTF-8
        ((b"\x00\x00\xc2\x80?" * 2, b"\x00\x00\xc4\x80?" * 2), "is damaged at byte"),  # no Latin-1
        ((b"latin1", b"utf-16"), "is damaged at byte"),
    ],
)
def test_refuses_damage(tmp_path, change, expected):
    message = changed(saved(tmp_path, W | {"x": np.ones((1, 1), np.int8)}, 2), change)
    assert expected in message
    assert message.startswith("cannot be read (")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_refuses_truncated_pickles(tmp_path, protocol):
    path = saved(tmp_path, {"w": ARRAYS["conv.bias"], "v": ARRAYS["fortran"]}, protocol)
    whole = path.read_bytes()
    for length in range(1, len(whole), 7):
        path.write_bytes(whole[:length])
        refusal_of(path)


class Bomb:
    def __init__(self, function: object, argument: str) -> None:
        self.reduced = function, (argument,)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("function", [os.system, eval], ids=["system", "eval"])
def test_never_runs_code(tmp_path, protocol, function):
    """``eval`` is also how paddle.save writes a tensor of a static graph."""
    marker = tmp_path / "marker"
    command = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w')"
    path = saved(tmp_path, W | {"x": Bomb(function, command)}, protocol)
    assert refusal_of(path).startswith("asks to run ")
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 5])
def test_hostile_pickles_cost_nothing(tmp_path, protocol):
    """One array of 25 dimensions, made half a million times."""
    path = saved(tmp_path, {"w": np.ones([1] * 25, np.float32)}, protocol)
    data = pickletools.optimize(path.read_bytes())
    made = b"b" if protocol == 2 else b"R"  # from a state, or by a function
    assert data.count(made + b"s.") == 1
    # Note the state (or arguments) and the array (or function), then use them again and again.
    again = b"q\xfe0q\xff0" + b"h\xffh\xfe" + (made + b"0h\xffh\xfe") * 500_000
    path.write_bytes(data.replace(made + b"s.", again + made + b"s."))
    start = time.process_time()
    assert "takes more than 2000000 steps" in refusal_of(path)
    assert time.process_time() - start < 5


def test_calls_nothing_of_numpy_beyond_its_arrays(tmp_path):
    path = saved(tmp_path, W | {"x": None}, 2)
    data = path.read_bytes()
    assert data.count(b"Nu.") == 1
    argument = b"X" + (1).to_bytes(4, "little") + b"a"
    path.write_bytes(data.replace(b"Nu.", call(named("numpy.load"), argument) + b"u."))
    assert refusal_of(path).startswith(SOMETHING_ELSE)
