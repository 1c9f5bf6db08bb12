"""Small networks and random images for tests."""

import numpy as np
import torch

from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.protocol import Protocol

TINY = Architecture((1, 1, 1, 1), 8, ema_channels=16, num_bases=4, head_channels=8)


def tiny_model(**protocol) -> EMANet:
    torch.manual_seed(0)
    model = EMANet(TINY, Protocol(**({"base_scale": (64, 32)} | protocol))).eval()
    model.decode_head.conv_seg.weight.data *= 300  # so that pixels differ clearly
    return model


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
