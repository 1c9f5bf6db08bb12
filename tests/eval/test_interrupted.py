"""What an interrupted or disturbed evaluation keeps, and how the next one continues."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_eval
import torch
from tiny_eval import expected_confusion, partials, run

from emanet_triton.data.dataset import Dataset
from emanet_triton.data.png import write_png
from emanet_triton.errors import InputError
from emanet_triton.eval import outputs, runner
from emanet_triton.eval import plan as jobs
from emanet_triton.eval.__main__ import main
from emanet_triton.inference.predictor import Predictor


class Stop:
    """Replaces ``Predictor.__call__``: raises an error at the n-th image."""

    def __init__(self, monkeypatch, at: int, error: BaseException) -> None:
        self.original, self.left, self.error = Predictor.__call__, at, error
        monkeypatch.setattr(Predictor, "__call__", lambda *args: self(*args))

    def __call__(self, predictor, images):
        self.left -= len(images)
        if self.left < 0:
            raise self.error
        return self.original(predictor, images)


def interrupt(monkeypatch, command, images: int) -> None:
    """Run until the given number of images is finished."""
    with monkeypatch.context() as patch:
        Stop(patch, images, KeyboardInterrupt())
        assert main(command) == 2


def resume(tmp_path, command, capsys) -> tuple[list[list[int]], str]:
    """The confusion matrix of the run that continues, and its lines about the earlier run."""
    capsys.readouterr()
    out = tmp_path / "resumed.json"
    assert main([*command, "--resume", "--json", str(out)]) == 0
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("resuming"))
    note = lines[begin + 1] if lines[begin + 1].startswith("note") else ""
    return json.loads(out.read_text())["confusion"], f"{lines[begin]} {note}"


@pytest.fixture
def undisturbed(tmp_path, command):
    """The confusion matrix and all pictures of a run without interruption."""
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
    """Another run in the same folder has finished since the interruption."""
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
        "{image}: 9x8 pixels, its label has 64x32; expected equal sizes",
    ),
    "label of another size": (
        lambda sample: write_png(sample.label, np.zeros((8, 9), np.uint8)),
        "{image}: 64x32 pixels, its label has 9x8; expected equal sizes",
    ),
    "illegal label": (
        lambda sample: write_png(sample.label, np.full(tiny_eval.SIZE, 77, np.uint8)),
        "{label}: illegal labelIds 77; expected 0 to 33, or 255 for -1",
    ),
    "image is gone": (
        lambda sample: sample.image.unlink(),
        "{image}: there is no such file; expected a PNG file",
    ),
    "label is gone": (
        lambda sample: sample.label.unlink(),
        "{label}: there is no such file; expected a PNG file",
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

    monkeypatch.setattr(runner.Bar, "monitor", None)  # tqdm's own thread has not started yet
    monkeypatch.setattr(threading.Thread, "start", fail)
    out = tmp_path / "alone.json"
    capsys.readouterr()
    assert main([*command, "--json", str(out), "--threads", "1"]) == 0
    assert json.loads(out.read_text())["confusion"] == undisturbed[0]
    assert pictures(tmp_path) == undisturbed[1]
    assert "note" not in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_ends_the_run_and_keeps_the_rest(
    tmp_path, city, ckpt, capsys, monkeypatch
):
    written = []

    def full_disk(path, pixels, write=outputs.write_png):
        if len(written) == 2:
            raise InputError(f"{path}: cannot be written (No space left on device)")
        written.append(write(path, pixels))

    monkeypatch.setattr(outputs, "write_png", full_disk)
    more = ["--save-predictions", str(tmp_path / "out"), "--workers", "1"]
    assert main(["--ckpt", str(ckpt), "--data", str(city), *more]) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err
    assert "2 of 6 images are finished; --resume goes on from there" in err


def test_a_picture_that_needs_too_much_memory_ends_the_run(command, capsys, monkeypatch):
    def draw(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(outputs, "side_by_side", draw)
    assert main(command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(
        "_leftImg8bit.png: too little memory for its pictures (DefaultCPUAllocator: can't allocate "
        "memory)"
    )


def test_an_interrupted_run_is_resumed(tmp_path, city, ckpt, capsys, monkeypatch):
    command = ["--ckpt", str(ckpt), "--data", str(city)]
    with monkeypatch.context() as patch:
        Stop(patch, 2, KeyboardInterrupt())
        assert main(command) == 2
        err = capsys.readouterr().err
        assert "2 of 6 images are finished; --resume goes on from there" in err
        assert err.rstrip().endswith("interrupted")
    with monkeypatch.context() as patch:  # a second interruption, by an error
        Stop(patch, 3, RuntimeError("a bug"))
        with pytest.raises(RuntimeError):
            main([*command, "--resume"])
        assert "5 of 6 images are finished" in capsys.readouterr().err
    assert len(partials()) == 2
    seen = []
    read = Dataset.read
    monkeypatch.setattr(Dataset, "read", lambda self, s: seen.append(s) or read(self, s))
    got = run(tmp_path, city, ckpt, "--resume")
    assert "resuming: 5 of 6 images were finished before" in capsys.readouterr().err
    assert len(seen) == 1
    assert got["confusion"] == expected_confusion(city)
    assert not partials()


def test_a_partial_result_belongs_to_its_settings(tmp_path, city, ckpt, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        Stop(patch, 2, KeyboardInterrupt())
        main(["--ckpt", str(ckpt), "--data", str(city)])
    got = run(tmp_path, city, ckpt, "--resume", "--ms-flip")
    assert "resuming: 0 of 6" in capsys.readouterr().err
    assert got["confusion"] == expected_confusion(city, ms_flip=True)
    got = run(tmp_path, city, ckpt)
    assert "starting anew: 2 images finished by an interrupted run" in capsys.readouterr().err
    assert got["confusion"] == expected_confusion(city)


def test_a_damaged_partial_result_is_not_counted(tmp_path, city, ckpt, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        Stop(patch, 4, KeyboardInterrupt())
        main(["--ckpt", str(ckpt), "--data", str(city)])
    (kept,) = partials()
    kept.write_text(kept.read_text()[:-100])
    got = run(tmp_path, city, ckpt, "--resume")
    assert "resuming: 0 of 6" in capsys.readouterr().err
    assert got["confusion"] == expected_confusion(city)


def test_a_result_that_cannot_be_written_is_kept(tmp_path, city, ckpt, capsys, monkeypatch):
    out = tmp_path / "out.json"
    command = ["--ckpt", str(ckpt), "--data", str(city), "--json", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr("emanet_triton.eval.report.write_json", _disk_full)
        assert main(command) == 2
    assert "error: out.json: cannot be written (No space left" in capsys.readouterr().err
    monkeypatch.setattr(Dataset, "read", None)  # nothing is left to be loaded
    assert main([*command, "--resume"]) == 0
    assert json.loads(out.read_text())["confusion"] == expected_confusion(city)


def _disk_full(path, *args, **kwargs):
    raise InputError(f"{path.name}: cannot be written (No space left on device)")


# As ``tiny_process``, with a partial result after half a second.
SOON = """
from tiny_eval import main, run_program
from emanet_triton.eval import partial

partial._SECONDS_BETWEEN_WRITES = 0.5
run_program(main)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A data set whose evaluation takes many seconds."""
    return tiny_eval.write_cityscapes(tmp_path_factory.mktemp("large"), 2000)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_keeps_what_is_finished(tmp_path, large, ckpt, signum):
    out = tmp_path / "out.json"
    command = ["--ckpt", str(ckpt), "--data", str(large), "--json", str(out)]
    search = os.pathsep.join([str(Path(tiny_eval.__file__).parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", SOON, *command],
        env=os.environ | {"PYTHONPATH": search},
        stderr=subprocess.PIPE,
        text=True,
        # A terminal does not ignore Ctrl-C, but the shell of a background job does.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not partials() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in err
    assert "of 2000 images are finished; --resume goes on from there" in err
    assert not out.exists()
    (kept,) = partials()
    content = json.loads(json.loads(kept.read_text())["content"])
    assert 0 < sum(len(batch["images"]) for batch in content["finished"]) < 2000
