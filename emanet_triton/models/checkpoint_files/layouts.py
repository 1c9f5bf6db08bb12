"""The names of weights in files of other projects, and the names that this package gives them.

This package has the names of mmsegmentation. A *layout* is a project's way to name the same
weights.
"""

import re
from dataclasses import dataclass

from torch import Tensor

from emanet_triton.models.checkpoint_files.refusals import UnsupportedError, shown

MMSEGMENTATION = "mmsegmentation"


@dataclass(frozen=True)
class Layout:
    """How a project names the weights of an EMANet.

    Attributes:
        project: what messages call the project.
        mark: how names of the backbone begin. No other project's names begin so.
        beginnings: beginnings of names, theirs and ours. The first that fits is replaced.
        inner: texts inside names, theirs and ours, which are replaced after the beginning, all of
            them and in this order.
    """

    project: str
    mark: str
    beginnings: tuple[tuple[str, str], ...]
    inner: tuple[tuple[str, str], ...] = ()


# Each layout but mmsegmentation's, by its name.
LAYOUTS = {
    # https://github.com/SegmentationBLWX/sssegmentation
    "sssegmentation": Layout(
        "sssegmentation",
        "backbone_net.",
        (
            ("backbone_net.", "backbone."),
            ("ema_in_conv.0.", "decode_head.ema_in_conv.conv."),
            ("ema_in_conv.1.", "decode_head.ema_in_conv.bn."),
            ("ema_mid_conv.", "decode_head.ema_mid_conv.conv."),
            ("ema_module.", "decode_head.ema_module."),
            ("ema_out_conv.0.", "decode_head.ema_out_conv.conv."),
            ("ema_out_conv.1.", "decode_head.ema_out_conv.bn."),
            ("bottleneck.0.", "decode_head.bottleneck.conv."),
            ("bottleneck.1.", "decode_head.bottleneck.bn."),
            ("decoder.0.", "decode_head.conv_cat.conv."),
            ("decoder.1.", "decode_head.conv_cat.bn."),
            ("decoder.4.", "decode_head.conv_seg."),
            ("auxiliary_decoder.0.", "auxiliary_head.convs.0.conv."),
            ("auxiliary_decoder.1.", "auxiliary_head.convs.0.bn."),
            ("auxiliary_decoder.4.", "auxiliary_head.conv_seg."),
        ),
    ),
    # https://github.com/XiaLiPKU/EMANet, the authors' own
    "official": Layout(
        "EMANet's authors (XiaLiPKU)",
        "extractor.",
        (
            ("extractor.0.", "backbone.stem."),
            ("extractor.1.", "backbone.stem.7."),
            ("extractor.4.", "backbone.layer1."),
            ("extractor.5.", "backbone.layer2."),
            ("extractor.6.", "backbone.layer3."),
            ("extractor.7.", "backbone.layer4."),
            ("fc0.", "decode_head.ema_in_conv."),
            ("emau.conv1.", "decode_head.ema_mid_conv.conv."),
            ("emau.mu", "decode_head.ema_module.bases"),
            ("emau.conv2.0.", "decode_head.ema_out_conv.conv."),
            ("emau.conv2.1.", "decode_head.ema_out_conv.bn."),
            ("fc1.0.", "decode_head.bottleneck."),
            ("fc2.", "decode_head.conv_seg."),
        ),
    ),
    # https://github.com/PaddlePaddle/PaddleSeg
    "paddleseg": Layout(
        "PaddleSeg",
        "backbone.bb_",
        (
            ("backbone.conv1_1._conv.", "backbone.stem.0."),
            ("backbone.conv1_1._batch_norm.", "backbone.stem.1."),
            ("backbone.conv1_2._conv.", "backbone.stem.3."),
            ("backbone.conv1_2._batch_norm.", "backbone.stem.4."),
            ("backbone.conv1_3._conv.", "backbone.stem.6."),
            ("backbone.conv1_3._batch_norm.", "backbone.stem.7."),
            ("backbone.bb_0_", "backbone.layer1."),
            ("backbone.bb_1_", "backbone.layer2."),
            ("backbone.bb_2_", "backbone.layer3."),
            ("backbone.bb_3_", "backbone.layer4."),
            ("head.ema_in_conv.", "decode_head.ema_in_conv."),
            ("head.ema_mid_conv.", "decode_head.ema_mid_conv.conv."),
            ("head.emau.mu", "decode_head.ema_module.bases"),
            ("head.ema_out_conv.", "decode_head.ema_out_conv."),
            ("head.bottleneck.", "decode_head.bottleneck."),
            ("head.conv_cat.", "decode_head.conv_cat."),
            ("head.cls.1.", "decode_head.conv_seg."),
            ("head.aux.0.", "auxiliary_head.convs.0."),
            ("head.aux.2.", "auxiliary_head.conv_seg."),
        ),
        (
            # in the blocks of the backbone
            (".conv0._conv.", ".conv1."),
            (".conv0._batch_norm.", ".bn1."),
            (".conv1._conv.", ".conv2."),
            (".conv1._batch_norm.", ".bn2."),
            (".conv2._conv.", ".conv3."),
            (".conv2._batch_norm.", ".bn3."),
            (".short._conv.", ".downsample.0."),
            (".short._batch_norm.", ".downsample.1."),
            # in the heads
            ("._conv.", ".conv."),
            ("._batch_norm.", ".bn."),
            # everywhere
            ("._mean", ".running_mean"),
            ("._variance", ".running_var"),
        ),
    ),
}
BACKBONES = ("backbone_net", "extractor")  # where they have another name than ours
PADDLE_NAMES = "StructuredToParameterName@@"  # Paddle's own names of the weights, a dict of texts
_OURS = re.compile(
    r"decode_head\.ema_module\.bases|(?:"
    r"backbone\.(?:stem\.\d+|layer[1-4]\.\d+\.(?:conv[1-3]|bn[1-3]|downsample\.[01]))"
    r"|decode_head\.(?:(?:ema_in_conv|ema_mid_conv|ema_out_conv|bottleneck|conv_cat)\.(?:conv|bn)"
    r"|conv_seg)"
    r"|auxiliary_head\.(?:convs\.0\.(?:conv|bn)|conv_seg)"
    r")\.(?:weight|bias|running_mean|running_var|num_batches_tracked)"
)


def project_of(layout: str) -> str:
    """What messages call the project of a layout."""
    return LAYOUTS[layout].project if layout in LAYOUTS else layout


def parts_of(layout: str | None) -> frozenset[str]:
    """The first words of the names of weights in a layout; none for mmsegmentation's."""
    if layout not in LAYOUTS:
        return frozenset()
    return frozenset(theirs.partition(".")[0] for theirs, _ in LAYOUTS[layout].beginnings)


def has_auxiliary_head(layout: str | None) -> bool:
    """Whether the networks of a project have an auxiliary head."""
    if layout not in LAYOUTS:
        return True
    return any(ours.startswith("auxiliary_head.") for _, ours in LAYOUTS[layout].beginnings)


def translated(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Give the weights of another project this package's names.

    A name of no weight of an EMANet stays as it is, so that ``load_into`` lists it. PaddleSeg's
    convolutions have a bias before their batch norm; it becomes a part of the running mean, which
    gives the same outputs.

    Args:
        weights: the state dict of a file; the order stays.

    Returns:
        The state dict with our names, and the name of its layout: ``"mmsegmentation"`` if it is
        none of the others.

    Raises:
        UnsupportedError: two weights would have the same name.
    """
    name = _layout_of(weights)
    if name == MMSEGMENTATION:
        return weights, name
    ours: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for key, value in weights.items():
        own = _translated_name(key, LAYOUTS[name])
        if sources.setdefault(own, key) != key:
            raise UnsupportedError(
                f"holds '{shown(own)}' twice, as '{shown(sources[own])}' and '{shown(key)}'; "
                f"expected one network of {project_of(name)}"
            )
        ours[own] = value
    return _without_biases_before_norms(ours), name


def _layout_of(weights: dict[str, Tensor]) -> str:
    """The layout of a state dict. A network of ours may stand beside an ``extractor`` of a loss."""
    if not any(key.startswith("decode_head.") for key in weights):
        for name, layout in LAYOUTS.items():
            if any(key.startswith(layout.mark) for key in weights):
                return name
    return MMSEGMENTATION


def _translated_name(key: str, layout: Layout) -> str:
    """Our name of a weight, or the same name if an EMANet of ours has no such weight."""
    for theirs, ours in layout.beginnings:
        if key.startswith(theirs):
            name = ours + key.removeprefix(theirs)
            for text, replacement in layout.inner:
                name = name.replace(text, replacement)
            return name if _OURS.fullmatch(name) else key
    return key


def _without_biases_before_norms(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Subtract each bias of a convolution from the running mean of the norm that follows."""
    result = dict(weights)
    for key, bias in weights.items():
        norm = key.removesuffix(".conv.bias") + ".bn.running_mean"
        mean = weights.get(norm)
        if not key.endswith(".conv.bias") or mean is None or mean.shape != bias.shape:
            continue
        if mean.is_floating_point() and bias.is_floating_point():
            result[norm] = (mean.double() - bias.double()).to(mean.dtype)
            del result[key]
    return result
