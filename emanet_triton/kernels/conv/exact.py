"""Measure the errors of a convolution's backends against a higher precision."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.kernels.exact import Check, wider
from emanet_triton.kernels.precision import cuda_fp32

BLOCK_BYTES = 2**26  # input and output, in the higher precision, that are compared at once


@dataclass(frozen=True)
class ConvCheck(Check):
    """Measures the error of an output of a convolution, or of several convolutions in a row.

    Attributes:
        x: [B, C, H, W], float32, float16 or bfloat16.
        residual: [B, O, ceil(H / stride), ceil(W / stride)], or None.
        out_shape, out_dtype: shape and dtype of the output.
        stride: stride of the convolution.
        reach: number of input rows above and below its own row on which an output row depends.
        relu: whether a ReLU follows.
        linear: computes, from rows of x in a higher precision, rows of the output without residual
            and ReLU.
        plain: computes the output by plain PyTorch, in the precision of the backends.
        pointwise: computes rows of the output from the same rows of what precedes it, residual and
            ReLU included; None if nothing follows the ReLU.
    """

    x: Tensor
    residual: Tensor | None
    out_shape: Sequence[int]
    out_dtype: torch.dtype
    stride: int
    reach: int
    relu: bool
    linear: Callable[[Tensor], Tensor]
    plain: Callable[[], Tensor]
    pointwise: Callable[[Tensor], Tensor] | None = None

    def pieces(self) -> Iterator[tuple[Any, Tensor]]:
        for image, rows in self._blocks():
            yield (image, slice(None), rows), self._exact(image, rows)

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        """Yield image and rows of each block of the output; the blocks are compared one by one."""
        batch, outputs, height, width = self.out_shape
        values = (self.stride**2 * self.x.shape[1] + outputs) * width
        rows_at_once = max(1, BLOCK_BYTES // (values * wider(self.x.dtype).itemsize))
        for image in range(batch):
            for begin in range(0, height, rows_at_once):
                end = min(begin + rows_at_once, height)
                yield slice(image, image + 1), slice(begin, end)

    def _exact(self, image: slice, rows: slice) -> Tensor:
        begin = max(0, rows.start * self.stride - self.reach)
        begin -= begin % self.stride  # so that an output row is centred there
        end = (rows.stop - 1) * self.stride + self.reach + 1
        out = self.linear(self.x[image, :, begin:end].to(wider(self.x.dtype)))
        above = rows.start - begin // self.stride
        out = out[:, :, above : above + rows.stop - rows.start]
        if self.residual is not None:
            out = out + self.residual[image, :, rows]
        out = out.relu() if self.relu else out
        return out if self.pointwise is None else self.pointwise(out)


def exact_conv(x: Tensor, weight: Tensor, bias: Tensor, stride: int, dilation: int) -> Tensor:
    """Convolution and bias by plain PyTorch, exact in the dtype of x."""
    padding = dilation * (weight.shape[2] // 2)
    with cuda_fp32("ieee"), torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), stride, padding, dilation)
