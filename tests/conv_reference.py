"""Convolutions to test with, their reference in float64 and the three-way comparison."""

from dataclasses import dataclass

import torch
from device import DEVICE
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.kernels.conv.op import pack_weight

# Error that a kernel may make beyond twice the error of plain PyTorch in the same dtype.
ATOL = {torch.float32: 1e-6, torch.float16: 2**-12, torch.bfloat16: 2**-9}


@dataclass(frozen=True)
class Convolution:
    """Operands of one convolution, made from a fixed seed, on one device."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor | None
    stride: int
    dilation: int
    relu: bool

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.x, self.weight, self.bias, self.residual

    @property
    def options(self) -> dict[str, int | bool]:
        return {"stride": self.stride, "dilation": self.dilation, "relu": self.relu}

    def eager(self, dtype: torch.dtype) -> Tensor:
        """Plain PyTorch, one operation after another, in one dtype, on the CPU."""
        x, weight, bias = (t.cpu().to(dtype) for t in (self.x, self.weight, self.bias))
        padding = self.dilation * (weight.shape[2] // 2)
        out = F.conv2d(x, weight, None, self.stride, padding, self.dilation)
        out = out + bias[:, None, None]
        out = out if self.residual is None else out + self.residual.cpu().to(dtype)
        return out.relu() if self.relu else out


def make(
    shape: tuple[int, int, int, int],
    outputs: int,
    kernel: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    residual: bool | torch.dtype = False,
    relu: bool = True,
    dtype: torch.dtype = torch.float16,
    device: str = DEVICE,
) -> Convolution:
    """Make x of this shape, [B, C, H, W], and the other operands; outputs are of ordinary size.

    ``residual`` is the residual's dtype; True stands for the dtype of x.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    batch, channels, height, width = shape
    x = normal(*shape).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = normal(outputs, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    bias = normal(outputs)
    out_shape = batch, outputs, (height - 1) // stride + 1, (width - 1) // stride + 1
    added = normal(*out_shape).to(dtype if residual is True else residual) if residual else None
    return Convolution(x, pack_weight(weight.to(dtype)), bias, added, stride, dilation, relu)


def assert_close_to_eager(found: Tensor, exact: Tensor, eager: Tensor) -> None:
    """Assert an error of at most twice plain PyTorch's error plus ``ATOL``, on the CPU.

    With operands of float32 four times: a kernel adds one product after another, a CPU sums of
    parts.
    """
    assert found.shape == exact.shape
    error = (found.cpu().double() - exact).abs().max().item()
    factor = 4 if eager.dtype == torch.float32 else 2
    allowed = factor * (eager.double() - exact).abs().max().item() + ATOL[found.dtype]
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


class _OnGpu(Tensor):
    is_cuda = True


def on_gpu(x: Tensor) -> Tensor:
    """The same tensor, but ``is_cuda`` is True."""
    return x.as_subclass(_OnGpu)
