"""How far 8-bit integers may be from float32: a float32 network with values rounded to 8 bits."""

import torch
from torch import Tensor, nn

from emanet_triton.models.emanet import EMANet
from emanet_triton.models.resnet import Bottleneck

UNSIGNED, SIGNED = 255, 127  # the largest 8-bit integers; what follows a ReLU is unsigned


@torch.no_grad()
def round_to_8_bits(model: EMANet) -> None:
    """Give the residual blocks of a network the rounding errors of 8-bit integers.

    They compute in floating point as before, from weights and activations that 8-bit integers times
    a scale could represent. The scale is exact for each tensor, and for each output channel of a
    weight: nothing is taken from ``emanet_triton.quantize``, whose error this one is to judge.

    Args:
        model: in evaluation mode. Its weights are rounded, and hooks round its activations.
    """
    for block in model.backbone.modules():
        if isinstance(block, Bottleneck):
            for conv in block.modules():
                if isinstance(conv, nn.Conv2d):
                    largest = conv.weight.abs().amax((1, 2, 3), keepdim=True)
                    conv.weight.copy_(_rounded(conv.weight, largest / SIGNED))
                    conv.register_forward_pre_hook(_round_input)
            if block.downsample is not None:
                block.downsample.register_forward_hook(_round_identity)
            block.register_forward_hook(_round_output)


def _round_input(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return _rounded(inputs[0], inputs[0].amax() / UNSIGNED)


def _round_output(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return _rounded(output, output.amax() / UNSIGNED)


def _round_identity(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return _rounded(output, output.abs().amax() / SIGNED)


def _rounded(x: Tensor, steps: Tensor) -> Tensor:
    steps = steps.clamp_min(1e-20)  # all values may be zero
    return (x / steps).round() * steps
