import errno
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from emanet_triton import files
from emanet_triton.data.cityscapes import CITYSCAPES, CLASSES, to_train_ids
from emanet_triton.data.dataset import IGNORE
from emanet_triton.data.png import read_image
from emanet_triton.data.scenes import generate as scenes
from emanet_triton.errors import InputError


@pytest.fixture(scope="module")
def held_out() -> list[tuple[np.ndarray, np.ndarray]]:
    return [scenes.generate_scene(seed) for seed in scenes.VAL_SEEDS[: scenes.DEMO_COUNT]]


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    """A cache folder for the test, and a demonstration set of two scenes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(scenes, "DEMO_COUNT", 2)
    return tmp_path / "emanet_triton"


def test_same_seed_same_bytes():
    for first, again in zip(scenes.generate_scene(3), scenes.generate_scene(3), strict=True):
        assert first.tobytes() == again.tobytes()
    assert scenes.generate_scene(3)[1].tobytes() != scenes.generate_scene(4)[1].tobytes()


def test_pixels_did_not_drift():
    """If it fails, increase ``VERSION`` and train the demonstration network again."""
    image, label_ids = scenes.generate_scene(0)
    assert hashlib.sha256(label_ids.tobytes()).hexdigest()[:16] == "0bca63ed87560e5a"
    # Image arithmetic in float may differ by a level between OpenCV's builds.
    means = image.mean(axis=(0, 1))
    assert means == pytest.approx((99.3, 161.3, 208.6), abs=0.5)


@pytest.mark.parametrize(
    "size", [(256, 512), (128, 256), (97, 203)], ids=["default", "half", "odd"]
)
def test_sizes_and_types(size):
    image, label_ids = scenes.generate_scene(1, *size)
    assert image.shape == (*size, 3)
    assert label_ids.shape == size
    assert image.dtype == label_ids.dtype == np.uint8


def test_ids_are_legal_and_every_class_is_held_out(held_out):
    counts = np.zeros(256, np.int64)
    for _, label_ids in held_out:
        counts += np.bincount(to_train_ids(label_ids, "labelIds").ravel(), minlength=256)
    shares = counts[: len(CLASSES)] / counts.sum()
    assert {c.name for c, share in zip(CLASSES, shares, strict=True) if share < 0.002} == set()
    assert 0.005 < counts[IGNORE] / counts.sum() < 0.1


def test_images_are_lit_differently(held_out):
    brightness = [image.mean() for image, _ in held_out]
    assert max(brightness) > 3 * min(brightness)


def test_training_and_held_out_seeds_are_disjoint():
    assert scenes.TRAIN_SEEDS.stop <= scenes.VAL_SEEDS.start


def test_written_set_reads_as_cityscapes(tmp_path):
    scenes.write_scenes(tmp_path, "train", count=2, seed=5)
    samples = CITYSCAPES.find_samples(tmp_path, "train")
    assert [s.name for s in samples] == ["synthetic_000000_000000", "synthetic_000000_000001"]
    for i, sample in enumerate(samples):
        image, label_ids = scenes.generate_scene(scenes.TRAIN_SEEDS[5 + i])
        assert CITYSCAPES.check(sample) == []
        assert np.array_equal(read_image(sample.image), image)
        assert np.array_equal(CITYSCAPES.read_labels(sample), to_train_ids(label_ids, "labelIds"))


@pytest.mark.parametrize(
    "arguments",
    [("test", 1, 0), ("val", 0, 0), ("val", 1, -1)],
    ids=["no-such-split", "no-scene", "negative-seed"],
)
def test_arguments_out_of_range(tmp_path, arguments):
    with pytest.raises(InputError, match="expected one of train, val, at least 1 scene"):
        scenes.write_scenes(tmp_path, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_demo_dataset_is_made_once(small_demo, monkeypatch):
    root = scenes.demo_dataset()
    assert root == small_demo / f"scenes-v{scenes.VERSION}"
    assert len(CITYSCAPES.find_samples(root)) == 2
    monkeypatch.setattr(scenes, "write_scenes", None)  # it would fail if it were called again
    assert scenes.demo_dataset() == root
    assert list(small_demo.iterdir()) == [root]


def test_interrupted_demo_dataset_leaves_nothing(small_demo, monkeypatch):
    def interrupt(seed):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scenes, "generate_scene", interrupt)
        with pytest.raises(KeyboardInterrupt):
            scenes.demo_dataset()
    assert list(small_demo.iterdir()) == []
    assert len(CITYSCAPES.find_samples(scenes.demo_dataset())) == 2


def test_demo_dataset_made_twice_at_once(small_demo, monkeypatch):
    """Another process finishes the set while this one is still writing."""
    write, other = scenes.write_scenes, small_demo / f"scenes-v{scenes.VERSION}"

    def overtaken(root, split, count):
        write(root, split, count)
        write(other, split, count)

    monkeypatch.setattr(scenes, "write_scenes", overtaken)
    assert scenes.demo_dataset() == other
    assert list(small_demo.iterdir()) == [other]
    assert len(CITYSCAPES.find_samples(other)) == 2


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path, monkeypatch, small_demo):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    with pytest.warns(UserWarning, match="cannot be written"):
        root = scenes.demo_dataset()
    assert root.parent == tmp_path / f"emanet_triton-{os.getuid()}" / "emanet_triton"
    assert len(CITYSCAPES.find_samples(root)) == 2


UNWRITABLE = "{}/emanet_triton: cannot be written ({}); set XDG_CACHE_HOME to a writable folder"


def test_cache_that_cannot_be_written(small_demo, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(scenes, "temporary_beside", refused)
    with pytest.raises(InputError) as caught:
        scenes.demo_dataset()
    assert str(caught.value) == UNWRITABLE.format(small_demo.parent, "Permission denied")


@pytest.mark.parametrize(
    "path",
    [
        "leftImg8bit/train/aachen/aachen_000000_000000_leftImg8bit.png",
        "gtFine/val/bochum/x.json",
        "leftImg8bit/val/synthetic/mine.png",
    ],
    ids=["another-split", "labels", "among-ours"],
)
def test_a_folder_with_other_data_is_refused(tmp_path, path):
    other = tmp_path / path
    other.parent.mkdir(parents=True)
    other.write_text("precious")
    with pytest.raises(InputError) as caught:
        scenes.write_scenes(tmp_path, "val", 1)
    shown = other if other.exists() else other.parent
    assert str(caught.value) == (
        f"{tmp_path}: holds other data ({shown}); expected a folder of its own for generated scenes"
    )
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [other]


def test_hidden_names_are_no_other_data(tmp_path):
    """Killed runs leave parts of files; file managers and macOS add files of their own."""
    city = tmp_path / "leftImg8bit" / "val" / scenes.CITY
    city.mkdir(parents=True)
    half = files.temporary_beside(city / f"{scenes.CITY}_000000_000000_leftImg8bit.png")
    for path in (half, city / ".DS_Store", city.with_name("._x"), city.parents[1] / ".DS_Store"):
        path.write_text("hidden")
    scenes.write_scenes(tmp_path, "val", 1)
    assert len(CITYSCAPES.find_samples(tmp_path)) == 1


def test_scenes_may_be_written_again(tmp_path):
    for _ in range(2):
        scenes.write_scenes(tmp_path, "val", 1)
    scenes.write_scenes(tmp_path, "train", 1)
    assert len(CITYSCAPES.find_samples(tmp_path)) == 1


def test_leftovers_of_a_killed_making_are_removed(small_demo, monkeypatch):
    left = small_demo / ".scenes-v1.emanet-00000000-1-00000000.tmp"
    (left / "leftImg8bit").mkdir(parents=True)
    os.utime(left, (0, 0))
    root = scenes.demo_dataset()
    assert list(small_demo.iterdir()) == [root]


def _command_line(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "emanet_triton.data.scenes.generate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_line_writes_scenes(tmp_path):
    done = _command_line(tmp_path / "out", "--split", "train", "--count", 1, "--seed", 7)
    assert (done.returncode, done.stderr) == (0, "")
    (sample,) = CITYSCAPES.find_samples(tmp_path / "out", "train")
    image, _ = scenes.generate_scene(scenes.TRAIN_SEEDS[7])
    assert np.array_equal(read_image(sample.image), image)


def test_command_line_reports_bad_output(tmp_path):
    (tmp_path / "file").touch()
    done = _command_line(tmp_path / "file", "--count", 1)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/file/leftImg8bit/val/synthetic: cannot be")
    assert "Traceback" not in done.stderr
