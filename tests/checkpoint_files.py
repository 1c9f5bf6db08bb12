"""Makers of small checkpoint files, as mmseg and other projects write them."""

import json
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from emanet_triton.errors import InputError
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.protocol import Protocol

FORMATS = ("zip", "legacy", "safetensors")
OTHER_FOLDER = Path(__file__).parent / "golden" / "other"
# Other projects' names of blocks, with the numbers of stage and block, and of classifiers.
BLOCKS = (
    (r"backbone_net\.layer(\d)\.(\d+)\.", 1),  # the number of the first stage
    (r"extractor\.([4-7])\.(\d+)\.", 4),
    (r"backbone\.bb_(\d)_(\d+)\.", 0),
)
CLASSIFIERS = ("decoder.4.", "auxiliary_decoder.4.", "fc2.", "head.cls.1.", "head.aux.2.")


def tiny_emanet(blocks: tuple[int, int, int, int] = (1, 1, 1, 1), num_classes: int = 19) -> EMANet:
    architecture = Architecture(
        blocks, base_channels=8, ema_channels=16, num_bases=4, head_channels=8
    )
    return EMANet(architecture, Protocol(base_scale=(64, 32)), num_classes)


def weights() -> OrderedDict[str, Tensor]:
    """A state dict of three entries, for tests that do not depend on the network."""
    generator = torch.Generator().manual_seed(0)
    return OrderedDict(
        {
            "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
            "bn.running_var": torch.rand(4, generator=generator),
            "bn.num_batches_tracked": torch.tensor(80000),
        }
    )


def published(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The content of mmsegmentation's published files."""
    meta = {
        "env_info": "Python: 3.7.7",
        "mmseg_version": "0.6.0+a90ea42",
        "config": "norm_cfg = dict(type='SyncBN', requires_grad=True)\n",
        "CLASSES": ("road", "sidewalk"),
        "PALETTE": [[128, 64, 128], [244, 35, 232]],
    }
    return {"meta": meta, "state_dict": state_dict}


def trained_0x(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint of a training with mmseg 0.x (mmcv's runner)."""
    content = published(state_dict)
    content["meta"] |= {
        "iter": 80000,
        "epoch": 54,
        "seed": 0,
        "hook_msgs": {"best_score": np.float64(0.7759), "last_ckpt": "iter_80000.pth"},
    }
    return content | {"optimizer": _optimizer_state()}


def trained_1x(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint of mmseg 1.x (mmengine's runner); save it under ``mmengine``."""
    history = sys.modules["mmengine.logging.history_buffer"].HistoryBuffer
    return {
        "meta": {
            "iter": 80000,
            "epoch": 0,
            "mmengine_version": "0.10.7",
            "dataset_meta": {"classes": ("road",), "palette": np.array([[128, 64, 128]])},
        },
        "state_dict": state_dict,
        "message_hub": {
            "log_scalars": OrderedDict({"train/loss": history([1.5, 0.5])}),
            "runtime_info": OrderedDict(
                {
                    "iter": 79999,
                    "best_mIoU": np.float64(77.59),
                    "last": np.array(["iter_80000.pth", None], dtype=object),
                }
            ),
            "resumed_keys": {"train/loss": True},
        },
        "optimizer": _optimizer_state(),
        "param_schedulers": [{"power": 0.9, "eta_min": np.float32(1e-4), "_last_lr": [0.01]}],
    }


def _optimizer_state() -> dict[str, Any]:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.01, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    return optimizer.state_dict()


class HistoryBuffer:
    """An imitation of mmengine's class: its pickles name ``getattr`` and its own methods."""

    def __init__(self, log_history: list[float]) -> None:
        self._log_history = np.array(log_history)
        self._count_history = np.ones(len(log_history))

    def mean(self) -> float:
        return self._log_history.mean()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"statistics_methods": {"mean": HistoryBuffer.mean}}


HistoryBuffer.__module__ = "mmengine.logging.history_buffer"
HistoryBuffer.mean.__module__ = "mmengine.logging.history_buffer"


def imitate_mmengine(patch: pytest.MonkeyPatch) -> None:
    """Make ``mmengine.logging.history_buffer`` importable until ``patch`` is undone."""
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        module = ModuleType(name)
        module.HistoryBuffer = HistoryBuffer
        patch.setitem(sys.modules, name, module)


def save(content: Any, path: Path, kind: str = "zip") -> Path:
    """Write ``content`` in one of ``FORMATS``."""
    if kind == "safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    return path


def rewrite_zip(
    path: Path, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> None:
    """Change the pickle of a zip checkpoint, with correct CRCs."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("/data.pkl") else data)


def named(path: str) -> bytes:
    """The opcode of protocol 2 that names a class or function."""
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    """Opcodes of protocol 2 that call a function; function and arguments are opcodes, too."""
    return function + b"(" + b"".join(arguments) + b"tR"


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def refusal_of(path: Path, *args: str) -> str:
    """The message of ``read_checkpoint`` about a file, in one line, without the file's name."""
    with pytest.raises(InputError) as error:
        read_checkpoint(path, *args)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def assert_weights(state_dict: dict[str, Tensor]) -> None:
    """Assert that the tensors are exactly the tensors of ``weights``."""
    expected = weights()
    assert set(state_dict) == set(expected)
    for key, value in state_dict.items():
        assert torch.equal(value, expected[key]), key
        assert value.dtype == expected[key].dtype, key


Listed = list[tuple[str, list[int], str]]  # name, shape and dtype of every entry, in its order


def listed_in_others(name: str) -> Listed:
    """The state dict of a published file of another project, as ``golden/other`` lists it."""
    entries = json.loads((OTHER_FOLDER / f"{name}.json").read_text())
    return [(key, shape, dtype) for key, shape, dtype in entries]


def with_blocks(listed: Listed, blocks: tuple[int, ...]) -> Listed:
    """A shallower network of another project: without the last blocks of each stage."""

    def keeps(key: str) -> bool:
        found = [(match, first) for name, first in BLOCKS if (match := re.match(name, key))]
        return all(int(match[2]) < blocks[int(match[1]) - first] for match, first in found)

    return [entry for entry in listed if keeps(entry[0])]


def with_classes(listed: Listed, num_classes: int) -> Listed:
    """The same network for another number of classes."""
    return [
        (key, [num_classes, *shape[1:]] if key.startswith(CLASSIFIERS) else shape, dtype)
        for key, shape, dtype in listed
    ]


def small(listed: Listed, num_classes: int = 5) -> Listed:
    """One block in each stage, an eighth of the channels and of the bases, and few classes."""
    few = with_classes(with_blocks(listed, (1, 1, 1, 1)), num_classes)
    return [
        (key, [size // 8 if size >= 32 else size for size in shape], dtype)
        for key, shape, dtype in few
    ]


def filled(listed: Listed) -> dict[str, Tensor]:
    """Random weights; variances are positive."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for key, shape, dtype in listed:
        if dtype == "int64":
            state[key] = torch.tensor(80000)
        elif key.endswith(("running_var", "_variance")):
            state[key] = torch.rand(shape, generator=generator) + 0.5
        else:
            state[key] = torch.randn(shape, generator=generator)
    return state


def file_of_another(layout: str, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The content of a file of a project: as its training saves it, or else as it is published."""
    if layout == "sssegmentation":
        content = {"cur_epoch": 3, "cur_iter": 9, "optimizer": _optimizer_state()}
        return content | {"model": state_dict}
    if layout == "official":
        prefixed = {f"module.{key}": value for key, value in state_dict.items()}
        return {"net": prefixed, "step": 30000}
    return {**state_dict, "StructuredToParameterName@@": {key: f"p_{key}" for key in state_dict}}


# A small network of each project.
SMALL_OTHERS = {
    "sssegmentation": small(listed_in_others("sssegmentation_r50os8")),
    "official": small(listed_in_others("official_r101")),
    "paddleseg": small(listed_in_others("paddleseg_r50")),
}
