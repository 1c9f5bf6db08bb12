"""The networks' operator calls, and the families of cases of correctness."""

import itertools
from collections.abc import Callable, Sequence

import torch

from emanet_triton.bench.gpu_check import meta
from emanet_triton.bench.gpu_check.cases import Case, ConfusionCase, EmCase, LabelsCase, PoolCase
from emanet_triton.bench.gpu_check.conv_cases import ConvCase, ExpandReduceCase, with_dtype
from emanet_triton.bench.gpu_check.meta import Gpu, Launch
from emanet_triton.bench.networks import MODES, NETWORKS
from emanet_triton.bench.suites import train_mem
from emanet_triton.bench.suites.conv_layers import convolutions_of
from emanet_triton.bench.walk import OperatorCall, recorded, walk
from emanet_triton.inference.views import Size
from emanet_triton.kernels.conv import tiles as conv_tiles
from emanet_triton.kernels.conv.op import conv_bias_act, expand_reduce
from emanet_triton.kernels.device import DTYPE_NAMES
from emanet_triton.kernels.em import tiles as em_tiles
from emanet_triton.kernels.pool.op import max_pool
from emanet_triton.kernels.tile import FP32_PRECISIONS
from emanet_triton.models.entries import DEMO
from emanet_triton.models.network import logits_size
from emanet_triton.models.zoo import ZOO

SIZE: Size = (1024, 2048)
WINDOW: Size = (769, 769)
SMALL: Size = (24, 40)  # size of images in a tiny run
CHOSEN = "chosen"  # begins the names of the families whose cases measure which backend is fastest


def network_calls(
    networks: Sequence[str], modes: Sequence[str], dtype: str = "bf16", size: Size = SIZE
) -> list[OperatorCall]:
    """The distinct calls of fused networks, and the two convolutions of each ``expand_reduce``."""
    found: dict[OperatorCall, None] = {}
    for network, mode in itertools.product(networks, modes):
        for call in walk(network, mode, size, dtype=dtype):
            found[call] = None
            found |= dict.fromkeys(convolutions_of(call))
    return list(found)


def convolutions(
    calls: Sequence[OperatorCall], backend: str, precision: str = "ieee"
) -> list[OperatorCall]:
    """The convolutions among some calls, by another backend."""
    own = (call for call in calls if call.name == "conv_bias_act")
    return list(dict.fromkeys(call.but(backend=backend, precision=precision) for call in own))


def small_cases() -> list[Case]:
    """A small case for each kernel."""

    def image(*shape: int) -> torch.Tensor:
        return torch.empty(
            shape, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last
        )

    def bias(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device="meta")

    def run() -> None:
        for sides in ((8, 128), (9, 17)):  # by conv_rows on sm_90, and by conv_pointers
            conv_bias_act(image(1, 64, *sides), image(64, 64, 3, 3), bias(64), backend="triton")
        boxes = image(2, 64, 9, 17), image(72, 64, 3, 3), bias(72), image(2, 72, 9, 17)
        conv_bias_act(*boxes, backend="gluon")
        stem = image(1, 3, 17, 33), image(32, 3, 3, 3), bias(32)  # by conv_taps
        conv_bias_act(*stem, stride=2, backend="triton")
        weights, biases = (image(256, 64, 1, 1), image(64, 256, 1, 1)), (bias(256), bias(64))
        images = image(1, 64, 8, 17), weights, biases, image(1, 256, 8, 17)
        expand_reduce(*images, backend="triton")
        max_pool(image(1, 64, 9, 17), backend="triton")

    *convs, pair, pool = recorded(run)
    # So many positions that programs have several tiles, of both images.
    one_pass = EmCase("block", 2, (67, 127), bases=16, backend="one-pass-128")
    others = [
        *_em("attention", True),
        *_em("block", True),
        one_pass,
        *_labels(True),
        *_confusion(True),
    ]
    return [*map(ConvCase, convs), ExpandReduceCase(pair), PoolCase(pool), *others]


def with_tiles(cases: Sequence[Case], arch: str) -> list[Case]:
    """The cases that an architecture has tiles for: kernels in Gluon are for Hopper alone."""
    return [case for case in cases if _has_tile(case, arch)]


def _has_tile(case: Case, arch: str) -> bool:
    if isinstance(case, EmCase) and case.backend in em_tiles.ONE_PASS:
        return em_tiles.has_one_pass(arch, case.dtype)
    if isinstance(case, ConvCase) and case.call["backend"] == "gluon":
        return conv_tiles.has_boxes(arch, DTYPE_NAMES[case.call["x"].dtype])
    return True


def small_calls() -> list[OperatorCall]:
    """The calls of ``small_cases``."""
    return [call for case in small_cases() for call in case.calls()]


def launches(gpu: Gpu, tiny: bool) -> list[Launch]:
    """Everything that any stage launches, but for the tiles of a sweep."""
    calls = [call for case in with_tiles(small_cases(), gpu.arch) for call in case.calls()]
    if not tiny:
        calls += _suite_calls()
    for family in FAMILIES.values():
        calls += (call for case in family(gpu, tiny) for call in case.calls())
    wanted = dict.fromkeys(map(_by_triton, calls))
    return [Launch(call) for call in wanted if meta.has_kernel(call)]


def _by_triton(call: OperatorCall) -> OperatorCall:
    chooses = call.name in ("conv_bias_act", "expand_reduce", "max_pool")
    return call.but(backend="triton") if chooses and call["backend"] != "gluon" else call


def _suite_calls() -> list[OperatorCall]:
    """The calls of the suites."""
    calls = network_calls(NETWORKS, MODES)
    scale = ZOO[DEMO].protocol.base_scale
    assert scale  # a model of the zoo has one
    for network, size in ((DEMO, scale[::-1]), ("r50", SIZE)):
        single = network_calls([network], ["whole"], "fp32", size)
        calls += [call for call in single if call.name != "conv_bias_act"]
        calls += convolutions(single, "triton", "tf32x3")
    for size in train_mem.CROPS.values():
        low = logits_size(*size)
        calls += EmCase("attention", 2, low, dtype="fp32", layout="nchw").calls()
    return calls


def _half(tiny: bool) -> list[OperatorCall]:
    """R50's calls in bfloat16; in a tiny run small ones."""
    return small_calls() if tiny else network_calls(["r50"], MODES)


def _single(tiny: bool) -> list[OperatorCall]:
    """R50's calls in float32; in a tiny run none."""
    return [] if tiny else network_calls(["r50"], ["whole"], "fp32")


def _with_float16(calls: list[OperatorCall], tiny: bool) -> list[OperatorCall]:
    """The calls, and the same calls in float16; in a tiny run only the former."""
    return calls if tiny else [*calls, *(with_dtype(call, torch.float16) for call in calls)]


def _em(operation: str, tiny: bool) -> list[Case]:
    if tiny:
        return [EmCase(operation, 1, logits_size(*SMALL), 64, 16)]
    low, window = logits_size(*SIZE), logits_size(*WINDOW)
    half = itertools.product(("bf16", "fp16"), (1, 8))
    return [
        *(EmCase(operation, batch, low, dtype=dtype) for dtype, batch in half),
        EmCase(operation, 8, window),
        EmCase(operation, 1, window, layout="nchw"),
        EmCase(operation, 1, low, backend="one-pass-128"),
        EmCase(operation, 8, low, backend="one-pass-16"),
        EmCase(operation, 8, window, dtype="fp16", backend="one-pass-16"),
        *(EmCase(operation, 1, low, dtype="fp32", precision=p) for p in FP32_PRECISIONS),
        EmCase(operation, 8, low, dtype="fp32"),
    ]


def _convolutions(kernel: str, gpu: Gpu, tiny: bool) -> list[Case]:
    """The convolutions that a kernel computes."""
    calls = _with_float16(convolutions(_half(tiny), "triton"), tiny)
    for precision in FP32_PRECISIONS:
        calls += convolutions(_single(tiny), "triton", precision)
    return [
        ConvCase(call) for call in calls if meta.kernels_of(Launch(call), gpu)[0].name == kernel
    ]


def by_gluon(calls: Sequence[OperatorCall]) -> list[ConvCase]:
    """The convolutions among some calls that the kernel in Gluon can compute."""
    cases = map(ConvCase, convolutions(calls, "gluon"))
    return [case for case in cases if not case.layer.why_not_boxes("sm_90")]


def _pairs(tiny: bool, backend: str) -> list[OperatorCall]:
    calls = (call for call in _half(tiny) if call.name == "expand_reduce" and meta.has_kernel(call))
    return [call.but(backend=backend) for call in calls]


def _pools(tiny: bool) -> list[Case]:
    single = [] if tiny else network_calls(["r50"], MODES, "fp32")
    calls = [call for call in (*_half(tiny), *single) if call.name == "max_pool"]
    wanted = (call.but(backend="triton") for call in _with_float16(calls, tiny))
    return [PoolCase(call) for call in dict.fromkeys(wanted)]


def _labels(tiny: bool) -> list[Case]:
    if tiny:
        return [LabelsCase("whole", False, SMALL, "bf16", p, tiny=True) for p in (False, True)]
    views = itertools.product(("bf16", "fp32"), MODES, (False, True))
    return [
        *(LabelsCase(mode, ms_flip, SIZE, dtype) for dtype, mode, ms_flip in views),
        LabelsCase("whole", False, SIZE, "fp16"),
        *(LabelsCase(mode, True, SIZE, "bf16", True) for mode in MODES),
    ]


def _confusion(tiny: bool) -> list[Case]:
    return [ConfusionCase(SMALL, 19)] if tiny else [ConfusionCase(SIZE, n) for n in (19, 64)]


def _by_cudnn(gpu: Gpu, tiny: bool) -> list[Case]:
    """The convolutions that cuDNN's fused operators can compute."""
    if gpu.target.backend != "cuda":
        return []
    calls = convolutions([*_half(tiny), *_single(tiny)], "cudnn")
    return [ConvCase(call) for call in calls if _can_fuse(call)]


def _can_fuse(call: OperatorCall) -> bool:
    """Whether cuDNN can fuse a convolution, and its output needs no other dtype.

    As ``cudnn.can_fuse`` of a residual that is not the input.
    """
    dtypes = {tensor.dtype for tensor in (call["x"], call["residual"]) if tensor}
    return call["relu"] and {call["out_dtype"]} == dtypes


def _chosen_half(tiny: bool) -> list[Case]:
    """Whatever the networks choose for each of their convolutions in bfloat16."""
    pairs = map(ExpandReduceCase, _pairs(tiny, "auto"))
    return [*map(ConvCase, convolutions(_half(tiny), "auto")), *pairs]


FAMILIES: dict[str, Callable[[Gpu, bool], Sequence[Case]]] = {
    "em-block": lambda gpu, tiny: with_tiles(_em("block", tiny), gpu.arch),
    "conv-rows": lambda gpu, tiny: _convolutions("conv_rows", gpu, tiny),
    "conv-pointers": lambda gpu, tiny: _convolutions("conv_pointers", gpu, tiny),
    "conv-boxes": lambda gpu, tiny: with_tiles(
        by_gluon(_with_float16(_half(tiny), tiny)), gpu.arch
    ),
    "conv-taps": lambda gpu, tiny: _convolutions("conv_taps", gpu, tiny),
    "expand-reduce": lambda _, tiny: [
        ExpandReduceCase(call) for call in _with_float16(_pairs(tiny, "triton"), tiny)
    ],
    "pool": lambda _, tiny: _pools(tiny),
    "em-attention": lambda gpu, tiny: with_tiles(_em("attention", tiny), gpu.arch),
    "labels": lambda _, tiny: _labels(tiny),
    "confusion": lambda _, tiny: _confusion(tiny),
    "cudnn": _by_cudnn,
    # What the networks choose, in bfloat16 alone and with R50's convolutions in float32.
    f"{CHOSEN}-half": lambda _, tiny: _chosen_half(tiny),
    CHOSEN: lambda _, tiny: [
        *_chosen_half(tiny),
        *(ConvCase(call) for call in convolutions(_single(tiny), "auto")),
    ],
}
