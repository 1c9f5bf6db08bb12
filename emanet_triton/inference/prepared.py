"""Labels of images that another package has resized and normalised.

``predictor`` does the same from the image on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from emanet_triton.errors import InputError
from emanet_triton.inference.inputs import cut_windows
from emanet_triton.inference.predictor import NOT_FINITE_MESSAGE
from emanet_triton.inference.taps import view_tables
from emanet_triton.inference.views import Size, View
from emanet_triton.kernels.resample.op import resample_labels
from emanet_triton.models.network import input_form
from emanet_triton.models.protocol import Protocol

WINDOWS_AT_ONCE = 8  # on a GPU; several at once are no faster on a CPU


class Prepared(NamedTuple):
    """One image of a batch.

    Attributes:
        views: how each network input shows the image.
        size: (height, width) of its labels in pixels.
    """

    views: tuple[View, ...]
    size: Size


@torch.no_grad()
def prepared_labels(
    network: nn.Module, inputs: Sequence[Tensor], images: Sequence[Prepared], protocol: Protocol
) -> list[Tensor]:
    """Label each image with the classes of the highest mean probability over its views.

    Args:
        network: float [B, 3, h, w] → logits [B, classes, ceil(h / stride), ceil(w / stride)].
        inputs: for each view a batch [B, 3, h, w], normalised for the network.
        images: the B images of the batch.
        protocol: how an input is cut into windows, and the convention of the resizes. Its scales
            are not used.

    Returns:
        uint8 [H, W] for each image, on the device of the inputs.

    Raises:
        InputError: the network's logits are not finite.
    """
    logits = torch.cat([_low_logits(network, view, protocol) for view in inputs], dim=2)
    if not logits.isfinite().all():
        raise InputError(NOT_FINITE_MESSAGE)
    stride = input_form(network).stride
    labels = []
    for part, image in zip(logits.split(1), images, strict=True):
        tables = view_tables(protocol, image.views, image.size, logits.device, stride)
        labels.append(resample_labels(part, *tables)[0])
    return labels


def _low_logits(network: nn.Module, inputs: Tensor, protocol: Protocol) -> Tensor:
    """[B, C, P]: the logits of all windows of each image, laid out as ``view_tables`` says."""
    at_once = 1 if inputs.device.type == "cpu" else WINDOWS_AT_ONCE
    parts = [network(windows) for windows in cut_windows(inputs, protocol, at_once)]
    windows = torch.cat(parts).unflatten(0, (-1, len(inputs)))
    return windows.permute(1, 2, 0, 3, 4).flatten(2)
