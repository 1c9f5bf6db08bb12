"""What a trained checkpoint says about itself, and models that are built from such a file."""

import json
import os
import pickle
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_eval
import torch
from checkpoint_files import save
from described_sets import described
from trained_files import CLASSES, TRAINED, write_trained

from emanet_triton import create_model
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.errors import InputError
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.checkpoint_files import torch_file
from emanet_triton.models.chosen import choose
from emanet_triton.models.description import Description, description_in
from emanet_triton.models.protocol import Protocol

DIRECT = Protocol(
    (2048, 512), version="sssegmentation", direct=True, average="logits", scaling="input"
)
PADDED = Protocol(
    None,
    align_corners=True,
    version="paddleseg",
    scaling="previous",
    pad_size=(512, 513),
    pad_step=8,
    final_align_corners=False,
)
OWN = Description("tiny", tuple(c.name for c in CITYSCAPES.classes), Protocol((64, 32)), None, {})


@pytest.mark.parametrize(
    "trained",
    [
        TRAINED,
        OWN,
        replace(OWN, protocol=Protocol(None, version="mmseg-1.x", ratios=(1, 2.5))),
        replace(OWN, protocol=Protocol((9, 9), "slide", (64, 64), (48, 32), True)),
        replace(OWN, protocol=DIRECT),
        replace(OWN, protocol=PADDED),
        replace(TRAINED, info={"versions": {"torch": "2"}, "mIoU": None, "seeds": [1, 2]}),
    ],
)
def test_the_metadata_say_it_again(tmp_path, trained):
    assert Description.of(trained.metadata()) == trained
    assert all(isinstance(text, str) for text in trained.metadata().values())
    assert trained.metadata()["format"] == "pt"
    path = write_trained(tmp_path / "x.safetensors", trained)
    assert description_in(path) == trained
    assert Description.of(read_checkpoint(path).meta) == trained
    link = tmp_path / "link"
    link.symlink_to(path)
    assert description_in(link) == trained


def test_files_of_before_have_the_protocols_of_mmsegmentation():
    content = json.loads(TRAINED.to_json())
    for key in ("direct", "average", "scaling", "pad_size", "pad_step", "final_align_corners"):
        del content["protocol"][key]
    assert Description.from_json(json.dumps(content)) == TRAINED


def test_odd_texts_survive(tmp_path):
    name = "große Straße 路 \U0001f600"
    dataset = described(classes=[name, '"']).description
    trained = replace(TRAINED, classes=(name, '"'), dataset=dataset)
    assert description_in(write_trained(tmp_path / "x.safetensors", trained)) == trained


def test_a_file_of_pytorch_says_it_too(tmp_path):
    path = save({"meta": TRAINED.metadata(), "state_dict": {"a": torch.ones(2)}}, tmp_path / "x")
    assert description_in(path) == TRAINED
    link = tmp_path / "link"
    link.symlink_to(path)
    assert description_in(link) == TRAINED


def as_zip(path: Path, name: str = "x/data.pkl", compression: int = zipfile.ZIP_STORED) -> Path:
    """A zip like one of PyTorch, whose pickle has a description."""
    content = {"meta": TRAINED.metadata(), "state_dict": {}}
    with zipfile.ZipFile(path, "w", compression) as zipped:
        zipped.writestr(name, pickle.dumps(content, protocol=2))
    return path


def test_damaged_and_other_zips_say_nothing(tmp_path, monkeypatch):
    right = as_zip(tmp_path / "right")
    assert description_in(right) == TRAINED
    data = right.read_bytes()
    assert b"sand" in data
    changed = {
        "wrong CRC": data.replace(b"sand", b"land"),
        "no end": data[:-30],
        "no directory": data[: len(data) // 2],
        "encrypted": data.replace(
            b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"
        ),
        "begins alone": b"PK\x03\x04",
    }
    paths = [tmp_path / name for name in changed]
    for path, content in zip(paths, changed.values(), strict=True):
        assert content != data
        path.write_bytes(content)
    paths += [
        as_zip(tmp_path / "compressed", compression=zipfile.ZIP_DEFLATED),
        as_zip(tmp_path / "without", "x/other.pkl"),
        save({"meta": TRAINED.metadata(), "x": os.system}, tmp_path / "dangerous"),
    ]
    for path in paths:
        assert description_in(path) is None, path.name
    monkeypatch.setattr(torch_file, "_PICKLE", 10)
    assert description_in(right) is None


def test_other_files_say_nothing(tmp_path):
    content = {"a": torch.ones(2)}
    text = b'{"a": '
    (tmp_path / "damaged.safetensors").write_bytes(struct.pack("<Q", 6) + text)
    (tmp_path / "deep.safetensors").write_bytes(struct.pack("<Q", 10**5) + b'{"a":' * 20000)
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", 2**23) + b"{" + bytes(2**23))
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"{}")
    (tmp_path / "folder").mkdir()
    for kind in ("zip", "legacy", "safetensors"):
        save(content, tmp_path / kind, kind)
    names = ["none", "x\0y", *(path.name for path in tmp_path.iterdir())]
    assert len(names) == 11
    for name in names:
        assert description_in(tmp_path / name) is None
    assert Description.of({}) is None


def broken(**changes: object) -> dict[str, str]:
    metadata = TRAINED.metadata()
    content = json.loads(metadata["emanet_triton"]) | changes
    content = {key: value for key, value in content.items() if value is not ...}
    return metadata | {"emanet_triton": json.dumps(content)}


PROTOCOL = json.loads(TRAINED.metadata()["emanet_triton"])["protocol"]


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({"emanet_triton": "x"}, "Expecting value: line 1 column 1 (char 0)"),
        ({"emanet_triton": 3}, "the JSON object must be str"),
        ({"emanet_triton": "[" * 10**5}, "maximum recursion depth exceeded"),
        ({"emanet_triton": "[]"}, "expected a table, got a list"),
        (broken(model=...), "it lacks 'model'"),
        (broken(model=3), "expected the name of a model, got a int"),
        (broken(classes="ab"), "expected a list of classes, got a str"),
        (broken(classes=[1]), "expected the name of a class, got a int"),
        (broken(classes=[], dataset=None), "expected 1 to 255 classes, got 0"),
        (broken(classes=["a"] * 256, dataset=None), "expected 1 to 255 classes, got 256"),
        (broken(classes=["a"]), "the data set has other classes"),
        (broken(dataset=[]), "expected a data set, got a list"),
        (broken(dataset={}), "the keys 'images' and 'labels' and 'classes' must be given"),
        (broken(info=None), "expected a table of figures, got a NoneType"),
        (broken(protocol={}), "it lacks 'base_scale'"),
        (broken(protocol=PROTOCOL | {"base_scale": [1, 2, 3]}), "expected two numbers as base_sc"),
        (broken(protocol=PROTOCOL | {"base_scale": ["1", 2]}), "expected a list of numbers"),
        (broken(protocol=PROTOCOL | {"base_scale": [-1, 2]}), "sizes must be 1 to 65536"),
        (broken(protocol=PROTOCOL | {"mode": "x"}), "mode must be 'whole' or 'slide', got 'x'"),
        (broken(protocol=PROTOCOL | {"more": 1}), "Protocol.__init__() got an unexpected keyword"),
        (broken(protocol=PROTOCOL | {"align_corners": 1}), "expected true or false, got a int"),
        (broken(protocol=PROTOCOL | {"direct": None}), "expected true or false, got a NoneType"),
        (broken(protocol=PROTOCOL | {"final_align_corners": 0}), "expected true, false or null"),
        (broken(protocol=PROTOCOL | {"pad_size": [1]}), "expected two numbers as pad_size"),
        (broken(protocol=PROTOCOL | {"pad_step": True}), "expected a whole number as pad_step"),
        (broken(protocol=PROTOCOL | {"average": "x"}), "average must be one of probabilities, l"),
        (broken(protocol=PROTOCOL | {"scaling": ["x"]}), "scaling must be one of image, input, r"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_broken_description(tmp_path, meta, reason):
    with pytest.raises(InputError) as raised:
        Description.of(meta)
    message = str(raised.value)
    assert message.startswith(f"its description of a model is broken ({reason}")
    assert message.endswith("); expected one that this package wrote")
    if isinstance(meta["emanet_triton"], str):
        path = write_trained(tmp_path / "x.safetensors", meta)
        with pytest.raises(InputError) as raised:
            description_in(path)
        assert str(raised.value) == f"{path}: {message}"


def test_a_model_of_a_trained_file(tmp_path):
    path = write_trained(tmp_path / "x.safetensors", TRAINED)
    weights = read_checkpoint(path).state_dict
    for options in ({}, {"name": "tiny"}, {"num_classes": len(CLASSES)}):
        model = create_model(checkpoint=path, **options)
        assert (model.num_classes, model.protocol) == (len(CLASSES), TRAINED.protocol)
        assert model.description == replace(TRAINED, info={})
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    with pytest.warns(UserWarning, match="is for 3 classes, the model for 7; the model's"):
        model = create_model(checkpoint=path, num_classes=7)
    assert (model.num_classes, model.description) == (7, None)


def test_what_a_model_says_of_itself():
    model = create_model("tiny")
    assert model.description == replace(OWN, protocol=model.protocol)
    model.protocol = DIRECT
    assert model.description == replace(OWN, protocol=DIRECT)
    assert create_model("tiny", num_classes=19).description is not None
    assert create_model("tiny", num_classes=7).description is None


def test_a_trained_file_for_another_model(tmp_path, monkeypatch):
    from emanet_triton.models.zoo import ZOO

    monkeypatch.setitem(ZOO, "other", replace(ZOO["tiny"], protocol=Protocol((8, 8))))
    path = write_trained(tmp_path / "x.safetensors", TRAINED)
    model = create_model("other", checkpoint=path)
    assert (model.num_classes, model.protocol) == (len(CLASSES), Protocol((8, 8)))


def test_a_trained_file_for_an_unknown_model(tmp_path):
    path = write_trained(tmp_path / "x.safetensors", replace(TRAINED, model="xxxx"))
    with pytest.raises(InputError) as raised:
        create_model("tiny", checkpoint=path)
    assert str(raised.value) == f"{path}: is a checkpoint of xxxx, not of tiny"


def test_other_files_need_a_name(tmp_path):
    path = tiny_eval.write_checkpoint(tmp_path)
    with pytest.raises(InputError) as raised:
        create_model(checkpoint=path)
    assert str(raised.value).startswith(f"{path}: expected the name of a model such as emanet_")
    end = "a file that names its model, as those of emanet-triton train do, needs none"
    with pytest.raises(
        InputError, match=rf"^create_model: expected the name of a model .*; {end}$"
    ):
        create_model()


def test_what_a_trained_file_chooses(tmp_path):
    path = write_trained(tmp_path / "x.safetensors", TRAINED)
    chosen = choose(str(path))
    assert (chosen.name, chosen.protocol, chosen.root) == ("tiny", TRAINED.protocol, None)
    assert chosen.dataset.description == TRAINED.dataset
    assert choose(str(path), "tiny", tmp_path).root == tmp_path
    own = write_trained(tmp_path / "own.safetensors", OWN, num_classes=19)
    assert choose(str(own)).dataset is CITYSCAPES


def refused(*arguments: object) -> str:
    with pytest.raises(InputError) as raised:
        choose(*arguments)
    return str(raised.value)


def test_what_contradicts_a_trained_file(tmp_path):
    path = str(write_trained(tmp_path / "x.safetensors", TRAINED))
    assert refused(path, "emanet_demo") == (
        f"{path}: is a checkpoint of tiny, not of --model emanet_demo"
    )
    other = str(write_trained(tmp_path / "y.safetensors", replace(TRAINED, model="mine")))
    assert refused(other).startswith(f"{other}: is of the model 'mine', which is unknown here; exp")
    third = str(write_trained(tmp_path / "z.safetensors", replace(TRAINED, dataset=None)))
    assert refused(third) == (
        f"{third}: says that it has the classes of Cityscapes, but its own are sea, sand, sky"
    )
    fourth = str(write_trained(tmp_path / "w.safetensors", {"emanet_triton": "x"}))
    assert refused(fourth).startswith(f"{fourth}: its description of a model is broken (")
