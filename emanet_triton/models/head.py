"""The EM attention layer, the EMA unit, and EMANet's two heads (mmseg parameter names)."""

import math
from numbers import Integral

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from emanet_triton.kernels.checks import BACKENDS, check_choice, check_shift
from emanet_triton.kernels.em.op import em_attention
from emanet_triton.kernels.em.tiles import MAX_BASES, MAX_CHANNELS


class EMAttention(nn.Module):
    """Expectation-maximization attention (Li et al., ICCV 2019; mmseg ``EMAModule``).

    In training mode a call also moves ``bases`` towards the bases of the batch, averaged over the
    batch and, if torch.distributed is initialised, over the ranks. If the bases of a batch are not
    finite, for example after an overflow, ``bases`` do not change. No gradient flows through the
    reconstruction, as in mmseg.

    Args:
        channels: C, channels of the features, at most 2048.
        num_bases: K, number of bases, at most 256.
        num_stages: number of EM iterations, at least 1.
        momentum: weight of a training batch in the moving average of ``bases``, in [0, 1].
        backend: "triton", "torch" (PyTorch's operations), or "auto" to choose by the device; see
            ``em_attention``.
        norm_shift: added to both norms of an M step, finite and at least 0; see ``em_attention``.

    Shape:
        features [B, C, H, W], float32, float16 or bfloat16 → reconstruction of the same shape,
        dtype and memory format. B may be 0.

    Raises:
        ValueError: an argument is out of its range, the features are not [B, C, H, W], or the
            backend cannot run on their device.
    """

    def __init__(
        self,
        channels: int,
        num_bases: int = 64,
        num_stages: int = 3,
        momentum: float = 0.1,
        backend: str = "auto",
        norm_shift: float = 0.0,
    ) -> None:
        super().__init__()
        counts = channels, num_bases, num_stages
        if not all(isinstance(count, Integral) and count >= 1 for count in counts):
            raise ValueError(
                "channels, num_bases and num_stages must be integers of at least 1, "
                f"got {channels}, {num_bases} and {num_stages}"
            )
        if channels > MAX_CHANNELS or num_bases > MAX_BASES:
            raise ValueError(
                f"expected at most {MAX_CHANNELS} channels and {MAX_BASES} bases, "
                f"got {channels} and {num_bases}"
            )
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        check_choice("backend", backend, BACKENDS)
        check_shift("norm_shift", norm_shift)
        self.num_stages = num_stages
        self.norm_shift = norm_shift
        self.momentum = momentum
        self.backend = backend
        bases = torch.empty(1, channels, num_bases).normal_(0, math.sqrt(2 / num_bases))
        self.bases: Tensor
        self.register_buffer("bases", F.normalize(bases, dim=1))

    def forward(self, feats: Tensor) -> Tensor:
        _check_features(feats, self.bases.shape[1])
        recon, bases = em_attention(
            feats, self.bases, self.num_stages, norm_shift=self.norm_shift, backend=self.backend
        )
        if self.training:
            self._update_bases(bases)
        return recon

    @torch.no_grad()
    def _update_bases(self, bases: Tensor) -> None:
        mean = bases.float().mean(dim=0, keepdim=True)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        moved = self.bases.lerp(F.normalize(mean, dim=1).to(self.bases.dtype), self.momentum)
        # torch.where does not wait for a GPU, as an ``if`` would. All ranks have the same mean.
        self.bases.copy_(torch.where(mean.isfinite().all(), moved, self.bases))

    def extra_repr(self) -> str:
        _, channels, num_bases = self.bases.shape
        options = f"num_stages={self.num_stages}, backend={self.backend!r}"
        if self.norm_shift:
            options += f", norm_shift={self.norm_shift}"
        return f"{channels}, num_bases={num_bases}, {options}"


def _check_features(feats: Tensor, channels: int) -> None:
    if feats.dim() != 4 or feats.shape[1] != channels:
        raise ValueError(f"features must be [B, {channels}, H, W], got {list(feats.shape)}")


def attentions(model: nn.Module) -> list[EMAttention]:
    """The EM attention layers of a model."""
    return [module for module in model.modules() if isinstance(module, EMAttention)]


class ConvModule(nn.Module):
    """Convolution, batch norm and ReLU (mmcv ``ConvModule``: same names and initialisation).

    The initialisation matters because ``ema_mid_conv`` is never trained. With smaller weights the
    softmax of the EM attention would be flat and the reconstruction the same at all pixels.
    """

    def __init__(
        self, in_channels: int, channels: int, kernel_size: int, norm: bool = True, act: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, channels, kernel_size, padding=kernel_size // 2, bias=not norm
        )
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.bn = nn.BatchNorm2d(channels) if norm else None
        self.act = nn.ReLU(inplace=True) if act else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        return x if self.act is None else self.act(x)


def _mid_conv(channels: int) -> ConvModule:
    """The 1x1 convolution before the EM attention: it maps [0, inf) to (-inf, inf).

    It is frozen, since no gradient reaches it through the EM steps.
    """
    conv = ConvModule(channels, channels, 1, norm=False, act=False)
    conv.requires_grad_(False)
    return conv


def _out_conv(channels: int, relu: bool) -> ConvModule:
    """The 1x1 convolution after the EM attention, with its batch norm."""
    return ConvModule(channels, channels, 1, act=relu)


def _residual_sum(feats: Tensor, reconstruction: Tensor, out_conv: nn.Module) -> Tensor:
    """The sum at the end of an EMA unit, before its ReLU."""
    return feats + out_conv(F.relu(reconstruction))


class EMAUnit(nn.Module):
    """The EMA unit (Li et al., section 3.3, "EMAU"): a residual block around the EM attention.

    It can stand where a network has a self-attention or non-local block::

        relu(x + norm(conv1x1(relu(attention(conv1x1(x))))))

    The first convolution keeps its initial weights, because no gradient flows through the
    attention. In training mode a call moves the attention's bases; see ``EMAttention``.

    The parameters have the names and the shapes of those in ``EMAHead``, so the weights of a
    published head fit.

    Args:
        channels: C of the features.
        num_bases: K of the EM attention.
        num_stages: EM iterations, at least 1.
        relu: whether a ReLU follows the sum, as in the paper. Leave it out where features may be
            negative, for example in front of a normalisation.
        out_relu: whether a ReLU also follows the norm, as in PaddleSeg's EMANet.
        norm_shift: as in ``EMAttention``.

    Shape:
        features [B, C, H, W] → the same shape.

    Raises:
        ValueError: an argument is out of its range, or the features are not [B, C, H, W].
    """

    def __init__(
        self,
        channels: int,
        num_bases: int = 64,
        num_stages: int = 3,
        relu: bool = True,
        out_relu: bool = False,
        norm_shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.ema_module = EMAttention(channels, num_bases, num_stages, norm_shift=norm_shift)
        self.ema_mid_conv = _mid_conv(channels)
        self.ema_out_conv = _out_conv(channels, out_relu)
        self.relu = relu

    def forward(self, feats: Tensor) -> Tensor:
        _check_features(feats, self.ema_module.bases.shape[1])
        out = _residual_sum(feats, self.ema_module(self.ema_mid_conv(feats)), self.ema_out_conv)
        return F.relu(out) if self.relu else out

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    """From features to logits, initialised as in mmseg (``BaseDecodeHead``)."""
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, 0, 0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


class EMAHead(nn.Module):
    """EMANet's decode head (mmseg ``EMAHead``), for the last features of any backbone.

    The head runs layer by layer, so that hooks, subclasses and replaced layers take effect.

    Attributes:
        fixed_reconstruction: for ablations, a tensor that broadcasts to [B, ema_channels, h, w]
            and replaces the reconstruction of the EM attention; otherwise ``None``.

    Args:
        in_channels: channels of the backbone's last features.
        ema_channels: C of the EM attention.
        num_bases: K of the EM attention.
        num_stages: EM iterations.
        channels: of the 3x3 convolutions after the attention.
        num_classes: channels of the logits.
        concat_input: whether there is ``conv_cat``, a 3x3 convolution of the head's input and the
            output of ``bottleneck`` (mmseg ``concat_input``).
        out_relu: whether a ReLU follows the norm of ``ema_out_conv``, as in PaddleSeg's EMANet.
        norm_shift: as in ``EMAttention``.

    Shape:
        [B, in_channels, h, w] → logits [B, num_classes, h, w].

    Raises:
        ValueError: ``ema_channels``, ``num_bases``, ``num_stages`` or ``norm_shift`` is out of the
            range in ``EMAttention``.
    """

    def __init__(
        self,
        in_channels: int,
        ema_channels: int = 512,
        num_bases: int = 64,
        num_stages: int = 3,
        channels: int = 256,
        num_classes: int = 19,
        concat_input: bool = True,
        out_relu: bool = False,
        norm_shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.fixed_reconstruction: Tensor | None = None
        self.conv_seg = _classifier(channels, num_classes)
        self.dropout = nn.Dropout2d(0.1)
        self.ema_module = EMAttention(ema_channels, num_bases, num_stages, norm_shift=norm_shift)
        self.ema_in_conv = ConvModule(in_channels, ema_channels, 3)
        self.ema_mid_conv = _mid_conv(ema_channels)
        self.ema_out_conv = _out_conv(ema_channels, out_relu)
        self.bottleneck = ConvModule(ema_channels, channels, 3)
        self.conv_cat = ConvModule(in_channels + channels, channels, 3) if concat_input else None

    def forward(self, x: Tensor) -> Tensor:
        feats = self.ema_in_conv(x)
        out = F.relu(_residual_sum(feats, self._reconstruction(feats), self.ema_out_conv))
        out = self.bottleneck(out)
        if self.conv_cat is not None:
            out = self.conv_cat(torch.cat([x, out], dim=1))
        return self.conv_seg(self.dropout(out))

    def _reconstruction(self, feats: Tensor) -> Tensor:
        if self.fixed_reconstruction is not None:
            return self.fixed_reconstruction.to(feats).expand_as(feats)
        return self.ema_module(self.ema_mid_conv(feats))


class FCNHead(nn.Module):
    """The auxiliary head, used in training only (mmseg ``FCNHead`` with one convolution).

    Shape:
        [B, in_channels, h, w] → logits [B, num_classes, h, w].
    """

    def __init__(self, in_channels: int, channels: int = 256, num_classes: int = 19) -> None:
        super().__init__()
        self.conv_seg = _classifier(channels, num_classes)
        self.dropout = nn.Dropout2d(0.1)
        self.convs = nn.Sequential(ConvModule(in_channels, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self.convs(x)))
