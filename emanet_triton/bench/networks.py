"""The networks that suites run: R50 and R101 with generated weights, for images of any size."""

import torch
from torch import nn

from emanet_triton.bench.options import Size
from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.zoo import DEMO, ZOO

BLOCKS = {"r50": (3, 4, 6, 3), "r101": (3, 4, 23, 3)}
TINY = {"base_channels": 8, "ema_channels": 16, "num_bases": 5, "head_channels": 16}


def architecture(network: str, tiny: bool = False) -> Architecture:
    """Of "r50", "r101" or the demonstration; tiny has the same layers of few channels."""
    if network == DEMO:
        return ZOO[DEMO].architecture
    return Architecture(BLOCKS[network], **(TINY if tiny else {}))


def make_protocol(mode: str, size: Size, tiny: bool = False) -> Protocol:
    """The published protocol of "whole" or "slide", its base scale that of images (H, W)."""
    height, width = size
    if mode == "whole":
        return Protocol((width, height))
    crop, stride = ((33, 33), (17, 17)) if tiny else ((769, 769), (513, 513))
    return Protocol((width + 1, height + 1), "slide", crop, stride, align_corners=True)


def make_network(network: str, protocol: Protocol, tiny: bool = False) -> EMANet:
    """In evaluation mode, on the CPU, with weights after He, the same at every call.

    Such weights keep the size of the activations. Those of the logits are centred, so that the
    labels are of many classes.
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
