"""Small networks, with batch norms that are no identity, and their outputs."""

from dataclasses import replace

import torch
from torch import nn

from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.protocol import Protocol

# With Winograd's convolutions in the last stages and the head, and without any.
SMALL = Architecture((2, 1, 2, 1), 32, ema_channels=128, num_bases=8, head_channels=128)
TINY = Architecture((1, 1, 1, 1), 8, ema_channels=16, num_bases=4, head_channels=8)

# The features of other projects' EMANets, and mixtures of them.
OFFICIAL = {"stem_channels": (16, 16, 24), "multi_grid": (1, 2, 4), "norm_shift": 1e-2}
PADDLE = {
    "contract_dilation": False,
    "avg_down": True,
    "out_relu": True,
    "mean": (127.5, 127.5, 127.5),
    "std": (127.5, 127.5, 127.5),
}
OS16 = {"strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)}
VARIANTS = {
    "stride 16": replace(SMALL, **OS16),
    "official": replace(SMALL, blocks=(1, 1, 1, 3), concat_input=False, **OFFICIAL),
    "paddleseg": replace(SMALL, **PADDLE),
    "tiny mixture": replace(TINY, concat_input=False, **OS16, **OFFICIAL, **PADDLE),
    "stride 32": replace(TINY, avg_down=True, strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1)),
}


def small_model(architecture=SMALL):
    """Batch norms have statistics of their own."""
    torch.manual_seed(0)
    model = EMANet(architecture, Protocol((64, 48)), num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.75, 1.5)
            nn.init.uniform_(module.weight, 0.75, 1.25)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def logits(network, images):
    with torch.no_grad():
        return network(images)
