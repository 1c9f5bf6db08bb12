"""``python -m emanet_triton.eval`` with one more model in the zoo, small enough for tests."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TINY

from emanet_triton import fuse, segment
from emanet_triton.command import run as run_program
from emanet_triton.data.cityscapes import CITYSCAPES, CLASSES
from emanet_triton.data.png import read_image, write_png
from emanet_triton.eval import metric
from emanet_triton.eval.__main__ import main
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.entries import Published, ZooEntry
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.zoo import ZOO

NAME = "tiny"
FILE = "tiny.pth"
SIZE = (32, 64)

ZOO[NAME] = ZooEntry(
    architecture=TINY,
    protocol=Protocol((64, 32), ratios=(0.5, 1.0)),
    file=FILE,
    sha256="--------",
    url=None,
    published=Published(miou=50.0, miou_ms_flip=60.0, memory_gb=1.0, fps=1.0),
)


def tiny_network(num_classes: int = 19) -> EMANet:
    """The tiny model with seeded weights and clear differences between pixels."""
    torch.manual_seed(0)
    model = EMANet(ZOO[NAME].architecture, ZOO[NAME].protocol, num_classes).eval()
    model.decode_head.conv_seg.weight.data *= 300
    return model


def image_of(city: Path, tree: str, index: int = 0) -> Path:
    """A PNG file of a data set, by its place among the sorted files of a tree."""
    return sorted((city / tree).rglob("*.png"))[index]


def write_checkpoint(folder: Path, name: str = FILE, num_classes: int = 19) -> Path:
    """Write a checkpoint in mmseg's form with the weights of the tiny model."""
    path = folder / name
    torch.save({"meta": {}, "state_dict": tiny_network(num_classes).state_dict()}, path)
    return path


def write_cityscapes(root: Path, count: int = 6, enlarge: int = 1) -> Path:
    """Write a data set with random pixels and labels in Cityscapes layout, in two cities.

    Images are ``SIZE`` times ``enlarge``.
    """
    rng = np.random.default_rng(0)
    ids = np.array([0, 4, *(c.label_id for c in CLASSES)], np.uint8)
    for i in range(count):
        city = "aachen" if i < count // 2 else "bochum"
        stem = f"{city}_000000_{i:06d}"
        image = root / "leftImg8bit" / "val" / city / f"{stem}_leftImg8bit.png"
        label = root / "gtFine" / "val" / city / f"{stem}_gtFine_labelIds.png"
        for path, pixels in (
            (image, rng.integers(0, 256, (SIZE[0] * enlarge, SIZE[1] * enlarge, 3), np.uint8)),
            (
                label,
                np.kron(rng.choice(ids, (4, 8)), np.ones((8 * enlarge, 8 * enlarge), np.uint8)),
            ),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(path, pixels)
    return root


def stop_before_the_tables(command: list[str]) -> None:
    """Evaluate all images, and fail before the partial results are removed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emanet_triton.eval.report.class_table", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(command)


def run(tmp_path: Path, city: Path, ckpt: Path, *more: str) -> dict:
    """Run the command line with more options, and return the JSON that it writes."""
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    command = ["--ckpt", str(ckpt), "--data", str(city), "--json", str(out), *more]
    assert main(command) == 0
    return json.loads(out.read_text())


def expected_confusion(city: Path, ms_flip: bool = False, fused: bool = True) -> list[list[int]]:
    """The confusion matrix that a plain loop over ``segment`` counts."""
    model, total = tiny_network(), 0
    model = fuse(model) if fused else model
    for sample in CITYSCAPES.find_samples(city):
        labels = torch.from_numpy(CITYSCAPES.read_labels(sample))
        predicted = segment(model, read_image(sample.image), ms_flip=ms_flip)
        total = total + metric.confusion_matrix(labels, torch.from_numpy(predicted))
    return total.tolist()


def partials() -> list[Path]:
    """The files of all partial results."""
    return list((Path(os.environ["XDG_CACHE_HOME"]) / "emanet_triton/partial").glob("*/*.json"))


def tiny_process(*arguments: str, launcher: tuple[str, ...] = ()) -> list[str]:
    """The command that runs this command line in a process of its own."""
    return [sys.executable, *launcher, __file__, *arguments]


if __name__ == "__main__":
    run_program(main)
