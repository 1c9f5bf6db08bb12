"""Runs of output rows: which low-resolution rows a program loads, and whether it holds the right.

A program keeps interpolated rows from one output row to the next. These tables make it keep,
replace, move and drop them in many ways.
"""

import pytest
import torch
from device import DEVICE
from torch import Tensor
from triton.runtime import interpreter

from emanet_triton.kernels.resample import gather
from emanet_triton.kernels.resample.op import Taps, resample_labels, resample_probabilities

WIDTH = 5  # of the low-resolution logits

# classes, low and full height, views
RESIZES = {
    "up-8": (19, 4, 37, 1),  # two whole runs and five rows
    "up-8-of-21-classes": (21, 4, 20, 1),  # a run that ends in the middle of a cell
    "up-8-of-150-classes": (150, 3, 19, 1),
    "up-3": (19, 7, 21, 1),
    "same-size": (19, 18, 18, 1),  # every row has a tap of its own
    "down-3": (19, 40, 13, 1),
    "one-row": (19, 3, 1, 1),
    "up-8-of-views": (19, 3, 22, 3),
    "up-8-of-views-of-150-classes": (150, 2, 9, 2),
    "down-2-of-views": (21, 22, 11, 2),
}


def resize(n_in: int, n_out: int, stride: int, views: int, align_corners: bool = False) -> Taps:
    """A bilinear resize; every second view is mirrored."""
    position = torch.arange(n_out, dtype=torch.float64)
    source = ((position + 0.5) * n_in / n_out - 0.5).clamp(0, n_in - 1)
    if align_corners:
        source = position * (n_in - 1) / max(n_out - 1, 1)
    low = source.long().clamp(max=max(n_in - 2, 0))
    index = stride * torch.stack([low, (low + 1).clamp(max=n_in - 1)])
    weight = torch.stack([1 - (source - low), source - low])
    flips = [(t.flip(-1) if view % 2 else t) for view in range(views) for t in (index, weight)]
    pairs = torch.stack(flips[::2]).int(), torch.stack(flips[1::2]).float()
    return Taps(*(t.to(DEVICE) for t in pairs))


def make_logits(classes: int, height: int) -> Tensor:
    generator = torch.Generator().manual_seed(classes + height)
    return (4 * torch.randn(1, classes, height * WIDTH, generator=generator)).to(DEVICE)


def assert_right(logits: Tensor, rows: Taps, columns: Taps) -> None:
    """Labels and probabilities of both averages are those of plain PyTorch."""
    for average in ("probabilities", "logits") if len(rows.index) > 1 else ("logits",):
        how = {"average": average}
        labels, got = resample_probabilities(logits, rows, columns, **how, backend="triton")
        alone = resample_labels(logits, rows, columns, **how, backend="triton")
        _, want = resample_probabilities(logits, rows, columns, **how, backend="torch")
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
        assert torch.equal(alone, labels)
        best = want.topk(2, 1).values
        clear = best[:, 0] - best[:, 1] > 1e-5
        assert torch.equal(alone[clear], want.argmax(1)[clear].to(torch.uint8))


@pytest.mark.parametrize("name", RESIZES)
def test_resizes(name):
    classes, low, height, views = RESIZES[name]
    columns = resize(WIDTH, 9, 1, views)
    assert_right(make_logits(classes, low), resize(low, height, WIDTH, views), columns)


@pytest.mark.parametrize("views", [1, 2])
def test_taps_that_come_and_go(views):
    """Taps without weight move and leave; tables change their taps in no order."""
    rows = resize(6, 33, WIDTH, views, align_corners=True)
    generator = torch.Generator().manual_seed(0)
    index = WIDTH * torch.randint(6, (views, 5, 33), generator=generator).int().to(DEVICE)
    index[:, :, 5:12] = index[:, :, 5:6]  # seven rows of the same taps
    weight = torch.rand(views, 5, 33, generator=generator).to(DEVICE)
    weight[:, 1:] *= (torch.rand(views, 4, 33, generator=generator) < 0.6).to(DEVICE)
    weight[:, 0, 20:22] = 0
    columns = resize(WIDTH, 7, 1, views)
    assert_right(make_logits(19, 6), rows, columns)
    assert_right(make_logits(19, 6), Taps(index, weight / weight.sum(1, keepdim=True)), columns)


def test_the_runs_of_a_tall_image_are_longer(monkeypatch):
    """A GPU refuses a grid of more programs along its second axis."""
    grids, start = [], gather.start

    def note(kernel, grid, *more):
        grids.append(grid)
        start(kernel, grid, *more)

    monkeypatch.setattr(gather, "MOST_RUNS", 2)
    monkeypatch.setattr(gather, "start", note)
    assert_right(make_logits(19, 2), resize(2, 7, WIDTH, 1), resize(WIDTH, 3, 1, 1))
    assert [runs for _, runs, _ in grids] == [2, 1]  # of probabilities, and of labels alone


def test_a_row_without_weight_is_not_read():
    """Its logits may be anything: here they are NaN, and the taps of weight 0 point to them."""
    logits = make_logits(19, 4)
    rows = resize(3, 24, WIDTH, 1)
    padded = torch.cat([rows.index, torch.full_like(rows.index[:, :1], 3 * WIDTH)], 1)
    weight = torch.cat([rows.weight, torch.zeros_like(rows.weight[:, :1])], 1)
    columns = resize(WIDTH, 6, 1, 1)
    want = resample_labels(logits, rows, columns, backend="triton")
    logits[:, :, 3 * WIDTH :] = float("nan")
    assert torch.equal(
        resample_labels(logits, Taps(padded, weight), columns, backend="triton"), want
    )


@pytest.mark.parametrize(("views", "least"), [(1, 10), (2, 4)], ids=["single", "two-views"])
def test_an_eighth_of_the_rows_load_logits(views, least, monkeypatch):
    """Loads of tiles at an upsampling of 8, against four for every row: two taps of each axis."""
    height, shapes = 64, []
    load = interpreter.InterpreterBuilder.create_masked_load

    def count(self, ptrs, *more):
        shapes.append(ptrs.data.shape)
        return load(self, ptrs, *more)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", count)
    rows, columns = resize(8, height, WIDTH, views), resize(WIDTH, 32, 1, views)
    labels = resample_labels(make_logits(19, 8), rows, columns, backend="triton")
    assert labels.shape == (1, height, 32)
    if gather.INTERPRETED:
        loads = sum(len(shape) == 2 for shape in shapes)
        assert 0 < least * loads <= views * height * 4
