"""Which 3x3 convolutions Winograd's algorithm computes on a CPU; oneDNN computes all others."""

import sys

import torch
from torch import Tensor

from emanet_triton.kernels import choice
from emanet_triton.kernels.conv.onednn import compute_dtype, conv_bias_act_
from emanet_triton.kernels.conv.op import pack_weight
from emanet_triton.kernels.conv.winograd import pack_weight as pack_winograd_weight
from emanet_triton.kernels.conv.winograd import winograd_conv
from emanet_triton.kernels.device import DTYPE_NAMES, cpu_capability, has_onednn

NEVER = sys.maxsize
# From so many input and output channels on, Winograd's algorithm is faster, by CPU and dtype of the
# products; with two threads at 64 x 128 pixels. An AMD EPYC measured avx512_bf16
# (benchmarks/results/conv_cpu.csv) and, restricted to its instructions, avx512; an older one avx2
# (benchmarks/results/zen3/convolutions.csv); an Intel Xeon amx (benchmarks/results/conv_amx.csv).
WINOGRAD_FROM = {
    ("amx", torch.float32): 256,
    ("amx", torch.bfloat16): NEVER,
    ("avx512_bf16", torch.float32): 256,
    ("avx512_bf16", torch.bfloat16): 256,
    ("avx512", torch.float32): 256,
    ("avx2", torch.float32): 256,
}
MEASURED_FROM = 128  # channels; with fewer, Winograd's algorithm was slower on every CPU
MEASURED_TO = 512  # a convolution of more channels takes the choice of this many
HEIGHT, WIDTH = 32, 64  # of the image that is measured: a second or less for a network


def takes_winograd(weight: Tensor) -> bool:
    """Whether Winograd's algorithm should compute a convolution of stride 1 on this CPU.

    Where ``WINOGRAD_FROM`` does not say, both algorithms are measured; see ``choice``.

    Args:
        weight: [O, C, k, k].
    """
    if weight.device.type != "cpu" or weight.shape[2] != 3 or not has_onednn(torch.float32):
        return False
    outputs, channels = weight.shape[:2]
    dtype = compute_dtype(weight.dtype)
    least = WINOGRAD_FROM.get((cpu_capability(), dtype))
    if least is not None:
        return min(outputs, channels) >= least
    if min(outputs, channels) < MEASURED_FROM:
        return False
    return _measured(min(outputs, MEASURED_TO), min(channels, MEASURED_TO), dtype)


def _measured(outputs: int, channels: int, dtype: torch.dtype) -> bool:
    shapes = (1, channels, HEIGHT, WIDTH), (outputs, channels, 3, 3), (outputs,)
    x, weight, bias = (torch.ones(shape, dtype=dtype, device="cpu") for shape in shapes)
    x = x.contiguous(memory_format=torch.channels_last)
    direct, winograd = pack_weight(weight), pack_winograd_weight(weight)
    candidates = {
        "onednn": lambda: conv_bias_act_(x, direct, bias),
        "winograd": lambda: winograd_conv(x, winograd, bias),
    }
    key = f"3x3 convolution of {channels} to {outputs} channels, {DTYPE_NAMES[dtype]}"
    return choice.choose(key, x.device, candidates, "onednn") == "winograd"
