"""What a stage runs: the networks' operator calls, and the families of correctness."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from emanet_triton.bench.gpu_check import meta
from emanet_triton.bench.gpu_check.cases import (
    Case,
    ConfusionCase,
    EmCase,
    LabelsCase,
    recorded,
)
from emanet_triton.bench.gpu_check.conv_cases import BottleneckCase, ConvCase, with_dtype
from emanet_triton.bench.gpu_check.meta import Gpu, Launch
from emanet_triton.bench.networks import MODES, NETWORKS
from emanet_triton.bench.suites import train_mem
from emanet_triton.bench.walk import OperatorCall, walk
from emanet_triton.inference.views import Size
from emanet_triton.kernels.conv.op import bottleneck, conv_bias_act
from emanet_triton.kernels.tile import PRECISIONS
from emanet_triton.models.emanet import logits_size
from emanet_triton.models.zoo import DEMO, ZOO

SIZE: Size = (1024, 2048)
WINDOW: Size = (769, 769)
SMALL: Size = (24, 40)  # of images, in a tiny run

Families = dict[str, Callable[[Gpu, bool], list[Case]]]


def network_calls(
    networks: Sequence[str], modes: Sequence[str], dtype: str = "bf16", size: Size = SIZE
) -> list[OperatorCall]:
    """The distinct calls of fused networks, a bottleneck's three convolutions among them."""
    found: dict[OperatorCall, None] = {}
    for network, mode in itertools.product(networks, modes):
        for call in walk(network, mode, size, dtype=dtype):
            found[call] = None
            found |= dict.fromkeys(separate(call))
    return list(found)


def separate(call: OperatorCall) -> list[OperatorCall]:
    """The three convolutions of a bottleneck; of another call none."""
    if call.name != "bottleneck":
        return []
    x, weights, biases, residual, *_ = call.values()

    def run() -> None:
        out = x
        for weight, bias, added in zip(weights, biases, (None, None, residual), strict=True):
            out = conv_bias_act(out, weight, bias, added)

    return recorded(run)


def convolutions(
    calls: Sequence[OperatorCall], provider: str, precision: str = "ieee"
) -> list[OperatorCall]:
    """The convolutions among some calls, by a provider."""
    own = (call for call in calls if call.name == "conv_bias_act")
    return list(dict.fromkeys(call.but(provider=provider, precision=precision) for call in own))


def small_cases() -> list[Case]:
    """Of every kernel a small case."""

    def image(*shape: int) -> torch.Tensor:
        return torch.empty(
            shape, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last
        )

    def run() -> None:
        bias = torch.empty(64, device="meta")
        conv_bias_act(image(1, 64, 8, 128), image(64, 64, 3, 3), bias, provider="triton")
        conv_bias_act(image(1, 64, 9, 17), image(64, 64, 3, 3), bias, provider="triton")
        weights = image(64, 256, 1, 1), image(64, 64, 3, 3), image(256, 64, 1, 1)
        biases = bias, bias, torch.empty(256, device="meta")
        bottleneck(image(1, 256, 8, 16), weights, biases, provider="triton")

    *convs, block = recorded(run)
    conv_cases = [ConvCase(call) for call in convs]
    return [*conv_cases, BottleneckCase(block), *_em_small(), *_labels(True), *_confusion(True)]


def small_calls() -> list[OperatorCall]:
    """The calls of ``small_cases``."""
    return [call for case in small_cases() for call in case.calls()]


def launches(gpu: Gpu, tiny: bool) -> list[Launch]:
    """All that every stage launches, but for a sweep's tiles: a call of each."""
    calls = small_calls()
    if not tiny:
        calls += _suite_calls()
    for family in FAMILIES.values():
        calls += (call for case in family(gpu, tiny) for call in case.calls())
    wanted = dict.fromkeys(map(_by_triton, calls))
    return [Launch(call) for call in wanted if meta.has_kernel(call)]


def _by_triton(call: OperatorCall) -> OperatorCall:
    has_provider = call.name in ("conv_bias_act", "bottleneck")
    return call.but(provider="triton") if has_provider else call


def _suite_calls() -> list[OperatorCall]:
    calls = network_calls(NETWORKS, MODES)
    demo = (DEMO, ZOO[DEMO].protocol.base_scale[::-1])
    for network, size in (demo, ("r50", SIZE)):
        single = network_calls([network], ["whole"], "fp32", size)
        calls += [call for call in single if call.name != "conv_bias_act"]
        calls += convolutions(single, "triton", "tf32x3")
    for size in train_mem.CROPS.values():
        low = logits_size(*size)
        calls += EmCase("attention", 2, low, dtype="fp32", layout="nchw").calls()
    return calls


def _em(operation: str) -> list[Case]:
    low, window = logits_size(*SIZE), logits_size(*WINDOW)
    found = [
        EmCase(operation, batch, low, dtype=dtype) for dtype in ("bf16", "fp16") for batch in (1, 8)
    ]
    found += [EmCase(operation, 8, window), EmCase(operation, 1, window, layout="nchw")]
    found += [EmCase(operation, 1, low, dtype="fp32", precision=p) for p in PRECISIONS]
    return [*found, EmCase(operation, 8, low, dtype="fp32")]


def _em_small(operations: Sequence[str] = ("attention", "block")) -> list[Case]:
    size = logits_size(*SMALL)
    return [EmCase(operation, 1, size, 64, 16) for operation in operations]


def _em_family(operation: str) -> Callable[[Gpu, bool], list[Case]]:
    return lambda gpu, tiny: _em_small([operation]) if tiny else _em(operation)


def _half(calls: Sequence[OperatorCall]) -> Iterator[OperatorCall]:
    """The calls in bfloat16, then in float16."""
    for dtype in (torch.bfloat16, torch.float16):
        yield from (with_dtype(call, dtype) for call in calls)


def _conv_family(kernel: str) -> Callable[[Gpu, bool], list[Case]]:
    def cases(gpu: Gpu, tiny: bool) -> list[Case]:
        if tiny:
            calls = convolutions(small_calls(), "triton")
        else:
            calls = list(_half(convolutions(network_calls(["r50"], MODES), "triton")))
            single = network_calls(["r50"], ["whole"], "fp32")
            for precision in PRECISIONS:
                calls += convolutions(single, "triton", precision)
        return [ConvCase(call) for call in calls if _kernel(call, gpu) == kernel]

    return cases


def _kernel(call: OperatorCall, gpu: Gpu) -> str:
    return meta.kernels_of(Launch(call), gpu)[0].name


def _bottlenecks(gpu: Gpu, tiny: bool, provider: str = "triton") -> list[Case]:
    calls = small_calls() if tiny else network_calls(["r50"], MODES)
    own = [c.but(provider=provider) for c in calls if c.name == "bottleneck" and meta.has_kernel(c)]
    return [BottleneckCase(call) for call in (own if tiny else _half(own))]


def _labels(tiny: bool) -> list[Case]:
    if tiny:
        return [LabelsCase("whole", False, SMALL, "bf16", p, tiny=True) for p in (False, True)]
    views = itertools.product(("bf16", "fp32"), MODES, (False, True))
    found = [LabelsCase(mode, ms_flip, SIZE, dtype) for dtype, mode, ms_flip in views]
    found.append(LabelsCase("whole", False, SIZE, "fp16"))
    return [*found, *(LabelsCase(mode, True, SIZE, "bf16", True) for mode in MODES)]


def _confusion(tiny: bool) -> list[Case]:
    if tiny:
        return [ConfusionCase(SMALL, 19)]
    return [ConfusionCase(SIZE, classes) for classes in (19, 64)]


def _by_cudnn(gpu: Gpu, tiny: bool) -> list[Case]:
    """Those that cuDNN's fused operators can compute."""
    if gpu.target.backend != "cuda":
        return []
    if tiny:
        calls = small_calls()
    else:
        calls = network_calls(["r50"], MODES) + network_calls(["r50"], ["whole"], "fp32")
    fused = [c for c in convolutions(calls, "cudnn") if _can_fuse(c)]
    return [ConvCase(call) for call in fused]


def _can_fuse(call: OperatorCall) -> bool:
    """As ``eager.can_fuse``, of a residual that is not the input."""
    dtypes = {tensor.dtype for tensor in (call["x"], call["residual"]) if tensor}
    return call["relu"] and {call["out_dtype"]} == dtypes


def _chosen_half(gpu: Gpu, tiny: bool) -> list[Case]:
    """Whatever the networks choose for each of their convolutions in bfloat16."""
    calls = small_calls() if tiny else network_calls(["r50"], MODES)
    found = [ConvCase(call) for call in convolutions(calls, "auto")]
    own = {case.call: case for case in _bottlenecks(gpu, tiny, "auto")}
    return found + [case for call, case in own.items() if call["x"].dtype == torch.bfloat16]


def _chosen(gpu: Gpu, tiny: bool) -> list[Case]:
    """The same, and of R50 in float32."""
    found = _chosen_half(gpu, tiny)
    if not tiny:
        single = convolutions(network_calls(["r50"], ["whole"], "fp32"), "auto")
        found += [ConvCase(call) for call in single]
    return found


FAMILIES: Families = {
    "em-block": _em_family("block"),
    "conv-rows": _conv_family("conv_rows"),
    "conv-pointers": _conv_family("conv_pointers"),
    "bottleneck": _bottlenecks,
    "em-attention": _em_family("attention"),
    "labels": lambda gpu, tiny: _labels(tiny),
    "confusion": lambda gpu, tiny: _confusion(tiny),
    "cudnn": _by_cudnn,
    "chosen": _chosen,
    "chosen-half": _chosen_half,
}
