"""Files of other projects, generated with the names that these projects give."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    FORMATS,
    SMALL_OTHERS,
    file_of_another,
    filled,
    listed_in_others,
    published,
    refusal_of,
    save,
    small,
    tiny_emanet,
)
from other_golden import ARCHITECTURES, small_architecture
from torch import nn

from emanet_triton.errors import InputError
from emanet_triton.models.alteration import on_meta
from emanet_triton.models.checkpoint import Checkpoint, read_checkpoint
from emanet_triton.models.checkpoint_files.layouts import translated
from emanet_triton.models.checkpoint_files.safetensors_file import write_safetensors
from emanet_triton.models.conversion import convert
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.loading import load_backbone, load_into
from emanet_triton.models.protocol import Protocol

LISTS = {
    "sssegmentation": "sssegmentation_r50os8",
    "official": "official_r101",
    "paddleseg": "paddleseg_r50",
}


def network_for(layout: str, num_classes: int = 5) -> EMANet:
    """The small network whose weights ``SMALL_OTHERS[layout]`` lists."""
    architecture = small_architecture(ARCHITECTURES[LISTS[layout]])
    return EMANet(architecture, Protocol((64, 32)), num_classes)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("layout", SMALL_OTHERS)
def test_reads_files_of_other_projects(tmp_path, layout, kind):
    state = filled(SMALL_OTHERS[layout])
    content = state if kind == "safetensors" else file_of_another(layout, state)
    checkpoint = read_checkpoint(save(content, tmp_path / "x.pth", kind))
    assert checkpoint.layout == layout
    want, _ = translated(state)
    assert checkpoint.state_dict.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(checkpoint.state_dict[key], value), key


@pytest.mark.parametrize("prefix", ["module.", "model.", "module._orig_mod.net."])
@pytest.mark.parametrize("layout", SMALL_OTHERS)
def test_wrappers_and_tensors_beside_the_network(tmp_path, layout, prefix):
    state = {f"{prefix}{key}": value for key, value in filled(SMALL_OTHERS[layout]).items()}
    content = {"step": torch.tensor(3), "best": {"net": state}}
    checkpoint = read_checkpoint(save(content, tmp_path / "x.pth"))
    assert checkpoint.layout == layout
    assert checkpoint.state_dict.keys() == translated(filled(SMALL_OTHERS[layout]))[0].keys()


def test_two_sets_of_weights_are_refused(tmp_path):
    """As of a training of sssegmentation with a moving average."""
    state = filled(SMALL_OTHERS["sssegmentation"])
    path = save({"model": state, "model_ema": dict(state)}, tmp_path / "x.pth")
    assert refusal_of(path).startswith("holds weights under 'model', 'model_ema'; expected one")


def test_the_published_structure_in_full_size(tmp_path):
    """Every name, shape and dtype of the file of R50-D8 for ADE20K, in the legacy format."""
    state = {
        key: torch.zeros(shape, dtype=getattr(torch, dtype))
        for key, shape, dtype in listed_in_others("sssegmentation_r50os8")
    }
    path = save({"model": state}, tmp_path / "x.pth", "legacy")
    del state
    checkpoint = read_checkpoint(path)
    path.unlink()
    network = on_meta(EMANet, ARCHITECTURES["sssegmentation_r50os8"], Protocol(None), 150)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_into(network, checkpoint, share=True)
    assert list(network.decode_head.conv_seg.weight.shape) == [150, 512, 1, 1]


@pytest.mark.parametrize("layout", SMALL_OTHERS)
def test_loads_every_entry(tmp_path, layout):
    path = save(file_of_another(layout, filled(SMALL_OTHERS[layout])), tmp_path / "x.pth")
    checkpoint, network = read_checkpoint(path), network_for(layout)
    want = {key: value.clone() for key, value in network.state_dict().items()}
    want |= checkpoint.state_dict
    with warnings.catch_warnings():  # the authors' network has no auxiliary head, as expected
        warnings.simplefilter("error")
        load_into(network, checkpoint)
    for key, value in network.state_dict().items():
        assert torch.equal(value, want[key]), key


def test_the_backbone_alone(tmp_path):
    path = save(
        file_of_another("sssegmentation", filled(SMALL_OTHERS["sssegmentation"])), tmp_path / "x"
    )
    network = network_for("sssegmentation", num_classes=7)
    with pytest.warns(UserWarning, match="which no backbone uses, first decode_head"):
        load_backbone(network, path)
    want = read_checkpoint(path).state_dict
    for key, value in network.backbone.state_dict().items():
        assert torch.equal(value, want[f"backbone.{key}"]), key


def refused(model: nn.Module, checkpoint: Checkpoint) -> str:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_into(model, checkpoint)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return str(error.value)


@pytest.mark.parametrize(
    ("layout", "missing", "ours", "unknown"),
    [
        (
            "sssegmentation",
            "bottleneck.0.weight",
            "decode_head.bottleneck.conv.weight",
            ["decoder.7.weight", "backbone_net.layer1.0.conv4.weight"],
        ),
        (
            "paddleseg",
            "head.conv_cat._batch_norm._variance",
            "decode_head.conv_cat.bn.running_var",
            ["head.extra.weight", "backbone.bb_0_0.conv7._conv.weight", "backbone.bb_4_0.x"],
        ),
        ("official", "emau.mu", "decode_head.ema_module.bases", ["fc1.1.bn.bias", "extractor.8.x"]),
    ],
)
def test_unknown_and_missing_names_are_listed(tmp_path, layout, missing, ours, unknown):
    state = filled(SMALL_OTHERS[layout])
    path = save(state | {key: torch.ones(1) for key in unknown}, tmp_path / "x.pth")
    left = f"left over in the file ({len(unknown)}):\n" + "\n".join(f"  {key}" for key in unknown)
    assert refused(network_for(layout), read_checkpoint(path)) == (
        f"{path}: does not fit the model\n{left}"
    )
    del state[missing]
    path = save(state, tmp_path / "y.pth")
    assert refused(network_for(layout), read_checkpoint(path)) == (
        f"{path}: does not fit the model\nmissing from the file (1):\n  {ours}"
    )


def test_a_loss_beside_the_network_is_left_out(tmp_path):
    state = {**filled(SMALL_OTHERS["sssegmentation"]), "criterion.weight": torch.ones(5)}
    path = save({"model": state}, tmp_path / "x.pth")
    with pytest.warns(UserWarning, match="leaves out 1 of its entries, .* first criterion.weight"):
        load_into(network_for("sssegmentation"), read_checkpoint(path))


def test_a_weight_under_two_names_is_refused(tmp_path):
    state = filled(SMALL_OTHERS["paddleseg"])
    state["backbone.stem.0.weight"] = torch.ones(1)
    assert refusal_of(save(state, tmp_path / "x.pth")) == (
        "holds 'backbone.stem.0.weight' twice, as 'backbone.conv1_1._conv.weight' and "
        "'backbone.stem.0.weight'; expected one network of PaddleSeg"
    )


AUTHORS = "EMANet's authors (XiaLiPKU)"


@pytest.mark.parametrize(
    ("file", "model", "theirs", "ours"),
    [
        ("sssegmentation", "paddleseg", "sssegmentation", "PaddleSeg"),
        ("paddleseg", "mmsegmentation", "PaddleSeg", "mmsegmentation"),
        ("official", "sssegmentation", AUTHORS, "sssegmentation"),
        ("mmsegmentation", "official", "mmsegmentation", AUTHORS),
    ],
)
def test_a_file_of_another_project_than_the_model(tmp_path, file, model, theirs, ours):
    state = filled(SMALL_OTHERS[file]) if file in SMALL_OTHERS else tiny_emanet().state_dict()
    content = state if file in SMALL_OTHERS else published(state)
    checkpoint = read_checkpoint(save(content, tmp_path / "x.pth"))
    network = network_for(model) if model in SMALL_OTHERS else tiny_emanet()
    assert refused(network, checkpoint) == (
        f"{checkpoint.path}: is a checkpoint of {theirs}, but the model is one of {ours}: the same "
        f"weights give other results there; expected a model of {theirs} "
        "(--model NAME, or create_model(NAME, ...))"
    )


SECOND_BLOCK = {
    "sssegmentation": "backbone_net.layer3.1.conv1.weight",
    "official": "extractor.6.1.conv1.weight",
    "paddleseg": "backbone.bb_2_1.conv0._conv.weight",
}


@pytest.mark.parametrize("layout", SMALL_OTHERS)
def test_another_depth_and_number_of_classes_are_named(tmp_path, layout):
    state = filled(small(listed_in_others(LISTS[layout]), num_classes=7))
    deeper = state | {SECOND_BLOCK[layout]: torch.ones(32, 128, 1, 1)}
    message = refused(network_for(layout), read_checkpoint(save(deeper, tmp_path / "x.pth")))
    assert "left over in the file (1):\n  backbone.layer3.1.conv1.weight\n" in message
    assert "\nThe file's backbone has 1-1-2-1 blocks, the model's 1-1-1-1: " in message
    assert "\nThe file is for 7 classes, the model for 5; create_model takes num_cl" in message
    checkpoint, network = read_checkpoint(save(state, tmp_path / "x.pth")), network_for(layout)
    with pytest.warns(UserWarning) as caught:
        load_into(network, checkpoint, new_classes=True)
    assert "is for 7 classes, the model for 5; the model's" in str(caught[0].message)


@pytest.mark.parametrize(
    ("layout", "key", "value", "message"),
    [
        (
            "paddleseg",
            "backbone.bb_3_0.conv1._batch_norm._variance",
            -1.0,
            "backbone.layer4.0.bn2.running_var is negative; expected variances",
        ),
        (
            "official",
            "fc0.bn.running_var",
            -1.0,
            "decode_head.ema_in_conv.bn.running_var is negative; expected variances",
        ),
        (
            "paddleseg",
            "head.conv_cat._conv.bias",
            torch.inf,
            "expected finite weights, but 1 of 127 tensors hold NaN or infinity in float32, first "
            "decode_head.conv_cat.bn.running_mean",
        ),
        (
            "sssegmentation",
            "ema_module.bases",
            torch.nan,
            "expected finite weights, but 1 of 151 tensors hold NaN or infinity in float32, first "
            "decode_head.ema_module.bases",
        ),
    ],
)
def test_bad_values_are_refused(tmp_path, layout, key, value, message):
    state = filled(SMALL_OTHERS[layout])
    state[key].view(-1)[3] = value
    assert refusal_of(save(state, tmp_path / "x.pth")) == message


@pytest.mark.parametrize(
    "bias", [torch.ones(3), torch.ones(32, dtype=torch.int64), torch.ones(32, 1)]
)
def test_a_bias_that_fits_no_norm_stays(tmp_path, bias):
    state = filled(SMALL_OTHERS["paddleseg"])
    state["head.bottleneck._conv.bias"] = bias
    message = refused(network_for("paddleseg"), read_checkpoint(save(state, tmp_path / "x.pth")))
    assert message.endswith("left over in the file (1):\n  decode_head.bottleneck.conv.bias")


@pytest.mark.parametrize("layout", SMALL_OTHERS)
def test_convert_keeps_the_project(tmp_path, layout):
    source = save(file_of_another(layout, filled(SMALL_OTHERS[layout])), tmp_path / "x.pth")
    first = convert(source, tmp_path / "y.safetensors")
    again = convert(first.path, tmp_path / "z.safetensors")
    for written in (first, again):
        assert written.layout == layout == written.meta["layout"]
        assert written.state_dict.keys() == read_checkpoint(source).state_dict.keys()


@pytest.mark.parametrize("noted", ["official", "mmsegmentation", "", "other", "x" * 1000])
def test_a_project_that_metadata_name(tmp_path, noted):
    path = tmp_path / "x.safetensors"
    state = tiny_emanet().state_dict()
    path.write_bytes(write_safetensors(state, {"layout": noted}))
    known = noted if noted in ("official", "mmsegmentation") else None
    assert read_checkpoint(path).layout == known
    path.write_bytes(write_safetensors(filled(SMALL_OTHERS["paddleseg"]), {"layout": noted}))
    assert read_checkpoint(path).layout == "paddleseg"
    described = {"layout": noted, "emanet_triton": json.dumps({})}
    path.write_bytes(write_safetensors(state, described))
    assert read_checkpoint(path).layout is None
    torch.save({"state_dict": state, "meta": {"layout": noted}}, path)
    assert read_checkpoint(path).layout is None
    torch.save({"state_dict": state, "meta": {"mmseg_version": "0.30.0"}}, path)
    assert read_checkpoint(path).layout == "mmsegmentation"


@pytest.mark.parametrize("layout", SMALL_OTHERS)
def test_a_state_dict_of_our_own_model_loads_again(tmp_path, layout):
    """It has mmsegmentation's names, whatever the network is."""
    network = network_for(layout)
    path = save(network.state_dict(), tmp_path / "x.pth")
    checkpoint = read_checkpoint(path)
    assert checkpoint.layout is None
    load_into(network_for(layout), checkpoint)


def test_files_for_mmsegmentation(tmp_path):
    paths: dict[str, Path] = {}
    for layout, listed in SMALL_OTHERS.items():
        paths[layout] = save(filled(listed), tmp_path / f"{layout}.pt")
    written = convert(paths["sssegmentation"], tmp_path / "x.pth")
    assert written.state_dict.keys() == network_for("sssegmentation").state_dict().keys()
    projects = {"official": r"EMANet's authors \(XiaLiPKU\)", "paddleseg": "PaddleSeg"}
    for layout, project in projects.items():
        message = f"{layout}.pt: is of a network of {project}, which mmsegmentation cannot build; "
        with pytest.raises(InputError, match=message):
            convert(paths[layout], tmp_path / "y.pth")
        assert not (tmp_path / "y.pth").exists()
