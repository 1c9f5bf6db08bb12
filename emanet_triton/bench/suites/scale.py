"""Time and memory against image size: post-processing alone, and a network with it."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.bench.case import Absent, Case
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.growth import FEWEST_POINTS, fit
from emanet_triton.bench.networks import make_network, make_protocol
from emanet_triton.bench.options import Selection, Size
from emanet_triton.bench.peers import mmseg_network, without_gradients
from emanet_triton.bench.rows import Row
from emanet_triton.inference.taps import tap_tables
from emanet_triton.kernels.out_of_memory import is_out_of_memory
from emanet_triton.kernels.resample.op import resample_labels
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.fused import fuse
from emanet_triton.models.network import logits_size
from emanet_triton.models.zoo import DEMO, create_model

SIZES = ((512, 1024), (1024, 2048), (2048, 4096), (4096, 8192), (8192, 8192))
LARGEST_BY_DEFAULT = {  # pixels that a CPU runs unless sizes are given: the rest takes minutes
    "mmseg": 2048 * 4096,
    "network": 2048 * 4096,
}
CLASSES = 19
CLEAR = 1e-4  # between the two best logits of a pixel whose label is held against float64's
SAMPLED = 4096  # pixels
CLOSE = 1e-3  # relative error of a network's logits


def cases(selection: Selection) -> Iterator[Case]:
    """Post-processing, then a network: R50, on a CPU the demonstration's.

    Up to 8192x8192; on a GPU, whose time is dear, by default to 2048x4096.
    """
    if "fp32" not in (selection.dtypes or ["fp32"]):
        return
    sizes = selection.sizes or _sizes(selection)
    for size in sizes:
        yield _post(selection, size)
    networks = selection.networks if not selection.tiny else ()
    for network in networks or ("r50" if selection.cuda and not selection.tiny else DEMO,):
        for size in sizes:
            if _by_default(selection, "network", size):
                yield _network(selection, network, size)


def _sizes(selection: Selection) -> Sequence[Size]:
    if selection.tiny:
        return (16, 32), (32, 32), (32, 64)
    if selection.cuda:
        return SIZES[:FEWEST_POINTS]
    return ((256, 512), (512, 512), (512, 1024)) if selection.quick else SIZES


def _by_default(selection: Selection, what: str, size: Size) -> bool:
    asked = selection.cuda or selection.sizes
    return bool(asked) or math.prod(size) <= LARGEST_BY_DEFAULT[what]


def summary(rows: Sequence[Row]) -> str:
    """The fitted growth of time and of memory with pixels, for what ran at three sizes."""
    lines = []
    for (what, provider), own in series(rows).items():
        for quantity, column in (("time", "p50_ms"), ("peak memory", "peak_mb")):
            points = [(pixels(row.case), value) for row in own if (value := getattr(row, column))]
            if len({size for size, _ in points}) >= FEWEST_POINTS:
                growth = fit(*zip(*points, strict=True))
                lines.append(f"{what}, {provider}: {quantity} grows as pixels ^ {growth}")
    return "\n".join(lines)


def series(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by what ran, a case's name without its size and dtype, and by provider."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        what = " ".join(row.case.split()[:-2])
        found.setdefault((what, row.provider), []).append(row)
    return found


def pixels(case: str) -> int:
    """Of the images of a case of this name."""
    height, width = case.split()[-2].split("x")
    return int(height) * int(width)


def _post(selection: Selection, size: Size) -> Case:
    """Logits of stride 8 to labels: as mmseg, through full-size logits, and by taps."""
    make = functools.cache(functools.partial(_random_logits, size, selection.device))
    providers = {
        "mmseg": lambda: _mmseg_post(selection, make(), size),
        "ours": lambda: _ours_post(make(), size),
    }
    return Case(
        suite="scale",
        name=f"post-processing {size[0]}x{size[1]} fp32",
        providers=selection.pick(providers, "mmseg"),
        baseline="mmseg",
        error=lambda labels: _wrong(labels, make(), size),
        bound=0.0,
        prepare=make,
        peak=not selection.short,
    )


def _random_logits(size: Size, device: str) -> Tensor:
    """As of an EMANet, [1, classes, ceil(H / 8), ceil(W / 8)]."""
    generator = torch.Generator().manual_seed(0)
    return 4 * torch.randn(1, CLASSES, *logits_size(*size), generator=generator).to(device)


def _mmseg_post(selection: Selection, logits: Tensor, size: Size) -> Call:
    if not _by_default(selection, "mmseg", size):
        raise Absent("takes minutes at this size; --sizes asks for it")
    _check_memory(selection.device, size)
    return without_gradients(_full_size_labels, logits, size)


def _full_size_labels(logits: Tensor, size: Size) -> Tensor:
    """mmseg's sequence: resize, softmax, argmax; labels [1, H, W]."""
    try:
        full = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return full.softmax(1).argmax(1).to(torch.uint8)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise Absent("out of memory") from None


def _ours_post(logits: Tensor, size: Size) -> Call:
    tables = tap_tables(make_protocol("whole", size), size, False, logits.device)
    return without_gradients(resample_labels, logits.flatten(2), *tables)


def _check_memory(device: str, size: Size) -> None:
    """Refuse what would not fit: logits and probabilities of the image's size, and the argmax."""
    if device == "cpu":
        needed = (2 * 4 * CLASSES + 8) * math.prod(size)
        available = 1024 * int(_meminfo().partition("MemAvailable:")[2].split()[0])
        if needed > available:
            raise Absent(f"needs {needed / 1e9:.1f} GB, {available / 1e9:.1f} are available")


def _meminfo() -> str:
    return Path("/proc/meminfo").read_text()


def _wrong(labels: Tensor, logits: Tensor, size: Size) -> float:
    """Share of wrong labels among clear pixels, of a sample, by float64's bilinear resize."""
    generator = torch.Generator().manual_seed(0)
    index = [torch.randint(side, (SAMPLED,), generator=generator) for side in size]
    exact = _interpolated(logits.double(), size, *index)  # [classes, SAMPLED]
    best = exact.topk(2, dim=0)
    clear = best.values[0] - best.values[1] > CLEAR
    rows, columns = (i.to(labels.device) for i in index)
    wrong = labels[0, rows, columns] != best.indices[0]
    return wrong[clear].double().mean().item()


def _interpolated(logits: Tensor, size: Size, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear logits, corners not aligned, at some pixels of an image: [classes, pixels]."""
    (low_y, high_y, weight_y), (low_x, high_x, weight_x) = (
        _neighbours(index.to(logits.device), n, low)
        for index, n, low in zip((rows, columns), size, logits.shape[2:], strict=True)
    )
    upper = torch.lerp(logits[0, :, low_y, low_x], logits[0, :, low_y, high_x], weight_x)
    lower = torch.lerp(logits[0, :, high_y, low_x], logits[0, :, high_y, high_x], weight_x)
    return torch.lerp(upper, lower, weight_y)


def _neighbours(index: Tensor, n: int, low: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two positions that an axis reads for each output, and the weight of the second."""
    source = ((index.double() + 0.5) * (low / n) - 0.5).clamp(min=0)
    first = source.long().clamp(max=low - 1)
    return first, (first + 1).clamp(max=low - 1), source - first


def _network(selection: Selection, network: str, size: Size) -> Case:
    """A normalised image to labels: mmseg's operations; our fused network and taps."""
    make = functools.cache(functools.partial(_model_and_image, network, size, selection.device))
    want = functools.cache(lambda: mmseg_network(*make()).cpu())
    providers = {
        "mmseg": lambda: _mmseg_network_call(selection, *make(), size),
        "ours": lambda: _our_network_call(*make(), size),
    }
    return Case(
        suite="scale",
        name=f"{network} {size[0]}x{size[1]} fp32",
        providers=selection.pick(providers, "mmseg"),
        baseline="mmseg",
        error=lambda got: _network_error(*got, want, size),
        bound=CLOSE,
        prepare=make,
        peak=not selection.short,
    )


def _model_and_image(network: str, size: Size, device: str) -> tuple[EMANet, Tensor]:
    if network == DEMO:
        model = create_model(DEMO, pretrained=True)
    else:
        model = make_network(network, make_protocol("whole", size))
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    return model.to(device), image.to(device)


def _mmseg_network_call(selection: Selection, model: EMANet, image: Tensor, size: Size) -> Call:
    _check_memory(selection.device, size)

    def run() -> tuple[Tensor, Tensor]:
        try:
            logits = mmseg_network(model, image)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise Absent("out of memory") from None
        return logits, _full_size_labels(logits, size)

    return without_gradients(run)


def _our_network_call(model: EMANet, image: Tensor, size: Size) -> Call:
    fused = fuse(model)
    tables = tap_tables(make_protocol("whole", size), size, False, image.device)

    def run() -> tuple[Tensor, Tensor]:
        logits = fused(image)
        return logits, resample_labels(logits.flatten(2), *tables)

    return without_gradients(run)


@torch.inference_mode()
def _network_error(logits: Tensor, labels: Tensor, want: Callable[[], Tensor], size: Size) -> float:
    """Relative error of the logits against the plain network's; infinite for a wrong label."""
    if _wrong(labels, logits, size):
        return math.inf
    difference = (logits.cpu().double() - want().double()).norm()
    return (difference / want().double().norm()).item()
