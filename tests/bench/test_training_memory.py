"""The memory of a training step by arithmetic: its file, and the table of docs/train.md."""

import csv
from pathlib import Path

import pytest

from emanet_triton.bench.training_memory import WAYS, main
from emanet_triton.models.zoo import list_models

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results" / "train" / "memory.csv"
PARTS = [f"{name}, GB" for name in ("weights", "gradients", "momentum")]
SAVED, TOGETHER = "kept for the backward pass, GB", "together, GB"


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_kept_file_has_todays_figures(tmp_path):
    path = tmp_path / "memory.csv"
    assert main(["--tiny", "--csv", str(path)]) == 0
    for ours, kept in zip(rows(path), rows(KEPT), strict=False):
        for column in ("network", "way", *PARTS, SAVED, TOGETHER):
            assert ours[column] == kept[column], ours["way"]


def test_the_kept_file_is_whole_and_adds_up():
    kept = rows(KEPT)
    published = list_models(source="mmseg")
    assert [(row["network"], row["way"]) for row in kept] == [
        (name, way) for name in published for way in WAYS
    ]
    for row in kept:
        parts = sum(float(row[column]) for column in (*PARTS, SAVED))
        assert float(row[TOGETHER]) == pytest.approx(parts, abs=2e-3)


def test_the_page_shows_the_kept_file():
    page = (ROOT / "docs" / "train.md").read_text()
    for name in list_models(source="mmseg"):
        mine = [row for row in rows(KEPT) if row["network"] == name]
        if mine:
            cells = [f"{float(row[TOGETHER]):.1f}" for row in mine]
            name = name.removesuffix("_80k_cityscapes")
            line = " | ".join([f"| `{name}`", *cells, f"{mine[0]['published, GB']} |"])
            assert line in page


def test_no_more_than_mmsegmentation_and_less_by_options():
    by_network = {}
    for row in rows(KEPT):
        by_network.setdefault(row["network"], {})[row["way"]] = float(row[SAVED])
    for saved in by_network.values():
        assert saved["ours"] <= saved["mmseg"]
        assert saved["ours, --checkpointing"] < 0.5 * saved["ours"]
        assert saved["ours, bf16"] < 0.6 * saved["ours"]
        assert saved["ours, bf16 --checkpointing"] < saved["ours, --checkpointing"]
