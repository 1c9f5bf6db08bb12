"""The operators of convolution: they check arguments, choose a backend, and are registered."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from emanet_triton.kernels import choice, flops
from emanet_triton.kernels.checks import (
    OPEN_BACKENDS,
    check_at_least,
    check_choice,
    check_device,
    check_dtype,
    check_float,
    check_layout,
    check_shape,
)
from emanet_triton.kernels.conv.backends import CONVOLUTIONS, candidates
from emanet_triton.kernels.conv.eager import out_shape
from emanet_triton.kernels.conv.exact import ConvCheck, exact_conv
from emanet_triton.kernels.conv.tiles import EXPAND_REDUCE_CHANNELS
from emanet_triton.kernels.device import HAS_TRITON, triton_kernels
from emanet_triton.kernels.registration import Operator, register
from emanet_triton.kernels.tile import FP32_PRECISIONS

CONV_BACKENDS = (*OPEN_BACKENDS, *CONVOLUTIONS)
EXPAND_REDUCE_BACKENDS = (*OPEN_BACKENDS, "triton", "separate")
_NHWC = torch.channels_last


def pack_weight(weight: Tensor) -> Tensor:
    """Copy a weight [O, C, k, k] to channels-last memory, which is the matrix [O, k * k * C].

    Every backend reads this layout. The operators copy a weight of another layout at every call.
    """
    return weight.contiguous(memory_format=_NHWC)


@torch.no_grad()
def conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    relu: bool = True,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    precision: str = "ieee",
) -> Tensor:
    """Convolve, add bias and residual and apply ReLU: one pass over the output where possible.

    Products of float16 and bfloat16 are summed in float32. Our kernels add bias and residual to
    this sum and round once. cuDNN does the same if a ReLU follows and the residual, if any, has the
    dtype of ``x``. In all other cases the convolution is first rounded to the dtype of ``x``.

    Args:
        x: [B, C, H, W]; float32, float16 or bfloat16. Channels-last memory needs no copy.
        weight: [O, C, k, k], k 1 or 3, in the dtype of ``x``, from ``pack_weight``. The padding is
            ``dilation * (k // 2)``.
        bias: [O], in the dtype of ``x`` or float32.
        residual: [B, O, ceil(H / stride), ceil(W / stride)], in the dtype of ``x`` or float32.
        stride: 1 or 2.
        dilation: at least 1.
        relu: whether negative values become zero.
        out_dtype: the dtype of ``x``, which is the default, or float32.
        backend: ``"torch"`` runs anywhere, ``"triton"`` on a GPU and in Triton's interpreter,
            ``"cudnn"`` on an NVIDIA GPU; with ``"cudnn-benchmark"`` cuDNN measures which of its
            engines is the fastest. ``"gluon"`` is a second kernel of ours: for float16 and bfloat16
            on a Hopper GPU, stride 1, C a multiple of 64 and O of 8. ``"auto"`` is ``"torch"`` on a
            CPU. On a GPU it measures at the first call of a shape (see ``choice``), and takes the
            fastest backend whose largest error is at most twice the error of ``"torch"``. For
            float32 at ``"ieee"`` Triton takes part with ``"tf32x3"``, and its error must be as
            small as ``"ieee"`` requires.
            ``"fastest"`` is ``"auto"``, but measures ``"gluon"``, too, which no GPU has run yet.
            ``"fastest-known"`` takes what ``"fastest"`` has chosen earlier for the shape on this
            kind of GPU, and else is ``"auto"``.
        precision: how a GPU multiplies float32: ``"ieee"``, ``"tf32x3"`` (Triton on an NVIDIA GPU;
            elsewhere the same as ``"ieee"``) or ``"tf32"``.

    Returns:
        [B, O, ceil(H / stride), ceil(W / stride)], channels-last. No gradient flows through it.

    Raises:
        ValueError: an argument is not as above, or the backend cannot run here.
    """
    check_layout("x", x, "B, C, H, W")
    check_float("x", x.dtype)
    _check_parameters(x, x.shape[1], "", weight, bias, (1, 3))
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")
    check_at_least("dilation", dilation, 1)
    dtypes = x.dtype, torch.float32
    if residual is not None:
        check_shape("residual", residual, out_shape(x, weight, stride))
        _check_like(x, "residual", residual, dtypes)
    check_dtype("out_dtype", out_dtype or x.dtype, dtypes)
    check_choice("backend", backend, CONV_BACKENDS)
    check_choice("precision", precision, FP32_PRECISIONS)
    return torch.ops.emanet_triton.conv_bias_act(
        x, weight, bias, residual, stride, dilation, relu, out_dtype or x.dtype, backend, precision
    )


@torch.no_grad()
def expand_reduce(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor,
    *,
    backend: str = "auto",
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """Run the last 1x1 convolution of a residual block and the first of the next block.

    The first convolution expands the channels; the residual and a ReLU follow. The second reduces
    its output, and a ReLU follows. Batch norms are folded into the weights and biases.

    Args:
        x: [B, P, H, W]; float32, float16 or bfloat16. Channels-last memory needs no copy.
        weights: [O, P, 1, 1] and [R, O, 1, 1], in the dtype of ``x``, from ``pack_weight``.
        biases: [O] and [R], in the dtype of ``x`` or float32.
        residual: [B, O, H, W], in the dtype of ``x``.
        backend: ``"triton"`` is one kernel, for float16 and bfloat16: P is 64, 128 or 256, R is P
            or 2P and at most 256, and O is a multiple of 64. ``"separate"`` is two calls of
            ``conv_bias_act``. ``"auto"`` is ``"separate"`` on a CPU and measures on a GPU, as in
            ``conv_bias_act``; so does ``"fastest"``, also for each of two separate convolutions.
            ``"fastest-known"`` takes what ``"fastest"`` has chosen earlier, and else is ``"auto"``.
        precision: for the separate convolutions, as in ``conv_bias_act``.

    Returns:
        [B, O, H, W] and [B, R, H, W], channels-last. No gradient flows through them.

    Raises:
        ValueError: an argument is not as above, or the backend cannot run here.
    """
    check_layout("x", x, "B, C, H, W")
    check_float("x", x.dtype)
    if len(weights) != 2 or len(biases) != 2:
        raise ValueError(
            f"weights and biases must be two each, got {len(weights)} and {len(biases)}"
        )
    channels = x.shape[1]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        _check_parameters(x, channels, f"{i + 1}", weight, bias, (1,))
        channels = weight.shape[0]
    check_shape("residual", residual, out_shape(x, weights[0], 1))
    _check_like(x, "residual", residual, (x.dtype,))
    check_choice("backend", backend, EXPAND_REDUCE_BACKENDS)
    check_choice("precision", precision, FP32_PRECISIONS)
    return torch.ops.emanet_triton.expand_reduce(
        x, list(weights), list(biases), residual, backend, precision
    )


def _check_parameters(
    x: Tensor, channels: int, number: str, weight: Tensor, bias: Tensor, kernels: tuple[int, ...]
) -> None:
    name = f"weight{number}"
    is_kernel = weight.dim() == 4 and weight.shape[2] == weight.shape[3] in kernels
    if not is_kernel or weight.shape[1] != channels or weight.shape[0] == 0:
        wanted = " or ".join(f"[O, {channels}, {kernel}, {kernel}]" for kernel in kernels)
        raise ValueError(f"{name} must be {wanted}, got {list(weight.shape)}")
    _check_like(x, name, weight, (x.dtype,))
    check_shape(f"bias{number}", bias, [weight.shape[0]])
    _check_like(x, f"bias{number}", bias, (x.dtype, torch.float32))


def _check_like(x: Tensor, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    check_dtype(name, tensor.dtype, dtypes)
    check_device(name, tensor, "x", x)


def _run_conv_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: int,
    dilation: int,
    relu: bool,
    out_dtype: torch.dtype,
    backend: str,
    precision: str,
) -> Tensor:
    arguments = x, weight, bias, residual, stride, dilation, relu, out_dtype
    if backend in CONVOLUTIONS:
        return CONVOLUTIONS[backend](*arguments, precision)
    added = None if residual is None else residual.dtype
    shapes = x.shape, weight.shape
    geometry = stride, dilation, x.dtype, added, out_dtype, relu, precision
    found = None
    if backend == "fastest-known" and x.is_cuda:
        found = choice.known(_key(*shapes, *geometry, True), x.device)
    gluon = backend == "fastest" or found is not None
    pairs = candidates(x, weight, residual, stride, relu, precision, gluon)
    calls = {
        name: functools.partial(CONVOLUTIONS[candidate], *arguments, its_precision)
        for name, (candidate, its_precision) in pairs.items()
    }
    if found in calls:
        return calls[found]()
    if backend != "fastest":
        calls.pop("gluon", None)  # so it is not measured if an earlier winner is gone
    if len(calls) == 1:
        return calls["torch"]()
    key = _key(*shapes, *geometry, "gluon" in calls)

    def make_checks() -> tuple[ConvCheck]:
        check = ConvCheck(
            x, residual, out_shape(x, weight, stride), out_dtype, stride,
            reach=dilation * (weight.shape[2] // 2),
            relu=relu,
            linear=lambda rows: exact_conv(rows, weight, bias, stride, dilation),
            plain=calls["torch"],
        )  # fmt: skip
        return (check,)

    return calls[choice.choose(key, x.device, calls, "torch", make_checks)]()


@functools.lru_cache(maxsize=4096)
def _key(
    x: torch.Size,
    weight: torch.Size,
    stride: int,
    dilation: int,
    dtype: torch.dtype,
    residual: torch.dtype | None,
    out_dtype: torch.dtype,
    relu: bool,
    precision: str,
    gluon: bool,
) -> str:
    """All that decides the fastest backend of a convolution on one device."""
    return (
        f"convolution of {list(x)} with {list(weight)}, stride {stride}, dilation {dilation}, "
        f"{dtype}, residual {residual}, output {out_dtype}, relu {relu}, {precision}"
        + (", or by gluon" if gluon else "")
    )


def _separate(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: Tensor,
    backend: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    options = 1, 1, True, x.dtype, backend, precision
    out = _run_conv_bias_act(x, weights[0], biases[0], residual, *options)
    return out, _run_conv_bias_act(out, weights[1], biases[1], None, *options)


def _expand_reduce_by_triton(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    with triton_kernels("conv.expand_reduce", x) as kernels:
        return kernels.expand_reduce(x, *arguments)


def why_not_one_kernel(dtype: torch.dtype, planes: int, outputs: int, reduced: int) -> str | None:
    """What the kernel of ``expand_reduce`` needs and does not get; None if it can run."""
    if dtype == torch.float32:
        return "float16 or bfloat16, got float32"
    if (planes, reduced) not in EXPAND_REDUCE_CHANNELS:
        pairs = ", ".join(f"{p} and {r}" for p, r in EXPAND_REDUCE_CHANNELS)
        return f"input and reduced channels of {pairs}, got {planes} and {reduced}"
    if outputs % 64:
        return f"expanded channels in multiples of 64, got {outputs}"
    return None


def _run_expand_reduce(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: Tensor,
    backend: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    outputs, planes, reduced = *weights[0].shape[:2], len(weights[1])
    why_not = why_not_one_kernel(x.dtype, planes, outputs, reduced)
    if backend == "triton" and why_not:
        raise ValueError(f"backend 'triton' of expand_reduce needs {why_not}")
    arguments = x, weights, biases, residual
    sizes = x.shape, outputs, reduced, x.dtype
    within = backend if backend in OPEN_BACKENDS else "auto"
    if within == "fastest-known" and x.is_cuda and HAS_TRITON and not why_not:
        within = within if choice.known(_expand_reduce_key(*sizes, True), x.device) else "auto"
    calls = {
        "separate": functools.partial(_separate, *arguments, within, precision),
        "triton": functools.partial(_expand_reduce_by_triton, *arguments),
    }
    if backend in OPEN_BACKENDS:
        backend = "separate"
        if x.is_cuda and HAS_TRITON and not why_not:
            key = _expand_reduce_key(*sizes, within != "auto")
            make_checks = functools.partial(_expand_reduce_checks, *arguments, precision)
            backend = choice.choose(key, x.device, calls, "separate", make_checks)
    return calls[backend]()


@functools.lru_cache(maxsize=4096)
def _expand_reduce_key(
    x: torch.Size, outputs: int, reduced: int, dtype: torch.dtype, gluon: bool
) -> str:
    """All that decides the faster way on one device."""
    sizes = f"{list(x)}, {outputs} and {reduced} channels, {dtype}"
    return f"expand and reduce {sizes}" + (", or by gluon" if gluon else "")


def _expand_reduce_checks(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], residual: Tensor, precision: str
) -> tuple[ConvCheck, ConvCheck]:
    plain = functools.partial(_separate, x, weights, biases, residual, "torch", precision)
    expanded = ConvCheck(
        x, residual, out_shape(x, weights[0], 1), x.dtype, stride=1, reach=0, relu=True,
        linear=lambda rows: exact_conv(rows, weights[0], biases[0], 1, 1),
        plain=lambda: plain()[0],
    )  # fmt: skip
    reduced = replace(
        expanded,
        out_shape=out_shape(x, weights[1], 1),
        pointwise=lambda rows: exact_conv(rows, weights[1], biases[1], 1, 1).relu(),
        plain=lambda: plain()[1],
    )
    return expanded, reduced


def _fake_conv_bias_act(x, weight, bias, residual, stride, dilation, relu, out_dtype, *_) -> Tensor:
    shape = out_shape(x, weight, stride)
    return torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=_NHWC)


def _fake_expand_reduce(x, weights, *_) -> tuple[Tensor, Tensor]:
    expanded, reduced = (
        torch.empty(out_shape(x, w, 1), dtype=x.dtype, device=x.device, memory_format=_NHWC)
        for w in weights
    )
    return expanded, reduced


def _expand_reduce_flops(x: flops.Shape, weights: Sequence[flops.Shape], *_, **__) -> int:
    pixels = (x[0], *x[2:])
    return sum(flops.convolution((*pixels, weight[0]), weight) for weight in weights)


register(
    __name__,
    Operator(
        "conv_bias_act", _run_conv_bias_act, _fake_conv_bias_act, flops=flops.first_convolution
    ),
    Operator("expand_reduce", _run_expand_reduce, _fake_expand_reduce, flops=_expand_reduce_flops),
)
