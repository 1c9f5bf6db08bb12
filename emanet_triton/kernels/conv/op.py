"""The operators of convolution: they check arguments, choose a backend, and are registered."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from emanet_triton.kernels import flops
from emanet_triton.kernels.checks import (
    check_at_least,
    check_choice,
    check_device,
    check_dtype,
    check_float,
    check_layout,
    check_shape,
)
from emanet_triton.kernels.conv import choice
from emanet_triton.kernels.conv.cudnn import (
    can_fuse,
    cudnn_benchmark_conv,
    cudnn_conv,
    has_cudnn,
)
from emanet_triton.kernels.conv.eager import out_shape, torch_conv
from emanet_triton.kernels.conv.exact import Check, exact_conv
from emanet_triton.kernels.conv.tiles import BOTTLENECK_PLANES
from emanet_triton.kernels.device import HAS_TRITON, triton_kernels
from emanet_triton.kernels.registration import Operator, register
from emanet_triton.kernels.tile import FP32_PRECISIONS

BOTTLENECK_BACKENDS = ("auto", "triton", "separate")
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

    Products of float16 and bfloat16 are summed in float32. Triton adds bias and residual to this
    sum and rounds once. cuDNN does the same if a ReLU follows and the residual, if any, has the
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
            engines is the fastest. ``"auto"`` is ``"torch"`` on a CPU. On a GPU it measures at the
            first call of a shape (see ``choice``), and takes the fastest backend whose largest
            error is at most twice the error of ``"torch"``. For float32 at ``"ieee"`` Triton takes
            part with ``"tf32x3"``, and its error must be as small as ``"ieee"`` requires.
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
def bottleneck(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None = None,
    *,
    backend: str = "auto",
    precision: str = "ieee",
) -> Tensor:
    """Run a residual block of stride and dilation 1 (mmseg ``Bottleneck``): 1x1, 3x3, 1x1.

    Batch norms are folded into the weights and biases.

    Args:
        x: [B, C, H, W]; float32, float16 or bfloat16. Channels-last memory needs no copy.
        weights: [P, C, 1, 1], [P, P, 3, 3] and [O, P, 1, 1], in the dtype of ``x``, from
            ``pack_weight``.
        biases: [P], [P] and [O], in the dtype of ``x`` or float32.
        residual: [B, O, H, W], in the dtype of ``x``; ``x`` unless given.
        backend: ``"triton"`` is one kernel, for float16 and bfloat16, P 64 or 128 and C and O
            multiples of 64; ``"separate"`` is three calls of ``conv_bias_act``. ``"auto"`` is
            ``"separate"`` on a CPU and measures on a GPU, as in ``conv_bias_act``.
        precision: for the separate convolutions, as in ``conv_bias_act``.

    Returns:
        [B, O, H, W], channels-last. No gradient flows through it.

    Raises:
        ValueError: an argument is not as above, or the backend cannot run here.
    """
    check_layout("x", x, "B, C, H, W")
    check_float("x", x.dtype)
    if len(weights) != 3 or len(biases) != 3:
        raise ValueError(
            f"weights and biases must be three each, got {len(weights)} and {len(biases)}"
        )
    channels = x.shape[1]
    for i, (weight, bias, kernel) in enumerate(zip(weights, biases, (1, 3, 1), strict=True)):
        _check_parameters(x, channels, f"{i + 1}", weight, bias, (kernel,))
        channels = weight.shape[0]
    residual = x if residual is None else residual
    check_shape("residual", residual, out_shape(x, weights[2], 1))
    _check_like(x, "residual", residual, (x.dtype,))
    check_choice("backend", backend, BOTTLENECK_BACKENDS)
    check_choice("precision", precision, FP32_PRECISIONS)
    return torch.ops.emanet_triton.bottleneck(
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


def _candidates(
    x: Tensor, residual: Tensor | None, relu: bool, precision: str
) -> dict[str, tuple[str, str]]:
    """{name: (backend, precision)} of the candidates on the device of x, the default first.

    Triton's ``"ieee"`` is no candidate for float32, because ``"tf32x3"`` is faster.
    """
    pairs = {"torch": ("torch", precision)}
    if has_cudnn(x):
        if can_fuse(x, residual, relu):
            pairs = {"cudnn": ("cudnn", precision)} | pairs
        pairs["cudnn-benchmark"] = "cudnn-benchmark", precision
    if x.is_cuda and HAS_TRITON:
        if x.dtype != torch.float32 or precision != "ieee":
            pairs["triton"] = "triton", precision
        elif torch.version.hip is None:  # AMD has no TF32
            pairs["triton-tf32x3"] = "triton", "tf32x3"
    return pairs


def _triton_conv(x: Tensor, *arguments) -> Tensor:
    with triton_kernels("conv.implicit_gemm", x) as kernels:
        return kernels.conv_bias_act(x, *arguments)


# Each takes x, weight, bias, residual, stride, dilation, relu, out_dtype and precision, as
# ``conv_bias_act`` has checked them, and returns the output, channels-last.
CONVOLUTIONS: dict[str, Callable[..., Tensor]] = {
    "cudnn": cudnn_conv,
    "cudnn-benchmark": cudnn_benchmark_conv,
    "triton": _triton_conv,
    "torch": torch_conv,
}
CONV_BACKENDS = ("auto", *CONVOLUTIONS)


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
    if backend != "auto":
        return CONVOLUTIONS[backend](*arguments, precision)
    calls = {
        name: functools.partial(CONVOLUTIONS[backend], *arguments, its_precision)
        for name, (backend, its_precision) in _candidates(x, residual, relu, precision).items()
    }
    if len(calls) == 1:
        return calls["torch"]()
    added = None if residual is None else residual.dtype
    key = _key(x.shape, weight.shape, stride, dilation, x.dtype, added, out_dtype, relu, precision)

    def make_check() -> Check:
        return Check(
            x, residual, out_shape(x, weight, stride), out_dtype, stride,
            reach=dilation * (weight.shape[2] // 2),
            relu=relu,
            linear=lambda rows: exact_conv(rows, weight, bias, stride, dilation),
            plain=calls["torch"],
        )  # fmt: skip

    return calls[choice.choose(key, x.device, calls, "torch", make_check)]()


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
) -> str:
    """All that decides the time of a convolution on one device."""
    return (
        f"convolution of {list(x)} with {list(weight)}, stride {stride}, dilation {dilation}, "
        f"{dtype}, residual {residual}, output {out_dtype}, relu {relu}, {precision}"
    )


def _separate(x, weights, biases, residual, backend: str, precision: str) -> Tensor:
    out = x
    for weight, bias, identity in zip(weights, biases, (None, None, residual), strict=True):
        out = _run_conv_bias_act(
            out, weight, bias, identity, 1, 1, True, x.dtype, backend, precision
        )
    return out


def _exact_bottleneck(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """The block without residual and last ReLU, by plain PyTorch in the dtype of x."""
    out = exact_conv(x, weights[0], biases[0], 1, 1).relu()
    out = exact_conv(out, weights[1], biases[1], 1, 1).relu()
    return exact_conv(out, weights[2], biases[2], 1, 1)


def _fused(x: Tensor, weights: list[Tensor], biases: list[Tensor], residual: Tensor) -> Tensor:
    with triton_kernels("conv.bottleneck", x) as kernels:
        return kernels.bottleneck(x, weights, biases, residual)


def _why_not_fused(x: Tensor, weights: list[Tensor]) -> str | None:
    outputs, planes = weights[2].shape[:2]
    if x.dtype == torch.float32:
        return "float16 or bfloat16, got float32"
    if planes not in BOTTLENECK_PLANES:
        return f"{' or '.join(map(str, BOTTLENECK_PLANES))} planes, got {planes}"
    if x.shape[1] % 64 or outputs % 64:
        return f"input and output channels in multiples of 64, got {x.shape[1]} and {outputs}"
    return None


def _run_bottleneck(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    residual: Tensor,
    backend: str,
    precision: str,
) -> Tensor:
    why_not = _why_not_fused(x, weights)
    if backend == "triton" and why_not:
        raise ValueError(f"backend 'triton' of a bottleneck needs {why_not}")
    separate = functools.partial(_separate, x, weights, biases, residual)
    calls = {
        "separate": functools.partial(separate, "auto", precision),
        "triton": functools.partial(_fused, x, weights, biases, residual),
    }
    if backend == "auto":
        backend = "separate"
        if x.is_cuda and HAS_TRITON and not why_not:
            make_check = functools.partial(
                Check, x, residual, residual.shape, x.dtype, stride=1, reach=1, relu=True,
                linear=lambda rows: _exact_bottleneck(rows, weights, biases),
                plain=functools.partial(separate, "torch", precision),
            )  # fmt: skip
            planes, outputs = weights[1].shape[0], weights[2].shape[0]
            key = f"bottleneck {list(x.shape)}, {planes} planes, {outputs} outputs, {x.dtype}"
            backend = choice.choose(key, x.device, calls, "separate", make_check)
    return calls[backend]()


def _fake_conv_bias_act(x, weight, bias, residual, stride, dilation, relu, out_dtype, *_) -> Tensor:
    shape = out_shape(x, weight, stride)
    return torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=_NHWC)


def _fake_bottleneck(x, weights, *_) -> Tensor:
    shape = out_shape(x, weights[2], 1)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_NHWC)


def _bottleneck_flops(x: flops.Shape, weights: Sequence[flops.Shape], *_, **__) -> int:
    pixels = (x[0], *x[2:])
    return sum(flops.convolution((*pixels, weight[0]), weight) for weight in weights)


register(
    __name__,
    Operator(
        "conv_bias_act", _run_conv_bias_act, _fake_conv_bias_act, flops=flops.first_convolution
    ),
    Operator("bottleneck", _run_bottleneck, _fake_bottleneck, flops=_bottleneck_flops),
)
