"""The command line on pictures: results, resuming, damaged files, places."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_eval
from tiny_models import random_image

from emanet_triton import fuse, segment
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.overlay import colored, overlay
from emanet_triton.data.picture import read_picture
from emanet_triton.data.png import read_image, read_label_png, write_png
from emanet_triton.eval.__main__ import main as evaluate
from emanet_triton.predict import pictures
from emanet_triton.predict.outputs import Outputs

ALL = "overlay,color,labels,probabilities"


def test_the_labels_are_those_of_the_evaluation(tmp_path, ckpt, predict):
    city = tiny_eval.write_cityscapes(tmp_path / "city", enlarge=2)
    for i, options in enumerate(([], ["--ms-flip"], ["--precision", "bf16"], ["--no-fuse"])):
        saved = tmp_path / f"eval{i}"
        command = ["--ckpt", str(ckpt), "--data", str(city), "--save-predictions", str(saved)]
        assert evaluate([*command, *options]) == 0
        images = city / "leftImg8bit"
        save = ["--save", "labels" if i else "labels,probabilities"]
        assert predict(images, *options, *save, out=f"predict{i}")[0] == 0
        expected = sorted(saved.glob("*.png"))
        got = sorted((tmp_path / f"predict{i}").rglob("*_labels.png"))
        assert len(expected) == len(got) == 6
        for one, other in zip(expected, got, strict=True):
            np.testing.assert_array_equal(read_label_png(one), read_label_png(other))


def test_all_kinds_of_results(tmp_path, photos, predict):
    code, out, _ = predict(photos, "--save", ALL, "--alpha", "0.4", "--train-ids")
    assert code == 0
    assert out == f"5 of 5 segmented: results in {tmp_path / 'out'}\n"
    network = fuse(tiny_eval.tiny_network())
    for name in ("a.png", "b.jpg", "deep/c.webp", "deep/d.bmp", "deep/er/e.TIFF"):
        image = read_picture(photos / name)
        result = str(tmp_path / "out" / name).rpartition(".")[0]
        labels = read_label_png(tmp_path / f"{result}_labels.png")
        np.testing.assert_array_equal(labels, segment(network, image))
        drawn = read_image(tmp_path / f"{result}_overlay.png")
        np.testing.assert_array_equal(drawn, overlay(image, labels, alpha=0.4))
        np.testing.assert_array_equal(read_image(tmp_path / f"{result}_color.png"), colored(labels))
        with np.load(f"{result}_probabilities.npz") as file:
            probabilities = file["probabilities"]
            assert file["classes"].tolist() == [c.name for c in CITYSCAPES.classes]
        _, expected = segment(network, image, return_probabilities=True)
        assert probabilities.dtype == np.float16
        np.testing.assert_array_equal(probabilities, expected.astype(np.float16))
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == 5 * 4


def test_labels_have_the_ids_of_the_data_set(tmp_path, photos, predict):
    assert predict(photos / "a.png", "--save", "labels")[0] == 0
    labels = segment(fuse(tiny_eval.tiny_network()), read_picture(photos / "a.png"))
    saved = read_label_png(tmp_path / "out" / "a_labels.png")
    np.testing.assert_array_equal(saved, CITYSCAPES.to_stored_ids(labels))


@pytest.mark.parametrize("scale", [(40, 40), "native"])
def test_the_size_of_the_network_s_input(tmp_path, photos, predict, scale):
    option = scale if scale == "native" else "x".join(map(str, scale))
    assert predict(photos, "--save", "labels", "--train-ids", "--scale", option)[0] == 0
    model = tiny_eval.tiny_network()
    network = fuse(model)
    for name in ("a.png", "b.jpg"):
        image = read_picture(photos / name)
        size = image.shape[1::-1] if scale == "native" else scale
        protocol = type(model.protocol)(size, ratios=model.protocol.ratios)
        saved = read_label_png(tmp_path / "out" / f"{name[0]}_labels.png")
        np.testing.assert_array_equal(saved, segment(network, image, protocol=protocol))


@pytest.mark.parametrize("batch", ["2", "3", "16"])
def test_pictures_of_one_size_go_together(tmp_path, ckpt, predict, batch):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(9):
        write_png(folder / f"{i}.png", random_image(24 + 8 * (i in (3, 4)), 48, seed=i))
    (folder / "5.png").write_text("damaged")
    assert predict(folder, "--save", "labels", out="one")[0] == 1
    assert predict(folder, "--save", "labels", "--batch-size", batch, out="several")[0] == 1
    for path in (tmp_path / "one").iterdir():
        other = tmp_path / "several" / path.name
        assert (read_label_png(path) == read_label_png(other)).mean() > 0.999
    assert len(list((tmp_path / "several").iterdir())) == 8


def test_finished_files_are_skipped(tmp_path, photos, predict):
    assert predict(photos)[0] == 0
    kept = tmp_path / "out" / "a_overlay.png"
    kept.write_text("kept")
    (tmp_path / "out" / "b_overlay.png").unlink()
    code, out, _ = predict(photos)
    assert code == 0
    again = "(--overwrite segments them again)"
    assert out.startswith(f"1 of 1 segmented, 4 finished before {again}: results in ")
    assert kept.read_text() == "kept"
    assert (tmp_path / "out" / "b_overlay.png").exists()
    code, out, _ = predict(photos)
    assert (code, out.startswith("5 finished before")) == (0, True)
    code, out, _ = predict(photos, "--overwrite")
    assert out.startswith("5 of 5 segmented: ")
    assert kept.read_bytes().startswith(b"\x89PNG")


def test_a_pattern_can_be_repeated(tmp_path, photos, predict, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = predict("**/a.*")
    assert (code, out.startswith("1 of 1 segmented: ")) == (0, True)
    code, out, err = predict("**/a*.*")
    assert (code, out.startswith("1 finished before ")) == (0, True)
    assert f"note: **/a*.*: leaves out 1 of its files, which lie in {tmp_path / 'out'}\n" in err


def test_results_that_exist_are_kept_beside_new_ones(tmp_path, photos, predict):
    assert predict(photos / "a.png")[0] == 0
    kept = tmp_path / "out" / "a_overlay.png"
    kept.write_text("kept")
    assert predict(photos / "a.png", "--save", "overlay,labels")[1].startswith("1 of 1 segmented:")
    assert kept.read_text() == "kept"
    assert (tmp_path / "out" / "a_labels.png").exists()


def test_options_may_stand_between_sources(photos, predict):
    assert predict(photos / "a.png", "--save", "labels", photos / "b.jpg")[1].startswith("2 of 2 ")


def test_a_name_that_is_too_long_for_a_result_is_refused(photos, refused):
    long = photos / f"{'n' * 245}.png"
    long.write_bytes((photos / "a.png").read_bytes())
    assert "the name is too long for the name of a result" in refused(photos)


def test_damaged_files_stop_no_other(tmp_path, photos, predict):
    (photos / "deep" / "bad1.jpg").write_text("text")
    (photos / "bad2.png").write_bytes((photos / "a.png").read_bytes()[:-20])
    code, out, err = predict(photos)
    assert code == 1
    assert out == f"5 of 7 segmented, 2 failed: results in {tmp_path / 'out'}\n"
    first, second = [line for line in err.splitlines() if line.startswith("error: ")]
    assert first.startswith(f"error: {photos / 'bad2.png'}: not a readable PNG (")
    assert second.startswith(f"error: {photos / 'deep' / 'bad1.jpg'}: not a readable picture (")
    assert len(list((tmp_path / "out").rglob("*.png"))) == 5


@pytest.mark.parametrize("error", [MemoryError("too much"), cv2.error("too much")], ids=type)
def test_a_picture_that_cannot_be_drawn_fails_alone(photos, predict, monkeypatch, error):
    save = Outputs.save_one

    def sometimes(self, path, kind, prediction):
        if path.name.startswith("b_"):
            raise error
        save(self, path, kind, prediction)

    monkeypatch.setattr(Outputs, "save_one", sometimes)
    code, out, err = predict(photos)
    assert code == 1
    assert out.startswith("4 of 5 segmented, 1 failed: ")
    assert f"error: {photos / 'b.jpg'}: its results cannot be drawn (too much)\n" in err


def test_logits_that_are_not_finite_fail_one_picture(tmp_path, photos, ckpt, predict, monkeypatch):
    network = pictures.predict

    def sometimes(predictor, images, *rest):
        (labels,) = network(predictor, images, *rest)
        return (labels.fill_(255) if images[0].shape[0] == 32 else labels,)

    monkeypatch.setattr(pictures, "predict", sometimes)
    code, out, err = predict(photos, "--no-fuse")
    assert code == 1
    assert out.startswith("3 of 5 segmented, 2 failed: ")
    assert f"{photos / 'b.jpg'}: the logits of the network are not finite" in err


def test_only_the_named_classes_are_painted(tmp_path, photos, predict):
    assert predict(photos / "a.png", "--classes", "car, road", "--save", "color")[0] == 0
    colors = read_image(tmp_path / "out" / "a_color.png").reshape(-1, 3)
    assert {tuple(c) for c in colors.tolist()} <= {(0, 0, 0), (128, 64, 128), (0, 0, 142)}


def test_a_file_that_cannot_be_written_ends_the_run(tmp_path, photos, predict):
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "er").write_text("in the way")
    code, _, err = predict(photos)
    assert code == 2
    assert "er: the folder cannot be made" in err
    assert len(list((tmp_path / "out").rglob("*_overlay.png"))) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photos}", "--save", "masks"], "--save: 'masks' is no kind of result; expected some of"),
        (["{photos}", "--alpha", "2"], "--alpha: expected a number of 0 to 1, got '2'"),
        (["{photos}", "--smooth", "1"], "--smooth: expected a number of at least 0 and less than"),
        (["{photos}", "--scale", "10"], "--scale: expected protocol, native or WIDTHxHEIGHT"),
        (["{photos}", "--scale", "0x9"], "--scale: expected sides of 1 to 16384 pixels, got '0x9'"),
        (
            ["{photos}", "--scale", "64x32", "--ms-flip", "--protocol", "mmseg-1.x"],
            "--scale 64x32: has no effect with --ms-flip, whose scales multiply the image's own",
        ),
        (["{photos}", "--classes", "cars"], "--classes: Cityscapes has no class 'cars'; expected"),
        (["{photos}", "--classes", ","], "--classes: expected names with commas between them"),
        (["{photos}", "--precision", "tf32"], "tf32 is a precision of CUDA devices"),
        (["{photos}", "--device", "tpu"], "--device tpu: no such device here"),
        (["{photos}/none.png"], "none.png: there is no such file or folder"),
        ([], "the following arguments are required: SOURCE"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(photos, refused, arguments, message):
    assert message in refused(*(a.format(photos=photos) for a in arguments))


@pytest.mark.parametrize(
    "options",
    [
        ["--scale", "native", "--ms-flip", "--protocol", "mmseg-1.x"],
        ["--scale", "64x32", "--ms-flip"],
        ["--scale", "64x32", "--protocol", "mmseg-1.x"],
    ],
    ids=" ".join,
)
def test_a_size_that_has_an_effect(photos, predict, options):
    assert predict(photos / "a.png", *options)[0] == 0


def test_results_do_not_lie_among_the_sources(photos, refused):
    for place in ("photos", "photos/out", "photos/deep/../out"):
        assert "lies in the source folder" in refused(photos, out=place)
    assert not (photos / "out").exists()


def test_a_result_does_not_replace_a_source(tmp_path, photos, refused):
    source = tmp_path / "x_overlay.png"
    source.write_bytes((photos / "a.png").read_bytes())
    picture = tmp_path / "x.png"
    picture.write_bytes(source.read_bytes())
    assert f"would replace the source {source}" in refused(picture, source, out=".")


def test_a_checkpoint_that_is_missing_or_unknown(photos, refused, tmp_path):
    assert "no such file and no such model" in refused(photos, "--ckpt", "none", model=False)
    unknown = tmp_path / "unknown.pth"
    unknown.write_bytes((tmp_path / tiny_eval.FILE).read_bytes())
    assert "expected --model" in refused(photos, "--ckpt", unknown, model=False)


def test_an_interruption_keeps_what_is_finished(tmp_path, photos, predict, interrupt):
    interrupt(pictures, 3)
    code, out, err = predict(photos)
    assert code == 2
    assert out.startswith("2 of 5 segmented")
    assert err.endswith("interrupted; the same command goes on from there\n")
    code, out, _ = predict(photos)
    assert (code, out.startswith("3 of 3 segmented, 2 finished before")) == (0, True)


def test_a_process_needs_no_more_memory_for_more_pictures(tmp_path, ckpt):
    """A folder of 300 small pictures of a few sizes, in the memory of 100."""
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(300):
        pixels = random_image(16 + i % 3, 24, seed=i)
        (folder / f"{i:04}.jpg").write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes())
    code = """
import json, os, sys
import tiny_eval
from emanet_triton.predict.__main__ import main
from emanet_triton.predict import pictures

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

network, sizes = pictures.predict, []

def noted(*arguments):
    sizes.append(resident())
    return network(*arguments)

pictures.predict = noted
assert main(sys.argv[1:]) == 0
print(json.dumps(sizes))
"""
    command = [sys.executable, "-c", code, str(folder), "--ckpt", str(ckpt)]
    tests = str(Path(tiny_eval.__file__).parent)
    search = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), "--save", "labels"],
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert len(sizes) == 300
    assert max(sizes[200:]) - max(sizes[50:100]) < 8
