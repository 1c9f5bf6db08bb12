"""What ``FusedEMANet`` refuses, with the message that mmsegmentation shows."""

import pytest
import torch
import versions_of_mmseg as mm
from versions_of_mmseg import build, config_of, metas_of

import emanet_triton.mmseg  # noqa: F401  # registers the classes
from emanet_triton.errors import InputError


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("backbone.type", "ResNetV1d", "backbone.type is 'ResNetV1d', .* needs 'ResNetV1c'"),
        ("backbone.depth", 18, "backbone.depth is 18, .* needs 50 or 101 or 152"),
        ("backbone.strides", (1, 2, 2, 1), r"backbone.strides is \(1, 2, 2, 1\)"),
        ("backbone.contract_dilation", False, "backbone.contract_dilation is False"),
        ("backbone.style", "caffe", "backbone.style is 'caffe', .* needs 'pytorch'"),
        ("backbone.norm_cfg", {"type": "GN", "num_groups": 4}, "norm_cfg.type is 'GN'"),
        ("decode_head.concat_input", False, "decode_head.concat_input is False"),
        ("decode_head.in_index", 2, "decode_head.in_index is 2, .* needs 3 or -1"),
        ("decode_head.num_bases", 512, "num_bases is 512, .* needs 1 to 256"),
        ("decode_head.num_classes", 300, "num_classes is 300, .* needs 2 to 254"),
        ("neck", {"type": "FPN"}, r"neck is \{'type': 'FPN'\}, .* needs None"),
        ("precision", "int8", "model.precision is 'int8', expected one of: bf16, fp16, fp32"),
    ],
)
def test_another_network_is_refused_by_the_name_of_the_field(option, value, message):
    config = config_of(type="FusedEMANet")
    config.merge_from_dict({f"model.{option}": value})
    with pytest.raises(InputError, match=message):
        build(config)


def labels_with(test_cfg):
    model = build(config_of(type="FusedEMANet", test_cfg=test_cfg))
    if mm.VERSION_1:
        model.labels_only = True
    return mm.tested(model, [torch.zeros(1, 3, 64, 64)], [metas_of(1, (64, 64), (64, 64))])


@pytest.mark.parametrize(
    ("test_cfg", "message"),
    [
        ({"mode": "tiles"}, "model.test_cfg: mode must be 'whole' or 'slide', got 'tiles'"),
        ({"mode": "slide", "stride": (8, 8)}, "model.test_cfg has no crop_size"),
        ({"mode": "slide", "stride": (9, 8), "crop_size": (8, 8)}, "leaves gaps between windows"),
    ],
)
def test_windows_that_cannot_be(test_cfg, message):
    with pytest.raises(InputError, match=message):
        labels_with(test_cfg)


def test_a_network_with_other_weights():
    model = build(config_of(type="FusedEMANet"))
    model.backbone.layer1[0].bn1 = torch.nn.Identity()
    with pytest.raises(InputError, match=r"backbone.layer1.0.bn1.bias is missing"):
        mm.encoded(model, torch.zeros(1, 3, 64, 64))
    model = build(config_of(type="FusedEMANet"))
    model.decode_head.extra = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match=r"decode_head.extra.bias is an additional one"):
        mm.encoded(model, torch.zeros(1, 3, 64, 64))
