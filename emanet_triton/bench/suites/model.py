"""From an image to its labels: R50 and R101, whole and sliding inference.

On a GPU a case is timed twice. ``from=host`` is what mmsegmentation's benchmark times: the input
comes from the host's memory, the labels go back to it. There peers begin with the normalised
float32 input, and ours with the uint8 image, which it resizes and normalises itself.
``from=device`` is the network and the labels alone, input and output on the device, as the replay
of a CUDA graph. On a CPU the two are the same.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from emanet_triton.bench import runtimes
from emanet_triton.bench.case import Case
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.machine import DTYPES
from emanet_triton.bench.networks import BLOCKS, make_network, make_protocol
from emanet_triton.bench.options import Selection, Size
from emanet_triton.bench.peers import (
    compiled,
    full_size_labels,
    mmseg_labels,
    mmseg_network,
    without_gradients,
)
from emanet_triton.inference import reference
from emanet_triton.inference.inputs import cut_windows, scaled_inputs
from emanet_triton.inference.predictor import Predictor
from emanet_triton.inference.taps import tap_tables
from emanet_triton.inference.views import view_sizes
from emanet_triton.kernels.conv.tiles import BOTTLENECK_PLANES
from emanet_triton.kernels.resample.op import resample_labels
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.fused import FusedBottleneck, FusedConv, fuse
from emanet_triton.models.network import FusedNetwork
from emanet_triton.models.protocol import Protocol

MODES = ("whole", "slide")
LABELS_BOUND = 1e-3  # share of labels that may differ in float32
COMPILED = ("compiled-fp32", "compiled-bf16")
ONE_PROVIDER = ("cudnn-bf16", "triton-bf16")  # of all convolutions; has to be asked for

# Milliseconds of "fused-bf16" as a graph, by the case. Forecast of a review of commit 54dbbc2,
# H100, nothing measured.
PREDICTED_MS = {
    "r50 whole 1024x2048 from=device": "6-6.6",
    "r101 whole 1024x2048 from=device": "9.2-9.8",
    "r50 slide 1024x2048 from=device": "13-14.5",
    "r101 slide 1024x2048 from=device": "20-22",
}
MS_FLIP = ("plain-fp32", "plain-bf16", "fused-fp32", "fused-bf16")  # what runs it


@dataclass(frozen=True)
class Problem:
    """An image, the network that segments it, and where it runs.

    Attributes:
        network: "r50" or "r101".
        protocol: of its inference.
        image: uint8 RGB [H, W, 3].
        device: "cpu" or "cuda".
        resident: whether input and labels stay on the device.
        tiny: a network of few channels.
        ms_flip: whether six scales, plain and mirrored, are averaged.
    """

    network: str
    protocol: Protocol
    image: np.ndarray
    device: str
    resident: bool
    tiny: bool
    ms_flip: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.image.shape[0], self.image.shape[1]

    def inputs(self) -> Tensor:
        """The normalised input, float32 [1, 3, h, w], in pinned host memory unless resident."""
        (scale,) = view_sizes(self.protocol, self.size, ms_flip=False)
        inputs = scaled_inputs([self.image], scale, torch.device("cpu")).contiguous()
        if self.device == "cpu":
            return inputs
        return inputs.to(self.device) if self.resident else inputs.pin_memory()

    def to_device(self, inputs: Tensor) -> Tensor:
        return inputs.to(self.device, non_blocking=True)

    def model(self) -> EMANet:
        return make_network(self.network, self.protocol, self.tiny)

    @property
    def finish(self) -> Callable[[Tensor, Tensor], Tensor]:
        """mmseg's labels [1, H, W] from the logits of all windows and the inputs."""
        return functools.partial(full_size_labels, size=self.size, protocol=self.protocol)

    def labels_by(
        self,
        forward: Callable[[Tensor], Tensor],
        finish: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """mmseg's sequence around a network: inputs → labels [1, H, W]."""

        def labels(inputs: Tensor) -> Tensor:
            return mmseg_labels(forward, inputs, self.protocol, finish or self.finish)

        return labels

    def timed(self, labels: Callable[[Tensor], Tensor]) -> Call:
        """Labels of the input, from where it lies to where it lies."""
        inputs = self.inputs()
        if self.resident or self.device == "cpu":
            return without_gradients(labels, inputs)
        return without_gradients(lambda: labels(self.to_device(inputs)).cpu())


def cases(selection: Selection) -> Iterator[Case]:
    """Both networks and both modes of inference, for images of each size; whole ms+flip, too."""
    sizes = selection.sizes or _default_sizes(selection)
    short = selection.quick and not selection.cuda
    networks = selection.networks or (["r50"] if selection.short else list(BLOCKS))
    modes = ["whole"] if short else MODES
    ways = ["host", "device"] if selection.cuda else ["host"]
    for size, network in itertools.product(sizes, networks):
        for mode, way in itertools.product(modes, ways):
            yield _case(selection, network, mode, size, way)
        if not selection.quick:
            yield _case(selection, network, "whole", size, "host", ms_flip=True)


def _default_sizes(selection: Selection) -> list[Size]:
    if selection.tiny:
        return [(40, 64)]
    return [(256, 512)] if selection.quick and not selection.cuda else [(1024, 2048)]


def _case(
    selection: Selection, network: str, mode: str, size: Size, way: str, ms_flip: bool = False
) -> Case:
    protocol = make_protocol(mode, size, selection.tiny)
    problem = Problem(
        *(network, protocol, make_image(size), selection.device),
        resident=way == "device",
        ms_flip=ms_flip,
        tiny=selection.tiny,
    )
    if any(_is_half(name) for name in selection.providers):  # they are held against plain's
        selection = replace(selection, providers=("plain-bf16", *selection.providers))
    want = functools.cache(lambda: PROVIDERS["plain-fp32"](problem)().cpu())
    short = selection.short and not selection.cuda
    names = [n for n in PROVIDERS if selection.cuda or n not in GPU_ONLY]
    names = [n for n in names if n not in HOST_ONLY or not problem.resident]
    names = [n for n in names if n in MS_FLIP or not ms_flip]
    name = f"{network} {mode}{' ms+flip' * ms_flip} {size[0]}x{size[1]} from={way}"
    return Case(
        suite="model",
        name=name,
        providers=selection.pick(
            {n: functools.partial(PROVIDERS[n], problem) for n in names},
            "plain-fp32",
            (*ONE_PROVIDER, *(COMPILED if selection.short else ())),
        ),
        baseline="plain-fp32",
        error=lambda got: (got.cpu() != want()).double().mean().item(),
        bound=bound,
        predicted_ms={"fused-bf16": PREDICTED_MS[name]} if name in PREDICTED_MS else {},
        peak=not short,
        wall=not problem.resident,
        graph=problem.resident,
    )


def make_image(size: Size) -> np.ndarray:
    """uint8 noise [H, W, 3], as much of it as pixels."""
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


def bound(name: str, errors: Mapping[str, float]) -> float:
    """Labels that may differ from plain float32's: in half precision twice plain's, three-way."""
    return LABELS_BOUND + (2 * errors.get("plain-bf16", float("nan")) if _is_half(name) else 0)


def _is_half(name: str) -> bool:
    return "bf16" in name or name == "tensorrt"


def plain(problem: Problem, dtype: str, how: str = "eager") -> Call:
    """mmseg's operations in PyTorch, channels-last in half precision on a GPU; or compiled."""
    model = problem.model().to(problem.device, DTYPES[dtype])
    if problem.device == "cuda" and dtype != "fp32":
        model = model.to(memory_format=torch.channels_last)

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


def _like_weights(x: Tensor, model: EMANet) -> Tensor:
    weight = model.decode_head.conv_seg.weight
    last = x.is_cuda and weight.dtype != torch.float32
    layout = torch.channels_last if last else torch.contiguous_format
    return x.to(weight.dtype).contiguous(memory_format=layout)


def fused(problem: Problem, dtype: str, provider: str = "auto") -> Call:
    """Ours: the fused network, and labels from tap tables; convolutions by one provider or auto."""
    model = fuse(problem.model().to(problem.device), dtype=DTYPES[dtype])
    if provider != "auto":
        set_provider(model, provider)
    if problem.resident:
        return without_gradients(resident_labels, model, problem.inputs(), problem)
    predictor = Predictor(model, problem.protocol, ms_flip=problem.ms_flip, cuda_graphs=True)
    return without_gradients(lambda: torch.stack(list(predictor([problem.image]))).cpu())


def set_provider(model: FusedNetwork, provider: str) -> None:
    """Have all convolutions run by "cudnn", or by "triton", with bottlenecks in one where it can.

    What cuDNN cannot fuse runs by PyTorch's convolution, which is cuDNN's too.
    """
    for module in model.modules():
        if isinstance(module, FusedConv):
            module.provider = provider
        elif isinstance(module, FusedBottleneck):
            planes = module.conv2.weight.shape[0]
            module.has_operator &= provider == "triton" and planes in BOTTLENECK_PLANES
            module.provider = provider


def resident_labels(model: nn.Module, inputs: Tensor, problem: Problem) -> Tensor:
    """What ``Predictor`` does from its normalised input on: uint8 [1, H, W]."""
    logits = model(*cut_windows(inputs, problem.protocol))
    tables = tap_tables(problem.protocol, problem.size, False, inputs.device)
    return resample_labels(logits.transpose(0, 1).flatten(1)[None], *tables)


def runtime(problem: Problem, find: Callable[[str], runtimes.Maker]) -> Call:
    """mmseg's sequence around a network that another runtime runs, if there is one here."""
    make = find(problem.device)  # before anything is built or exported
    model = runtimes.LogitsOnly(problem.model()).to(problem.device).eval()
    window = next(cut_windows(problem.inputs(), problem.protocol, at_once=1)).to(problem.device)
    return problem.timed(problem.labels_by(make(model, window)))


def mmsegmentation(problem: Problem) -> Call:
    """mmsegmentation's own ``EncoderDecoder`` with the same weights."""
    simple_test = runtimes.mmsegmentation(problem.model(), problem.device)
    inputs = problem.inputs()
    return without_gradients(lambda: simple_test(problem.to_device(inputs), problem.size))


PROVIDERS: dict[str, Callable[[Problem], Call]] = {
    "plain-fp32": lambda problem: plain(problem, "fp32"),
    "plain-bf16": lambda problem: plain(problem, "bf16"),
    "compiled-fp32": lambda problem: plain(problem, "fp32", "compiled"),
    "compiled-bf16": lambda problem: plain(problem, "bf16", "compiled"),
    "cudnn-bf16": lambda problem: fused(problem, "bf16", "cudnn"),
    "triton-bf16": lambda problem: fused(problem, "bf16", "triton"),
    "fused-fp32": lambda problem: fused(problem, "fp32"),  # these may search for minutes
    "fused-bf16": lambda problem: fused(problem, "bf16"),
    "mmsegmentation": mmsegmentation,
    "onnxruntime": lambda problem: runtime(problem, runtimes.onnxruntime),
    "tensorrt": lambda problem: runtime(problem, runtimes.tensorrt),
}
GPU_ONLY = ("compiled-bf16", *ONE_PROVIDER)
HOST_ONLY = ("mmsegmentation",)  # its labels are always the host's
