"""What a convolution costs: the arithmetic and the memory traffic of one launch."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ConvShape:
    """One convolution with bias, residual and ReLU.

    Attributes:
        batch, channels, height, width: of the input.
        outputs: channels of the output.
        kernel, stride, dilation: of the convolution, padded to keep the size at stride 1.
        dtype: of the input and the weight.
        residual: dtype of the residual, if there is one.
        out_dtype: of the output.
        relu: whether the output goes through a ReLU.
    """

    batch: int
    channels: int
    height: int
    width: int
    outputs: int
    kernel: int
    stride: int
    dilation: int
    dtype: torch.dtype
    residual: torch.dtype | None
    out_dtype: torch.dtype
    relu: bool

    @property
    def pixels(self) -> int:
        """Pixels of the output."""
        height, width = ((size - 1) // self.stride + 1 for size in (self.height, self.width))
        return self.batch * height * width

    @property
    def flops(self) -> int:
        """Multiplications and additions of the products; bias, residual and ReLU not counted."""
        return 2 * self.pixels * self.outputs * self.channels * self.kernel**2

    @property
    def bytes(self) -> int:
        """Bytes moved if every tensor is read or written once; the bias is taken as float32."""
        inputs = self.batch * self.channels * self.height * self.width
        weights = self.outputs * self.channels * self.kernel**2
        per_output = self.out_dtype.itemsize + (self.residual.itemsize if self.residual else 0)
        return (
            (inputs + weights) * self.dtype.itemsize
            + 4 * self.outputs
            + self.pixels * self.outputs * per_output
        )
