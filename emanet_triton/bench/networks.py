"""The networks that suites run: R50 and R101 with generated weights, for images of any size."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from emanet_triton.inference.views import Size
from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.entries import DEMO, Published
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.zoo import ZOO

MODES = ("whole", "slide")  # of inference


# The models of the zoo that the suites run, by network and mode.
MODELS = {
    ("r50", "whole"): "emanet_r50-d8_512x1024_80k_cityscapes",
    ("r101", "whole"): "emanet_r101-d8_512x1024_80k_cityscapes",
    ("r50", "slide"): "emanet_r50-d8_769x769_80k_cityscapes",
    ("r101", "slide"): "emanet_r101-d8_769x769_80k_cityscapes",
}
ARCHITECTURES = {network: ZOO[name].architecture for (network, _), name in MODELS.items()}
NETWORKS = tuple(ARCHITECTURES)  # "r50", "r101"


def published_figures() -> Iterator[tuple[str, str, Published]]:
    """Network, mode of inference and published figures of each model."""
    for (network, mode), name in MODELS.items():
        published = ZOO[name].published
        if published:
            yield network, mode, published


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
