"""From PNG files to the metric: the whole evaluation, and its decoder and its network alone."""

import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emanet_triton.bench.case import Case
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.networks import make_network
from emanet_triton.bench.options import Selection, Size
from emanet_triton.bench.rows import Row
from emanet_triton.cores import usable_cores
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.dataset import IGNORE, Sample
from emanet_triton.data.png import read_image, write_png
from emanet_triton.data.scenes.generate import DEMO_COUNT, demo_dataset, generate_scene
from emanet_triton.errors import InputError
from emanet_triton.eval.__main__ import main as evaluate
from emanet_triton.inference.predictor import Predictor
from emanet_triton.inference.reference import probabilities
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.verified import verified_fuse
from emanet_triton.models.zoo import DEMO, ZOO, create_model

WHOLE, DECODER, NETWORK = "evaluation", "decoding alone", "network alone"
PUBLISHED = "emanet_{}-d8_512x1024_80k_cityscapes"
BOUND = 1e-3  # share of the pixels that may be counted elsewhere than by mmseg's sequence
WORKERS = min(8, usable_cores())  # threads that decode

_KEPT: list[tempfile.TemporaryDirectory] = []  # until the process ends


@dataclass(frozen=True)
class Problem:
    """Weights and images on disk.

    Attributes:
        name: of the model in the zoo.
        checkpoint: what ``--ckpt`` gets.
        data: root in Cityscapes layout.
        samples: its files.
    """

    name: str
    checkpoint: str
    data: Path
    samples: Sequence[Sample]

    def load(self, device: str) -> EMANet:
        """The network on its device."""
        given = {"pretrained": True} if self.name == DEMO else {"checkpoint": self.checkpoint}
        return create_model(self.name, **given).to(device)


def cases(selection: Selection) -> Iterator[Case]:
    """The shipped demonstration; on a GPU, or for the networks asked for, generated images too."""
    if "fp32" not in (selection.dtypes or ["fp32"]):
        return
    if not selection.networks:
        count = 2 if selection.tiny else 8 if selection.quick else DEMO_COUNT
        yield _case(selection, f"{DEMO} 256x512 images={count} fp32", _demonstration, count)
    by_default = ("r50",) if selection.cuda and not selection.short else ()
    count = 16 if selection.cuda else 4
    for network in selection.networks or by_default:
        for height, width in selection.sizes or [(64, 128) if selection.tiny else (1024, 2048)]:
            name = f"{network} {height}x{width} images={count} fp32"
            yield _case(selection, name, _generated, network, (height, width), count)


def summary(rows: Sequence[Row]) -> str:
    """Images a second, and whether the decoder or the network is the limit."""
    times = {(row.case, row.provider): row.p50_ms for row in rows if row.p50_ms}
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        whole, decoder, network = (times.get((case, name)) for name in (WHOLE, DECODER, NETWORK))
        if not whole:
            continue
        line = f"{case}: {1e3 * images(case) / whole:.3g} images/s"
        if decoder and network:
            limit = "network" if network > decoder else "decoder"
            line += (
                f"; decoding alone takes {decoder / whole:.0%} of that time, the network alone "
                f"{network / whole:.0%}: the {limit} is the limit"
            )
        lines.append(line)
    return "\n".join(lines)


def images(case: str) -> int:
    """How many images a case of this name is of."""
    return int(case.partition("images=")[2].split()[0])


def _case(
    selection: Selection, name: str, make: Callable[..., Problem], *arguments: object
) -> Case:
    problem = functools.cache(functools.partial(make, *arguments))
    want = functools.cache(lambda: _reference(problem(), selection.device))
    providers = {
        WHOLE: lambda: _evaluation(problem(), selection.device),
        DECODER: lambda: functools.partial(_decode, problem().samples),
        NETWORK: lambda: _network(problem(), selection.device),
    }
    return Case(
        suite="eval",
        name=name,
        providers=selection.pick(providers, WHOLE),
        baseline=WHOLE,
        error=lambda got: _error(got, want()),
        bound=BOUND,
        prepare=problem,
        peak=not selection.short,
        wall=True,
    )


def _demonstration(count: int) -> Problem:
    data = demo_dataset()
    return Problem(DEMO, DEMO, data, CITYSCAPES.find_samples(data, "val", count))


def _generated(network: str, size: Size, count: int) -> Problem:
    """Scenes of (height, width), and a network with generated weights; deleted at exit."""
    folder = _temporary_folder()

    def write(i: int) -> None:
        image, labels = generate_scene(i, *size)
        for tree, kind, pixels in (
            ("leftImg8bit", "leftImg8bit", image),
            ("gtFine", "gtFine_labelIds", labels),
        ):
            path = folder / tree / "val" / "synthetic" / f"synthetic_000000_{i:06d}_{kind}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(path, pixels)

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(write, range(count)))
    name, checkpoint = PUBLISHED.format(network), folder / "network.pth"
    model = make_network(network, ZOO[name].protocol)
    torch.save({"meta": {}, "state_dict": model.state_dict()}, checkpoint)
    return Problem(name, str(checkpoint), folder, CITYSCAPES.find_samples(folder, "val"))


def _temporary_folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="emanet_triton-")
    _KEPT.append(folder)
    return Path(folder.name)


def _evaluation(problem: Problem, device: str) -> Call:
    """The command line, on these images; the result is its confusion matrix."""
    out = _temporary_folder() / "out.json"
    arguments = ["--ckpt", problem.checkpoint, "--model", problem.name, "--json", str(out)]
    arguments += ["--data", str(problem.data), "--limit", str(len(problem.samples))]
    arguments += ["--device", device, "--workers", str(WORKERS)]
    arguments += ["--threads", str(torch.get_num_threads())]

    def call() -> Tensor:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = evaluate(arguments)
        if code:
            raise InputError(said.getvalue().strip().splitlines()[-1])
        return torch.tensor(json.loads(out.read_text())["confusion"])

    return call


def _decode(samples: Sequence[Sample]) -> Tensor:
    """Decode all images and labels as the evaluation does; counts the labels, int64 [classes]."""
    with ThreadPoolExecutor(WORKERS) as pool:
        found = pool.map(
            lambda sample: (read_image(sample.image), CITYSCAPES.read_labels(sample)), samples
        )
        return sum(_histogram(labels) for _, labels in found)


def _network(problem: Problem, device: str) -> Call:
    """From decoded images to labels, by the network that the command line runs by default."""
    decoded = [
        (read_image(sample.image), CITYSCAPES.read_labels(sample)) for sample in problem.samples
    ]
    model = problem.load(device)
    predictor = Predictor(verified_fuse(model), model.protocol, cuda_graphs=True)

    def call() -> Tensor:
        predicted = list(predictor([image for image, _ in decoded]))
        pairs = zip(decoded, predicted, strict=True)
        return sum(_count(labels, found.cpu().numpy()) for (_, labels), found in pairs)

    return call


@torch.inference_mode()
def _reference(problem: Problem, device: str) -> Tensor:
    """The confusion matrix by mmsegmentation's sequence of operations."""
    model = problem.load(device)
    total = torch.zeros(len(CITYSCAPES.classes), len(CITYSCAPES.classes), dtype=torch.int64)
    for sample in problem.samples:
        found = probabilities(model, [read_image(sample.image)], model.protocol, device=device)
        total += _count(CITYSCAPES.read_labels(sample), found[0].argmax(0).cpu().numpy())
    return total


def _count(labels: np.ndarray, predicted: np.ndarray) -> Tensor:
    """Pixels of each pair of a train id and a class, int64 [classes, classes]."""
    scored, classes = labels != IGNORE, len(CITYSCAPES.classes)
    pairs = labels[scored].astype(np.int64) * classes + predicted[scored]
    return torch.from_numpy(np.bincount(pairs, minlength=classes**2)).view(classes, classes)


def _histogram(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(
        np.bincount(labels[labels != IGNORE], minlength=len(CITYSCAPES.classes))
    )


def _error(got: Tensor, want: Tensor) -> float:
    """Share of the pixels that are counted elsewhere; of labels alone for a histogram."""
    want = want.sum(1) if got.dim() == 1 else want
    return ((got - want).abs().sum() / (2 * want.sum())).item()
