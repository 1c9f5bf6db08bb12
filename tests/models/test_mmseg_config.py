"""Which configurations of mmsegmentation describe an EMANet."""

import copy

import pytest

from emanet_triton.errors import InputError
from emanet_triton.models.mmseg_config import described_network
from emanet_triton.models.zoo import ZOO

# As in mmsegmentation's configs/_base_/models/emanet_r50-d8.py, except for what has no effect.
NORM = {"type": "SyncBN", "requires_grad": True}
BACKBONE = {
    "type": "ResNetV1c",
    "depth": 50,
    "num_stages": 4,
    "out_indices": (0, 1, 2, 3),
    "dilations": (1, 1, 2, 4),
    "strides": [1, 2, 1, 1],
    "norm_cfg": NORM,
    "style": "pytorch",
    "contract_dilation": True,
}
HEAD = {
    "type": "EMAHead",
    "in_channels": 2048,
    "in_index": 3,
    "channels": 256,
    "ema_channels": 512,
    "num_bases": 64,
    "num_stages": 3,
    "momentum": 0.1,
    "num_classes": 19,
    "norm_cfg": NORM,
}


class EMAHead:
    """A class in place of its name, as newer configurations have it."""


@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize("head", ["EMAHead", "mmseg.EMAHead", EMAHead], ids=str)
def test_the_published_ones(depth, head):
    found = described_network(BACKBONE | {"depth": depth}, HEAD | {"type": head})
    assert found == (ZOO[f"emanet_r{depth}-d8_512x1024_80k_cityscapes"].architecture, 19)


def test_other_sizes():
    backbone = BACKBONE | {"base_channels": 8, "stem_channels": 8}
    head = HEAD | {"in_channels": 256, "channels": 16, "num_bases": 4, "num_stages": 2}
    architecture, classes = described_network(backbone, head | {"num_classes": 150})
    assert (architecture.base_channels, architecture.head_channels, classes) == (8, 16, 150)
    assert (architecture.num_bases, architecture.num_stages) == (4, 2)


@pytest.mark.parametrize(
    ("part", "field", "value", "needed"),
    [
        ("backbone", "type", "ResNet", "'ResNetV1c'"),
        ("backbone", "depth", 34, "50 or 101 or 152"),
        ("backbone", "in_channels", 4, "3"),
        ("backbone", "stem_channels", 32, "64"),
        ("backbone", "strides", None, "(1, 2, 1, 1)"),
        ("backbone", "dilations", [1, 1, 1, 2], "(1, 1, 2, 4)"),
        ("backbone", "out_indices", (1, 2, 3), "(0, 1, 2, 3)"),
        ("backbone", "dcn", {"type": "DCN"}, "None"),
        ("backbone", "norm_cfg.type", "GN", "'BN' or 'BN2d' or 'SyncBN' or 'MMSyncBN'"),
        ("decode_head", "type", "PSPHead", "'EMAHead'"),
        ("decode_head", "in_channels", 1024, "2048"),
        ("decode_head", "input_transform", "multiple_select", "None"),
        ("decode_head", "act_cfg.type", "GELU", "'ReLU'"),
        ("decode_head", "norm_cfg.type", None, "'BN' or 'BN2d' or 'SyncBN' or 'MMSyncBN'"),
        ("decode_head", "ema_channels", 4096, "1 to 2048"),
        ("decode_head", "num_stages", 0, "a positive integer"),
        ("decode_head", "out_channels", 1, "None or 19"),
    ],
)
def test_a_refusal_names_the_field(part, field, value, needed):
    config = copy.deepcopy({"backbone": BACKBONE, "decode_head": HEAD})
    name, _, inner = field.partition(".")
    config[part][name] = {inner: value} if inner else value
    with pytest.raises(InputError) as refused:
        described_network(**config)
    given = tuple(value) if isinstance(value, list) else value
    wanted = f"model.{part}.{field} is {given!r}, but FusedEMANet needs {needed}"
    assert str(refused.value) == wanted


@pytest.mark.parametrize(("part", "field"), [("backbone", "strides"), ("decode_head", "norm_cfg")])
def test_missing_fields_have_the_defaults_of_mmsegmentation(part, field):
    config = copy.deepcopy({"backbone": BACKBONE, "decode_head": HEAD})
    del config[part][field]
    with pytest.raises(InputError, match=rf"model\.{part}\.{field}"):
        described_network(**config)


def test_a_neck():
    with pytest.raises(InputError, match=r"model\.neck is 'FPN', but FusedEMANet needs None"):
        described_network(BACKBONE, HEAD, "FPN")
