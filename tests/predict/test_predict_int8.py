"""``predict --precision int8``: its ranges, its labels and what it refuses."""

import numpy as np
import pytest
import tiny_eval

from emanet_triton import quantize, segment
from emanet_triton.data.picture import read_picture
from emanet_triton.data.png import read_label_png
from emanet_triton.kernels.conv.int8 import has_int8
from emanet_triton.models.protocol import Protocol

INT8 = "--precision", "int8", "--save", "labels", "--train-ids"

needs_int8 = pytest.mark.skipif(not has_int8(), reason="this CPU has no int8 products")


@needs_int8
@pytest.mark.parametrize("calibration", [None, "deep"])
def test_pictures(tmp_path, photos, predict, calibration):
    names = "a.png", "b.jpg"
    options = ("--calibration", photos / calibration) if calibration else ()
    code, out, err = predict(*(photos / n for n in names), *INT8, *options, "--scale", "48x32")
    assert (code, out) == (0, f"2 of 2 segmented: results in {tmp_path / 'out'}\n"), err
    inner = "deep/c.webp", "deep/d.bmp", "deep/er/e.TIFF"
    source = f"3 images ({photos / 'deep'})" if calibration else "2 images (this run)"
    assert f"note: int8: ranges from {source}\n" in err
    protocol = Protocol((48, 32))
    ranges = [photos / name for name in (inner if calibration else names)]
    network = quantize(tiny_eval.tiny_network(), ranges, protocol=protocol)
    for name in names:
        labels = segment(network, read_picture(photos / name), protocol=protocol)
        saved = read_label_png(tmp_path / "out" / f"{name[0]}_labels.png")
        np.testing.assert_array_equal(saved, labels)


@needs_int8
def test_a_repeated_command_has_the_same_ranges(tmp_path, photos, predict):
    pictures = photos / "a.png", photos / "b.jpg"
    assert predict(*pictures, *INT8)[0] == 0
    result = tmp_path / "out" / "b_labels.png"
    before = result.read_bytes()
    result.unlink()
    assert "1 of 1 segmented, 1 finished before" in predict(*pictures, *INT8)[1]
    assert result.read_bytes() == before


@needs_int8
def test_a_damaged_picture_does_not_stop_the_others(photos, predict):
    (photos / "b.jpg").write_bytes((photos / "b.jpg").read_bytes()[:100])
    code, out, err = predict(photos / "a.png", photos / "b.jpg", *INT8)
    assert code == 1
    assert out.startswith("1 of 2 segmented, 1 failed")
    assert "int8: ranges from 1 image (this run)" in err


@needs_int8
def test_a_video_with_pictures_for_the_ranges(photos, clip, predict):
    options = *INT8, "--calibration", photos, "--frames", "2"
    code, out, err = predict(clip, *options)
    assert code == 0, err
    assert out.startswith("1 of 1 segmented")


def test_refusals(tmp_path, photos, clip, refused, monkeypatch):
    monkeypatch.setattr("emanet_triton.inference.quantize.has_int8", lambda: True)
    assert refused(clip, *INT8) == (
        "int8 takes its ranges from pictures, got none among the sources; expected --calibration "
        "PICTURES"
    )
    assert refused(photos, *INT8, "--no-fuse").startswith("int8 has no plain network")
    assert refused(photos, *INT8, "--device", "meta").startswith("int8 is a precision of CPUs")
    assert refused(photos, *INT8, "--calibration", "none").startswith("--calibration none: there")
    assert refused(photos, "--calibration", photos).startswith("--calibration names pictures for")
    assert not (tmp_path / "out").exists()


def test_a_cpu_without_int8(refused, monkeypatch):
    monkeypatch.setattr("emanet_triton.kernels.conv.int8.cpu_capability", lambda: "avx2")
    assert refused("none.jpg", *INT8).startswith("int8 needs a CPU with AMX or AVX512-BF16, got ")
