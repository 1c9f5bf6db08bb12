"""The evaluation in int8: its ranges, what it prints and what it refuses."""

import json

import numpy as np
import pytest
import torch
from tiny_eval import image_of, run, stop_before_the_tables

from emanet_triton import create_model, quantize, segment
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.png import read_image, write_png
from emanet_triton.data.scenes.generate import demo_dataset
from emanet_triton.eval import metric
from emanet_triton.eval.__main__ import main
from emanet_triton.inference.calibration import evenly_spread
from emanet_triton.kernels.conv.int8 import has_int8

needs_int8 = pytest.mark.skipif(not has_int8(), reason="this CPU has no int8 products")


@pytest.fixture
def pictures(tmp_path):
    """A folder with two pictures of random pixels."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(1)
    for name in ("a.png", "b.png"):
        write_png(folder / name, rng.integers(0, 256, (32, 64, 3), np.uint8))
    return folder


@needs_int8
def test_the_demonstration_agrees_with_fp32(tmp_path, capsys):
    out = tmp_path / "out.json"
    options = "--precision", "int8", "--compare", "fp32", "--limit", "9", "--json", str(out)
    assert main(options) == 0
    printed = capsys.readouterr()
    assert "quantized network, int8 on cpu" in printed.err
    assert "  int8      ranges from 8 images (split val)" in printed.err
    assert "no reconstruction" not in printed.out
    got = json.loads(out.read_text())
    samples = CITYSCAPES.find_samples(demo_dataset(), limit=9)
    ranges = [sample.image for sample in evenly_spread(samples)]
    assert got["calibration"] == list(map(str, ranges))
    assert (got["precision"], got["network"]) == ("int8", "quantized")
    assert got["compared"]["labels_agree"] > 97

    network = quantize(create_model("emanet_demo", pretrained=True), ranges)
    total = torch.zeros(19, 19, dtype=torch.int64)
    for sample in samples:
        predicted = torch.from_numpy(segment(network, read_image(sample.image)))
        labels = torch.from_numpy(CITYSCAPES.read_labels(sample))
        total += metric.confusion_matrix(labels, predicted)
    assert got["confusion"] == total.tolist()


@needs_int8
def test_ranges_from_pictures_of_the_user(tmp_path, city, ckpt, pictures):
    options = "--precision", "fp32", "--compare", "int8"
    own = run(tmp_path, city, ckpt, *options)
    other = run(tmp_path, city, ckpt, *options, "--calibration", str(pictures / "b.png"))
    assert len(own["calibration"]) == 6
    assert other["calibration"] == [str(pictures / "b.png")]
    assert own["network"] == other["network"] == "fused"
    assert own["confusion"] == other["confusion"]
    assert own["compared"]["confusion"] != other["compared"]["confusion"]


@needs_int8
def test_resume_takes_over_results_of_the_same_ranges_only(command, pictures, capsys):
    def finished_before(calibration) -> str:
        options = "--precision", "int8", "--calibration", str(calibration)
        stop_before_the_tables([*command, *options])
        capsys.readouterr()
        if calibration == pictures / "a.png":
            write_png(calibration, np.zeros((32, 64, 3), np.uint8))
        assert main([*command, *options, "--resume"]) == 0
        lines = capsys.readouterr().err.splitlines()
        return next(line for line in lines if line.startswith("resuming"))

    assert finished_before(pictures / "b.png").startswith("resuming: 6 of 6 images")
    assert finished_before(pictures / "a.png").startswith("resuming: 0 of 6 images")  # it changed


def test_without_int8_there_are_no_ranges(tmp_path, city, ckpt):
    assert run(tmp_path, city, ckpt, "--limit", "1")["calibration"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--precision int8 --no-fuse", "int8 has no plain network: leave out --no-fuse"),
        ("--compare int8 --no-fuse", "int8 has no plain network: leave out --no-fuse"),
        ("--precision int8 --compare int8", "--compare int8: --precision is the same"),
        ("--calibration x", "--calibration names pictures for int8, but no network runs in int8"),
        ("--precision int8 --device meta", "int8 is a precision of CPUs, got --device meta; exp"),
        ("--compare int8 --device meta", "int8 is a precision of CPUs, got --device meta; exp"),
        ("--compare int8 --calibration none", "--calibration none: there is no such file or fol"),
    ],
)
def test_refusals(command, fails, monkeypatch, options, message):
    monkeypatch.setattr("emanet_triton.inference.quantize.has_int8", lambda: True)
    assert f"error: {message}" in fails(*command, *options.split())


@pytest.mark.parametrize("option", ["--precision", "--compare"])
def test_a_cpu_without_int8_is_refused_before_anything_is_read(fails, monkeypatch, option):
    monkeypatch.setattr("emanet_triton.kernels.conv.int8.cpu_capability", lambda: "avx2")
    message = fails("--data", "none", "--ckpt", "none", option, "int8")
    assert "error: int8 needs a CPU with AMX or AVX512-BF16, got " in message


def test_the_results_do_not_replace_the_calibration(command, city, pictures, fails, monkeypatch):
    monkeypatch.setattr("emanet_triton.inference.quantize.has_int8", lambda: True)
    before = (pictures / "a.png").read_bytes()
    options = "--precision", "int8", "--calibration", pictures, "--json", pictures / "a.png"
    assert "a.png" in fails(*command, *options)
    assert (pictures / "a.png").read_bytes() == before
    assert "leftImg8bit" in fails(*command, "--json", image_of(city, "leftImg8bit"))
