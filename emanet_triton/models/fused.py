"""``fuse``, and the layers of which fused networks are made."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emanet_triton.errors import InputError, is_of_reloaded
from emanet_triton.kernels.checks import OPEN_BACKENDS, check_float
from emanet_triton.kernels.conv import onednn, winograd
from emanet_triton.kernels.conv.cpu_choice import takes_winograd
from emanet_triton.kernels.conv.op import (
    conv_bias_act,
    expand_reduce,
    pack_weight,
    why_not_one_kernel,
)
from emanet_triton.kernels.device import has_onednn
from emanet_triton.kernels.pool.op import max_pool
from emanet_triton.models.network import FusedNetwork, Network
from emanet_triton.models.resnet import Bottleneck, average_pool

# Folded weights below this become zero. Subnormal numbers, below 1.2e-38, would slow some CPUs down
# ten times. An output of 2^15 such weights moves by less than 3e-26 times its largest input.
SMALLEST = 2.0**-100
ROWS = 16  # output channels that are folded at once: only their weights exist in float64


def fuse(
    model: Network, *, dtype: torch.dtype = torch.float32, channels_last: bool = True
) -> FusedNetwork:
    """Make a faster copy of a model for inference. Later changes of the model do not reach it.

    Call the copy like the model: normalised images [B, 3, H, W] → logits. The logits are the
    model's but for rounding. For an EMANet the copy differs as follows:

    - Batch norms are folded into convolutions, in float64. ReLU and residuals are part of the
      convolutions.
    - On a CPU ``ema_in_conv`` and a part of ``conv_cat``, which read the same input, become one
      convolution, if there is ``conv_cat``.
    - The EM attention and its 1x1 convolutions become one operator.
    - On a GPU the last convolution of a residual block and the first of the next block become one
      operator, if activations are channels-last in memory.
    - Dropout and the auxiliary head are left out.
    - On a CPU a 3x3 convolution becomes Winograd's if this is faster, with weights laid out for it.
      A CPU without AVX2 measures this once, and keeps the result on disk. Fuse the model on the
      device where the copy will run.

    Args:
        model: an EMANet in evaluation mode; it is not changed. Its tensors may have any floating
            dtype.
        dtype: of weights and activations: float32, float16 or bfloat16. The copy ignores
            autocast.
        channels_last: whether activations are channels-last in memory. If not, the convolutions
            are PyTorch's, without ReLU and residual in them.

    Raises:
        InputError: a weight is not finite after the batch norm is folded into it.
        ValueError: the model is no EMANet, or is in training mode; it has a
            ``fixed_reconstruction``; it was changed: it has forward hooks, replaced modules or
            methods, changed attributes or tensors of other shapes (a method that was replaced in
            a class is not noticed); or the dtype is none of these.
    """
    fused = fuse_if_possible(model, dtype, channels_last)
    if fused is None:
        raise ValueError(f"{type(model).__name__} has no fused form")
    return fused


def fuse_if_possible(
    model: nn.Module, dtype: torch.dtype, channels_last: bool = True
) -> FusedNetwork | None:
    """Fuse a model as ``fuse`` does; return ``None`` if it has no fused form.

    Raises:
        InputError, ValueError: for the same reasons as ``fuse``.
    """
    if is_of_reloaded(model, Network):
        raise ValueError("the model is of a package that was reloaded since; make the model anew")
    if not isinstance(model, Network) or isinstance(model, FusedNetwork):
        raise ValueError(f"fuse takes an EMANet, got {type(model).__name__}")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    check_float("dtype", dtype)
    with torch.inference_mode(False):  # so that its tensors are always ordinary ones
        fused = model.fused_form(dtype, channels_last)
    if fused is None:
        return None
    _check_finite(fused, dtype)
    return fused.eval()


def _check_finite(fused: FusedNetwork, dtype: torch.dtype) -> None:
    """Refuse weights that are not finite: a ReLU inside a kernel may turn NaN into 0."""
    for name, tensor in fused.state_dict().items():
        if not (tensor.is_meta or tensor.isfinite().all()):
            hint = "; bfloat16 has a wider range" if dtype == torch.float16 else ""
            raise InputError(
                f"{name} of the fused network is not finite in {dtype}, as its weights or the "
                f"statistics of its batch norm are damaged or too large{hint}"
            )


class FusedConv(nn.Module):
    """A convolution with bias, then residual and ReLU, by the fastest operator for the device.

    Args:
        weight: [O, C, k, k], in the dtype of the input.
        bias: [O], in the dtype of the input.
        channels_last: as in ``fuse``.
        stride, dilation: of the convolution. Its padding is ``dilation * (k // 2)``.
        relu: whether a ReLU follows.
        wide: whether the output is float32. It is not where oneDNN convolves: its output has the
            dtype of the input.

    Attributes:
        backend: given to ``conv_bias_act``, or to ``expand_reduce``, which runs two convolutions
            of the same backend, "triton" or one of ``OPEN_BACKENDS``; "auto" at first.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        channels_last: bool,
        *,
        stride: int = 1,
        dilation: int = 1,
        relu: bool = True,
        wide: bool = False,
    ) -> None:
        super().__init__()
        self.backend = "auto"
        self.stride, self.dilation, self.relu = stride, dilation, relu
        self.channels_last = channels_last
        self.winograd = channels_last and stride == 1 and takes_winograd(weight)
        on_cpu = channels_last and weight.device.type == "cpu"
        by_onednn = on_cpu and not self.winograd and has_onednn(torch.float32)
        self.out_dtype = torch.float32 if wide and not by_onednn else weight.dtype
        if channels_last:
            weight = winograd.pack_weight(weight) if self.winograd else pack_weight(weight)
        else:
            weight = weight.contiguous()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve. ``residual`` has the output's shape and may be overwritten."""
        if self.winograd:
            arguments = x, self.weight, self.bias, residual
            return winograd.winograd_conv(
                *arguments, dilation=self.dilation, relu=self.relu, out_dtype=self.out_dtype
            )
        return self._convolve(x, self.weight, self.bias, residual, self.relu, self.out_dtype)

    def _convolve(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        relu: bool,
        out_dtype: torch.dtype,
    ) -> Tensor:
        if not self.channels_last:
            padding = self.dilation * (weight.shape[2] // 2)
            out = F.conv2d(x, weight, bias, self.stride, padding, self.dilation)
            out = out if residual is None else out + residual
            return (out.relu_() if relu else out).to(out_dtype)
        arguments = x, weight, bias, residual
        geometry: dict[str, Any] = {
            "stride": self.stride,
            "dilation": self.dilation,
            "relu": relu,
        }
        one_dtype = out_dtype == x.dtype and (residual is None or residual.dtype == x.dtype)
        if x.device.type == "cpu" and one_dtype:
            return onednn.conv_bias_act_(*arguments, **geometry)
        return conv_bias_act(*arguments, **geometry, out_dtype=out_dtype, backend=self.backend)

    def is_watched(self) -> bool:
        """Whether a call of the module itself, with its hooks, is needed."""
        return bool(self._forward_hooks or self._forward_pre_hooks)

    def extra_repr(self) -> str:
        options = f"stride={self.stride}, dilation={self.dilation}, relu={self.relu}"
        return f"{list(self.weight.shape)}, {options}, winograd={self.winograd}"


class SharedConv(FusedConv):
    """Two convolutions that read the same input; a ReLU follows the first.

    A CPU runs them as one convolution: Winograd's then transforms the input once. A GPU runs two,
    so that each writes its output as the next layer reads it, with no further pass.

    Args:
        first, second: weight [O, C, k, k] and bias [O] of each, in the dtype of the input.
        channels_last: as in ``fuse``.

    Attributes:
        merged: whether they run as one; at first whether the weights are on a CPU.

    Shape:
        [B, C, h, w] → [B, O of the first, h, w] and [B, O of the second, h, w]. If they are merged,
        the ReLU is left to the caller, who can free the input first, and both outputs are parts of
        one tensor, float32 unless oneDNN convolves. Else both have the dtype of the input.
    """

    def __init__(
        self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], channels_last: bool
    ) -> None:
        weight, bias = (torch.cat(pair) for pair in zip(first, second, strict=True))
        super().__init__(weight, bias, channels_last, relu=False, wide=True)
        self.merged = weight.device.type == "cpu"
        self.sizes = [len(first[1]), len(second[1])]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if self.merged:
            first, second = super().forward(x).split(self.sizes, dim=1)
            return first, second
        weights, biases = self.weight.split(self.sizes), self.bias.split(self.sizes)
        return (
            self._convolve(x, weights[0], biases[0], None, True, x.dtype),
            self._convolve(x, weights[1], biases[1], None, False, x.dtype),
        )


class InputConv(FusedConv):
    """The only convolution of an input, in the place of ``SharedConv``.

    Shape:
        [B, C, h, w] → [B, O, h, w], and ``None`` for the second convolution.
    """

    merged = False

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class FusedMaxPool(nn.Module):
    """The pooling of the stem: our operator on a GPU if activations are channels-last in memory."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last and x.device.type != "cpu":
            return max_pool(x)
        return F.max_pool2d(x, 3, stride=2, padding=1)


class FusedBottleneck(nn.Module):
    """A residual block, which may run its last convolution with the first of the next block."""

    def __init__(self, block: Bottleneck, dtype: torch.dtype, channels_last: bool) -> None:
        super().__init__()
        self.conv1 = fused_conv(block.conv1, block.bn1, dtype, channels_last)
        self.conv2 = fused_conv(block.conv2, block.bn2, dtype, channels_last)
        self.conv3 = fused_conv(block.conv3, block.bn3, dtype, channels_last)
        self.downsample, self.pool = None, block.pool
        if block.downsample is not None:
            ((conv, bn),) = convs_with_norms(block.downsample)
            self.downsample = fused_conv(conv, bn, dtype, channels_last, relu=False)

    def forward(
        self,
        x: Tensor,
        reduced: Tensor | None = None,
        following: "FusedBottleneck | None" = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            x: [B, C, h, w]; it may be overwritten.
            reduced: the output of ``conv1``, if the block before has computed it.
            following: the next block, if its ``conv1`` is to run with ``conv3``.

        Returns:
            The output; with ``following`` also the output of its ``conv1``.
        """
        inner = self.conv2(self.conv1(x) if reduced is None else reduced)
        # conv3 writes its output over the identity, which is computed last to save its memory.
        identity = x if self.downsample is None else self.downsample(average_pool(x, self.pool))
        if following is None:
            return self.conv3(inner, identity)
        pair = self.conv3, following.conv1
        weights, biases = [conv.weight for conv in pair], [conv.bias for conv in pair]
        return expand_reduce(inner, weights, biases, identity, backend=self.conv3.backend)

    def runs_with(self, following: nn.Module | None, device: torch.device) -> bool:
        """Whether ``conv3`` and the ``conv1`` of the next layer are to run as one operator.

        They are on a GPU where activations are channels-last in memory, unless somebody asks for a
        backend that has no such operator, or watches one of them by a hook.
        """
        if not isinstance(following, FusedBottleneck) or device.type == "cpu":
            return False
        pair = self.conv3, following.conv1
        if not all(conv.channels_last and not conv.is_watched() for conv in pair):
            return False
        backend = self.conv3.backend
        if following.conv1.backend != backend:
            return False
        (outputs, planes, *_), reduced = self.conv3.weight.shape, len(following.conv1.weight)
        has_kernel = not why_not_one_kernel(self.conv3.weight.dtype, planes, outputs, reduced)
        return backend in OPEN_BACKENDS or (backend == "triton" and has_kernel)


def run_backbone(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Run the layers, on a GPU the end of a residual block with the beginning of the next one.

    A layer's input is freed before the next layer runs.
    """
    reduced = None
    for layer, following in pairwise((*layers, None)):
        if not isinstance(layer, FusedBottleneck):
            x = layer(x)
        elif layer.runs_with(following, x.device):
            x, reduced = layer(x, reduced, following)
        else:
            x, reduced = layer(x, reduced), None
    return x


def convs_with_norms(layers: nn.Sequential) -> Iterator[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Every convolution with its batch norm, in order."""
    convs = (layer for layer in layers if isinstance(layer, nn.Conv2d))
    norms = (layer for layer in layers if isinstance(layer, nn.BatchNorm2d))
    return zip(convs, norms, strict=True)


def fused_conv(
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d | None,
    dtype: torch.dtype,
    channels_last: bool,
    relu: bool = True,
) -> FusedConv:
    """A convolution with its batch norm folded in, and with ReLU."""
    return FusedConv(
        *folded(conv, bn, dtype),
        channels_last,
        stride=conv.stride[0],
        dilation=conv.dilation[0],
        relu=relu,
    )


@torch.no_grad()
def folded(conv: nn.Conv2d, bn: nn.BatchNorm2d | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution after the batch norm is folded in, computed in float64.

    Numbers below ``SMALLEST`` become zero.
    """
    weight = torch.empty_like(conv.weight, dtype=dtype, memory_format=torch.contiguous_format)
    scale = weight.new_ones(len(weight), dtype=torch.float64)
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.double()
    if bn is not None:
        mean, variance = bn.running_mean, bn.running_var
        if mean is None or variance is None:
            raise ValueError("a batch norm without running statistics cannot be folded")
        scale = bn.weight.double() / torch.sqrt(variance.double() + bn.eps)
        bias = bn.bias.double() + (bias - mean.double()) * scale
    parts = (t.split(ROWS) for t in (weight, conv.weight, scale))
    for rows, part, scales in zip(*parts, strict=True):
        rows.copy_(F.hardshrink(part.double() * scales[:, None, None, None], SMALLEST))
    return weight, F.hardshrink(bias, SMALLEST).to(dtype)
