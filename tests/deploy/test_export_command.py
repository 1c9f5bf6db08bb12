"""``emanet-triton export``."""

from dataclasses import replace

import pytest
import torch
from checkpoint_files import save

from emanet_triton import create_model
from emanet_triton.__main__ import main
from emanet_triton.models.checkpoint_files.safetensors_file import write_safetensors
from emanet_triton.models.description import description_in

TWO_CLASSES = """
images = "images/{name}.png"
labels = "labels/{name}.png"
[[classes]]
name = "land"
[[classes]]
name = "water"
"""


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


def test_a_checkpoint_of_own_classes(tmp_path, capsys):
    content = {"meta": {}, "state_dict": create_model("emanet_demo", num_classes=2).state_dict()}
    ckpt, data = save(content, tmp_path / "two.pth"), tmp_path / "two.toml"
    data.write_text(TWO_CLASSES)
    command = ckpt, "--model", "emanet_demo", "--to", "safetensors", "--size", "32x64", "--out"
    assert run(*command, tmp_path / "a.safetensors") == 2
    assert "eval, predict and export take --data FILE.toml" in capsys.readouterr().err
    assert run(*command, tmp_path / "a.safetensors", "--data", tmp_path) == 2
    assert f"--data {tmp_path}: expected a file *.toml" in capsys.readouterr().err
    assert run(*command, tmp_path / "a.safetensors", "--data", data) == 0
    description = description_in(tmp_path / "a.safetensors")
    assert description is not None and description.classes == ("land", "water")


def test_a_training_keeps_its_protocol(tmp_path):
    model = create_model("emanet_demo")
    protocol = model.protocol = replace(model.protocol, base_scale=(96, 48))
    trained, file = tmp_path / "best.safetensors", tmp_path / "a.safetensors"
    weights = model.state_dict()
    trained.write_bytes(write_safetensors(weights, model.description.metadata()))
    assert run(trained, "--to", "safetensors", "--size", "32x64", "--out", file) == 0
    assert create_model(checkpoint=file).protocol == protocol
    again = tmp_path / "b.safetensors"
    assert run(trained, "--to", "safetensors", "--scale", "64x32", "--out", again) == 2


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
