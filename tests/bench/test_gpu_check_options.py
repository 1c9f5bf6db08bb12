"""Options of the steps' own commands: bad input ends with one message."""

import importlib
import signal
import sys

import pytest
import torch

from emanet_triton.bench.gpu_check import own, versions
from emanet_triton.errors import InputError

MEASURING = {
    "correct": ["em-block"], "single": [], "sweep": [], "trace": [], "warm": [],
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURING)
def test_a_step_without_a_gpu_says_so(name, monkeypatch, capsys):
    module = importlib.import_module(f"emanet_triton.bench.gpu_check.{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [name, *MEASURING[name]])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="2"):
        own.run_main(module.main)
    assert capsys.readouterr().err == (
        f"error: python -m emanet_triton.bench.gpu_check.{name} needs a GPU, and PyTorch finds "
        "none here; --rehearse does without\n"
    )


@pytest.mark.parametrize(
    ("folder", "message"),
    [("/proc/none", "cannot be made: No such file or directory"),
     (__file__, "is a file, expected a folder")],
    ids=["nowhere", "file"],
)  # fmt: skip
def test_a_step_whose_folder_cannot_be_made(folder, message):
    with pytest.raises(InputError, match=f"^--out {folder}: {message}$"):
        versions.main(["--out", folder])


def test_processes_default_to_the_usable_cores(monkeypatch):
    monkeypatch.setattr(own, "usable_cores", lambda: 3)
    made = own.Parser()
    own.add_processes(made)
    assert made.parse_args([]).processes == 3
