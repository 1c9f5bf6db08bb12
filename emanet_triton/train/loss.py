"""The training loss of EMANet (mmseg ``CrossEntropyLoss`` of both heads)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.data.dataset import IGNORE


class Losses(NamedTuple):
    """The losses of a batch, scalars on its device.

    Attributes:
        total: main + weight * auxiliary; only it has a gradient.
        main: of the decode head.
        auxiliary: of the auxiliary head.
    """

    total: Tensor
    main: Tensor
    auxiliary: Tensor


def losses(
    logits: Tensor,
    auxiliary_logits: Tensor,
    labels: Tensor,
    *,
    align_corners: bool,
    auxiliary_weight: float,
    class_weights: Tensor | None = None,
) -> Losses:
    """The losses of both heads.

    Args:
        logits, auxiliary_logits: of the two heads, [B, C, h, w].
        labels: train ids, int64 [B, H, W].
        align_corners: of the resize of the logits to the labels' size.
        auxiliary_weight: of the auxiliary head's loss.
        class_weights: float [C], or ``None`` for equal weights.
    """
    main, auxiliary = (
        pixel_loss(each, labels, align_corners, class_weights)
        for each in (logits, auxiliary_logits)
    )
    return Losses(main + auxiliary_weight * auxiliary, main.detach(), auxiliary.detach())


def pixel_loss(
    logits: Tensor, labels: Tensor, align_corners: bool, class_weights: Tensor | None = None
) -> Tensor:
    """The cross entropy at the labels' size, averaged over all pixels as mmsegmentation does.

    A pixel of ``IGNORE`` adds nothing to the sum, but the mean counts it.
    """
    resized = F.interpolate(
        logits.float(), labels.shape[1:], mode="bilinear", align_corners=align_corners
    )
    total = F.cross_entropy(resized, labels, class_weights, ignore_index=IGNORE, reduction="sum")
    return total / labels.numel()


@torch.no_grad()
def accuracy(logits: Tensor, labels: Tensor, align_corners: bool) -> Tensor:
    """The percentage of pixels that are not ignored whose highest logit is the label's.

    Returns:
        A scalar; NaN if all pixels are ignored.
    """
    resized = F.interpolate(
        logits.float(), labels.shape[1:], mode="bilinear", align_corners=align_corners
    )
    counted = labels != IGNORE
    return 100 * ((resized.argmax(1) == labels) & counted).sum() / counted.sum()
