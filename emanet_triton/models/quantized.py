"""The 8-bit form of an EMANet for a CPU: most of its convolutions multiply 8-bit integers.

A fused network first runs on a handful of images, and the largest output of each convolution is
noted. Then the outputs of the backbone's convolutions become unsigned 8-bit integers. They stand
for numbers from 0 to the largest output; in a ``downsample``, after which there is no ReLU, they
stand for negative numbers, too. The first convolution, the EM attention, and all that follows it
stay in bfloat16.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from emanet_triton.errors import InputError
from emanet_triton.kernels.conv.int8 import (
    Scale,
    conv_int8,
    conv_int8_add_,
    quantize,
    quantize_weight,
)
from emanet_triton.kernels.pool.op import max_pool
from emanet_triton.models.emanet import EMANet, FusedEMANet, input_parts
from emanet_triton.models.fused import FusedConv, convs_with_norms, folded
from emanet_triton.models.head import EMAHead
from emanet_triton.models.resnet import Bottleneck, average_pool

DTYPE = torch.bfloat16  # of the layers that are not quantised

Ranges = Mapping[str, float]  # name of a convolution of the backbone → its largest |output|


@contextlib.contextmanager
def observed(network: FusedEMANet) -> Iterator[dict[str, float]]:
    """Note the largest absolute outputs of the backbone's convolutions in the calls inside.

    Raises:
        InputError: in such a call, if an output is not finite.
    """
    ranges: dict[str, float] = {}

    def observe(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def note(module: nn.Module, inputs: object, output: Tensor) -> None:
            largest = float(output.abs().max())
            if not math.isfinite(largest):
                raise InputError(
                    f"the output of backbone.{name} of the fused network is not finite"
                )
            ranges[name] = max(ranges.get(name, 0.0), largest)

        return note

    with contextlib.ExitStack() as hooks:
        for name, layer in network.backbone.named_modules():
            if isinstance(layer, FusedConv):
                hooks.callback(layer.register_forward_hook(observe(name)).remove)
        yield ranges


class QuantizedConv(nn.Module):
    """A convolution of 8-bit integers with bias and ReLU.

    Args:
        folded: weight [O, C, k, k] and bias [O], float32.
        x_scale: of the input.
        out_scale: of the output; ``None``: the output is bfloat16.
        stride, dilation: of the convolution. Its padding is ``dilation * (k // 2)``.
        relu: whether a ReLU follows.
    """

    weight: Tensor
    weight_scales: Tensor
    bias: Tensor

    def __init__(
        self,
        folded: tuple[Tensor, Tensor],
        x_scale: Scale,
        out_scale: Scale | None,
        *,
        stride: int = 1,
        dilation: int = 1,
        relu: bool = True,
    ) -> None:
        super().__init__()
        weight, bias = folded
        self.x_scale, self.out_scale = x_scale, out_scale
        self.stride, self.dilation, self.relu = stride, dilation, relu
        rounded, scales = quantize_weight(weight)
        for name, value in (("weight", rounded), ("weight_scales", scales), ("bias", bias)):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return conv_int8(
            x,
            self.weight,
            self.weight_scales,
            self.bias,
            self.x_scale,
            self.out_scale,
            stride=self.stride,
            dilation=self.dilation,
            relu=self.relu,
        )

    def extra_repr(self) -> str:
        options = f"stride={self.stride}, dilation={self.dilation}, relu={self.relu}"
        return f"{list(self.weight.shape)}, {options}"


class QuantizedOutput(nn.Module):
    """A layer whose bfloat16 output becomes 8-bit integers."""

    def __init__(self, layer: nn.Module, scale: Scale) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale

    def forward(self, x: Tensor) -> Tensor:
        return quantize(self.layer(x), self.scale)


class QuantizedMaxPool(nn.Module):
    """The pooling of the stem, of 8-bit integers."""

    def forward(self, x: Tensor) -> Tensor:
        return max_pool(x, backend="torch")


class QuantizedBottleneck(nn.Module):
    """A residual block of 8-bit integers.

    Args:
        block: in evaluation mode.
        x_scale: of the input.
        ranges: of the layers of the fused form.
        name: what the names of the block's layers begin with, in ``ranges``.

    Attributes:
        scale: of the output.
    """

    def __init__(self, block: Bottleneck, x_scale: Scale, ranges: Ranges, name: str) -> None:
        super().__init__()
        first, second, self.scale = (Scale.of(ranges[f"{name}conv{i}"]) for i in (1, 2, 3))
        self.conv1 = _quantized(block.conv1, block.bn1, x_scale, first)
        self.conv2 = _quantized(block.conv2, block.bn2, first, second)
        self.conv3 = _quantized(block.conv3, block.bn3, second, self.scale)
        self.downsample, self.identity_scale, self.pool = None, x_scale, block.pool
        if block.downsample is not None:
            ((conv, bn),) = convs_with_norms(block.downsample)
            self.identity_scale = Scale.of(ranges[f"{name}downsample"], signed=True)
            self.downsample = _quantized(conv, bn, x_scale, self.identity_scale, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` may be overwritten."""
        out = self.conv2(self.conv1(x))
        # conv3 writes its output over the identity, which is computed last to save its memory.
        identity = x if self.downsample is None else self.downsample(self._pooled(x))
        last = self.conv3
        operands = out, last.weight, last.weight_scales, last.bias
        return conv_int8_add_(identity, *operands, self.identity_scale, last.x_scale, self.scale)

    def _pooled(self, x: Tensor) -> Tensor:
        """The average pool of the identity, of 8-bit integers: means are rounded."""
        if self.pool == 1:
            return x
        return average_pool(x.float(), self.pool).round_().to(torch.uint8)


class QuantizedSharedConv(nn.Module):
    """The convolutions that read the head's input, see ``SharedConv``; not merged.

    Shape:
        uint8 [B, C, h, w] → bfloat16 [B, O of the first, h, w] and [B, O of the second, h, w], or
        ``None`` for a head without ``conv_cat``.
    """

    merged = False

    def __init__(self, head: EMAHead, x_scale: Scale) -> None:
        super().__init__()
        first, *rest = input_parts(head, torch.float32)
        self.first = QuantizedConv(first, x_scale, None)
        self.second = QuantizedConv(rest[0], x_scale, None, relu=False) if rest else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.first(x), None if self.second is None else self.second(x)


def _quantized(
    conv: nn.Conv2d, bn: nn.BatchNorm2d, x_scale: Scale, out_scale: Scale, relu: bool = True
) -> QuantizedConv:
    return QuantizedConv(
        folded(conv, bn, torch.float32),
        x_scale,
        out_scale,
        stride=conv.stride[0],
        dilation=conv.dilation[0],
        relu=relu,
    )


class QuantizedEMANet(FusedEMANet):
    """The 8-bit form of an EMANet, made by ``emanet_triton.quantize``.

    Args:
        model: a network that ``fuse`` takes, on a CPU.
        ranges: of the layers of its fused form, see ``observed``.

    Shape:
        float [B, 3, H, W] → bfloat16 logits [B, num_classes, ceil(H / stride), ceil(W / stride)].

    Attributes:
        ranges: as given.

    Raises:
        ValueError: a call such as ``cuda()`` or ``half()`` would change its device or dtypes, or
            ``load_state_dict`` its ranges.
    """

    def __init__(self, model: EMANet, ranges: Ranges) -> None:
        super().__init__(model, DTYPE, channels_last=True)
        self.ranges = dict(ranges)
        _, *stem = convs_with_norms(model.backbone.stem)
        scale = Scale.of(ranges["0"])
        layers: list[nn.Module] = [QuantizedOutput(self.backbone[0], scale)]
        for i, (conv, bn) in enumerate(stem, start=1):
            x_scale, scale = scale, Scale.of(ranges[str(i)])
            layers.append(_quantized(conv, bn, x_scale, scale))
        layers.append(QuantizedMaxPool())
        for block in model.backbone.modules():
            if isinstance(block, Bottleneck):
                layer = QuantizedBottleneck(block, scale, ranges, f"{len(layers)}.")
                layers.append(layer)
                scale = layer.scale
        self.backbone = nn.Sequential(*layers)
        head: nn.Module = self.decode_head
        head.shared_conv = QuantizedSharedConv(model.decode_head, scale)

    def get_extra_state(self) -> dict[str, float]:
        """The ranges, for the state dict: its integers mean nothing without them."""
        return dict(self.ranges)

    def set_extra_state(self, state: object) -> None:
        """Refuse integers of other ranges. ``load_state_dict(strict=False)`` may not ask.

        Raises:
            ValueError: the state dict is of a network with other ranges.
        """
        if state != self.ranges:
            raise ValueError(
                "the state dict is of a network that was quantized with other images; expected one "
                "of a network with the same ranges"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for dtype in (DTYPE, torch.float32):
            tensor = fn(torch.empty(0, dtype=dtype, device="cpu"))
            if (tensor.dtype, tensor.device.type) != (dtype, "cpu"):
                raise ValueError("a quantized network stays on the CPU and in its dtypes")
        return super()._apply(fn, recurse)
