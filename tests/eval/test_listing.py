"""The table of all models."""

from pathlib import Path

import pytest

from emanet_triton.eval.__main__ import main
from emanet_triton.models.zoo import ZOO

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.fixture
def listed(monkeypatch, capsys) -> str:
    """What the command prints of the models that the package has, without those of the tests."""
    for name in [name for name, entry in ZOO.items() if entry.source is None]:
        monkeypatch.delitem(ZOO, name)
    assert main(["--list"]) == 0
    return capsys.readouterr().out


def test_the_page_has_the_printed_table(listed):
    assert listed in PAGE.read_text()


def test_every_model_and_every_project_has_a_row(listed):
    models, notes, sources = listed.split("\n\n")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in models.splitlines()[2:]]
    assert [row[0] for row in rows] == list(ZOO)
    found = {row[0]: row[1:] for row in rows}
    assert found["emanet_resnet101os16_voc"] == [
        *("sssegmentation", "Pascal VOC 2012", "R101-D16", "whole", "76.19", "-", "-", "-")
    ]
    assert found["emanet_r50-d8_769x769_40k_sem_seg_bdd100k"] == [
        *("bdd100k", "BDD100K", "R50-D8", "slide", "62.05", "-", "-", "54.52")
    ]
    assert found["emanet_resnet50_os8_cityscapes_1024x512_80k"] == [
        *("paddleseg", "Cityscapes", "R50-D8", "whole", "79.05", "79.34", "80.82", "-")
    ]
    assert notes.startswith("emanet_r101_voc_official: mIoU by the author's word")
    assert "GPL-3.0-only" in sources
    assert sources.count("not stated") == 4


def test_a_model_of_nobody_has_a_row(monkeypatch, capsys):
    assert "tiny" in ZOO
    assert main(["--list"]) == 0
    assert "| tiny " in capsys.readouterr().out


def test_the_list_can_be_filtered(capsys):
    assert main(["--list", "--all", "sssegmentation", "--dataset", "ade20k"]) == 0
    out = capsys.readouterr().out
    assert out.count("_ade20k") == 4
    assert "_voc " not in out
    assert "paddleseg" not in out


def test_the_licences_are_those_of_the_listed_models(capsys):
    assert main(["--list", "--dataset", "ade20k"]) == 0
    sources = capsys.readouterr().out.split("\n\n")[-1]
    assert [row.split("|")[1].strip() for row in sources.splitlines()[2:]] == ["sssegmentation"]


def test_an_empty_list_is_refused(capsys):
    assert main(["--list", "--all", "mmseg", "--dataset", "ade20k"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == (
        "",
        "error: --all mmseg: has no model of ade20k; expected cityscapes\n",
    )
