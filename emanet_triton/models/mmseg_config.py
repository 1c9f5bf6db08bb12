"""The EMANet that a configuration of mmsegmentation describes."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from emanet_triton.errors import InputError
from emanet_triton.kernels.em.tiles import MAX_BASES, MAX_CHANNELS
from emanet_triton.kernels.resample.eager import IGNORE
from emanet_triton.models.emanet import Architecture
from emanet_triton.models.resnet import Bottleneck

DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
NORMS = ("BN", "BN2d", "SyncBN", "MMSyncBN")
POSITIVE = range(1, 2**31)

# Fields with one possible value: mmsegmentation's default, then the value of an EMANet.
BACKBONE = {
    "in_channels": (3, 3),
    "num_stages": (4, 4),
    "strides": ((1, 2, 2, 2), Architecture.strides),
    "dilations": ((1, 1, 1, 1), Architecture.dilations),
    "contract_dilation": (False, True),
    "out_indices": ((0, 1, 2, 3), (0, 1, 2, 3)),
    "style": ("pytorch", "pytorch"),
    "conv_cfg": (None, None),
    "dcn": (None, None),
    "plugins": (None, None),
    "multi_grid": (None, None),
}
HEAD = {"concat_input": (True, True), "input_transform": (None, None), "conv_cfg": (None, None)}

Field = tuple[str, Any, Collection[Any]]  # name, value, possible values


def described_network(
    backbone: Mapping[str, Any], decode_head: Mapping[str, Any], neck: object = None
) -> tuple[Architecture, int]:
    """The sizes and the number of classes of the EMANet in a configuration.

    Args:
        backbone, decode_head, neck: fields of ``model`` in a configuration of mmsegmentation 0.x
            or 1.x, whose defaults hold for missing fields.

    Raises:
        InputError: the configuration describes another network. The message names the field.
    """
    for name, value, possible in _fields(backbone, decode_head, neck):
        if value not in possible:
            raise InputError(
                f"model.{name} is {value!r}, but FusedEMANet needs {_alternatives(possible)}"
            )
    architecture = Architecture(
        DEPTHS[backbone["depth"]],
        backbone.get("base_channels", 64),
        decode_head["ema_channels"],
        decode_head["num_bases"],
        decode_head["num_stages"],
        decode_head["channels"],
    )
    return architecture, decode_head["num_classes"]


def _fields(backbone: Mapping[str, Any], head: Mapping[str, Any], neck: object) -> Iterator[Field]:
    """Yield every field that decides what the network computes."""
    yield "neck", neck, (None,)
    yield "backbone.type", _type(backbone), ("ResNetV1c",)
    yield "backbone.depth", backbone.get("depth"), tuple(DEPTHS)
    yield from _fixed("backbone", backbone, BACKBONE)
    width = backbone.get("base_channels", 64)
    yield "backbone.stem_channels", backbone.get("stem_channels", 64), (width,)
    yield "backbone.norm_cfg.type", _type(backbone.get("norm_cfg", {"type": "BN"})), NORMS

    yield "decode_head.type", _type(head), ("EMAHead",)
    yield from _fixed("decode_head", head, HEAD)
    yield "decode_head.norm_cfg.type", _type(head.get("norm_cfg")), NORMS
    yield "decode_head.act_cfg.type", _type(head.get("act_cfg", {"type": "ReLU"})), ("ReLU",)
    yield "decode_head.in_index", head.get("in_index", -1), (3, -1)
    yield "decode_head.in_channels", head.get("in_channels"), (8 * Bottleneck.expansion * width,)
    yield "decode_head.channels", head.get("channels"), POSITIVE
    yield "decode_head.ema_channels", head.get("ema_channels"), POSITIVE[:MAX_CHANNELS]
    yield "decode_head.num_bases", head.get("num_bases"), POSITIVE[:MAX_BASES]
    yield "decode_head.num_stages", head.get("num_stages"), POSITIVE
    classes = head.get("num_classes")
    yield "decode_head.num_classes", classes, range(2, IGNORE)
    yield "decode_head.out_channels", head.get("out_channels"), (None, classes)


def _fixed(part: str, config: Mapping[str, Any], table: Mapping[str, Any]) -> Iterator[Field]:
    for name, (default, wanted) in table.items():
        yield f"{part}.{name}", _frozen(config.get(name, default)), (wanted,)


def _frozen(value: Any) -> Any:
    """A sequence as a tuple, since configurations write both lists and tuples."""
    return tuple(value) if isinstance(value, list) else value


def _type(config: object) -> str | None:
    """The name in a field ``type``, which may be a class or have a scope such as "mmseg."."""
    kind = config.get("type") if isinstance(config, Mapping) else None
    return kind.rpartition(".")[2] if isinstance(kind, str) else getattr(kind, "__name__", None)


def _alternatives(values: Collection[Any]) -> str:
    if values is POSITIVE:
        return "a positive integer"
    if isinstance(values, range):
        return f"{values[0]} to {values[-1]}"
    return " or ".join(map(repr, values))
