"""Files of other projects: sssegmentation, the authors' EMANet and PaddleSeg."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_files import (
    FORMATS,
    file_of_another,
    filled,
    listed_in_others,
    listed_in_paddleseg,
    refusal_of,
    save,
    small,
    tiny_emanet,
    with_blocks,
    with_classes,
)
from golden_data import listed_keys
from torch import Tensor, nn

from emanet_triton.errors import InputError
from emanet_triton.models.checkpoint import Checkpoint, read_checkpoint
from emanet_triton.models.checkpoint_files.layouts import translated
from emanet_triton.models.checkpoint_files.safetensors_file import write_safetensors
from emanet_triton.models.conversion import convert
from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.loading import load_backbone, load_into
from emanet_triton.models.protocol import Protocol

R50, R101 = (3, 4, 6, 3), (3, 4, 23, 3)
SMALL = {
    "sssegmentation": small(listed_in_others("sssegmentation_r50os8")),
    "official": small(listed_in_others("official_r101")),
    "paddleseg": small(listed_in_paddleseg((1, 1, 1, 1))),
}
# One name for each rule of the tables.
PAIRS = {
    "sssegmentation": {
        "backbone_net.stem.3.weight": "backbone.stem.3.weight",
        "backbone_net.layer4.0.downsample.1.bias": "backbone.layer4.0.downsample.1.bias",
        "ema_in_conv.0.weight": "decode_head.ema_in_conv.conv.weight",
        "ema_in_conv.1.running_var": "decode_head.ema_in_conv.bn.running_var",
        "ema_mid_conv.bias": "decode_head.ema_mid_conv.conv.bias",
        "ema_module.bases": "decode_head.ema_module.bases",
        "ema_out_conv.0.weight": "decode_head.ema_out_conv.conv.weight",
        "ema_out_conv.1.bias": "decode_head.ema_out_conv.bn.bias",
        "bottleneck.0.weight": "decode_head.bottleneck.conv.weight",
        "bottleneck.1.num_batches_tracked": "decode_head.bottleneck.bn.num_batches_tracked",
        "decoder.0.weight": "decode_head.conv_cat.conv.weight",
        "decoder.1.running_mean": "decode_head.conv_cat.bn.running_mean",
        "decoder.4.bias": "decode_head.conv_seg.bias",
        "auxiliary_decoder.0.weight": "auxiliary_head.convs.0.conv.weight",
        "auxiliary_decoder.1.weight": "auxiliary_head.convs.0.bn.weight",
        "auxiliary_decoder.4.weight": "auxiliary_head.conv_seg.weight",
    },
    "official": {
        "extractor.0.0.weight": "backbone.stem.0.weight",
        "extractor.0.4.running_var": "backbone.stem.4.running_var",
        "extractor.0.6.weight": "backbone.stem.6.weight",
        "extractor.1.running_mean": "backbone.stem.7.running_mean",
        "extractor.4.0.conv1.weight": "backbone.layer1.0.conv1.weight",
        "extractor.5.0.downsample.0.weight": "backbone.layer2.0.downsample.0.weight",
        "extractor.6.0.bn3.bias": "backbone.layer3.0.bn3.bias",
        "extractor.7.0.conv2.weight": "backbone.layer4.0.conv2.weight",
        "fc0.conv.weight": "decode_head.ema_in_conv.conv.weight",
        "fc0.bn.running_var": "decode_head.ema_in_conv.bn.running_var",
        "emau.mu": "decode_head.ema_module.bases",
        "emau.conv1.bias": "decode_head.ema_mid_conv.conv.bias",
        "emau.conv2.0.weight": "decode_head.ema_out_conv.conv.weight",
        "emau.conv2.1.weight": "decode_head.ema_out_conv.bn.weight",
        "fc1.0.conv.weight": "decode_head.bottleneck.conv.weight",
        "fc1.0.bn.bias": "decode_head.bottleneck.bn.bias",
        "fc2.bias": "decode_head.conv_seg.bias",
    },
    "paddleseg": {
        "backbone.conv1_1._conv.weight": "backbone.stem.0.weight",
        "backbone.conv1_1._batch_norm.weight": "backbone.stem.1.weight",
        "backbone.conv1_2._conv.weight": "backbone.stem.3.weight",
        "backbone.conv1_2._batch_norm._mean": "backbone.stem.4.running_mean",
        "backbone.conv1_3._conv.weight": "backbone.stem.6.weight",
        "backbone.conv1_3._batch_norm._variance": "backbone.stem.7.running_var",
        "backbone.bb_0_0.conv0._conv.weight": "backbone.layer1.0.conv1.weight",
        "backbone.bb_1_0.conv0._batch_norm.bias": "backbone.layer2.0.bn1.bias",
        "backbone.bb_2_0.conv1._conv.weight": "backbone.layer3.0.conv2.weight",
        "backbone.bb_3_0.conv1._batch_norm._mean": "backbone.layer4.0.bn2.running_mean",
        "backbone.bb_0_0.conv2._conv.weight": "backbone.layer1.0.conv3.weight",
        "backbone.bb_0_0.conv2._batch_norm._variance": "backbone.layer1.0.bn3.running_var",
        "backbone.bb_0_0.short._conv.weight": "backbone.layer1.0.downsample.0.weight",
        "backbone.bb_0_0.short._batch_norm.bias": "backbone.layer1.0.downsample.1.bias",
        "head.emau.mu": "decode_head.ema_module.bases",
        "head.ema_in_conv._conv.weight": "decode_head.ema_in_conv.conv.weight",
        "head.ema_in_conv._batch_norm.weight": "decode_head.ema_in_conv.bn.weight",
        "head.ema_mid_conv.weight": "decode_head.ema_mid_conv.conv.weight",
        "head.ema_mid_conv.bias": "decode_head.ema_mid_conv.conv.bias",
        "head.ema_out_conv._batch_norm._variance": "decode_head.ema_out_conv.bn.running_var",
        "head.bottleneck._conv.weight": "decode_head.bottleneck.conv.weight",
        "head.cls.1.bias": "decode_head.conv_seg.bias",
        "head.aux.0._batch_norm.bias": "auxiliary_head.convs.0.bn.bias",
        "head.aux.2.weight": "auxiliary_head.conv_seg.weight",
        "head.conv_cat._conv.weight": "decode_head.conv_cat.conv.weight",
    },
}


def meta_tensors(listed) -> dict[str, Tensor]:
    return {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, shape, dtype in listed
    }


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[list[int], str]]:
    return {key: (list(value.shape), str(value.dtype)) for key, value in state.items()}


def ours(blocks: tuple[int, int, int, int], num_classes: int, channels: int) -> dict:
    """Shapes and dtypes of mmsegmentation's network."""
    with torch.device("meta"):
        network = EMANet(Architecture(blocks, head_channels=channels), Protocol(None), num_classes)
    return shapes(network.state_dict())


def network_for(layout: str, num_classes: int = 5) -> EMANet:
    """A small network of mmsegmentation, whose weights have the shapes of ``SMALL[layout]``.

    The authors' network has another stem and other heads; see ``test_the_authors_network``.
    """
    channels = {"sssegmentation": 64, "paddleseg": 32}[layout]
    architecture = Architecture(
        (1, 1, 1, 1), base_channels=8, ema_channels=64, num_bases=8, head_channels=channels
    )
    return EMANet(architecture, Protocol((64, 32)), num_classes)


@pytest.mark.parametrize(
    ("listed", "blocks", "classes"),
    [
        (listed_in_others("sssegmentation_r50os8"), R50, 150),
        (listed_in_others("sssegmentation_r50os16"), R50, 21),
        (listed_in_others("sssegmentation_r101os8"), R101, 19),
        (with_blocks(listed_in_others("sssegmentation_r101os8"), R50), R50, 19),
        (with_classes(listed_in_others("sssegmentation_r101os8"), 21), R101, 21),
    ],
    ids=["r50os8", "r50os16", "r101os8", "r50os8-of-r101", "r101os8-21"],
)
def test_names_of_sssegmentation(listed, blocks, classes):
    found, layout = translated(meta_tensors(listed))
    assert layout == "sssegmentation"
    assert shapes(found) == ours(blocks, classes, channels=512)


@pytest.mark.parametrize(("blocks", "classes"), [(R50, 19), (R101, 21)])
def test_names_of_paddleseg(blocks, classes):
    """They are mmsegmentation's but for the counters; the biases before norms are gone."""
    found, layout = translated(meta_tensors(listed_in_paddleseg(blocks, classes)))
    assert layout == "paddleseg"
    want = ours(blocks, classes, channels=256)
    assert shapes(found) == {k: v for k, v in want.items() if not k.endswith("batches_tracked")}


@pytest.mark.parametrize(("blocks", "classes"), [(R101, 21), (R50, 19)])
def test_names_of_the_authors(blocks, classes):
    """Mmsegmentation's, with a stem of 64, 64 and 128 channels and without two parts."""
    listed = with_classes(with_blocks(listed_in_others("official_r101"), blocks), classes)
    found, layout = translated(meta_tensors(listed))
    assert layout == "official"
    want = {
        key: value
        for key, value in ours(blocks, classes, channels=256).items()
        if not key.startswith(("auxiliary_head.", "decode_head.conv_cat."))
    }
    stem = {"0": (64, 3), "3": (64, 64), "6": (128, 64)}
    for place, (channels, inputs) in stem.items():
        want[f"backbone.stem.{place}.weight"] = ([channels, inputs, 3, 3], "torch.float32")
        for entry in ("weight", "bias", "running_mean", "running_var"):
            norm = f"backbone.stem.{int(place) + 1}.{entry}"
            want[norm] = ([channels], "torch.float32")
    want["backbone.layer1.0.conv1.weight"] = ([64, 128, 1, 1], "torch.float32")
    want["backbone.layer1.0.downsample.0.weight"] = ([256, 128, 1, 1], "torch.float32")
    assert shapes(found) == want


@pytest.mark.parametrize("layout", SMALL)
def test_each_rule(layout):
    state = filled(SMALL[layout])
    found, _ = translated(state)
    biased = layout == "paddleseg"
    assert len(found) == len(state) - 5 * biased
    for theirs, own in PAIRS[layout].items():
        assert torch.equal(found[own], state[theirs]), theirs


def test_our_own_names_stay():
    state = {key: torch.empty(0) for key, _, _ in listed_keys("r50")}
    assert translated(state) == (state, "mmsegmentation")
    # As in a module that holds a network and a loss with an extractor of features.
    state["extractor.0.0.weight"] = torch.empty(0)
    assert translated(state) == (state, "mmsegmentation")


def test_a_bias_before_a_norm_moves_into_the_mean():
    conv, norm = nn.Conv2d(6, 8, 3).double(), nn.BatchNorm2d(8).double().eval()
    state = {f"head.ema_in_conv._conv.{key}": value for key, value in conv.state_dict().items()}
    renamed = {"running_mean": "_mean", "running_var": "_variance"}
    for key, value in norm.state_dict().items():
        value.copy_(torch.rand(value.shape) + 0.5)
        state[f"head.ema_in_conv._batch_norm.{renamed.get(key, key)}"] = value
    found, _ = translated({**state, "backbone.bb_0_0.conv0._conv.weight": torch.ones(1)})
    assert "decode_head.ema_in_conv.conv.bias" not in found
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    want = norm(conv(x))
    folded = nn.functional.conv2d(x, found["decode_head.ema_in_conv.conv.weight"])
    got = nn.functional.batch_norm(
        folded,
        *(found[f"decode_head.ema_in_conv.bn.{key}"] for key in ("running_mean", "running_var")),
        *(found[f"decode_head.ema_in_conv.bn.{key}"] for key in ("weight", "bias")),
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_mean_is_rounded_once():
    state = filled(SMALL["paddleseg"])
    mean, bias = (state[f"head.bottleneck.{name}"] for name in ("_batch_norm._mean", "_conv.bias"))
    found, _ = translated(state)
    want = (mean.numpy().astype("f8") - bias.numpy()).astype("f4")
    assert (found["decode_head.bottleneck.bn.running_mean"].numpy() == want).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("layout", SMALL)
def test_reads_files_of_other_projects(tmp_path, layout, kind):
    state = filled(SMALL[layout])
    content = state if kind == "safetensors" else file_of_another(layout, state)
    checkpoint = read_checkpoint(save(content, tmp_path / "x.pth", kind))
    assert checkpoint.layout == layout
    want, _ = translated(state)
    assert checkpoint.state_dict.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(checkpoint.state_dict[key], value), key


@pytest.mark.parametrize("prefix", ["module.", "model.", "module._orig_mod.net."])
@pytest.mark.parametrize("layout", SMALL)
def test_wrappers_and_tensors_beside_the_network(tmp_path, layout, prefix):
    state = {f"{prefix}{key}": value for key, value in filled(SMALL[layout]).items()}
    content = {"step": torch.tensor(3), "best": {"net": state}}
    checkpoint = read_checkpoint(save(content, tmp_path / "x.pth"))
    assert checkpoint.layout == layout
    assert checkpoint.state_dict.keys() == translated(filled(SMALL[layout]))[0].keys()


def test_two_sets_of_weights_are_refused(tmp_path):
    """As of a training of sssegmentation with a moving average."""
    state = filled(SMALL["sssegmentation"])
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
    with torch.device("meta"):
        network = EMANet(Architecture(R50, head_channels=512), Protocol((2048, 512)), 150)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_into(network, checkpoint, share=True)
    assert list(network.decode_head.conv_seg.weight.shape) == [150, 512, 1, 1]


@pytest.mark.parametrize("layout", ["sssegmentation", "paddleseg"])
def test_loads_strictly(tmp_path, layout):
    path = save(file_of_another(layout, filled(SMALL[layout])), tmp_path / "x.pth")
    checkpoint, network = read_checkpoint(path), network_for(layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_into(network, checkpoint)
    counters = {key for key in network.state_dict() if key.endswith("num_batches_tracked")}
    for key, value in network.state_dict().items():
        if key in counters and layout == "paddleseg":
            assert value == 0
        else:
            assert torch.equal(value, checkpoint.state_dict[key]), key


def test_the_backbone_alone(tmp_path):
    path = save(file_of_another("sssegmentation", filled(SMALL["sssegmentation"])), tmp_path / "x")
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
    ],
)
def test_unknown_and_missing_names_are_listed(tmp_path, layout, missing, ours, unknown):
    state = filled(SMALL[layout])
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
    state = {**filled(SMALL["sssegmentation"]), "criterion.weight": torch.ones(5)}
    path = save({"model": state}, tmp_path / "x.pth")
    with pytest.warns(UserWarning, match="leaves out 1 of its entries, .* first criterion.weight"):
        load_into(network_for("sssegmentation"), read_checkpoint(path))


def test_a_weight_under_two_names_is_refused(tmp_path):
    state = filled(SMALL["paddleseg"])
    state["backbone.stem.0.weight"] = torch.ones(1)
    assert refusal_of(save(state, tmp_path / "x.pth")) == (
        "holds 'backbone.stem.0.weight' twice, as 'backbone.conv1_1._conv.weight' and "
        "'backbone.stem.0.weight'; expected one network of PaddleSeg"
    )


@pytest.mark.parametrize(
    ("layout", "theirs", "ours"),
    [
        ("sssegmentation", "sssegmentation", "PaddleSeg"),
        ("paddleseg", "PaddleSeg", "mmsegmentation"),
        ("official", "the authors' EMANet (XiaLiPKU/EMANet)", "mmsegmentation"),
        (None, "mmsegmentation", "PaddleSeg"),
    ],
)
def test_a_file_of_another_project_than_the_model(tmp_path, layout, theirs, ours):
    network = network_for("paddleseg")
    state = filled(SMALL[layout]) if layout else network.state_dict()
    checkpoint = read_checkpoint(save(state, tmp_path / "x.pth"))
    network.architecture = SimpleNamespace(layout=ours.lower())
    assert refused(network, checkpoint) == (
        f"{checkpoint.path}: is a checkpoint of {theirs}, but the model is one of {ours}: the same "
        f"weights give other results there; expected a model of {theirs} "
        "(--model NAME, or create_model(NAME, ...))"
    )
    if layout == "paddleseg":
        network.architecture.layout = layout
        load_into(network, checkpoint)


@pytest.mark.parametrize("layout", ["sssegmentation", "paddleseg"])
def test_another_depth_and_number_of_classes_are_named(tmp_path, layout):
    state = filled(small(listed_in_paddleseg((1, 1, 1, 1)), 7))
    if layout == "sssegmentation":
        state = filled(small(listed_in_others("sssegmentation_r50os8"), 7))
    block = {
        "sssegmentation": "backbone_net.layer3.{}.conv1",
        "paddleseg": "backbone.bb_2_{}.conv0",
    }
    name = f"{block[layout]}{'._conv' if layout == 'paddleseg' else ''}.weight"
    state[name.format(1)] = state[name.format(0)]
    message = refused(network_for(layout), read_checkpoint(save(state, tmp_path / "x.pth")))
    assert "left over in the file (1):\n  backbone.layer3.1.conv1.weight\n" in message
    assert "\nThe file's backbone has 1-1-2-1 blocks, the model's 1-1-1-1: " in message
    assert "\nThe file is for 7 classes, the model for 5; create_model takes num_cl" in message
    del state[name.format(1)]
    network = network_for(layout)
    with pytest.warns(UserWarning, match="is for 7 classes, the model for 5; not loaded are"):
        checkpoint = read_checkpoint(save(state, tmp_path / "x.pth"))
        load_into(network, checkpoint, new_classes=True)


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
    state = filled(SMALL[layout])
    state[key].view(-1)[3] = value
    assert refusal_of(save(state, tmp_path / "x.pth")) == message


@pytest.mark.parametrize(
    "bias", [torch.ones(3), torch.ones(32, dtype=torch.int64), torch.ones(32, 1)]
)
def test_a_bias_that_fits_no_norm_stays(tmp_path, bias):
    state = filled(SMALL["paddleseg"])
    state["head.bottleneck._conv.bias"] = bias
    message = refused(network_for("paddleseg"), read_checkpoint(save(state, tmp_path / "x.pth")))
    assert message.endswith("left over in the file (1):\n  decode_head.bottleneck.conv.bias")


@pytest.mark.parametrize("layout", SMALL)
def test_convert_keeps_the_project(tmp_path, layout):
    source = save(file_of_another(layout, filled(SMALL[layout])), tmp_path / "x.pth")
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
    assert read_checkpoint(path).layout == ("official" if noted == "official" else "mmsegmentation")
    path.write_bytes(write_safetensors(filled(SMALL["paddleseg"]), {"layout": noted}))
    assert read_checkpoint(path).layout == "paddleseg"
    described = {"layout": noted, "emanet_triton": json.dumps({})}
    path.write_bytes(write_safetensors(state, described))
    assert read_checkpoint(path).layout is None
    torch.save({"state_dict": state, "meta": {"layout": noted}}, path)
    assert read_checkpoint(path).layout == "mmsegmentation"


def test_files_for_mmsegmentation(tmp_path):
    paths: dict[str, Path] = {}
    for layout, listed in SMALL.items():
        paths[layout] = save(filled(listed), tmp_path / f"{layout}.pt")
    written = convert(paths["sssegmentation"], tmp_path / "x.pth")
    assert written.state_dict.keys() == network_for("sssegmentation").state_dict().keys()
    projects = {"official": r"the authors' EMANet \(XiaLiPKU/EMANet\)", "paddleseg": "PaddleSeg"}
    for layout, project in projects.items():
        message = f"{layout}.pt: is of a network of {project}, which mmsegmentation cannot build; "
        with pytest.raises(InputError, match=message):
            convert(paths[layout], tmp_path / "y.pth")
        assert not (tmp_path / "y.pth").exists()
