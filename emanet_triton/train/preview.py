"""``--dry-run``: eight training samples as one picture, and the memory of one iteration."""

import re
import struct
import zlib
from pathlib import Path

import numpy as np

from emanet_triton.data.dataset import IGNORE
from emanet_triton.data.overlay import BLACK, legend_entries, overlay, with_legend
from emanet_triton.data.png import encode_png
from emanet_triton.errors import InputError
from emanet_triton.files import require_own, write_output
from emanet_triton.train.group import Group
from emanet_triton.train.log import peak_memory
from emanet_triton.train.memory import SavedTensors, step_memory
from emanet_triton.train.plan import Plan
from emanet_triton.train.samples import Batches, Crops, ending, load
from emanet_triton.train.trainer import Trainer

SAMPLES = 8
PICTURE = "samples.png"
_HEADER = 33  # bytes of a PNG: its signature and the chunk IHDR
_MARK = b"Software\0emanet-triton train"
_OWN = re.compile(rb"\x89PNG.{29}.{4}tEXt%b" % re.escape(_MARK), re.DOTALL)  # .{4}: the size
_COLUMNS = 2  # pairs of a sample and its labels beside each other
_GAP = 4  # pixels between pictures
_WIDTH = 1600  # pixels of the picture, about


def draw_samples(plan: Plan) -> np.ndarray:
    """The first eight training samples, each beside its labels, above a legend: uint8 RGB.

    Raises:
        InputError: a sample cannot be read.
    """
    crops = Crops(plan.train, plan.dataset, plan.recipe.augmentation, plan.recipe.seed)
    batch = next(load(crops, Batches(len(crops), SAMPLES, plan.recipe.seed), 0, pin_memory=False))
    if batch.problem:
        raise InputError(batch.problem)
    zoom = max(1, -(-batch.images.shape[2] * 2 * _COLUMNS // _WIDTH))
    cells = []
    for image, labels in zip(batch.images.numpy(), batch.labels.numpy(), strict=True):
        painted = overlay(image, labels, plan.dataset, legend=False)
        painted[labels == IGNORE] = BLACK
        cells.append(np.concatenate([image, painted], axis=1)[::zoom, ::zoom])
    gap = [(0, _GAP), (0, _GAP), (0, 0)]
    cells = [np.pad(cell, gap, constant_values=255) for cell in cells]
    rows = [np.concatenate(cells[i : i + _COLUMNS], axis=1) for i in range(0, SAMPLES, _COLUMNS)]
    entries = [*legend_entries(plan.dataset), ("ignored", BLACK)]
    return with_legend(np.ascontiguousarray(np.concatenate(rows)), entries)


def measure_memory(plan: Plan) -> list[tuple[str, int]]:
    """Run one iteration, and return the bytes of its parts by their names."""
    crops = Crops(plan.train, plan.dataset, plan.recipe.augmentation, plan.recipe.seed)
    recipe = plan.recipe
    size = recipe.batch_size // recipe.accumulate
    batches = load(crops, Batches(len(crops), size, recipe.seed), plan.workers, pin_memory=False)
    with ending(batches):
        trainer = Trainer(plan.network(), recipe)
        first = next(batches)
        if first.problem:
            raise InputError(first.problem)
        with SavedTensors(trainer.network) as saved:
            trainer.step([first])
    found = step_memory(
        trainer.network,
        trainer.state_dict()["optimizer"],
        saved.bytes,
        averaged=trainer.averaged is not None,
    )
    return [
        ("weights", found.weights),
        ("gradients", found.gradients),
        ("optimizer", found.optimizer),
        ("kept for the backward pass", found.saved),
        ("these together", found.total),
        (
            "peak of the process" if plan.device.type == "cpu" else "peak on the GPU",
            peak_memory(plan.device),
        ),
    ]


def preview(plan: Plan, group: Group) -> tuple[Path, list[tuple[str, int]]]:
    """Write the picture of samples into ``plan.out`` and measure the memory.

    Raises:
        InputError: a file cannot be read or written, or there are several processes.
    """
    if group.count > 1:
        raise InputError("--dry-run runs in one process; expected no torchrun")
    path = plan.out / PICTURE
    require_own(path, _OWN, "picture of emanet-triton train --dry-run")
    write_output(path, _marked(encode_png(draw_samples(plan), str(path))))
    return path, measure_memory(plan)


def _marked(png: bytes) -> bytes:
    """The PNG with the mark of this command behind its header."""
    chunk = b"tEXt" + _MARK
    size, check = struct.pack(">I", len(_MARK)), struct.pack(">I", zlib.crc32(chunk))
    return png[:_HEADER] + size + chunk + check + png[_HEADER:]
