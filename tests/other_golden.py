"""The vectors that other projects' EMANets computed, and the networks that must repeat them.

``golden/other/NAME.json`` lists (key, shape, dtype) of every entry of the project's state dict.
``NAME.npz`` has a normalised input ``x`` [1, 3, 65, 97] and the project's ``logits`` before they
are resized. Its own network computed them, with the weights of ``golden_data.make_tensor``;
PaddleSeg's is the one of paddleseg 2.8.0 in PaddlePaddle 3.3.1, on a CPU.
"""

import json
from dataclasses import replace

import torch
from golden_data import FOLDER, make_tensor, vectors
from torch import Tensor

from emanet_triton.models.alteration import on_meta
from emanet_triton.models.checkpoint_files.layouts import translated
from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.entries import ZOO
from emanet_triton.models.network import Network
from emanet_triton.models.protocol import Protocol

R50 = (3, 4, 6, 3)
ARCHITECTURES = {
    "sssegmentation_r50os8": ZOO["emanet_resnet50os8_ade20k"].architecture,
    "sssegmentation_r50os16": ZOO["emanet_resnet50os16_voc"].architecture,
    "sssegmentation_r101os8": ZOO["emanet_resnet101os8_cityscapes"].architecture,
    "official_r101": ZOO["emanet_r101_voc_official"].architecture,
    "paddleseg_r50": ZOO["emanet_resnet50_os8_cityscapes_1024x512_80k"].architecture,
    "paddleseg_r101": ZOO["emanet_resnet101_os8_voc12aug_512x512_40k"].architecture,
}
# Parts of PaddleSeg's names, and the names by which ``make_tensor`` knows the kind of a weight.
PADDLE_KINDS = {
    "conv2._batch_norm.": "bn3.",
    "_batch_norm.": "bn.",
    "._mean": ".running_mean",
    "._variance": ".running_var",
    "emau.mu": "ema_module.bases",
}


def small_architecture(full: Architecture) -> Architecture:
    """One block in each stage, and an eighth of the channels and of the bases."""
    stem = full.stem_channels and tuple(channels // 8 for channels in full.stem_channels)
    return replace(
        full,
        blocks=(1, 1, 1, 1),
        base_channels=8,
        ema_channels=64,
        num_bases=8,
        head_channels=full.head_channels // 8,
        stem_channels=stem,
    )


def other_state_dict(name: str) -> dict[str, Tensor]:
    """The weights behind ``golden/other/<name>.npz``, by the names of their project."""
    listed = json.loads((FOLDER / "other" / f"{name}.json").read_text())
    return weights_of(ARCHITECTURES[name].layout, listed)


def weights_of(layout: str, listed: list) -> dict[str, Tensor]:
    """Weights for a list of (key, shape, dtype), by the rule of ``golden_data``."""
    return {key: make_tensor(_kind(layout, key), shape, seed=0) for key, shape, _ in listed}


def _kind(layout: str, key: str) -> str:
    for theirs, ours in PADDLE_KINDS.items() if layout == "paddleseg" else ():
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
