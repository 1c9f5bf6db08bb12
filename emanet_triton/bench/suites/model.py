"""From an image to its labels: R50 and R101, whole and sliding inference; the network alone.

On a GPU a case is timed twice. ``from=host`` is what mmsegmentation's benchmark times: the input
comes from the host's memory, and the labels go back to it. There peers begin with the normalised
float32 input. Ours begins with the uint8 image, which it resizes and normalises itself.
``from=device`` is the replay of a CUDA graph of the network and the labels, with input and output
on the device. On a CPU the two are the same, and the network alone is timed too, as deployment
runtimes run it: from the normalised float32 input to the logits.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from emanet_triton.bench import quantized_peer, runtimes
from emanet_triton.bench.case import Absent, Case
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.eight_bits import round_to_8_bits
from emanet_triton.bench.networks import MODES, NETWORKS, make_protocol, published_figures
from emanet_triton.bench.options import Selection
from emanet_triton.bench.peers import compiled, mmseg_network, without_gradients
from emanet_triton.bench.rows import Row
from emanet_triton.bench.suite import Suite
from emanet_triton.bench.suites.model_problem import Problem, make_image
from emanet_triton.bench.tables import NOT_MEASURED, on_gpu, table
from emanet_triton.errors import InputError
from emanet_triton.inference import reference
from emanet_triton.inference.inputs import cut_windows
from emanet_triton.inference.predictor import Predictor
from emanet_triton.inference.quantize import quantize, require_int8
from emanet_triton.inference.taps import tap_tables
from emanet_triton.inference.views import Size
from emanet_triton.kernels.checks import OPEN_BACKENDS
from emanet_triton.kernels.device import DTYPES, has_onednn
from emanet_triton.kernels.resample.op import resample_labels
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.fused import FusedConv, fuse
from emanet_triton.models.network import FusedNetwork

OPENVINO_INT8 = "openvino-int8"
LABELS_BOUND = 1e-3  # the share of labels that may differ in float32
COMPILED = ("compiled-fp32", "compiled-bf16")
# One provider of all convolutions, or a choice among more than usual. Run only if named.
BY_NAME = ("cudnn-bf16", "triton-bf16", "fastest-bf16")
MS_FLIP = ("plain-fp32", "plain-bf16", "fused-fp32", "fused-bf16")  # the providers with ms+flip
CPU_ONLY = ("fused-int8", OPENVINO_INT8, "openvino-fp32", "openvino-bf16")
ALONE = "network"  # in place of the mode where the network is timed alone
SIZES_ALONE = [(512, 1024), (1024, 2048)]
TINY_ALONE = [(80, 128)]  # its logits are not resized, so that smaller images have few labels
RATES = ("plain-fp32", "fused-fp32", "fused-bf16")  # shown beside the published images a second


def cases(selection: Selection) -> Iterator[Case]:
    """Both networks and both modes of inference, for images of each size; also whole ms+flip.

    On a CPU then the networks alone.
    """
    sizes = selection.sizes or _default_sizes(selection)
    short = selection.quick and not selection.cuda
    networks = selection.networks or (["r50"] if selection.short else NETWORKS)
    modes = ["whole"] if short else MODES
    ways = ["host", "device"] if selection.cuda else ["host"]
    for size, network in itertools.product(sizes, networks):
        for mode, way in itertools.product(modes, ways):
            yield _case(selection, network, mode, size, way)
        if not selection.quick:
            yield _case(selection, network, "whole", size, "host", ms_flip=True)
    if not (selection.cuda or selection.quick):
        sizes_alone = selection.sizes or (TINY_ALONE if selection.tiny else SIZES_ALONE)
        for size, network in itertools.product(sizes_alone, networks):
            yield _case(selection, network, ALONE, size, "host")


def _default_sizes(selection: Selection) -> list[Size]:
    if selection.tiny:
        return [(40, 64)]
    return [(256, 512)] if selection.quick and not selection.cuda else [(1024, 2048)]


def _case(
    selection: Selection, network: str, mode: str, size: Size, way: str, ms_flip: bool = False
) -> Case:
    alone = mode == ALONE
    protocol = make_protocol("whole" if alone else mode, size, selection.tiny)
    problem = Problem(
        *(network, protocol, make_image(size), selection.device),
        resident=way == "device",
        ms_flip=ms_flip,
        alone=alone,
        tiny=selection.tiny,
    )
    slow = not (selection.cuda or has_onednn(torch.bfloat16))  # takes minutes a convolution
    if not slow and any("bf16" in name for name in selection.providers):
        # Their gate needs plain's error.
        selection = replace(selection, providers=("plain-bf16", *selection.providers))
    want = functools.cache(lambda: labels_of(PROVIDERS["plain-fp32"](problem)()))

    def error(got: Tensor) -> float:
        return (labels_of(got) != want()).double().mean().item()

    rounded = functools.cache(lambda: error(plain(problem, "fp32", change=round_to_8_bits)()))
    halved = functools.cache(lambda: error(plain(problem, "bf16", change=multiply_float32)()))
    elsewhere = CPU_ONLY if selection.cuda else GPU_ONLY
    names = [n for n in PROVIDERS if n not in elsewhere]
    names = [n for n in names if n in MS_FLIP or not ms_flip]
    return Case(
        suite=SUITE.name,
        name=f"{network} {mode}{' ms+flip' * ms_flip} {size[0]}x{size[1]}"
        + f" from={way}" * (not alone),
        providers=selection.pick(
            {n: functools.partial(PROVIDERS[n], problem) for n in names},
            "plain-fp32",
            (*BY_NAME, *(COMPILED if selection.short else ()), *(["plain-bf16"] if slow else ())),
        ),
        baseline="plain-fp32",
        error=error,
        bound=functools.partial(bound, rounded=rounded, halved=halved if slow else unknown),
        peak=selection.cuda or not selection.short,
        wall=not problem.resident,
        graph=problem.resident,
        own_threads=(OPENVINO_INT8, *runtimes.RUNTIMES),
    )


def labels_of(result: Tensor) -> Tensor:
    """The labels on the host: the result itself, or the largest of its logits."""
    return (result.argmax(1) if result.is_floating_point() else result).cpu()


def unknown() -> float:
    """A share that nobody has measured: a bound of it fails."""
    return math.nan


def bound(
    name: str,
    errors: Mapping[str, float],
    rounded: Callable[[], float] = unknown,
    halved: Callable[[], float] = unknown,
) -> float:
    """The largest share of labels that may differ from plain float32's.

    With fewer bits it is above twice the share of plain PyTorch with as many.

    Args:
        name: the provider.
        errors: the shares so far; plain PyTorch's is the measure for bfloat16.
        rounded: the share of plain PyTorch whose values are rounded to 8 bits.
        halved: the measure for bfloat16 where plain PyTorch is too slow in it.
    """
    share = 0.0
    if "bf16" in name:
        share = errors["plain-bf16"] if "plain-bf16" in errors else halved()
    elif "int8" in name:
        share = rounded()
    return LABELS_BOUND + 2 * share


def plain(
    problem: Problem,
    dtype: str,
    how: str = "eager",
    change: Callable[[EMANet], None] = lambda model: None,
) -> Call:
    """mmseg's operations in PyTorch, eager or compiled; channels-last in bfloat16 on a GPU.

    ``change`` changes the network before.
    """
    model = problem.model().to(problem.device, DTYPES[dtype])
    change(model)
    if problem.device == "cuda" and dtype != "fp32":
        # PyTorch 2.11 does not declare this form of the call.
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(x: Tensor) -> Tensor:
        return mmseg_network(model, _like_weights(x, model))

    if problem.ms_flip:
        asked = forward, [problem.image], problem.protocol, True
        return without_gradients(
            lambda: reference.probabilities(*asked, device=problem.device).argmax(1).cpu()
        )
    if how == "eager":
        return problem.timed(problem.labels_by(forward))
    mode = "default"
    if problem.device == "cuda":  # a resident case is captured as a whole
        mode = "max-autotune-no-cudagraphs" if problem.resident else "max-autotune"
    network, finish = (compiled(function, mode=mode) for function in (forward, problem.finish))
    # Its CUDA graphs overwrite their outputs at the next window.
    return problem.timed(problem.labels_by(lambda x: network(x).clone(), finish))


def multiply_float32(model: EMANet) -> None:
    """Let convolutions in half precision multiply float32 numbers, and round their results.

    A CPU without instructions for half precision takes minutes for each of them otherwise. The sums
    are float32 both ways.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.forward = functools.partial(_in_float32, module)  # type: ignore[method-assign]


def _in_float32(conv: nn.Conv2d, x: Tensor) -> Tensor:
    bias = None if conv.bias is None else conv.bias.float()
    return conv._conv_forward(x.float(), conv.weight.float(), bias).to(x.dtype)


def _like_weights(x: Tensor, model: EMANet) -> Tensor:
    weight = model.decode_head.conv_seg.weight
    last = x.is_cuda and weight.dtype != torch.float32
    layout = torch.channels_last if last else torch.contiguous_format
    return x.to(weight.dtype).contiguous(memory_format=layout)


def fused(problem: Problem, dtype: str, backend: str = "auto") -> Call:
    """Our fused network and labels from tap tables.

    Args:
        problem: the image and the network.
        dtype: of the network.
        backend: of all convolutions. "auto" chooses for each. "fastest" may also choose kernels in
            Gluon, for convolutions and for EM attention.
    """
    model = fuse(problem.model().to(problem.device), dtype=DTYPES[dtype])
    if backend in OPEN_BACKENDS:
        model.choose_by(backend)
    else:
        set_backend(model, backend)
    return _timed_by(model, problem)


def quantized(problem: Problem) -> Call:
    """Our fused network with 8-bit convolutions, whose ranges come from the case's own image.

    Raises:
        Absent: this CPU lacks the instructions.
    """
    try:
        require_int8()  # before anything is built
    except InputError as error:
        raise Absent(str(error)) from None
    model = quantize(problem.model(), problem.image, protocol=problem.protocol)
    return _timed_by(model, problem)


def _timed_by(model: FusedNetwork, problem: Problem) -> Call:
    if problem.alone:
        return problem.timed(model)
    if problem.resident:
        return without_gradients(resident_labels, model, problem.inputs(), problem)
    predictor = Predictor(model, problem.protocol, ms_flip=problem.ms_flip, cuda_graphs=True)
    return without_gradients(lambda: torch.stack(list(predictor([problem.image]))).cpu())


def set_backend(model: FusedNetwork, backend: str) -> None:
    """Let "cudnn" or "triton" run all convolutions; "triton" also pairs of them where it can.

    A convolution that cuDNN cannot fuse is run by PyTorch, which uses cuDNN too.
    """
    for module in model.modules():
        if isinstance(module, FusedConv):
            module.backend = backend


def resident_labels(model: FusedNetwork, inputs: Tensor, problem: Problem) -> Tensor:
    """The work of ``Predictor`` after its normalised input: uint8 [1, H, W]."""
    logits = model(*cut_windows(inputs.to(model.dtype), problem.protocol))
    tables = tap_tables(problem.protocol, problem.size, False, inputs.device)
    return resample_labels(logits.transpose(0, 1).flatten(1)[None], *tables)


def runtime(name: str, problem: Problem) -> Call:
    """mmseg's sequence around a network that another runtime runs, if it is installed."""
    make = runtimes.RUNTIMES[name](problem.device)  # before anything is built or exported
    window = next(problem.windows(problem.inputs())).to(problem.device)
    return problem.timed(problem.labels_by(make(_exportable(problem), window)))


def quantized_runtime(problem: Problem) -> Call:
    """As ``runtime``, by OpenVINO in 8 bits, whose ranges come from all windows of the image."""
    make = quantized_peer.openvino_int8(problem.device)
    windows = list(problem.windows(problem.inputs()))
    return problem.timed(problem.labels_by(make(_exportable(problem), windows)))


def _exportable(problem: Problem) -> nn.Module:
    return runtimes.LogitsOnly(problem.model()).to(problem.device).eval()


PROVIDERS: dict[str, Callable[[Problem], Call]] = {
    "plain-fp32": lambda problem: plain(problem, "fp32"),
    "plain-bf16": lambda problem: plain(problem, "bf16"),
    "compiled-fp32": lambda problem: plain(problem, "fp32", "compiled"),
    "compiled-bf16": lambda problem: plain(problem, "bf16", "compiled"),
    "cudnn-bf16": lambda problem: fused(problem, "bf16", "cudnn"),
    "triton-bf16": lambda problem: fused(problem, "bf16", "triton"),
    "fastest-bf16": lambda problem: fused(problem, "bf16", "fastest"),
    "fused-fp32": lambda problem: fused(problem, "fp32"),  # these may search for minutes
    "fused-bf16": lambda problem: fused(problem, "bf16"),
    "fused-int8": quantized,
    OPENVINO_INT8: quantized_runtime,
    **{name: functools.partial(runtime, name) for name in runtimes.RUNTIMES},
}
GPU_ONLY = ("compiled-bf16", *BY_NAME)


def beside_published(rows: Sequence[Row]) -> str:
    """Images a second on GPUs beside the published figures."""
    own = [row for row in rows if on_gpu(row)]
    gpus = list(dict.fromkeys(row.device for row in own)) or [NOT_MEASURED]
    lines = []
    for (network, mode, published), gpu in itertools.product(published_figures(), gpus):
        case = f"{network} {mode} 1024x2048 from=host"
        times = {r.provider: r.p50_ms for r in own if (r.case, r.device) == (case, gpu)}
        cells = [f"{1e3 / ms:.1f}" if (ms := times.get(n)) else NOT_MEASURED for n in RATES]
        lines.append([network, mode, f"{published.fps:.2f}", gpu, *cells])
    columns = ["network", "inference", "published images/s (V100)", "GPU", *RATES]
    return table(lines, columns, texts=2)


SUITE = Suite(
    name="model",
    title="From an image to labels",
    measures="an image to its labels: R50 and R101, whole and sliding window; on a CPU the network "
    "alone too",
    cases=cases,
    text="""\
`plain` runs mmsegmentation's operations in PyTorch, `compiled` the same by `torch.compile`. `fused`
is our fused network. `fused-int8` (on a CPU) multiplies 8-bit integers in most convolutions; it
takes the ranges of their outputs from the case's own image. `cudnn` and `triton` are the fused
network with all convolutions by cuDNN or by our Triton kernels, `fastest` the one that also tries
our kernels in Gluon, for convolutions and for EM attention; they run only if `--providers` names
them. In half precision on a Hopper GPU the evaluation takes the kernels in Gluon that win in a
trial, if the network passes its checks. OpenVINO (on a CPU), ONNX Runtime and Torch-TensorRT (on a
GPU) run `plain`'s network if they are installed: `pip install '.[peers]'` installs the first two.
They get its ONNX export for inputs of one shape, and PyTorch's number of threads. `openvino-fp32`
computes in float32; without this setting OpenVINO would choose bf16 where the CPU has it.
`openvino-int8` runs the export after `quantize_static` of ONNX Runtime has quantized its
convolutions: 8-bit inputs and outputs whose ranges come from the case's own image, and 8-bit
weights with a scale for each output channel. The rest it computes in bf16 where the CPU has it.
Between windows, and from logits to labels, all but `fused` run mmsegmentation's operations in
PyTorch.

Of a provider's labels one in a thousand may differ from `plain-fp32`'s. In bf16 twice the share
that differs in `plain-bf16` is added. In int8 it is twice the share that differs if `plain-fp32`
rounds the weights and activations of its residual blocks to 8 bits. Where a CPU has no instructions
for bf16, `plain-bf16` takes many minutes: it runs only if `--providers` names it, and for the gate
its convolutions multiply float32 numbers.

`from=host` is what mmsegmentation's benchmark times: the input comes from the host's memory, the
labels go back to it. `network` is the network alone, from the normalised float32 input to the
logits; its gate compares the largest logit of each pixel.""",
    published=beside_published,
)
