"""Pictures in the classes of a trained checkpoint, or of a described data set."""

from pathlib import Path

import numpy as np
import pytest
import tiny_eval
from trained_files import CLASSES, TRAINED, write_trained

from emanet_triton import fuse, overlay, segment
from emanet_triton.data.overlay import colored
from emanet_triton.data.picture import read_picture
from emanet_triton.data.png import read_image, read_label_png
from emanet_triton.models.protocol import Protocol

ALL = "overlay,color,labels,probabilities"


@pytest.fixture
def trained(tmp_path):
    return write_trained(tmp_path / "last.safetensors")


@pytest.fixture
def file(tmp_path):
    """A file that describes three classes; its root is missing."""
    path = tmp_path / "pets.toml"
    path.write_text(
        'root = "none"\nimages = "{name}.jpg"\nlabels = "{name}.png"\n'
        '[[classes]]\nname = "cat"\nids = [10]\n[[classes]]\nname = "dog"\nids = [300, 301]\n'
        '[[classes]]\nname = "fish"\ncolor = [1, 2, 3]\nids = [0]\n'
    )
    return path


def test_a_trained_file_says_all(tmp_path, photos, trained, predict):
    options = "--ckpt", trained, "--save", ALL
    code, out, err = predict(photos, *options, model=False)
    assert (code, out) == (0, f"5 of 5 segmented: results in {tmp_path / 'out'}\n"), err
    network = fuse(tiny_eval.tiny_network(3))
    network.protocol = TRAINED.protocol
    dataset = TRAINED.described()
    for name in ("a.png", "b.jpg"):
        image = read_picture(photos / name)
        result = str(tmp_path / "out" / name).rpartition(".")[0]
        labels = segment(network, image)
        np.testing.assert_array_equal(read_label_png(Path(f"{result}_labels.png")), labels)
        drawn, colors = (read_image(Path(f"{result}_{kind}.png")) for kind in ("overlay", "color"))
        np.testing.assert_array_equal(drawn, overlay(image, labels, dataset))
        np.testing.assert_array_equal(colors, colored(labels, dataset))
        with np.load(f"{result}_probabilities.npz") as content:
            assert content["classes"].tolist() == list(CLASSES)
            assert content["probabilities"].shape == (3, *labels.shape)


def test_the_scale_of_a_trained_file_can_be_replaced(tmp_path, photos, trained, predict):
    options = "--ckpt", trained, "--save", "labels", "--train-ids", "--scale", "32x16"
    assert predict(photos / "a.png", *options, model=False)[0] == 0
    network = fuse(tiny_eval.tiny_network(3))
    network.protocol = Protocol((32, 16))
    expected = segment(network, read_image(photos / "a.png"))
    np.testing.assert_array_equal(read_label_png(tmp_path / "out" / "a_labels.png"), expected)


@pytest.mark.parametrize("kind", ["trained", "mmseg"])
def test_a_description_wins(tmp_path, photos, trained, file, predict, kind):
    ckpt = [trained]
    if kind == "mmseg":
        ckpt = [tiny_eval.write_checkpoint(tmp_path, "x.pth", num_classes=3), "--model", "tiny"]
    options = "--ckpt", *ckpt, "--data", file, "--save", "labels,color"
    code, _, err = predict(photos / "a.png", *options, model=False)
    assert code == 0, err
    labels = read_label_png(tmp_path / "out" / "a_labels.png")
    assert labels.dtype == np.uint16
    assert set(np.unique(labels)) <= {10, 300, 0}
    network = fuse(tiny_eval.tiny_network(3))
    network.protocol = TRAINED.protocol if kind == "trained" else network.protocol
    expected = segment(network, read_image(photos / "a.png"))
    np.testing.assert_array_equal(labels, np.array([10, 300, 0])[expected])
    colors = read_image(tmp_path / "out" / "a_color.png")
    assert set(map(tuple, colors.reshape(-1, 3).tolist())) <= {(0, 0, 0), (128, 0, 0), (1, 2, 3)}


def test_classes_by_name(photos, trained, file, predict, refused):
    options = "--ckpt", trained, "--classes"
    assert predict(photos / "a.png", *options, "sea,sky", model=False)[0] == 0
    assert refused(photos, *options, "road", model=False) == (
        "--classes: Beach has no class 'road'; expected some of: sea, sand, sky"
    )
    assert refused(photos, *options, "sea", "--data", file, model=False) == (
        "--classes: pets has no class 'sea'; expected some of: cat, dog, fish"
    )


def test_what_is_refused(tmp_path, photos, trained, file, predict, refused):
    assert refused(photos, "--data", tmp_path) == (
        f"--data {tmp_path}: expected a file *.toml that describes a data set"
    )
    missing = tmp_path / "none.toml"
    assert refused(photos, "--data", missing) == (
        f"{missing}: there is no such file; expected a TOML file"
    )
    assert refused(photos, "--ckpt", trained, "--model", "emanet_demo", model=False) == (
        f"{trained}: is a checkpoint of tiny, not of --model emanet_demo"
    )
    code, out, err = predict(photos, "--data", file)  # a checkpoint of 19 classes
    assert (code, out) == (2, "")
    assert "The file is for 19 classes, the model for 3; create_model takes num_classes=" in err


def test_a_broken_description_of_a_trained_file(tmp_path, photos, refused):
    metadata = TRAINED.metadata()
    metadata["emanet_triton"] = metadata["emanet_triton"].replace('"sea"', '"sea2"', 1)
    path = write_trained(tmp_path / "x.safetensors", metadata)
    assert refused(photos, "--ckpt", path, model=False) == (
        f"{path}: its description of a model is broken (the data set has other classes); "
        "expected one that this package wrote"
    )
