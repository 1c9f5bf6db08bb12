"""The command line from end to end: what it prints, writes and keeps."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_eval
import torch
from kills import TORCHRUN

from emanet_triton import fuse, segment
from emanet_triton.errors import InputError
from emanet_triton.eval import cityscapes, metric, outputs, runner
from emanet_triton.eval.__main__ import main
from emanet_triton.eval.inference import Predictor
from emanet_triton.eval.png import read_image
from emanet_triton.models.zoo import ZOO

TINY = Path(tiny_eval.__file__)
FIELDS = [
    "model",
    "checkpoint",
    "sha256",
    "data",
    "split",
    "images",
    "protocol",
    "ms_flip",
    "precision",
    "device",
    "network",
    "versions",
    "seconds",
    "mIoU",
    "mAcc",
    "aAcc",
    "IoU",
    "confusion",
    "compared",
    "published",
]


@pytest.fixture
def city(tmp_path):
    return tiny_eval.write_cityscapes(tmp_path / "cityscapes")


@pytest.fixture
def ckpt(tmp_path):
    return tiny_eval.write_checkpoint(tmp_path)


@pytest.fixture
def threads():
    """The number of PyTorch's threads, put back at the end."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def run(tmp_path, city, ckpt, *more: str) -> dict:
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    command = ["--ckpt", str(ckpt), "--data", str(city), "--json", str(out), *more]
    assert main(command) == 0
    return json.loads(out.read_text())


def expected_confusion(city: Path, ms_flip: bool = False, fused: bool = True) -> list[list[int]]:
    """What a plain loop over ``segment`` counts."""
    model, total = tiny_eval.tiny_network(), 0
    model = fuse(model) if fused else model
    for sample in cityscapes.find_samples(city):
        labels = torch.from_numpy(cityscapes.read_labels(sample))
        predicted = segment(model, read_image(sample.image), ms_flip=ms_flip)
        total = total + metric.confusion_matrix(labels, torch.from_numpy(predicted))
    return total.tolist()


@pytest.mark.parametrize("ms_flip", [False, True], ids=["single", "ms_flip"])
def test_json_has_every_figure(tmp_path, city, ckpt, ms_flip):
    got = run(tmp_path, city, ckpt, *["--ms-flip"] * ms_flip)
    assert list(got) == FIELDS
    assert got["confusion"] == expected_confusion(city, ms_flip)
    scores = metric.scores(torch.tensor(got["confusion"]))
    assert (got["mIoU"], got["mAcc"], got["aAcc"]) == (scores.miou, scores.macc, scores.aacc)
    assert list(got["IoU"]) == [c.name for c in cityscapes.CLASSES]
    assert got["model"] == "tiny"
    assert got["images"] == 6
    assert got["ms_flip"] is ms_flip
    assert got["published"] is None  # another file than the published one
    assert got["protocol"]["base_scale"] == [64, 32]


def test_the_plain_network(tmp_path, city, ckpt, capsys):
    got = run(tmp_path, city, ckpt, "--no-fuse")
    assert "plain network, fp32 on cpu, " in capsys.readouterr().err
    assert got["network"] == "plain"
    assert got["confusion"] == expected_confusion(city, fused=False)


def test_printed_tables(tmp_path, city, ckpt, capsys, threads):
    got = run(tmp_path, city, ckpt, "--threads", "1")
    out, err = capsys.readouterr()
    assert out.count("\n") == 25
    assert f"{got['IoU']['bicycle']:.2f}" in out
    assert f"| {got['mIoU']:.2f}" in out
    assert "mmseg-0.x, whole, one view\n" in err
    assert "fused network, fp32 on cpu, 1 thread, one input at once\n" in err
    assert "images a second; " in err
    assert f"mIoU {got['mIoU']:.2f}" in err  # the progress bar's last figure


@pytest.mark.parametrize(
    ("published", "verdict"), [(0.0, "NO"), (None, "yes")], ids=["far", "reproduced"]
)
def test_published_row(tmp_path, city, ckpt, capsys, monkeypatch, published, verdict):
    first = run(tmp_path, city, ckpt)
    figure = round(first["mIoU"], 2) if published is None else published
    entry = ZOO["tiny"]
    figures = type(entry.published)(figure, 99.0, 1.0, 1.0)
    known = type(entry)(
        entry.architecture, entry.protocol, entry.file, first["sha256"][:8], None, figures
    )
    monkeypatch.setitem(ZOO, "tiny", known)
    monkeypatch.setattr("emanet_triton.eval.jobs._VAL_IMAGES", 6)
    capsys.readouterr()
    got = run(tmp_path, city, ckpt)
    difference = got["mIoU"] - figure
    assert got["published"] == {
        "mIoU": figure,
        "difference": difference,
        "within_tolerance": published is None,
    }
    row = capsys.readouterr().out.splitlines()[-1]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[-3:] == [f"{figure:.2f}", f"{difference:+.2f}", verdict]
    # A part of the split is not what was published.
    assert run(tmp_path, city, ckpt, "--limit", "5")["published"] is None


def test_two_precisions_in_one_pass(tmp_path, city, ckpt, capsys):
    single = run(tmp_path, city, ckpt)
    half = run(tmp_path, city, ckpt, "--precision", "bf16")
    capsys.readouterr()
    both = run(tmp_path, city, ckpt, "--precision", "bf16", "--compare", "fp32")
    out, err = capsys.readouterr()
    compared = both["compared"]
    assert both["confusion"] == half["confusion"]
    assert compared["confusion"] == single["confusion"]
    assert compared["precision"] == "fp32"
    assert compared["mIoU"] == single["mIoU"]
    assert compared["difference"] == half["mIoU"] - single["mIoU"]
    agreement = np.array(compared["agreement"])
    assert agreement.sum() == 6 * 32 * 64  # every pixel, scored or not
    assert compared["labels_agree"] == pytest.approx(100 * agreement.trace() / agreement.sum())
    assert 90 < compared["labels_agree"] < 100
    assert "compared with fp32" in err
    assert f"{compared['difference']:+.4f}" in out
    assert f"{compared['labels_agree']:.4f}%" in out


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


def test_saved_predictions_are_label_ids_under_the_servers_names(tmp_path, city, ckpt):
    folder = tmp_path / "predictions"
    run(tmp_path, city, ckpt, "--save-predictions", str(folder), "--limit", "2")
    samples = cityscapes.find_samples(city, limit=2)
    assert sorted(p.name for p in folder.iterdir()) == [
        f"{s.name}_leftImg8bit.png" for s in samples
    ]
    for sample in samples:
        ids = cv2.imread(str(folder / f"{sample.name}_leftImg8bit.png"), cv2.IMREAD_UNCHANGED)
        want = segment(fuse(tiny_eval.tiny_network()), read_image(sample.image))
        np.testing.assert_array_equal(ids, cityscapes.to_label_ids(want))


def test_saved_overlays(tmp_path, city, ckpt):
    folder = tmp_path / "overlays"
    run(tmp_path, city, ckpt, "--save-overlays", str(folder), "--limit", "1")
    (path,) = folder.iterdir()
    assert read_image(path).shape[1] > 2 * tiny_eval.SIZE[1]


@pytest.mark.parametrize("size", ["2", "4"])
def test_batches_count_every_image_once(tmp_path, city, ckpt, size):
    got = run(tmp_path, city, ckpt, "--batch-size", size)
    want = np.array(expected_confusion(city))
    assert np.sum(got["confusion"]) == want.sum()
    assert np.abs(np.array(got["confusion"]) - want).sum() <= 4  # rounding, at near-ties


def test_all_gives_one_table(tmp_path, city, capsys, monkeypatch):
    published = {}
    for i in range(2):
        weights = tiny_eval.write_checkpoint(tmp_path, f"published{i}.pth")
        sha256 = run(tmp_path, city, weights, "--model", "tiny", "--limit", "1")["sha256"]
        tiny = ZOO["tiny"]
        published[f"tiny{i}"] = type(tiny)(
            tiny.architecture, tiny.protocol, weights.name, sha256[:8], "http://", tiny.published
        )
    monkeypatch.setattr("emanet_triton.models.zoo.ZOO", published)
    monkeypatch.setattr("emanet_triton.eval.jobs.ZOO", published)
    out = tmp_path / "all.json"
    capsys.readouterr()
    command = ["--all", "--ckpt", str(tmp_path), "--data", str(city), "--json", str(out)]
    assert main(command) == 0
    reports = json.loads(out.read_text())
    runs = [(r["model"], r["ms_flip"]) for r in reports]
    assert runs == [("tiny0", False), ("tiny1", False), ("tiny0", True), ("tiny1", True)]
    assert reports[0]["confusion"] == reports[1]["confusion"] == expected_confusion(city)
    assert reports[2]["confusion"] == expected_confusion(city, ms_flip=True)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4


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


def partials(tmp_path) -> list[Path]:
    return list((Path(os.environ["XDG_CACHE_HOME"]) / "emanet_triton/partial").glob("*/*.json"))


def test_an_interrupted_run_is_resumed(tmp_path, city, ckpt, capsys, monkeypatch):
    command = ["--ckpt", str(ckpt), "--data", str(city)]
    with monkeypatch.context() as patch:
        Stop(patch, 2, KeyboardInterrupt())
        assert main(command) == 2
        err = capsys.readouterr().err
        assert "2 of 6 images are finished; --resume goes on from there" in err
        assert err.rstrip().endswith("interrupted")
    with monkeypatch.context() as patch:  # and once more, now by an error
        Stop(patch, 3, RuntimeError("a bug"))
        with pytest.raises(RuntimeError):
            main([*command, "--resume"])
        assert "5 of 6 images are finished" in capsys.readouterr().err
    assert len(partials(tmp_path)) == 2
    seen = []
    monkeypatch.setattr(runner, "_load", lambda b, f=runner._load: seen.extend(b) or f(b))
    got = run(tmp_path, city, ckpt, "--resume")
    assert "resuming: 5 of 6 images were finished before" in capsys.readouterr().err
    assert len(seen) == 1
    assert got["confusion"] == expected_confusion(city)
    assert not partials(tmp_path)


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
    (kept,) = partials(tmp_path)
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
    monkeypatch.setattr(runner, "_load", None)  # nothing is left to be loaded
    assert main([*command, "--resume"]) == 0
    assert json.loads(out.read_text())["confusion"] == expected_confusion(city)


TERMINALS = {
    "full-disk": (">/dev/full", 2),
    "no-output": (">&-", 0),
    "no-streams": (">&- 2>&-", 0),
    "head": ("| head -1; exit ${PIPESTATUS[0]}", 0),
}


@pytest.mark.parametrize("terminal", TERMINALS)
def test_the_result_is_written_whatever_happens_to_the_terminal(tmp_path, city, ckpt, terminal):
    redirection, code = TERMINALS[terminal]
    out = tmp_path / "out.json"
    command = tiny_process("--ckpt", str(ckpt), "--data", str(city), "--json", str(out))
    done = subprocess.run(
        ["bash", "-c", f"{shlex.join(command)} {redirection}"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert json.loads(out.read_text())["confusion"] == expected_confusion(city)


def test_the_tables_are_printed_when_the_result_cannot_be_written(city, ckpt, capsys):
    assert main(["--ckpt", str(ckpt), "--data", str(city), "--json", "/dev/full"]) == 2
    out, err = capsys.readouterr()
    assert out.count("\n") == 25
    assert err.endswith("error: /dev/full: cannot be written (No space left on device)\n")


def test_the_result_goes_through_links_and_into_fifos(tmp_path, city, ckpt):
    (tmp_path / "link.json").symlink_to("real.json")
    os.mkfifo(tmp_path / "fifo")
    written = []
    reader = threading.Thread(target=lambda: written.append((tmp_path / "fifo").read_text()))
    reader.start()
    for name in ("link.json", "fifo"):
        assert main(["--ckpt", str(ckpt), "--data", str(city), "--json", str(tmp_path / name)]) == 0
    reader.join(timeout=60)
    assert (tmp_path / "link.json").is_symlink()
    for text in (written[0], (tmp_path / "real.json").read_text()):
        assert json.loads(text)["confusion"] == expected_confusion(city)


def _disk_full(path, *args, **kwargs):
    from emanet_triton.errors import InputError

    raise InputError(f"{path.name}: cannot be written (No space left on device)")


def tiny_process(*arguments: str, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *launcher, str(TINY), *arguments]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_keeps_what_is_finished(tmp_path, ckpt, signum):
    city = tiny_eval.write_cityscapes(tmp_path / "large", 3000)
    out = tmp_path / "out.json"
    command = tiny_process("--ckpt", str(ckpt), "--data", str(city), "--json", str(out))
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # As from a terminal, also where the tests run in the background with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not partials(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in err
    assert "of 3000 images are finished; --resume goes on from there" in err
    assert not out.exists()
    (kept,) = partials(tmp_path)
    content = json.loads(json.loads(kept.read_text())["content"])
    assert 0 < sum(len(batch["images"]) for batch in content["finished"]) < 3000


@pytest.mark.parametrize(
    "options", [[], ["--no-fuse", "--threads", "2"]], ids=["fused", "plain_of_as_many_threads"]
)
def test_two_ranks_count_as_one(tmp_path, city, ckpt, threads, options):
    single = run(tmp_path, city, ckpt, *options)
    out = tmp_path / "two.json"
    command = ["--ckpt", str(ckpt), "--data", str(city), "--json", str(out), "--limit", "5"]
    done = subprocess.run(
        tiny_process(*command, *options, launcher=(*TORCHRUN, "2")),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bicycle") == 1
    want = run(tmp_path, city, ckpt, "--limit", "5", *options)
    assert json.loads(out.read_text())["confusion"] == want["confusion"] != single["confusion"]


def test_memory_does_not_grow_with_the_number_of_images(tmp_path, ckpt):
    """Peak memory of 50 images is that of 10, within a quarter of the others' pixels."""
    peaks = []
    code = (  # not getrusage's ru_maxrss, which starts from the peak of the process that starts it
        "import pathlib, sys, tiny_eval; code = tiny_eval.main(sys.argv[1:]);"
        "status = pathlib.Path('/proc/self/status').read_text();"
        "print(status.partition('VmHWM:')[2].split()[0]); sys.exit(code)"
    )
    city = tiny_eval.write_cityscapes(tmp_path / "many", 50, enlarge=16)
    for limit in ("10", "50"):
        command = ["--ckpt", str(ckpt), "--data", str(city), "--limit", limit]
        done = subprocess.run(
            [sys.executable, "-c", code, *command],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(TINY.parent)},
        )
        peaks.append(int(done.stdout.splitlines()[-1]))
    pixels = 40 * 4 * 256 * tiny_eval.SIZE[0] * tiny_eval.SIZE[1] / 1024  # KiB, images and labels
    assert peaks[1] - peaks[0] < pixels / 4
