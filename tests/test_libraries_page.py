"""The code of docs/libraries.md; ``tests/examples`` runs what needs other libraries."""

import re
from pathlib import Path

import pytest
import torch
from page_blocks import run_section, sections

from emanet_triton import EMAUnit, create_model

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "libraries.md"
OTHER_LIBRARIES = {"timm", "segmentation_models_pytorch"}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(title: str) -> dict:
    return run_section(PAGE, title)


def test_each_section_has_a_test():
    tested = {"torchvision", "In place of self-attention", "Through torch.hub"}
    assert sections(PAGE).keys() == tested | OTHER_LIBRARIES | {"On the Hugging Face Hub"}


def test_torchvision():
    names = run("torchvision")
    names["logits"].square().mean().backward()
    assert names["resnet"].conv1.weight.grad.any()


def test_self_attention():
    names = run("In place of self-attention")
    assert isinstance(names["network"][1], EMAUnit)
    assert names["features"].data_ptr() == names["tokens"].data_ptr()
    assert names["mixed"].min() < 0
    bases = create_model("emanet_demo", pretrained=True).decode_head.ema_module.bases
    assert torch.equal(names["unit"].ema_module.bases, bases)


def test_torch_hub(monkeypatch):
    monkeypatch.chdir(ROOT)
    run("Through torch.hub")


def test_the_table_of_entry_points(monkeypatch):
    monkeypatch.setattr(torch.hub, "_get_cache_or_reload", lambda *_, **options: str(ROOT))
    table = re.findall(r"^\| `(emanet\w*)` \|", PAGE.read_text(), re.MULTILINE)
    assert sorted(table) == sorted(torch.hub.list("owner/repository"))


def test_the_hugging_face_hub(monkeypatch):
    pytest.importorskip("huggingface_hub", reason="install it by: pip install '.[hub]'")
    from emanet_triton.hub import HubEMANet

    def upload(self, repo_id, **options):
        self.save_pretrained(repo_id)  # a folder of this name stands for the repository

    monkeypatch.setattr(HubEMANet, "push_to_hub", upload)
    model = run("On the Hugging Face Hub")["model"]
    want = create_model("emanet_demo", pretrained=True)
    image = torch.randn(1, 3, 64, 96)
    assert torch.equal(model(image), want(image))
