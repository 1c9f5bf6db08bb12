"""``hubconf.py``: the models through ``torch.hub``, from a folder and as from GitHub."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trained_files import CLASSES, write_trained

from emanet_triton import create_model, list_models
from emanet_triton.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def github(monkeypatch):
    """The name of a repository that seems to have been downloaded."""
    monkeypatch.setattr(torch.hub, "_get_cache_or_reload", lambda *_, **options: str(ROOT))
    return "owner/repository"


def test_there_is_one_entry_point_for_each_model(github):
    names = set(torch.hub.list(github)) - {"emanet"}
    models = [model for model in list_models() if model.startswith("emanet_")]  # no test's own
    short = {re.sub("-d8|_80k_cityscapes$", "", model): model for model in models}
    assert names == short.keys()
    for name, model in short.items():
        assert torch.hub.help(github, name).startswith(f"The model {model}, in evaluation mode")


def test_a_fresh_process_needs_the_folder_alone(tmp_path):
    """Without the package in the search path, as in a clone of the repository."""
    code = (
        "import sys, torch;"
        f"sys.path = [path for path in sys.path if path not in ('', {str(ROOT)!r})];"
        f"model = torch.hub.load({str(ROOT)!r}, 'emanet_demo', pretrained=True, source='local');"
        "torch.save(model(torch.ones(1, 3, 40, 72)), 'logits.pt');"
        "print(sys.modules['emanet_triton'].__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(ROOT / "emanet_triton" / "__init__.py")
    want = create_model("emanet_demo", pretrained=True)(torch.ones(1, 3, 40, 72))
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), want)


def load(entry, *arguments, **options):
    return torch.hub.load(str(ROOT), entry, *arguments, source="local", **options)


def test_arguments(tmp_path):
    weights = ROOT / "emanet_triton" / "models" / "weights" / "emanet_demo.pth"
    want = create_model("emanet_demo", pretrained=True).state_dict()
    for model in (
        load("emanet", "emanet_demo", True),
        load("emanet", "emanet_demo", checkpoint=weights),
        load("emanet_demo", checkpoint=weights),
    ):
        assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())
        assert not model.training
    assert load("emanet_demo", num_classes=5).num_classes == 5
    own = load("emanet", checkpoint=write_trained(tmp_path / "best.safetensors"))
    assert own.num_classes == len(CLASSES)


def test_bad_arguments():
    with pytest.raises(InputError, match="unknown model 'x'"):
        load("emanet", "x")
    with pytest.raises(InputError, match="create_model: expected the name of a model such as"):
        load("emanet")
