"""The operators of EM attention: they check arguments, choose a backend, and are registered."""

import math

import torch
from torch import Tensor

from emanet_triton.kernels.checks import (
    OPEN_BACKENDS,
    check_at_least,
    check_choice,
    check_device,
    check_dtype,
    check_float,
    check_shape,
    check_shift,
    check_tensor,
)
from emanet_triton.kernels.device import auto_backend, triton_kernels
from emanet_triton.kernels.em import eager, passes
from emanet_triton.kernels.em.tiles import MAX_BASES, MAX_CHANNELS, ONE_PASS
from emanet_triton.kernels.flops import Shape
from emanet_triton.kernels.registration import Operator, register
from emanet_triton.kernels.tile import FP32_PRECISIONS

EM_BACKENDS = (*OPEN_BACKENDS, "triton", "torch", *ONE_PASS)


@torch.no_grad()
def em_attention(
    feats: Tensor,
    bases: Tensor,
    num_stages: int = 3,
    *,
    norm_shift: float = 0.0,
    backend: str = "auto",
    precision: str = "tf32x3",
) -> tuple[Tensor, Tensor]:
    """Run the batched EM iterations (Li et al., ICCV 2019, eq. 12-14; mmseg ``EMAModule``).

    Args:
        feats: features X, [B, C, H, W] or [B, N, C], any strides; C up to 2048; float32, float16 or
            bfloat16. Channels-last memory is the fastest. B may be 0.
        bases: initial bases, [1 or B, C, K], K up to 256; in the dtype of ``feats`` or float32.
        num_stages: number of E and M steps, at least 1.
        norm_shift: added to both norms of an M step, at least 0. The authors' EMANet adds 1e-6,
            mmsegmentation's none.
        backend: ``"torch"`` runs anywhere, ``"triton"`` on a GPU and in Triton's interpreter.
            ``"one-pass-128"`` and ``"one-pass-16"`` read the features once for E and M step, in up
            to so many ranges of positions an image, and end the block with a kernel of their own.
            They need an NVIDIA Hopper GPU, half precision,
            512 channels, up to 64 bases, and channels-last memory in which positions begin at
            multiples of 16 bytes. No GPU has run them yet. ``"auto"`` is ``"torch"`` on a CPU and
            ``"triton"`` on a GPU. ``"fastest"`` is the same, but where ``"one-pass-128"`` can run
            it measures all three at the first call of a number of positions (see ``choice``).
            ``"fastest-known"`` takes what ``"fastest"`` has chosen earlier, and else is ``"auto"``.
        precision: how the Triton kernels multiply float32 features: ``"tf32x3"`` on an NVIDIA
            GPU's tensor cores, each number split in two, with about the error of float32 (on AMD
            the same as ``"ieee"``); ``"ieee"`` without tensor cores; or ``"tf32"``.

    Returns:
        The reconstruction, with the shape, dtype and memory format of ``feats``, and the bases
        after the last M step, [B, C, K], in the same dtype. No gradient flows through either.

    Raises:
        ValueError: an argument is not as above.
    """
    _check(feats, bases, num_stages, norm_shift, backend, precision)
    recon, new_bases = torch.ops.emanet_triton.em_attention(
        as_positions(feats), bases, num_stages, norm_shift, backend, precision
    )
    return _as_feats(recon, feats), new_bases


@torch.no_grad()
def em_attention_block(
    feats: Tensor,
    bases: Tensor,
    mid_weight: Tensor,
    mid_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_stages: int = 3,
    *,
    norm_shift: float = 0.0,
    out_relu: bool = False,
    backend: str = "auto",
    precision: str = "tf32x3",
) -> tuple[Tensor, Tensor]:
    """Run EM attention with the 1x1 convolutions and the residual around it (mmseg ``EMAHead``).

    The output is relu(F + out(relu(EM attention of mid(F)))); neither mid(F) nor the
    reconstruction is written to memory.

    Args:
        feats: features F, as X of ``em_attention``.
        bases: initial bases, as in ``em_attention``.
        mid_weight, mid_bias: ``ema_mid_conv``, [C, C] and [C], floating point.
        out_weight, out_bias: ``ema_out_conv`` with its batch norm folded in, [C, C] and [C].
        num_stages, norm_shift, backend, precision: as in ``em_attention``.
        out_relu: whether a ReLU follows the out convolution, before F is added, as in PaddleSeg's
            EMANet.

    Returns:
        The block's output, with the shape, dtype and memory format of ``feats``, and the bases
        after the last M step, [B, C, K], in the same dtype. No gradient flows through either.

    Raises:
        ValueError: an argument is not as above.
    """
    _check(feats, bases, num_stages, norm_shift, backend, precision)
    channels = bases.shape[1]
    weights = {
        "mid_weight": mid_weight,
        "mid_bias": mid_bias,
        "out_weight": out_weight,
        "out_bias": out_bias,
    }
    for name, weight in weights.items():
        check_tensor(name, weight)
        check_shape(name, weight, [channels] * (2 if name.endswith("weight") else 1))
        if not weight.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {weight.dtype}")
        check_device(name, weight, "feats", feats)
    out, new_bases = torch.ops.emanet_triton.em_attention_block(
        as_positions(feats), bases, mid_weight, mid_bias, out_weight, out_bias,
        num_stages, norm_shift, out_relu, backend, precision,
    )  # fmt: skip
    return _as_feats(out, feats), new_bases


def _check(
    feats: Tensor, bases: Tensor, num_stages: int, norm_shift: float, backend: str, precision: str
) -> None:
    check_tensor("feats", feats)
    check_tensor("bases", bases)
    if feats.dim() not in (3, 4):
        raise ValueError(f"feats must be [B, C, H, W] or [B, N, C], got {list(feats.shape)}")
    channels = feats.shape[1] if feats.dim() == 4 else feats.shape[2]
    if 0 in feats.shape[1:]:
        raise ValueError(f"feats must have channels and positions, got {list(feats.shape)}")
    if channels > MAX_CHANNELS:
        raise ValueError(f"feats must have at most {MAX_CHANNELS} channels, got {channels}")
    check_float("feats", feats.dtype)
    if bases.dim() != 3 or bases.shape[0] not in (1, feats.shape[0]) or bases.shape[1] != channels:
        batch = feats.shape[0]
        raise ValueError(f"bases must be [1 or {batch}, {channels}, K], got {list(bases.shape)}")
    if not 1 <= bases.shape[2] <= MAX_BASES:
        raise ValueError(f"bases must be 1 to {MAX_BASES} in number, got {bases.shape[2]}")
    check_dtype("bases", bases.dtype, (feats.dtype, torch.float32))
    check_device("bases", bases, "feats", feats)
    if isinstance(num_stages, bool) or not isinstance(num_stages, (int, torch.SymInt)):
        raise ValueError(f"num_stages must be an int, got {num_stages!r}")
    check_at_least("num_stages", num_stages, 1)
    check_shift("norm_shift", norm_shift)
    check_choice("backend", backend, EM_BACKENDS)
    check_choice("precision", precision, FP32_PRECISIONS)


def _by_torch(backend: str, feats: Tensor) -> bool:
    """Whether PyTorch runs. It is asked at each call, also of a program that was exported."""
    is_open = backend in OPEN_BACKENDS
    return (auto_backend(feats.is_cuda) if is_open else backend) == "torch"


def as_positions(feats: Tensor) -> Tensor:
    """[B, C, H, W] → [B, N, C], a view where the strides allow one; [B, N, C] as it is."""
    return feats.permute(0, 2, 3, 1).flatten(1, 2) if feats.dim() == 4 else feats


def _as_feats(out: Tensor, feats: Tensor) -> Tensor:
    """[B, N, C] → the shape of ``feats``."""
    return out.unflatten(1, feats.shape[2:]).permute(0, 3, 1, 2) if feats.dim() == 4 else out


def _run_em_attention(
    feats: Tensor, bases: Tensor, num_stages: int, norm_shift: float, backend: str, precision: str
) -> tuple[Tensor, Tensor]:
    options = num_stages, norm_shift
    if _by_torch(backend, feats):
        recon, new_bases = eager.run_attention(feats, bases, *options)
        return recon, new_bases.mT.contiguous().mT
    with triton_kernels("em.attention", feats) as kernels:
        return passes.run(
            backend, feats, (bases,), options,
            lambda ranges: kernels.run_attention(feats, bases, *options, precision, ranges),
            eager.run_attention,
        )  # fmt: skip


def _run_em_attention_block(
    feats: Tensor,
    bases: Tensor,
    mid_weight: Tensor,
    mid_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_stages: int,
    norm_shift: float,
    out_relu: bool,
    backend: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    tensors = bases, mid_weight, mid_bias, out_weight, out_bias
    options = num_stages, norm_shift, out_relu
    if _by_torch(backend, feats):
        out, new_bases = eager.run_block(feats, *tensors, *options)
        return out, new_bases.mT.contiguous().mT
    with triton_kernels("em.block", feats) as kernels:
        return passes.run(
            backend, feats, tensors, options,
            lambda ranges: kernels.run_block(feats, *tensors, *options, precision, ranges),
            eager.run_block,
        )  # fmt: skip


def _fake(feats: Tensor, bases: Tensor, *_) -> tuple[Tensor, Tensor]:
    batch, channels, num_bases = feats.shape[0], bases.shape[1], bases.shape[2]
    return torch.empty_like(feats), feats.new_empty(batch, num_bases, channels).mT


def _attention_flops(feats: Shape, bases: Shape, num_stages: int, *_, **__) -> int:
    """FLOPs of two products per stage, and of the reconstruction."""
    return 2 * math.prod(feats) * bases[2] * (2 * num_stages + 1)


def _block_flops(
    feats, bases, mid_weight, mid_bias, out_weight, out_bias, num_stages, *_, **__
) -> int:
    """FLOPs of the EM attention and of both 1x1 convolutions, also of the one that is folded."""
    layers = 2 * math.prod(feats) * (mid_weight[0] + out_weight[0])
    return _attention_flops(feats, bases, num_stages) + layers


register(
    __name__,
    Operator("em_attention", _run_em_attention, _fake, flops=_attention_flops),
    Operator("em_attention_block", _run_em_attention_block, _fake, flops=_block_flops),
)
