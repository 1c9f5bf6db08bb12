"""The inference network: EMANet with everything folded and fused that no number depends on."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emanet_triton.errors import InputError, is_of_reloaded
from emanet_triton.kernels.checks import check_float
from emanet_triton.kernels.conv import onednn, winograd
from emanet_triton.kernels.conv.op import bottleneck, conv_bias_act, pack_weight
from emanet_triton.kernels.em.op import em_attention_block
from emanet_triton.models.alteration import alteration
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.head import ConvModule, EMAHead
from emanet_triton.models.resnet import Bottleneck, ResNetV1c

ROWS = 16  # output channels that are folded at once, so that little of them exists in float64
WINOGRAD_CHANNELS = 256  # from which it is the faster (benchmarks/results/conv_cpu.csv)


def fuse(
    model: EMANet, *, dtype: torch.dtype = torch.float32, channels_last: bool = True
) -> "FusedEMANet":
    """Make the inference network of a model, with the same call.

    Batch norms are folded in float64; dropout and the auxiliary head are gone; ``ema_in_conv``
    and the part of ``conv_cat`` that reads the same input are one convolution, so that the
    concatenation need not exist; ReLU and residual are part of the convolutions; the EM
    attention and its 1x1 convolutions are one operator. On the CPU most 3x3 convolutions become
    Winograd's, whose weights suit that device: fuse where the network is to run.

    It is a copy: later changes of the model do not reach it.

    Args:
        model: an EMANet in evaluation mode, which stays as it is. Its tensors may have any
            floating dtype.
        dtype: of weights and activations: float32, float16 or bfloat16. An autocast around
            the fused network does not change it.
        channels_last: the memory format of the activations; without it convolutions are
            PyTorch's, and nothing is fused into them.

    Raises:
        InputError: weights that are not finite once the batch norm is folded into them.
        ValueError: a model of another type, in training mode or ablated, another dtype, or a
            model that computes something else than an EMANet of its architecture: it has hooks,
            replaced modules or methods, changed attributes, or tensors of other shapes. What is
            replaced in a class, not in the model, goes unseen.
    """
    if is_of_reloaded(model, EMANet) or is_of_reloaded(model, FusedEMANet):
        raise ValueError("the model is of a package that was reloaded since; make the model anew")
    if type(model) is not EMANet:
        raise ValueError(f"fuse takes an EMANet, got {type(model).__name__}")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    if model.decode_head.fixed_reconstruction is not None:
        raise ValueError("a model with a fixed_reconstruction is an ablation and is not fused")
    check_float("dtype", dtype)
    altered = alteration(model)
    if altered is not None:
        raise ValueError(f"fuse takes an EMANet that nothing has altered, but here {altered}")
    with torch.inference_mode(False):  # a network of ordinary tensors, wherever it is made
        fused = FusedEMANet(model, dtype, channels_last).eval()
    _check_finite(fused, dtype)
    return fused


class FusedEMANet(nn.Module):
    """What ``fuse`` returns: normalised images to logits, for inference only.

    Shape:
        float [B, 3, H, W] → logits of the network's dtype [B, num_classes, ceil(H / 8),
        ceil(W / 8)]. No gradient flows through it.

    Raises:
        ValueError: its dtype is to change, as by ``half()``: weights are folded for one dtype.
    """

    def __init__(self, model: EMANet, dtype: torch.dtype, channels_last: bool) -> None:
        super().__init__()
        self.architecture = model.architecture
        self.protocol = model.protocol
        self.num_classes = model.num_classes
        self.dtype = dtype
        self.channels_last = channels_last
        self.backbone = _fused_backbone(model.backbone, dtype, channels_last)
        self.decode_head = FusedHead(model.decode_head, dtype, channels_last)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        with _without_autocast(images.device.type):
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            x = images.to(self.dtype).contiguous(memory_format=layout)
            # One by one, so that the input of each is let go of.
            for layer in (*self.backbone, self.decode_head.shared_conv):
                x = layer(x)
            return self.decode_head(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FusedEMANet":
        dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if dtype != self.dtype:
            raise ValueError(
                f"a network fused in {self.dtype} cannot be changed to {dtype}; call "
                "fuse(model, dtype=...)"
            )
        return super()._apply(fn, recurse)


class FusedConv(nn.Module):
    """A convolution with bias, then residual and ReLU, by the fastest means there is for it.

    Its attribute ``backend`` is that of ``conv_bias_act``, "auto" unless it is set.

    Args:
        weight: [O, C, k, k], in the dtype of the input.
        bias: [O], in that dtype.
        channels_last: as in ``fuse``.
        stride, dilation: of the convolution, whose padding is ``dilation * (k // 2)``.
        relu: whether a ReLU follows.
        out_dtype: that dtype unless given, or float32.
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
        out_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.backend = "auto"
        self.stride, self.dilation, self.relu = stride, dilation, relu
        self.out_dtype = out_dtype or weight.dtype
        self.channels_last = channels_last
        self.winograd = channels_last and stride == 1 and _winograd_pays(weight)
        if channels_last:
            weight = winograd.pack_weight(weight) if self.winograd else pack_weight(weight)
        else:
            weight = weight.contiguous()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The residual, of the output's shape, may be overwritten."""
        arguments = x, self.weight, self.bias, residual
        if self.winograd:
            return winograd.winograd_conv(
                *arguments, dilation=self.dilation, relu=self.relu, out_dtype=self.out_dtype
            )
        if not self.channels_last:
            return self._plain(x, residual)
        options = {"stride": self.stride, "dilation": self.dilation, "relu": self.relu}
        one_dtype = self.out_dtype == x.dtype and (residual is None or residual.dtype == x.dtype)
        if x.device.type == "cpu" and one_dtype:
            return onednn.conv_bias_act_(*arguments, **options)
        return conv_bias_act(*arguments, **options, out_dtype=self.out_dtype, backend=self.backend)

    def _plain(self, x: Tensor, residual: Tensor | None) -> Tensor:
        padding = self.dilation * (self.weight.shape[2] // 2)
        out = F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation)
        out = out if residual is None else out + residual
        out = out.relu_() if self.relu else out
        return out.to(self.out_dtype)

    def extra_repr(self) -> str:
        options = f"stride={self.stride}, dilation={self.dilation}, relu={self.relu}"
        return f"{list(self.weight.shape)}, {options}, winograd={self.winograd}"


class FusedBottleneck(nn.Module):
    """A residual block: three convolutions, or one operator on a GPU where that exists.

    Its attribute ``backend`` is that of the operator, "auto" unless it is set; where
    ``has_operator`` is set to False, the three convolutions run by backends of their own.
    """

    def __init__(self, block: Bottleneck, dtype: torch.dtype, channels_last: bool) -> None:
        super().__init__()
        self.backend = "auto"
        self.conv1 = _fused(block.conv1, block.bn1, dtype, channels_last)
        self.conv2 = _fused(block.conv2, block.bn2, dtype, channels_last)
        self.conv3 = _fused(block.conv3, block.bn3, dtype, channels_last)
        self.downsample = (
            None
            if block.downsample is None
            else _fused(*block.downsample, dtype, channels_last, relu=False)
        )
        middle = self.conv2
        undilated = middle.stride == middle.dilation == 1
        self.has_operator = channels_last and undilated and not middle.winograd

    def forward(self, x: Tensor) -> Tensor:
        """``x`` may be overwritten."""
        convs = self.conv1, self.conv2, self.conv3
        if x.device.type != "cpu" and self.has_operator:
            weights, biases = [c.weight for c in convs], [c.bias for c in convs]
            return bottleneck(x, weights, biases, self._identity(x), backend=self.backend)
        out = self.conv2(self.conv1(x))
        return self.conv3(out, self._identity(x))  # the largest comes last and becomes the output

    def _identity(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)


class FusedHead(nn.Module):
    """EMANet's decode head with ``conv_cat`` split at the concatenation it reads.

    ``shared_conv`` is ``ema_in_conv`` and the part of ``conv_cat`` for the head's input;
    ``conv_cat`` is the other part, which adds to the first.
    """

    def __init__(self, head: EMAHead, dtype: torch.dtype, channels_last: bool) -> None:
        super().__init__()
        attention = head.ema_module
        self.ema_channels = attention.bases.shape[1]
        self.num_stages, self.backend = attention.num_stages, attention.backend

        in_weight, in_bias = _folded(*_parts(head.ema_in_conv), dtype)
        cat_weight, cat_bias = _folded(*_parts(head.conv_cat), dtype)
        split = in_weight.shape[1]
        self.shared_conv = FusedConv(
            torch.cat([in_weight, cat_weight[:, :split]]),
            torch.cat([in_bias, torch.zeros_like(cat_bias)]),
            channels_last,
            relu=False,
            out_dtype=torch.float32,
        )
        self.conv_cat = FusedConv(cat_weight[:, split:], cat_bias, channels_last)
        self.bottleneck = _fused(*_parts(head.bottleneck), dtype, channels_last)
        self.conv_seg = _fused(head.conv_seg, None, dtype, channels_last, relu=False)

        mid_weight, mid_bias = _folded(*_parts(head.ema_mid_conv), dtype)
        out_weight, out_bias = _folded(*_parts(head.ema_out_conv), dtype)
        block = {
            "bases": attention.bases.to(dtype, copy=True),
            "mid_weight": mid_weight.flatten(1),
            "mid_bias": mid_bias,
            "out_weight": out_weight.flatten(1),
            "out_bias": out_bias,
        }
        for name, value in block.items():
            self.register_buffer(name, value)

    def forward(self, shared: Tensor) -> Tensor:
        """What ``shared_conv`` made of the backbone's output → logits.

        That output is the largest tensor of all, and the caller need not keep it.
        """
        feats, partial = shared.split([self.ema_channels, self.conv_cat.bias.shape[0]], dim=1)
        feats = self._attention_block(feats.relu().to(self.bases.dtype))
        return self.conv_seg(self.conv_cat(self.bottleneck(feats), partial))

    def _attention_block(self, feats: Tensor) -> Tensor:
        weights = self.mid_weight, self.mid_bias, self.out_weight, self.out_bias
        out, _ = em_attention_block(
            feats, self.bases, *weights, self.num_stages, backend=self.backend
        )
        return out


def _check_finite(fused: FusedEMANet, dtype: torch.dtype) -> None:
    """Refuse weights that are not finite, which a fused ReLU may hide: it turns NaN into 0."""
    for name, tensor in fused.state_dict().items():
        if not (tensor.is_meta or tensor.isfinite().all()):
            hint = "; bfloat16 has a wider range" if dtype == torch.float16 else ""
            raise InputError(
                f"{name} of the fused network is not finite in {dtype}, as its weights or the "
                f"statistics of its batch norm are damaged or too large{hint}"
            )


def _without_autocast(device: str) -> contextlib.AbstractContextManager:
    """Autocast off; there is none for meta tensors, which show what the network calls."""
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _fused_backbone(backbone: ResNetV1c, dtype: torch.dtype, channels_last: bool) -> nn.Sequential:
    stem = backbone.stem
    blocks = [
        block
        for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
        for block in stage
    ]
    return nn.Sequential(
        *(_fused(stem[i], stem[i + 1], dtype, channels_last) for i in (0, 3, 6)),
        nn.MaxPool2d(3, stride=2, padding=1),
        *(FusedBottleneck(block, dtype, channels_last) for block in blocks),
    )


def _fused(
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d | None,
    dtype: torch.dtype,
    channels_last: bool,
    relu: bool = True,
) -> FusedConv:
    return FusedConv(
        *_folded(conv, bn, dtype),
        channels_last,
        stride=conv.stride[0],
        dilation=conv.dilation[0],
        relu=relu,
    )


def _parts(module: ConvModule) -> tuple[nn.Conv2d, nn.BatchNorm2d | None]:
    return module.conv, module.bn


@torch.no_grad()
def _folded(
    conv: nn.Conv2d, bn: nn.BatchNorm2d | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weight and bias with the batch norm's statistics in them, computed in float64."""
    weight = torch.empty_like(conv.weight, dtype=dtype, memory_format=torch.contiguous_format)
    if bn is None:
        scale, bias = weight.new_ones(len(weight), dtype=torch.float64), conv.bias.double()
    else:
        scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
        bias = bn.bias.double() - bn.running_mean.double() * scale
    parts = (t.split(ROWS) for t in (weight, conv.weight, scale))
    for folded, part, scales in zip(*parts, strict=True):
        folded.copy_(part.double() * scales[:, None, None, None])
    return weight, bias.to(dtype)


def _winograd_pays(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.shape[2] != 3 or not onednn.has_onednn(weight.dtype):
        return False
    return min(weight.shape[:2]) >= WINOGRAD_CHANNELS
