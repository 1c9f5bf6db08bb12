"""The command line on videos and webcams."""

import os
import time
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_eval
import torch
from tiny_models import random_image
from videos import write_video

from emanet_triton import fuse, segment
from emanet_triton.data.overlay import palette
from emanet_triton.data.png import read_label_png
from emanet_triton.inference.predictor import Predictor
from emanet_triton.inference.smoothing import Smoothing
from emanet_triton.predict import video


def frames_of(path) -> list[np.ndarray]:
    capture, frames = cv2.VideoCapture(str(path)), []
    while True:
        there, frame = capture.read()
        if not there:
            return frames
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))


def rate_of(path) -> float:
    return cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS)


def labels_in(folder) -> list[np.ndarray]:
    return [read_label_png(path) for path in sorted(folder.iterdir())]


def test_all_kinds_of_results(tmp_path, clip, predict):
    kinds = "overlay,color,labels,probabilities"
    code, out, _ = predict(clip, "--save", kinds, "--train-ids")
    assert (code, out) == (0, f"1 of 1 segmented: results in {tmp_path / 'out'}\n")
    images = frames_of(clip)
    network = fuse(tiny_eval.tiny_network())
    for image, labels in zip(images, labels_in(tmp_path / "out" / "clip_labels"), strict=True):
        np.testing.assert_array_equal(labels, segment(network, image))
    for kind in ("overlay", "color"):
        path = tmp_path / "out" / f"clip_{kind}.mp4"
        assert len(frames_of(path)) == 12
        assert rate_of(path) == rate_of(clip) == 10
    files = sorted(path.name for path in (tmp_path / "out" / "clip_probabilities").iterdir())
    assert files == [f"{i:06}.npz" for i in range(1, 13)]
    assert {path.name.split("_")[0] for path in (tmp_path / "out").iterdir()} == {"clip"}


def test_the_colours_of_a_frame_are_those_of_its_labels(tmp_path, predict):
    frame = np.full((64, 128, 3), 90, np.uint8)
    write_video(tmp_path / "grey.avi", [frame] * 3, rate=25)
    assert predict(tmp_path / "grey.avi", "--save", "color,labels", "--train-ids")[0] == 0
    (labels, *_), (colors, *_) = (
        labels_in(tmp_path / "out" / "grey_labels"),
        frames_of(tmp_path / "out" / "grey_color.mp4"),
    )
    wrong = np.abs(colors.astype(int) - palette()[labels]).mean()
    assert wrong < 20  # the encoder's loss; a wrong order of the channels costs 60


def test_only_the_first_frames(tmp_path, clip, predict):
    assert predict(clip, "--frames", "5", "--save", "labels")[0] == 0
    assert len(list((tmp_path / "out" / "clip_labels").iterdir())) == 5


def test_smoothing_averages_over_frames_and_begins_anew_for_each_video(tmp_path, clip, predict):
    other = tmp_path / "other.mp4"
    other.write_bytes(clip.read_bytes())
    options = ["--smooth", "0.7", "--save", "labels", "--train-ids"]
    assert predict(clip, other, *options)[0] == 0
    network = fuse(tiny_eval.tiny_network())
    predictor, smoothing = Predictor(network, network.protocol), Smoothing(0.7)
    wanted = [predictor.results([i], adjust=smoothing)[0][0].numpy() for i in frames_of(clip)]
    for name in ("clip", "other"):
        got = labels_in(tmp_path / "out" / f"{name}_labels")
        assert all(map(np.array_equal, got, wanted))


def changed(labels: list[np.ndarray]) -> float:
    return float(np.mean([(a != b).mean() for a, b in pairwise(labels)]))


def test_smoothing_lets_fewer_labels_change(tmp_path, clip, predict):
    assert predict(clip, "--save", "labels", out="plain")[0] == 0
    assert predict(clip, "--save", "labels", "--smooth", "0.8", out="smooth")[0] == 0
    plain, smooth = (
        changed(labels_in(tmp_path / name / "clip_labels")) for name in ("plain", "smooth")
    )
    assert 0 < smooth < 0.7 * plain


def test_a_finished_video_is_skipped(tmp_path, clip, predict):
    assert predict(clip)[0] == 0
    path = tmp_path / "out" / "clip_overlay.mp4"
    path.write_text("kept")
    assert predict(clip)[1].startswith("1 finished before")
    assert path.read_text() == "kept"
    assert predict(clip, "--overwrite")[1].startswith("1 of 1 segmented")
    assert len(frames_of(path)) == 12


def test_files_that_are_no_videos_stop_no_other(tmp_path, clip, predict):
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "text.avi").write_text("text " * 1000)
    os.mkfifo(tmp_path / "pipe.mp4")  # nobody writes to it
    given = ("zero.mp4", "text.avi", "pipe.mp4")
    code, out, err = predict(*(tmp_path / name for name in given), clip)
    assert code == 1
    assert out.startswith("1 of 4 segmented, 3 failed: ")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: {tmp_path / name}: cannot be opened; expected a video" for name in given
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["clip_overlay.mp4"]


def test_a_video_that_ends_early_keeps_its_frames(tmp_path, predict):
    path = tmp_path / "long.avi"
    write_video(path, [random_image(32, 64, seed=i) for i in range(60)], rate=10)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, _, err = predict(path, "--save", "labels")
    read = len(frames_of(path))
    assert len(list((tmp_path / "out" / "long_labels").iterdir())) == read
    assert 0 < read < 60
    assert cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT) == 60
    assert code == 1
    assert f"{path}: ends after {read} of 60 frames; the results have these frames" in err


@pytest.mark.parametrize("size", [(33, 64), (32, 65), (31, 63)])
def test_frames_of_odd_sides(tmp_path, predict, size):
    path = tmp_path / "odd.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 5.0, size[::-1])
    for i in range(3):
        writer.write(random_image(*size, seed=i))
    writer.release()
    assert predict(path, "--save", "color,labels")[0] == 0
    assert len(frames_of(tmp_path / "out" / "odd_color.mp4")) == 3
    shape = labels_in(tmp_path / "out" / "odd_labels")[0].shape
    even = frames_of(tmp_path / "out" / "odd_color.mp4")[0].shape[:2]
    assert even == tuple(side + side % 2 for side in shape)


def test_an_interrupted_video_is_kept_in_part_and_begins_anew(tmp_path, clip, predict, interrupt):
    interrupt(video, 5)
    code, out, err = predict(clip, "--save", "overlay,labels")
    assert (code, out.startswith("0 of 1 segmented")) == (2, True)
    assert err.endswith("interrupted; the same command goes on from there\n")
    out_folder = tmp_path / "out"
    assert {path.name for path in out_folder.iterdir()} == {
        "clip_labels.part",
        "clip_overlay.part.mp4",
    }
    assert len(frames_of(out_folder / "clip_overlay.part.mp4")) == 4
    assert predict(clip, "--save", "overlay,labels")[0] == 0
    assert {path.name for path in out_folder.iterdir()} == {"clip_labels", "clip_overlay.mp4"}


class Webcam:
    """A webcam of 20 frames a second."""

    def __init__(self) -> None:
        self.frames = 0

    def isOpened(self) -> bool:  # noqa: N802 (OpenCV's name)
        return True

    def get(self, what: int) -> float:
        return {cv2.CAP_PROP_FPS: 20.0}.get(what, -1.0)

    def read(self) -> tuple[bool, np.ndarray]:
        self.frames += 1
        return True, random_image(32, 64, seed=self.frames)

    def release(self) -> None:
        pass


@pytest.fixture
def webcam(monkeypatch):
    """Number 3 is a webcam; files stay what they are."""
    opened = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda path: Webcam() if path == 3 else opened(path))


@pytest.mark.parametrize("interrupted", [2, 4, 9])
def test_an_interruption_ends_a_webcam_s_recording(
    tmp_path, predict, interrupt, refused, webcam, interrupted
):
    interrupt(video, interrupted)
    code, out, err = predict("3", "--save", "labels")
    assert code == 0
    assert out.startswith("1 of 1 segmented")
    assert "interrupted" not in err
    recorded = tmp_path / "out" / "webcam3_labels"
    assert len(list(recorded.iterdir())) == interrupted - 1
    for kinds in ("labels", "overlay,labels"):
        message = refused("3", "--save", kinds)
        assert "webcam3_labels: exists already; expected --overwrite" in message


def test_a_recording_takes_as_long_as_the_scene(tmp_path, predict, monkeypatch, webcam):
    """At 20 frames a second, a frame that takes half a second is written ten times."""
    clock = iter(torch.arange(0, 100, 0.5).tolist())
    monkeypatch.setattr(video.time, "monotonic", lambda: next(clock))
    assert predict("3", "--frames", "4", "--save", "labels,color")[0] == 0
    assert len(frames_of(tmp_path / "out" / "webcam3_color.mp4")) == 40
    names = sorted(path.name for path in (tmp_path / "out" / "webcam3_labels").iterdir())
    assert names == ["000001.png", "000011.png", "000021.png", "000031.png"]


def test_a_webcam_that_does_not_open_is_one_message(refused):
    assert refused("63") == "webcam 63: cannot be opened; expected a webcam that works"


def test_logits_that_are_not_finite_end_a_video(tmp_path, clip, predict, monkeypatch):
    network, calls = video.predict, []

    def third_is_not_finite(*arguments):
        calls.append(arguments)
        (labels,) = network(*arguments)
        return (labels.fill_(255) if len(calls) == 3 else labels,)

    monkeypatch.setattr(video, "predict", third_is_not_finite)
    code, _, err = predict(clip)
    assert code == 1
    assert f"{clip}: frame 3: the logits of the network are not finite" in err
    assert len(frames_of(tmp_path / "out" / "clip_overlay.part.mp4")) >= 2


@pytest.mark.parametrize("name", ["12:30.mp4", "-.mp4", "a" + 70 * "漢" + ".mp4", "my.clip.v2.mp4"])
def test_odd_names(tmp_path, clip, predict, monkeypatch, name):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_bytes(clip.read_bytes())
    monkeypatch.chdir(folder)
    assert predict(f"./{name}" if name[0] == "-" else name, "--frames", "2")[0] == 0
    (result,) = (tmp_path / "out").iterdir()
    assert result.name == name.removesuffix(".mp4") + "_overlay.mp4"
    assert len(frames_of(result)) == 2


def test_a_name_that_is_not_utf8_is_refused_and_crashes_nothing(tmp_path, clip, predict):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    os.link(clip, path)
    code, out, err = predict(path, clip, "--frames", "2")
    assert (code, out.startswith("1 of 2 segmented, 1 failed")) == (1, True)
    assert "caf\\udce9.mp4: OpenCV opens no video whose path is not UTF-8" in err


@pytest.mark.parametrize("rate", [65.537, 90.123, 239.76])
def test_rates_that_the_codec_lacks_are_rounded(tmp_path, clip, predict, monkeypatch, rate):
    capture = cv2.VideoCapture

    class Fast:
        def __init__(self, path):
            self.inner = capture(path)

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def get(self, what):
            return rate if what == cv2.CAP_PROP_FPS else self.inner.get(what)

    monkeypatch.setattr(cv2, "VideoCapture", Fast)
    assert predict(clip, "--frames", "3")[0] == 0
    monkeypatch.undo()
    assert rate_of(tmp_path / "out" / "clip_overlay.mp4") == round(rate)


def test_a_video_that_was_not_written_whole_is_no_result(tmp_path, clip, predict, monkeypatch):
    """OpenCV's writer says nothing when the disk is full."""

    class Full:
        def __init__(self, path, *_):
            Path(path).write_bytes(b"a part")

        fourcc = staticmethod(cv2.VideoWriter.fourcc)
        isOpened = write = release = lambda *_: True  # noqa: N815 (OpenCV's name)

    monkeypatch.setattr(cv2, "VideoWriter", Full)
    code, _, err = predict(clip)
    assert code == 1
    assert "clip_overlay.mp4: cannot be written whole; the disk may be full" in err
    assert not (tmp_path / "out" / "clip_overlay.mp4").exists()


def test_another_run_leaves_a_video_in_progress_alone(tmp_path, clip, predict, monkeypatch):
    network, ages = video.predict, []

    def first_takes_hours(*arguments):
        (folder,) = (tmp_path / "out").glob(".*.tmp")
        ages.append(time.time() - folder.stat().st_mtime)
        if len(ages) == 1:
            os.utime(folder, (0, 0))
        return network(*arguments)

    monkeypatch.setattr(video, "predict", first_takes_hours)
    assert predict(clip)[0] == 0
    assert ages[-1] < 3600  # a frame that is saved makes the folder new again


def test_a_frame_of_another_size_ends_a_video(tmp_path, predict, webcam, monkeypatch):
    sizes = iter([(32, 64), (32, 64), (48, 64), (48, 64), (48, 64)])
    monkeypatch.setattr(Webcam, "read", lambda self: (True, random_image(*next(sizes))))
    code, _, err = predict("3", "--frames", "4")
    assert code == 1
    assert "webcam 3: frame 3: it has another size than the first frame" in err
