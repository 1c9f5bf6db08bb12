"""Small networks, with batch norms that are no identity, and their outputs."""

import torch
from torch import nn

from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.protocol import Protocol

# With Winograd's convolutions in the last stages and the head, and without any.
SMALL = Architecture((2, 1, 2, 1), 32, ema_channels=128, num_bases=8, head_channels=128)
TINY = Architecture((1, 1, 1, 1), 8, ema_channels=16, num_bases=4, head_channels=8)


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
