"""The suite train-mem: one training step is mmseg's, and its memory is measured."""

import math

import pytest
import torch

from emanet_triton.bench.__main__ import main
from emanet_triton.bench.options import Selection
from emanet_triton.bench.rows import read_rows
from emanet_triton.bench.suites import train_mem
from emanet_triton.bench.suites.train_mem import cases
from emanet_triton.train.loss import pixel_loss


def test_a_tiny_run(tmp_path):
    assert main(["train-mem", "--tiny", "--rounds", "3", "--csv", str(tmp_path / "rows.csv")]) == 0
    rows = read_rows(tmp_path / "rows.csv")
    assert [row.provider for row in rows] == ["mmseg", "ours"]
    assert all(row.gate == "passed" and row.p50_ms > 0 for row in rows)
    assert all(row.peak_mb > 0 for row in rows)


@pytest.fixture(scope="module")
def case():
    return next(cases(Selection(tiny=True)))


def test_ours_is_mmsegs_and_a_wrong_step_does_not_pass(case):
    assert case.error(case.providers["mmseg"]()()) == 0
    step = case.providers["ours"]()
    assert case.error(step()) <= case.bound
    model, *_ = step.args
    model.decode_head.fixed_reconstruction = torch.zeros(1, 1, 1, 1)
    assert case.error(step()) > case.bound
    assert math.isnan(case.error((math.nan, torch.ones(3))))


def test_the_optimisers_buffers_exist_before_the_first_step(case):
    _, optimizer, *_ = case.providers["ours"]().args
    (group,) = optimizer.param_groups
    assert all("momentum_buffer" in optimizer.state[p] for p in group["params"])
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)


def test_a_step_trains(case):
    model, optimizer, images, labels = case.providers["ours"]().args
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, _ = train_mem.training_step(model, optimizer, images, labels)
    second, _ = train_mem.training_step(model, optimizer, images, labels)
    after = model.state_dict()
    assert second < first
    for name in ("auxiliary_head.conv_seg.weight", "decode_head.ema_module.bases"):
        assert not torch.equal(before[name], after[name])
    frozen = "decode_head.ema_mid_conv.conv.weight"
    assert torch.equal(before[frozen], after[frozen])


def test_some_labels_are_ignored(case):
    model, _, _, labels = case.providers["ours"]().args
    assert (labels == 255).any()
    logits = torch.zeros(2, 19, 3, 5)
    share = (labels != 255).double().mean()
    loss = pixel_loss(logits, labels, model.protocol.align_corners)
    assert loss.item() == pytest.approx(math.log(19) * share.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (
            Selection("cuda"),
            [f"{n} {c} B=2 fp32" for n in ("r50", "r101") for c in ("512x1024", "769x769")],
        ),
        (Selection(), ["r50 256x512 B=1 fp32"]),
        (Selection(quick=True), []),
        (Selection(dtypes=("bf16",)), []),
        (
            Selection(sizes=((769, 769),), batches=(2,), networks=("r101",)),
            ["r101 769x769 B=2 fp32"],
        ),
    ],
)
def test_what_is_selected(selection, names):
    assert [case.name for case in cases(selection)] == names
