"""Products of matrices on a CPU by oneDNN, which PyTorch ships for its compiler."""

import torch
from torch import Tensor

from emanet_triton.kernels.device import cpu_capability, cpu_family, has_onednn

# Vendor and family of processors for which MKL, PyTorch's usual product of float32 matrices, uses
# vectors of half their length. AMD's family 26 is Zen 5.
HALVED_BY_MKL = {("AuthenticAMD", 26)}


def onednn_beats_mkl(device: torch.device) -> bool:
    """Whether oneDNN multiplies float32 matrices about twice as fast as PyTorch's own products.

    On other CPUs the two are about equally fast, or nobody measured.
    """
    return (
        device.type == "cpu"
        and cpu_family() in HALVED_BY_MKL
        and cpu_capability() in ("avx512", "avx512_bf16")
        and torch.backends.mkl.is_available()
        and has_onednn(torch.float32)
    )


def onednn_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """activation(x weight' + bias) by oneDNN, in new memory.

    oneDNN sums float32 in another order than MKL: over 256 to 2048 channels its error is up to 2.3
    times as large.

    Args:
        x: [..., I] on the CPU, in a dtype of ``has_onednn``.
        weight: [O, I]. oneDNN is slow if it is a part of a matrix.
        bias: [O].
        activation: "none" or "relu".

    Returns:
        [..., O].
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")
