"""The vectors that other projects' EMANets computed, and the networks that must repeat them.

``golden/other/NAME.json`` lists (key, shape, dtype) of every entry of the project's state dict.
``NAME.npz`` has a normalised input ``x`` [1, 3, 65, 97] and the project's ``logits`` before they
are resized. Its own network computed them, with the weights of ``golden_data.make_tensor``;
PaddleSeg's is the one of paddleseg 2.8.0 in PaddlePaddle 3.3.1, on a CPU.
"""

import json

import torch
from golden_data import FOLDER, make_tensor, vectors
from torch import Tensor

from emanet_triton.models.alteration import on_meta
from emanet_triton.models.checkpoint_files.layouts import translated
from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.network import Network
from emanet_triton.models.protocol import Protocol

R50, R101 = (3, 4, 6, 3), (3, 4, 23, 3)
SSSEG = {"head_channels": 512, "layout": "sssegmentation"}
PADDLE = {
    "contract_dilation": False,
    "avg_down": True,
    "out_relu": True,
    "mean": (127.5, 127.5, 127.5),
    "std": (127.5, 127.5, 127.5),
    "layout": "paddleseg",
}
ARCHITECTURES = {
    "sssegmentation_r50os8": Architecture(R50, **SSSEG),
    "sssegmentation_r50os16": Architecture(
        R50, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), **SSSEG
    ),
    "sssegmentation_r101os8": Architecture(R101, **SSSEG),
    "official_r101": Architecture(
        R101,
        stem_channels=(64, 64, 128),
        multi_grid=(1, 2, 4),
        concat_input=False,
        norm_shift=1e-6,
        layout="official",
    ),
    "paddleseg_r50": Architecture(R50, **PADDLE),
    "paddleseg_r101": Architecture(R101, **PADDLE),
}
# Parts of PaddleSeg's names, and the names by which ``make_tensor`` knows the kind of a weight.
PADDLE_KINDS = {
    "conv2._batch_norm.": "bn3.",
    "_batch_norm.": "bn.",
    "._mean": ".running_mean",
    "._variance": ".running_var",
    "emau.mu": "ema_module.bases",
}


def other_state_dict(name: str) -> dict[str, Tensor]:
    """The weights behind ``golden/other/<name>.npz``, by the names of their project."""
    listed = json.loads((FOLDER / "other" / f"{name}.json").read_text())
    return {key: make_tensor(_kind(name, key), shape, seed=0) for key, shape, _ in listed}


def _kind(name: str, key: str) -> str:
    for theirs, ours in PADDLE_KINDS.items() if name.startswith("paddleseg") else ():
        key = key.replace(theirs, ours)
    return key


def other_model(name: str) -> Network:
    """The network with golden weights. The official EMANet's auxiliary head has none."""
    weights, layout = translated(other_state_dict(name))
    architecture = ARCHITECTURES[name]
    assert layout == architecture.layout
    classes = len(weights["decode_head.conv_seg.bias"])
    model = on_meta(EMANet, architecture, Protocol(None), classes)  # no time for random weights
    fitted = model.load_state_dict(weights, strict=False, assign=True)
    missing = {key.partition(".")[0] for key in fitted.missing_keys}
    assert missing == ({"auxiliary_head"} if layout == "official" else set())
    assert fitted.unexpected_keys == []
    return model.eval()


def other_vectors(name: str) -> tuple[Tensor, Tensor]:
    """The input and the logits."""
    golden = vectors(f"other/{name}")
    return torch.from_numpy(golden["x"]), torch.from_numpy(golden["logits"])
