"""New classifiers for another number of classes, and the weights of a backbone alone."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_eval
import torch
from checkpoint_files import save, tiny_emanet
from torch import nn

from emanet_triton import create_model
from emanet_triton.errors import InputError
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.loading import load_backbone, load_into
from emanet_triton.models.zoo import ZOO

CLASSIFIERS = ("decode_head.conv_seg.", "auxiliary_head.conv_seg.")
OF_FIVE = (
    "is for 19 classes, the model for 5; the model's classifiers are random and must be trained"
)
HEADS = "decode_head.conv_seg and auxiliary_head.conv_seg"


def warned(function, *arguments, **options) -> list[str]:
    """The warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*arguments, **options)
    return [str(warning.message) for warning in caught]


def unchanged(model: nn.Module, function, *arguments, **options) -> str:
    """The message of a call that must change nothing of a model."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as raised:
        function(model, *arguments, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return str(raised.value)


@pytest.fixture
def path(tmp_path) -> Path:
    return save(tiny_emanet().state_dict(), tmp_path / "x.pth")


def test_all_but_the_classifiers_are_loaded(path):
    model = tiny_emanet(num_classes=5)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    checkpoint = read_checkpoint(path)
    assert warned(load_into, model, checkpoint, new_classes=True) == [f"{path}: {OF_FIVE}: {HEADS}"]
    for key, value in model.state_dict().items():
        source = own if key.startswith(CLASSIFIERS) else checkpoint.state_dict
        assert torch.equal(value, source[key]), key


def test_the_same_number_loads_everything_in_silence(path):
    model, checkpoint = tiny_emanet(), read_checkpoint(path)
    assert warned(load_into, model, checkpoint, new_classes=True) == []
    assert all(
        torch.equal(value, checkpoint.state_dict[key]) for key, value in model.state_dict().items()
    )


def test_without_an_auxiliary_head(tmp_path):
    weights = tiny_emanet().state_dict()
    weights = {key: value for key, value in weights.items() if "auxiliary" not in key}
    path = save(weights, tmp_path / "x.pth")
    assert warned(
        load_into, tiny_emanet(num_classes=5), read_checkpoint(path), new_classes=True
    ) == [
        f"{path}: {OF_FIVE}: decode_head.conv_seg",
        f"{path}: has no auxiliary head, which only training uses; none is loaded",
    ]


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("decode_head.conv_seg.weight", (19, 9, 1, 1)),
        ("decode_head.conv_seg.bias", (18,)),
        ("auxiliary_head.conv_seg.weight", (20, 8, 1, 1)),
        ("decode_head.conv_cat.conv.weight", (9, 1, 1, 1)),
        ("backbone.stem.0.weight", (1,)),
    ],
)
def test_every_other_difference_is_refused(path, key, shape):
    checkpoint = read_checkpoint(path)
    checkpoint.state_dict[key] = torch.zeros(shape)
    message = unchanged(tiny_emanet(num_classes=5), load_into, checkpoint, new_classes=True)
    assert f"{key}: file {list(shape)}, model" in message


@pytest.mark.parametrize("key", ["decode_head.conv_seg.weight", "auxiliary_head.conv_seg.bias"])
def test_a_missing_part_of_a_classifier_is_refused(path, key):
    checkpoint = read_checkpoint(path)
    del checkpoint.state_dict[key]
    message = unchanged(tiny_emanet(num_classes=5), load_into, checkpoint, new_classes=True)
    assert f"missing from the file (1):\n  {key}" in message


def test_never_without_being_asked(path):
    message = unchanged(tiny_emanet(num_classes=5), load_into, read_checkpoint(path))
    assert message.endswith(
        "create_model takes num_classes=, and the commands eval, predict and export take --data "
        "FILE.toml with the classes."
    )
    with pytest.raises(ValueError, match="give either share=True or new_classes=True, not both"):
        load_into(tiny_emanet(), read_checkpoint(path), share=True, new_classes=True)


def test_create_model(tmp_path, monkeypatch):
    path = tiny_eval.write_checkpoint(tmp_path)
    with pytest.warns(UserWarning, match=f"{OF_FIVE}: decode_") as caught:
        model = create_model("tiny", checkpoint=path, num_classes=5)
    assert caught[0].filename == __file__
    assert model.num_classes == 5
    assert model.decode_head.conv_seg.weight.std() < 0.02
    assert not model.decode_head.conv_seg.bias.any()
    want = tiny_eval.tiny_network().state_dict()
    assert torch.equal(model.state_dict()["backbone.stem.0.weight"], want["backbone.stem.0.weight"])

    five = tiny_eval.write_checkpoint(tmp_path, "five.pth", num_classes=5)
    with pytest.raises(InputError, match=r"create_model takes num_classes="):
        create_model("tiny", checkpoint=five)
    assert create_model("tiny", checkpoint=five, num_classes=5).num_classes == 5
    entry = replace(ZOO["tiny"], sha256=None)
    monkeypatch.setitem(ZOO, "tiny", entry)
    monkeypatch.setattr("emanet_triton.models.entries.WEIGHTS", tmp_path)
    with pytest.warns(UserWarning, match="for 19 classes, the model for 2;") as caught:
        create_model("tiny", pretrained=True, num_classes=2)
    assert caught[0].filename == __file__


def test_the_demonstration_for_five_classes():
    with pytest.warns(UserWarning, match=f"are random and must be trained: {HEADS}"):
        model = create_model("emanet_demo", pretrained=True, num_classes=5)
    model.train()
    logits, auxiliary = model(torch.zeros(2, 3, 64, 64))
    assert logits.shape == auxiliary.shape == (2, 5, 8, 8)


def backbone_weights(**options) -> dict[str, torch.Tensor]:
    return dict(tiny_emanet(**options).backbone.state_dict())


def assert_backbone(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, weights[key]), key


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.", "module.backbone."])
@pytest.mark.parametrize("classifier", [False, True])
def test_a_backbone_alone(tmp_path, prefix, classifier):
    """As mmsegmentation's open-mmlab://resnet50_v1c."""
    weights = backbone_weights()
    content = {f"{prefix}{key}": value for key, value in weights.items()}
    outside = prefix.removesuffix("backbone.")
    extra = {f"{outside}fc.weight": torch.ones(9, 4), f"{outside}fc.bias": torch.ones(9)}
    path = save(content | (extra if classifier else {}), tmp_path / "x.pth")
    model = tiny_emanet()
    head = model.decode_head.conv_cat.conv.weight.clone()
    note = f"{path}: leaves out 2 of its entries, which no backbone uses, first fc.weight"
    assert warned(load_backbone, model, path) == ([note] if classifier else [])
    assert_backbone(model, weights)
    assert torch.equal(model.decode_head.conv_cat.conv.weight, head)


def test_the_backbone_of_a_whole_network(path):
    model = tiny_emanet(num_classes=5)
    (note,) = warned(load_backbone, model, path)
    assert note.startswith(f"{path}: leaves out ")
    assert note.endswith(
        " of its entries, which no backbone uses, first decode_head.conv_seg.weight"
    )
    weights = read_checkpoint(path).state_dict
    assert_backbone(model, {key.removeprefix("backbone."): weights[key] for key in weights})


def test_counters_of_a_backbone_may_be_missing(tmp_path):
    weights = {k: v for k, v in backbone_weights().items() if "num_batches" not in k}
    model = tiny_emanet()
    model.backbone.stem[1].num_batches_tracked += 3
    assert warned(load_backbone, model, save(weights, tmp_path / "x.pth")) == []
    assert model.backbone.stem[1].num_batches_tracked == 0


def test_a_backbone_of_half_precision(tmp_path):
    weights = {k: v.half() if v.is_floating_point() else v for k, v in backbone_weights().items()}
    model = tiny_emanet()
    load_backbone(model, save(weights, tmp_path / "x.pth"))
    assert model.backbone.stem[0].weight.dtype == torch.float32


def test_torchvisions_backbone_is_another(tmp_path):
    content = {
        "conv1.weight": torch.ones(8, 3, 7, 7),
        "bn1.weight": torch.ones(8),
        **{k: v for k, v in backbone_weights().items() if not k.startswith("stem")},
        "fc.weight": torch.ones(9, 4),
    }
    path = save(content, tmp_path / "x.pth")
    message = unchanged(tiny_emanet(), load_backbone, path)
    assert message.startswith(f"{path}: does not fit the backbone\nmissing from the file (15):\n")
    assert "left over in the file (2):\n  backbone.conv1.weight" in message
    assert message.endswith(
        "\nThe file's backbone begins with one convolution, as torchvision's ResNet; expected "
        "ResNetV1c, whose stem has three, as open-mmlab://resnet50_v1c."
    )


def test_a_backbone_of_another_depth_or_with_more(tmp_path):
    path = save(backbone_weights(blocks=(1, 1, 3, 1)), tmp_path / "x.pth")
    message = unchanged(tiny_emanet(), load_backbone, path)
    assert message.endswith("blocks, the model's 1-1-1-1: the file is of another architecture.")
    path = save(backbone_weights() | {"neck.weight": torch.ones(1)}, tmp_path / "y.pth")
    assert "left over in the file (1):\n  backbone.neck.weight" in unchanged(
        tiny_emanet(), load_backbone, path
    )


def test_no_file_of_a_backbone(tmp_path):
    missing = tmp_path / "none.pth"
    assert unchanged(tiny_emanet(), load_backbone, missing).startswith(f"{missing}: no such file")
    with torch.device("meta"):
        model = tiny_emanet()
    path = save(backbone_weights(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="a model on the meta device has no memory for weights"):
        load_backbone(model, path)
