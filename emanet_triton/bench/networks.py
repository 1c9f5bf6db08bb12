"""The networks that suites run: R50 and R101 with generated weights, for images of any size."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from emanet_triton.inference.views import Size
from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.zoo import DEMO, ZOO, Published, ZooEntry

MODES = ("whole", "slide")  # of inference


def _published() -> Iterator[tuple[str, ZooEntry]]:
    """Each published model: the short name of its network, such as "r50", and its entry."""
    for name, entry in ZOO.items():
        if entry.published:
            yield name.removeprefix("emanet_").partition("-")[0], entry


ARCHITECTURES = {network: entry.architecture for network, entry in _published()}
NETWORKS = tuple(ARCHITECTURES)  # "r50", "r101"


def published_figures() -> Iterator[tuple[str, str, Published]]:
    """Network, mode of inference and published figures of each published model."""
    for network, entry in _published():
        if entry.published:
            yield network, entry.protocol.mode, entry.published


def architecture(network: str, tiny: bool = False) -> Architecture:
    """The sizes of "r50", "r101" or the demonstration's network.

    Args:
        network: the name.
        tiny: the same layers with few channels.
    """
    if network == DEMO:
        return ZOO[DEMO].architecture
    sizes = ARCHITECTURES[network]
    if not tiny:
        return sizes
    return replace(sizes, base_channels=8, ema_channels=16, num_bases=5, head_channels=16)


def flipped(size: Size) -> Size:
    """From (height, width) to (width, height), as ``emanet_triton.inference`` has it, and back."""
    return size[::-1]


def make_protocol(mode: str, size: Size, tiny: bool = False) -> Protocol:
    """The published protocol for images of another size.

    Args:
        mode: "whole" or "slide".
        size: (height, width) of the images in pixels, which becomes the base scale.
        tiny: with small windows.
    """
    height, width = size
    if mode == "whole":
        return Protocol((width, height))
    crop, stride = ((33, 33), (17, 17)) if tiny else ((769, 769), (513, 513))
    return Protocol((width + 1, height + 1), "slide", crop, stride, align_corners=True)


def make_network(network: str, protocol: Protocol, tiny: bool = False) -> EMANet:
    """A network in evaluation mode, on the CPU. Its weights are the same at every call.

    The initialisation after He keeps the size of the activations. The weights of the logits are
    centred, so that the labels are of many classes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = EMANet(architecture(network, tiny), protocol).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    logits = model.decode_head.conv_seg.weight.data
    logits -= logits.mean(1, keepdim=True)
    return model
