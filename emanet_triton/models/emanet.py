"""EMANet: a dilated ResNet, the EM attention head and the auxiliary head.

``FusedEMANet`` is its fused form: it computes the same logits for inference.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emanet_triton.kernels.checks import OPEN_BACKENDS
from emanet_triton.kernels.em import reference
from emanet_triton.kernels.em.op import em_attention_block
from emanet_triton.kernels.precision import without_autocast
from emanet_triton.models.alteration import alteration
from emanet_triton.models.fused import (
    FusedBottleneck,
    FusedConv,
    FusedMaxPool,
    InputConv,
    SharedConv,
    convs_with_norms,
    folded,
    fuse,
    fused_conv,
    run_backbone,
)
from emanet_triton.models.head import ConvModule, EMAHead, FCNHead
from emanet_triton.models.network import RGB, FusedNetwork, Network, check_images
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.resnet import Bottleneck, ResNet, Stages

MEAN, STD = Network.mean, Network.std
STEM_STRIDE = 4  # of the first convolution and the pooling


@dataclass(frozen=True)
class Architecture:
    """All that tells one EMANet from another; the defaults are mmsegmentation's.

    Attributes:
        blocks: bottlenecks of each of the four stages.
        base_channels: planes of the first stage.
        ema_channels: C of the EM attention.
        num_bases: K of the EM attention.
        num_stages: EM iterations.
        head_channels: of the convolutions after the attention and of the auxiliary head.
        strides: of the first block of each stage. The stem's stride is 4.
        dilations: of the 3x3 convolutions of each stage.
        contract_dilation: whether the first block of a dilated stage has half the dilation.
        multi_grid: factors of the dilations of stage 4's blocks, repeated if it has more blocks.
        stem_channels: of the stem's three convolutions; ``None``: half of ``base_channels`` twice,
            then ``base_channels``.
        avg_down: whether an average pool precedes the 1x1 convolution of a strided block's
            identity, and takes over its stride (ResNetV1d).
        concat_input: whether the head has ``conv_cat``.
        out_relu: whether a ReLU follows the norm of ``ema_out_conv`` (PaddleSeg).
        norm_shift: added to both norms of the EM steps; the official EMANet has 1e-6.
        mean, std: of the RGB values 0 to 255 of the input images.
        layout: the project whose checkpoint files fit: "mmsegmentation", "sssegmentation",
            "official" or "paddleseg".
    """

    blocks: Stages
    base_channels: int = 64
    ema_channels: int = 512
    num_bases: int = 64
    num_stages: int = 3
    head_channels: int = 256
    strides: Stages = (1, 2, 1, 1)
    dilations: Stages = (1, 1, 2, 4)
    contract_dilation: bool = True
    multi_grid: tuple[int, ...] = (1, 1, 1)
    stem_channels: tuple[int, int, int] | None = None
    avg_down: bool = False
    concat_input: bool = True
    out_relu: bool = False
    norm_shift: float = 0.0
    mean: RGB = Network.mean
    std: RGB = Network.std
    layout: str = "mmsegmentation"

    @property
    def stride(self) -> int:
        """Pixels of the input per logit, in each direction."""
        return STEM_STRIDE * math.prod(self.strides)


class EMANet(Network):
    """The segmentation network (mmseg ``EncoderDecoder``), from normalised images to logits.

    Args:
        architecture: sizes of the network. ``stride``, ``mean`` and ``std`` are its own.
        protocol: how its checkpoint is evaluated; ``segment`` uses it by default.
        num_classes: channels of the logits.

    Shape:
        float [B, 3, H, W], RGB, normalised by ``mean`` and ``std`` → logits
        [B, num_classes, ceil(H / stride), ceil(W / stride)].
        In training mode a pair: the logits and the auxiliary head's logits, of stage 3's size.

    Raises:
        ValueError: in a call, if the images are no floating-point tensor [B, 3, H, W].
    """

    architecture: Architecture

    def __init__(
        self, architecture: Architecture, protocol: Protocol, num_classes: int = 19
    ) -> None:
        super().__init__(architecture, protocol, num_classes)
        self.stride = architecture.stride
        self.mean, self.std = architecture.mean, architecture.std
        stage3, stage4 = (architecture.base_channels * Bottleneck.expansion * s for s in (4, 8))
        self.backbone = ResNet(
            architecture.blocks,
            architecture.base_channels,
            strides=architecture.strides,
            dilations=architecture.dilations,
            contract_dilation=architecture.contract_dilation,
            multi_grid=architecture.multi_grid,
            stem_channels=architecture.stem_channels,
            avg_down=architecture.avg_down,
        )
        self.decode_head = EMAHead(
            stage4,
            architecture.ema_channels,
            architecture.num_bases,
            architecture.num_stages,
            architecture.head_channels,
            num_classes,
            architecture.concat_input,
            architecture.out_relu,
            architecture.norm_shift,
        )
        self.auxiliary_head = FCNHead(stage3, architecture.head_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        check_images(images)
        *_, stage3, stage4 = self.backbone(images)
        logits = self.decode_head(stage4)
        return (logits, self.auxiliary_head(stage3)) if self.training else logits

    def fused_form(self, dtype: torch.dtype, channels_last: bool) -> "FusedEMANet":
        if type(self) is not EMANet:
            raise ValueError(f"fuse takes an EMANet, got {type(self).__name__}")
        if self.decode_head.fixed_reconstruction is not None:
            raise ValueError("a model with a fixed_reconstruction is an ablation and is not fused")
        altered = alteration(self)
        if altered is not None:
            raise ValueError(f"fuse takes an EMANet that nothing has altered, but here {altered}")
        return FusedEMANet(self, dtype, channels_last)

    def standard_form(self, dtype: torch.dtype) -> "FusedEMANet":
        fused = fuse(self, dtype=dtype, channels_last=False)
        assert isinstance(fused, FusedEMANet)
        fused.decode_head.standard = True
        return fused

    def reference_logits(self, images: Tensor) -> Tensor:
        """The logits by PyTorch's operations alone, whatever the EM attention's backend is."""
        *_, x = self.backbone(images)
        head = self.decode_head
        feats, attention = head.ema_in_conv(x), head.ema_module
        mid = head.ema_mid_conv(feats).flatten(2)
        steps = attention.num_stages, attention.norm_shift
        recon, _ = reference.em_attention(mid, attention.bases, *steps)
        out = F.relu(feats + head.ema_out_conv(F.relu(recon.view_as(feats))))
        out = head.bottleneck(out)
        if head.conv_cat is not None:
            out = head.conv_cat(torch.cat([x, out], dim=1))
        return head.conv_seg(out)


class FusedEMANet(FusedNetwork):
    """The fused form of an EMANet, made by ``fuse``.

    Shape:
        float [B, 3, H, W] → logits [B, num_classes, ceil(H / stride), ceil(W / stride)] in the
        network's dtype. No gradient flows through them. An image with NaN or infinity gets NaN.

    Raises:
        ValueError: in a call, if the images are no floating-point tensor [B, 3, H, W].
    """

    def __init__(self, model: EMANet, dtype: torch.dtype, channels_last: bool) -> None:
        super().__init__(model, dtype, channels_last)
        self.backbone = _fused_backbone(model.backbone, dtype, channels_last)
        self.decode_head = FusedHead(model.decode_head, dtype, channels_last)

    def choose_by(self, backend: str) -> bool:
        layers = (m for m in self.modules() if isinstance(m, (FusedConv, FusedHead)))
        choosing = [layer for layer in layers if layer.backend in OPEN_BACKENDS]
        for layer in choosing:
            layer.backend = self.backend = backend
        return bool(choosing)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        check_images(images)
        with without_autocast(images.device.type):
            layout = torch.channels_last if self.channels_last else torch.contiguous_format
            # One copy for both dtype and layout; ``to`` alone returns some views as they are. No
            # name holds the copy, so that ``run_backbone`` can free it.
            x = run_backbone(
                self.backbone,
                images.to(self.dtype, memory_format=layout).contiguous(memory_format=layout),
            )
            x = self.decode_head.shared_conv(x)
            logits = self.decode_head(*x)
        if self.channels_last:  # then a library's ReLU may turn NaN into 0
            finite = images.isfinite().flatten(1).all(1)
            logits.masked_fill_(~finite[:, None, None, None], math.nan)
        return logits


class FusedHead(nn.Module):
    """EMANet's decode head with ``conv_cat`` split into a part for each of its two inputs.

    ``shared_conv`` is ``ema_in_conv`` together with the part of ``conv_cat`` that reads the head's
    input. ``conv_cat`` here is the other part; it adds its output to the output of the first part.
    In a head without ``conv_cat``, ``shared_conv`` is ``ema_in_conv`` alone.

    Attributes:
        standard: whether PyTorch's own operators compute the EM attention, in float32.
    """

    shared_conv: SharedConv | InputConv
    conv_cat: FusedConv | None
    bases: Tensor
    mid_weight: Tensor
    mid_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor

    def __init__(self, head: EMAHead, dtype: torch.dtype, channels_last: bool) -> None:
        super().__init__()
        attention = head.ema_module
        self.num_stages, self.backend = attention.num_stages, attention.backend
        self.norm_shift = attention.norm_shift
        self.out_relu = head.ema_out_conv.act is not None
        self.standard = False

        first, *rest = input_parts(head, dtype)
        if rest:
            self.shared_conv = SharedConv(first, rest[0], channels_last)
            self.conv_cat = FusedConv(*rest[1], channels_last)
        else:
            self.shared_conv, self.conv_cat = InputConv(*first, channels_last), None
        self.bottleneck = fused_conv(*_parts(head.bottleneck), dtype, channels_last)
        self.conv_seg = fused_conv(head.conv_seg, None, dtype, channels_last, relu=False)

        mid_weight, mid_bias = folded(*_parts(head.ema_mid_conv), dtype)
        out_weight, out_bias = folded(*_parts(head.ema_out_conv), dtype)
        block = {
            "bases": attention.bases.to(dtype, copy=True),
            "mid_weight": mid_weight.flatten(1),
            "mid_bias": mid_bias,
            "out_weight": out_weight.flatten(1),
            "out_bias": out_bias,
        }
        for name, value in block.items():
            self.register_buffer(name, value)

    def forward(self, feats: Tensor, partial: Tensor | None) -> Tensor:
        """From the outputs of ``shared_conv`` to logits.

        The caller runs ``shared_conv``, so that it can free the backbone's output, the largest
        tensor, before this call.
        """
        if self.shared_conv.merged:
            feats = feats.relu().to(self.bases.dtype)
        feats = self.bottleneck(self._attention_block(feats))
        if self.conv_cat is not None:
            feats = self.conv_cat(feats, partial)
        return self.conv_seg(feats)

    def _attention_block(self, feats: Tensor) -> Tensor:
        weights = self.mid_weight, self.mid_bias, self.out_weight, self.out_bias
        if self.standard:
            positions = feats.flatten(2)
            arguments = positions, self.bases, *weights, self.num_stages
            out, _ = reference.em_attention_block(*arguments, self.norm_shift, self.out_relu)
            return out.view_as(feats)
        out, _ = em_attention_block(
            feats,
            self.bases,
            *weights,
            self.num_stages,
            norm_shift=self.norm_shift,
            out_relu=self.out_relu,
            backend=self.backend,
        )
        return out


def input_parts(head: EMAHead, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], ...]:
    """Folded weight and bias of ``ema_in_conv``, and of both parts of ``conv_cat`` if there is one.

    The first part of ``conv_cat`` reads the head's input. It has no bias; the second part has it.
    """
    weight, bias = folded(*_parts(head.ema_in_conv), dtype)
    if head.conv_cat is None:
        return ((weight, bias),)
    cat_weight, cat_bias = folded(*_parts(head.conv_cat), dtype)
    of_input, of_rest = cat_weight.tensor_split([weight.shape[1]], dim=1)
    return (weight, bias), (of_input, torch.zeros_like(cat_bias)), (of_rest, cat_bias)


def _fused_backbone(backbone: ResNet, dtype: torch.dtype, channels_last: bool) -> nn.Sequential:
    blocks = (module for module in backbone.modules() if isinstance(module, Bottleneck))
    return nn.Sequential(
        *(fused_conv(*pair, dtype, channels_last) for pair in convs_with_norms(backbone.stem)),
        FusedMaxPool(channels_last),
        *(FusedBottleneck(block, dtype, channels_last) for block in blocks),
    )


def _parts(module: ConvModule) -> tuple[nn.Conv2d, nn.BatchNorm2d | None]:
    return module.conv, module.bn
