"""``emanet-triton export``."""

import pytest
import torch

from emanet_triton.__main__ import main


def run(*arguments):
    return main(["export", *map(str, arguments)])


def test_it_compares_and_names_the_file(tmp_path, capsys):
    file = tmp_path / "labels.pt2"
    command = "emanet_demo", "--to", "torch", "--part", "image-to-labels"
    assert run(*command, "--size", "40x60", "--scale", "native", "--out", file) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"writing {file}"
    assert said[2].startswith("1 image of 40x60: 0.0000% of the labels differ, 0 of them by more")
    assert said[-1].startswith(f"{file}: ")
    labels = torch.export.load(file).module()(torch.zeros(40, 60, 3, dtype=torch.uint8))
    assert labels.shape == (40, 60)


def test_a_missing_size_is_refused_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("emanet_triton.deploy.__main__.read_chosen", None)
    name = "emanet_resnet50_os8_cityscapes_1024x512_80k"
    assert run(name, "--to", "torch", "--out", "a.pt2") == 2
    assert capsys.readouterr().err == (
        "error: images keep their size with this protocol; expected --size, such as 512x512\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("emanet_demo --to onnx", "--out"),
        ("emanet_demo --to tflite --out a.tflite", "invalid choice"),
        ("no_such_model --to torch --out a.pt2", "no_such_model"),
        ("emanet_demo --to torch --out a.pt2 --dynamic --batch 2", "--batch"),
        ("emanet_demo --to torch --out a.onnx", "a.onnx"),
        ("emanet_demo --to onnx --out a.onnx --precision bf16", "no bfloat16 convolution"),
        ("emanet_demo --to torch --out a.pt2 --part labels --scale native", "--size"),
        ("emanet_demo --to torch --out a.pt2 --device cuda", "--device cuda"),
    ],
)
def test_bad_input_is_one_message(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run(*arguments.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
