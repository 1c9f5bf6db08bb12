"""Every mistake of a user gives one message that names it, exit code 2 and no traceback."""

import os
import pickle
import subprocess
import sys
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_eval
import torch
from torch._inductor import config as inductor

from emanet_triton.eval.__main__ import main
from emanet_triton.models.zoo import ZOO

# The command line


def test_unknown_model(fails, city, ckpt):
    err = fails("--ckpt", ckpt, "--model", "emanet_r18", "--data", city)
    assert "unknown model 'emanet_r18'; expected a model such as " in err


def test_unknown_checkpoint(fails, city):
    err = fails("--ckpt", "emanet_r18", "--data", city)
    assert (
        "emanet_r18: no such file and no such model; expected a checkpoint file or a model" in err
    )


def test_missing_checkpoint_file(fails, city, tmp_path):
    err = fails("--ckpt", tmp_path / "no.pth", "--model", "tiny", "--data", city)
    assert f"{tmp_path / 'no.pth'}: no such file" in err


def test_data_without_checkpoint(fails, city):
    assert "--ckpt is missing; expected a checkpoint file or a model" in fails("--data", city)


def test_checkpoint_without_data(fails, ckpt):
    assert "--data is missing; expected the root of Cityscapes" in fails("--ckpt", ckpt)


def test_unpublished_file_without_model(fails, city, tmp_path):
    path = tiny_eval.write_checkpoint(tmp_path, "mine.pth")
    err = fails("--ckpt", path, "--data", city)
    assert f"{path}: neither its name nor its hash belongs to a published file" in err
    assert "expected --model" in err


def test_model_that_contradicts_the_checkpoints_name(fails, city):
    published, other = list(ZOO)[:2]
    err = fails("--ckpt", published, "--model", other, "--data", city)
    assert f"{published} is not a checkpoint of --model {other}" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size: expected a whole number of at least 1, got '0'"),
        (["--limit", "-3"], "--limit: expected a whole number of at least 1, got '-3'"),
        (["--workers", "two"], "--workers: expected a whole number of at least 1, got 'two'"),
        (["--precision", "int4"], "invalid choice: 'int4'"),
        (["--protocol", "mmseg-2.x"], "invalid choice: 'mmseg-2.x'"),
        (["--all", "emanet"], "invalid choice: 'emanet'"),
        (
            ["--all", "bdd100k", "--dataset", "voc2012"],
            "has no model of voc2012; expected bdd100k or",
        ),
        (["--all", "bdd100k", "--data", "x"], "--data x: there is no such folder; expected the"),
        (["--dataset", "voc2012"], "--dataset names the data set of a model: give --ckpt or"),
        (["--all", "--ms-flip"], "--all evaluates every published model both ways"),
        (["--all", "--save-overlays", "x"], "--all writes no pictures"),
        (["--compare", "fp32"], "--compare fp32: --precision is the same"),
        (["--compare", "fp8"], "invalid choice: 'fp8'"),
        (["--threads", "20000"], "--threads: expected at most 1024 threads, got 20000"),
        (["--threads", "0"], "--threads: expected a whole number of at least 1, got '0'"),
        (["--model", "tiny"], "give --ckpt too"),
        (["--device", "cuda:99"], "--device cuda:99: no such device here"),
        (["--device", "gpu"], "--device gpu: no such device here"),
        (["--device", "meta"], "--device meta: is not supported; expected cpu or cuda[:N]"),
        (["--precision", "tf32", "--device", "cpu"], "tf32 is a precision of CUDA devices"),
        (["--compare", "tf32", "--device", "cpu"], "tf32 is a precision of CUDA devices"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments(fails, arguments, message):
    assert message in fails(*arguments)


@pytest.mark.parametrize("compiler", ["no-such-compiler", os.sep], ids=["missing", "folder"])
def test_compile_without_a_compiler(fails, city, ckpt, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    with inductor.patch({"cpp.cxx": (compiler,)}):
        err = fails("--ckpt", ckpt, "--data", city, "--compile")
    assert f"--compile: the C++ compiler '{compiler}' cannot be run; expected g++" in err


def test_all_names_the_missing_published_file(fails, city, tmp_path):
    err = fails("--all", "--ckpt", tmp_path, "--data", city)
    assert f"{tmp_path / ZOO[next(iter(ZOO))].file}: no such file" in err


def test_names_that_are_too_long(fails, city, tmp_path, monkeypatch):
    """Path.exists raises for them."""
    folder, name = tmp_path / ("x" * 300), next(iter(ZOO))
    err = fails("--all", "--ckpt", folder, "--data", city)
    assert f"{folder / ZOO[name].file}: no such file" in err
    monkeypatch.setattr(torch.hub, "_hub_dir", str(folder))
    err = fails("--ckpt", name, "--data", city)
    assert "cannot be downloaded" in err and "File name too long" in err


# The data set


def test_missing_folder(fails, ckpt, tmp_path):
    err = fails("--ckpt", ckpt, "--data", tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'}: not usable as Cityscapes" in err
    assert "there is no such folder" in err


def test_empty_folder(fails, ckpt, tmp_path):
    (tmp_path / "empty").mkdir()
    err = fails("--ckpt", ckpt, "--data", tmp_path / "empty")
    assert "leftImg8bit is missing" in err
    assert "gtFine is missing" in err


def test_unknown_split(fails, ckpt, city):
    assert "has no 'train', it has: val" in fails(
        "--ckpt", ckpt, "--data", city, "--split", "train"
    )


def test_all_problems_of_the_files_at_once(fails, ckpt, city):
    damaged, other_size, flipped = (tiny_eval.image_of(city, "leftImg8bit", i) for i in range(3))
    illegal = tiny_eval.image_of(city, "gtFine", 3)
    damaged.write_bytes(damaged.read_bytes()[:-40])
    cv2.imwrite(str(other_size), np.zeros((8, 9, 3), np.uint8))
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 4
    flipped.write_bytes(data)
    cv2.imwrite(str(illegal), np.full(tiny_eval.SIZE, 77, np.uint8))
    err = fails("--ckpt", ckpt, "--data", city)
    assert "4 problems in the data set:" in err
    assert f"{damaged}: not a readable PNG (it is truncated" in err
    assert f"{flipped}: not a readable PNG (checksum error" in err
    assert "64x32 pixels, its image has 9x8" in err
    assert f"{illegal}: illegal labelIds 77; expected 0 to 33" in err


GIVEN, WRONG = (
    ("model", "file", "file and model", "all"),
    ("no folder", "long", "other folder", "damaged"),
)


@pytest.mark.parametrize(
    ("given", "wrong"),
    # Only the content of a renamed file says which model and which data set it is of.
    [*product(GIVEN, WRONG), ("renamed file", "no folder"), ("renamed file", "long")],
)
def test_data_is_checked_before_any_checkpoint(
    fails, city, ckpt, tmp_path, monkeypatch, given, wrong
):
    """A mistake in ``--data`` does not cost a download, or the reading of a large file."""

    def touched(*_):
        raise AssertionError("a checkpoint was touched before the data set was checked")

    monkeypatch.setattr("emanet_triton.models.zoo.download", touched)
    monkeypatch.setattr("emanet_triton.models.zoo.read_checkpoint", touched)
    monkeypatch.setattr("emanet_triton.models.chosen.read_checkpoint", touched)
    renamed = ckpt.with_name("mine.pth")
    renamed.write_bytes(ckpt.read_bytes())
    command = {
        "model": ["--ckpt", next(iter(ZOO))],
        "file": ["--ckpt", ckpt],
        "file and model": ["--ckpt", renamed, "--model", "tiny"],
        "renamed file": ["--ckpt", renamed],
        "all": ["--all"],
    }[given]
    data = {
        "no folder": city / "typo",
        "long": city / ("x" * 300),
        "other folder": tmp_path,
        "damaged": city,
    }[wrong]
    image = tiny_eval.image_of(city, "leftImg8bit")
    image.write_bytes(b"")
    message = {
        "no folder": "there is no such folder",
        "long": "there is no such folder" if given == "renamed file" else "File name too long",
        "other folder": f"{tmp_path / 'gtFine'} is missing",
        "damaged": f"{image}: not a readable PNG (empty file)",
    }[wrong]
    assert message in fails(*command, "--data", data)


def test_problems_of_all_kinds_come_in_one_message(fails, ckpt, city):
    images = sorted((city / "leftImg8bit").rglob("*.png"))
    labels = sorted((city / "gtFine").rglob("*.png"))
    unlabelled, unseen, damaged, illegal = images[0], labels[1], images[2], labels[3]
    labels[0].unlink()
    images[1].unlink()
    damaged.write_bytes(b"")
    cv2.imwrite(str(illegal), np.full(tiny_eval.SIZE, 77, np.uint8))
    err = fails("--ckpt", ckpt, "--data", city)
    assert err[err.index("error: ") :].splitlines() == [
        "error: 4 problems in the data set:",
        f"  {unlabelled} has no label",
        f"  {unseen} has no image",
        f"  {illegal}: illegal labelIds 77; expected 0 to 33, or 255 for -1",
        f"  {damaged}: not a readable PNG (empty file); expected an intact PNG file",
    ]


def test_a_message_of_many_problems_has_at_most_20_lines(fails, ckpt, tmp_path):
    large = tiny_eval.write_cityscapes(tmp_path / "large", 24)
    for i, image in enumerate(sorted(large.glob("leftImg8bit/*/*/*"))):
        image.unlink() if i % 2 else image.write_bytes(b"")
    lines = fails("--ckpt", ckpt, "--data", large).replace("\r", "\n").splitlines()
    begin = lines.index("error: 24 problems in the data set:")
    assert len(lines[begin:]) == 20
    assert lines[-1] == "  ... and 6 more"


def test_image_without_label_and_label_without_image(fails, ckpt, city):
    lonely_image, lonely_label = (
        tiny_eval.image_of(city, "leftImg8bit", 1),
        tiny_eval.image_of(city, "gtFine", 2),
    )
    tiny_eval.image_of(city, "gtFine", 1).unlink()
    tiny_eval.image_of(city, "leftImg8bit", 2).unlink()
    err = fails("--ckpt", ckpt, "--data", city)
    assert f"{lonely_image} has no label" in err or f"{lonely_label} has no image" in err
    lines = [line for line in err.splitlines() if " has no " in line]
    assert len(lines) == 2


# The checkpoint


class Bomb:
    """An object that would write a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def bit_flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "html": lambda path: path.write_text("<!DOCTYPE html><html>404 Not Found</html>"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "bit-flipped": bit_flipped,
    "bomb": lambda path: torch.save({"state_dict": Bomb(path.with_suffix(".ran"))}, path),
    "bare-bomb": lambda path: path.write_bytes(pickle.dumps(Bomb(path.with_suffix(".ran")))),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(fails, city, ckpt, damage):
    DAMAGE[damage](ckpt)
    err = fails("--ckpt", ckpt, "--data", city)
    assert f"error: {ckpt}: " in err
    assert "expected" in err
    assert not ckpt.with_suffix(".ran").exists()


def test_published_name_with_other_content(fails, city, tmp_path):
    name, entry = next(iter(ZOO.items()))
    path = tiny_eval.write_checkpoint(tmp_path, entry.file)
    err = fails("--ckpt", path, "--data", city, "--model", name)
    assert f"{path}: " in err
    assert entry.sha256 in err


def test_other_architecture(fails, city, ckpt):
    name = next(iter(ZOO))
    err = fails("--ckpt", ckpt, "--data", city, "--model", name)
    assert f"{ckpt}: is a checkpoint of tiny, not of --model {name}" in err
    mine = ckpt.rename(ckpt.with_name("mine.pth"))
    err = fails("--ckpt", mine, "--data", city, "--model", name)
    assert f"{mine}: does not fit the model" in err
    assert "missing from the file" in err
    assert "of another shape" in err


def test_other_class_count(fails, city, tmp_path):
    path = tiny_eval.write_checkpoint(tmp_path, num_classes=7)
    err = fails("--ckpt", path, "--data", city)
    assert "decode_head.conv_seg.weight: file [7, 8, 1, 1], model [19, 8, 1, 1]" in err


def test_a_data_set_of_another_number_of_classes(fails, city, ckpt, tmp_path):
    for given in ("emanet_demo", ckpt):
        assert fails("--ckpt", given, "--data", city, "--dataset", "ade20k") == (
            f"error: --dataset ade20k: ADE20K has 150 classes, but {given} has 19; expected a data "
            "set with the model's classes\n"
        )
    mine = tiny_eval.write_checkpoint(tmp_path, "mine.pth", num_classes=150)
    err = fails("--ckpt", mine, "--model", "tiny", "--data", city, "--dataset", "ade20k")
    assert f"{city}: not usable as ADE20K" in err


def test_weights_that_are_not_finite(fails, city, ckpt):
    content = torch.load(ckpt)
    content["state_dict"]["decode_head.conv_seg.bias"][3] = float("nan")
    torch.save(content, ckpt)
    assert "decode_head.conv_seg.bias" in fails("--ckpt", ckpt, "--data", city)


def test_unreachable_download(fails, city, monkeypatch):
    name, entry = next(iter(ZOO.items()))
    changed = type(entry)(**(vars(entry) | {"url": "http://127.0.0.1:9/x.pth"}))
    monkeypatch.setitem(ZOO, name, changed)
    err = fails("--ckpt", name, "--data", city)
    assert "http://127.0.0.1:9/x.pth: cannot be downloaded" in err
    assert entry.file in err


# While it runs


def test_out_of_memory_at_batch_one(city, ckpt, capsys, monkeypatch):
    def forward(self, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("emanet_triton.models.emanet.FusedEMANet.forward", forward)
    assert main(["--ckpt", str(ckpt), "--data", str(city), "--batch-size", "2"]) == 2
    err = capsys.readouterr().err
    assert "note: out of memory on cpu; going on with batch size 1" in err
    assert "error: out of memory on cpu with an image of 64x32 pixels at batch size 1" in err


def test_the_module_itself_exits_with_code_2():
    command = [sys.executable, "-m", "emanet_triton.eval", "--data", "/nowhere", "--ckpt", "x.pth"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: x.pth: no such file; "
        "expected a PyTorch (.pth), PaddlePaddle (.pdparams) or safetensors checkpoint\n"
    )
