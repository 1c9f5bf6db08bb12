"""What an interrupted, disturbed or shared evaluation leaves, and how the next one goes on."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny_eval
import torch
from kills import TORCHRUN

from emanet_triton.eval import jobs, runner
from emanet_triton.eval.__main__ import main
from emanet_triton.eval.inference import Predictor
from emanet_triton.eval.png import write_png

TESTS = Path(tiny_eval.__file__).parent


@pytest.fixture
def command(tmp_path):
    """The evaluation of six images that draws all pictures."""
    city = tiny_eval.write_cityscapes(tmp_path / "cityscapes")
    ckpt = tiny_eval.write_checkpoint(tmp_path)
    out = ["--save-predictions", str(tmp_path / "p"), "--save-overlays", str(tmp_path / "o")]
    return ["--ckpt", str(ckpt), "--data", str(city), *out]


def interrupt(monkeypatch, command, images: int) -> None:
    """Run until so many images are finished."""
    left, call = iter(range(images)), Predictor.__call__

    def until_then(self, batch):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return call(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "__call__", until_then)
        assert main(command) == 2


def resume(tmp_path, command, capsys) -> tuple[list[list[int]], str]:
    """The confusion matrix of the run that goes on, and what it says about the earlier one."""
    capsys.readouterr()
    out = tmp_path / "resumed.json"
    assert main([*command, "--resume", "--json", str(out)]) == 0
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("resuming"))
    note = lines[begin + 1] if lines[begin + 1].startswith("note") else ""
    return json.loads(out.read_text())["confusion"], f"{lines[begin]} {note}"


@pytest.fixture
def undisturbed(tmp_path, command):
    """The confusion matrix and all pictures of a run that nobody disturbs."""
    out = tmp_path / "undisturbed.json"
    assert main([*command, "--json", str(out)]) == 0
    return json.loads(out.read_text())["confusion"], pictures(tmp_path)


def pictures(tmp_path) -> dict[str, bytes]:
    return {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.glob("[po]/*")}


def first_picture(tmp_path) -> Path:
    return min((tmp_path / "p").glob("*.png"))


LOSSES = {
    "a prediction": lambda tmp_path: first_picture(tmp_path).unlink(),
    "an overlay": lambda tmp_path: min((tmp_path / "o").iterdir()).unlink(),
    "empty": lambda tmp_path: first_picture(tmp_path).write_bytes(b""),
    "cut": lambda tmp_path: os.truncate(first_picture(tmp_path), 60),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_picture_that_is_missing_is_made_again(
    tmp_path, command, undisturbed, capsys, monkeypatch, loss
):
    interrupt(monkeypatch, command, 4)
    LOSSES[loss](tmp_path)
    confusion, said = resume(tmp_path, command, capsys)
    assert (confusion, pictures(tmp_path)) == undisturbed
    finished = int(said.split()[1])
    assert said == (
        f"resuming: {finished} of 6 images were finished before "
        "note: not taken over: 1 image of a batch whose pictures are missing or have changed"
    )


def test_pictures_of_another_run_are_made_again(
    tmp_path, command, undisturbed, capsys, monkeypatch
):
    """It has finished in the same folder since the interruption."""
    interrupt(monkeypatch, command, 4)
    other = tiny_eval.write_checkpoint(tmp_path, "other.pth")
    content = torch.load(other)
    content["state_dict"]["decode_head.conv_seg.weight"] *= -1
    torch.save(content, other)
    assert main(["--ckpt", str(other), "--model", "tiny", *command[2:]]) == 0
    assert pictures(tmp_path) != undisturbed[1]
    confusion, said = resume(tmp_path, command, capsys)
    assert (confusion, pictures(tmp_path)) == undisturbed
    assert said.startswith("resuming: 0 of 6 images were finished before note: not taken over: ")


def test_an_image_that_changed_is_evaluated_again(tmp_path, command, capsys, monkeypatch):
    interrupt(monkeypatch, command, 4)
    image = min(Path(command[3]).glob("leftImg8bit/val/*/*"))
    write_png(image, np.zeros((*tiny_eval.SIZE, 3), np.uint8))
    confusion, said = resume(tmp_path, command, capsys)
    assert said.endswith("note: not taken over: 1 image of a batch whose files have changed")
    out = tmp_path / "anew.json"
    assert main([*command, "--json", str(out)]) == 0
    assert confusion == json.loads(out.read_text())["confusion"]


def test_half_written_pictures_of_a_killed_run_are_removed(tmp_path, command):
    for folder in ("p", "o"):
        (tmp_path / folder).mkdir()
    token = "emanet-00000000-77-00000000"  # as files.temporary_beside names them
    left = tmp_path / "p" / f".aachen_000000_000001_leftImg8bit.png.{token}.tmp"
    others = tmp_path / "o" / ".else_leftImg8bit.png.77.88.tmp", tmp_path / "p" / ".notes.tmp"
    for path in (left, *others):
        path.write_bytes(b"half")
        os.utime(path, (1, 1))
    assert main(command) == 0
    assert not left.exists()
    assert all(path.exists() for path in others)


CHANGES = {
    "image of another size": (
        lambda sample: write_png(sample.image, np.zeros((8, 9, 3), np.uint8)),
        "{image}: 9x8 pixels, its label has 64x32; one of them has changed since the files were "
        "checked",
    ),
    "label of another size": (
        lambda sample: write_png(sample.label, np.zeros((8, 9), np.uint8)),
        "{image}: 64x32 pixels, its label has 9x8; one of them has changed since the files were "
        "checked",
    ),
    "illegal label": (
        lambda sample: write_png(sample.label, np.full(tiny_eval.SIZE, 77, np.uint8)),
        "{label}: illegal labelIds 77; expected 0 to 33, or 255 for -1",
    ),
    "image is gone": (
        lambda sample: sample.image.unlink(),
        "{image}: not a readable PNG (No such file or directory); expected an intact PNG file",
    ),
    "label is gone": (
        lambda sample: sample.label.unlink(),
        "{label}: not a readable PNG (No such file or directory); expected an intact PNG file",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_after_the_check_ends_the_run(command, capsys, monkeypatch, change):
    make, message = CHANGES[change]
    changed = []

    def check(samples, *rest):
        runner.check_samples(samples, *rest)
        changed.append(samples[3])
        make(samples[3])

    monkeypatch.setattr(jobs, "check_samples", check)
    assert main([*command, "--workers", "1"]) == 2
    err = capsys.readouterr().err.replace("\r", "\n").splitlines()
    (sample,) = changed
    assert err[-1] == "error: " + message.format(image=sample.image, label=sample.label)
    assert "3 of 6 images are finished; --resume goes on from there" in err


def test_it_runs_where_no_thread_can_start(tmp_path, command, undisturbed, capsys, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(runner._Bar, "monitor", None)  # tqdm's own thread has not started yet
    monkeypatch.setattr(threading.Thread, "start", fail)
    out = tmp_path / "alone.json"
    capsys.readouterr()
    assert main([*command, "--json", str(out), "--threads", "1"]) == 0
    assert json.loads(out.read_text())["confusion"] == undisturbed[0]
    assert pictures(tmp_path) == undisturbed[1]
    assert "note" not in capsys.readouterr().err


# Two ranks of a torchrun

RANK = """
import os, sys, tiny_eval
from emanet_triton.errors import InputError
from emanet_triton.eval import jobs, link
from emanet_triton.eval.inference import Predictor

link.BEAT_SECONDS = 0.2

def fail(*_):
    raise {error}

if os.environ["RANK"] == "{rank}":
    {where} = fail
sys.exit(tiny_eval.main(sys.argv[1:]))
"""


def run_ranks(tmp_path, command, *, rank: int, where: str, error: str) -> list[str]:
    """The messages of two ranks of which one fails."""
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(rank=rank, where=where, error=error))
    search = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "2", str(script), *command],
        env=os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1  # torchrun's own
    return re.findall("error(?: on rank [01])?: .*|interrupted.*", done.stderr)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["jobs.find_samples", "Predictor.__call__"])
def test_what_ends_one_rank_ends_all_with_its_message(tmp_path, command, rank, where):
    said = run_ranks(tmp_path, command, rank=rank, where=where, error="InputError('out of luck')")
    assert said == ["error" + " on rank 1" * rank + ": out of luck"]


TRAINING = """
import os, subprocess, sys, time
if os.environ["RANK"] == "0":
    sys.exit(subprocess.run(sys.argv[1:]).returncode)
time.sleep(2)
"""


def test_a_training_evaluates_in_one_of_its_ranks(tmp_path, command):
    script, out = tmp_path / "training.py", tmp_path / "out.json"
    script.write_text(TRAINING)
    evaluation = [sys.executable, str(TESTS / "tiny_eval.py"), *command, "--json", str(out)]
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "2", str(script), *evaluation],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "note: started inside rank 0 of a torchrun, this evaluation runs alone" in done.stderr
    assert json.loads(out.read_text())["images"] == 6
