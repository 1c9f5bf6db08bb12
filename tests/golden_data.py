"""The vectors that mmsegmentation 0.30.0 computed, and the rule that made its weights."""

import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.protocol import Protocol

FOLDER = Path(__file__).parent / "golden"
NETWORKS = json.loads((FOLDER / "networks.json").read_text())
NAMES = tuple(NETWORKS)


@cache
def vectors(stem: str) -> dict[str, np.ndarray]:
    """All arrays of ``golden/<stem>.npz``."""
    with np.load(FOLDER / f"{stem}.npz") as file:
        return dict(file)


def listed_keys(name: str) -> list[tuple[str, list[int], str]]:
    """(key, shape, dtype) of every entry of a published state dict, in its order."""
    depth = "r101" if "r101" in name else "r50"
    return json.loads((FOLDER / f"state_dict_{depth}.json").read_text())


def make_tensor(key: str, shape: list[int], seed: int) -> Tensor:
    """One entry of a golden state dict, drawn by the rule under which mmseg was run."""
    rs = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    if key.endswith("num_batches_tracked"):
        return torch.tensor(80000)
    if key.endswith("running_mean"):
        value = 0.1 * rs.standard_normal(shape)
    elif key.endswith("running_var"):
        value = rs.uniform(0.75, 1.5, shape)
    elif key.endswith("ema_module.bases"):
        value = rs.standard_normal(shape)
        value /= np.linalg.norm(value, axis=1, keepdims=True)
    elif len(shape) == 4:
        value = rs.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif key.endswith("weight"):
        gain = 0.25 if ".bn3." in key else 16 if "ema_out_conv" in key else 1
        value = rs.uniform(0.75, 1.25, shape) * gain
    else:
        value = 0.1 * rs.standard_normal(shape)
    return torch.from_numpy(np.asarray(value, np.float32))


def golden_state_dict(name: str) -> dict[str, Tensor]:
    """The weights with which mmseg computed ``golden/<name>.npz``."""
    network = NETWORKS[name]
    state = {key: make_tensor(key, shape, network["seed"]) for key, shape, _ in listed_keys(name)}
    state["decode_head.conv_seg.weight"] *= network["conv_seg"]["scale"]
    state["decode_head.conv_seg.bias"] = torch.tensor(network["conv_seg"]["bias"])
    return state


def normalised(image: np.ndarray) -> Tensor:
    """uint8 RGB [H, W, 3] → float32 [1, 3, H, W]."""
    mean, std = torch.tensor(EMANet.mean), torch.tensor(EMANet.std)
    return ((torch.from_numpy(image).float() - mean) / std).permute(2, 0, 1)[None]


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of the wanted values."""
    got, want = got.double(), torch.as_tensor(want).double()
    return float((got - want).norm() / want.norm())


@cache
def golden_model(name: str) -> EMANet:
    """The network with golden weights, under the small protocol that mmseg was run with."""
    network = NETWORKS[name]
    protocol = Protocol(
        base_scale=tuple(network["base_scale_wh"]),
        mode="slide" if network["crop"] else "whole",
        crop=network["crop"] and tuple(network["crop"]),
        stride=network["stride"] and tuple(network["stride"]),
        align_corners=network["align_corners"],
    )
    blocks = (3, 4, 23, 3) if "r101" in name else (3, 4, 6, 3)
    model = EMANet(Architecture(blocks), protocol)
    model.load_state_dict(golden_state_dict(name), strict=True)
    return model.eval()
