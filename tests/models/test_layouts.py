"""Names of other projects: sssegmentation, the authors' EMANet and PaddleSeg."""

from dataclasses import replace

import pytest
import torch
from checkpoint_files import SMALL_OTHERS, filled, listed_in_others, with_blocks, with_classes
from golden_data import listed_keys
from other_golden import ARCHITECTURES, R50
from torch import Tensor, nn

from emanet_triton.models.alteration import on_meta
from emanet_triton.models.checkpoint_files.layouts import translated
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.protocol import Protocol

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


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[list[int], str]]:
    return {key: (list(value.shape), str(value.dtype)) for key, value in state.items()}


@pytest.mark.parametrize("classes", [19, 21, 150])
@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        *((name, architecture.blocks) for name, architecture in ARCHITECTURES.items()),
        ("official_r101", R50),  # without the last blocks of its list
        ("sssegmentation_r101os8", R50),
    ],
)
def test_the_names_are_those_of_the_network(name, blocks, classes):
    """Every weight of a listed file has its place, and every place its weight, of equal shape."""
    architecture = ARCHITECTURES[name]
    listed = with_classes(with_blocks(listed_in_others(name), blocks), classes)
    state = {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for key, shape, dtype in listed
    }
    found, layout = translated(state)
    assert layout == architecture.layout
    network = on_meta(EMANet, replace(architecture, blocks=blocks), Protocol(None), classes)
    want = shapes(network.state_dict())
    if layout == "official":  # it has no auxiliary head
        want = {key: value for key, value in want.items() if not key.startswith("auxiliary")}
    if layout == "paddleseg":  # its norms have no counters
        want = {key: value for key, value in want.items() if not key.endswith("batches_tracked")}
    assert shapes(found) == want


@pytest.mark.parametrize("layout", SMALL_OTHERS)
def test_each_rule(layout):
    state = filled(SMALL_OTHERS[layout])
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
    state = filled(SMALL_OTHERS["paddleseg"])
    mean, bias = (state[f"head.bottleneck.{name}"] for name in ("_batch_norm._mean", "_conv.bias"))
    found, _ = translated(state)
    want = (mean.numpy().astype("f8") - bias.numpy()).astype("f4")
    assert (found["decode_head.bottleneck.bn.running_mean"].numpy() == want).all()
