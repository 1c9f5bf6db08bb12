"""A softmax without subnormal numbers, which take many processors ten times as long."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def normal_softmax(logits: Tensor, dim: int, out: Tensor) -> None:
    """Write softmax(logits) to ``out``; a result that could be subnormal becomes exactly 0.

    Let n be the length of ``dim`` and ``tiny`` the smallest normal number, 1.2e-38 for float32.
    Results below 2 n ``tiny`` become 0 where their logit lies more than -log(2 n ``tiny``) below
    the largest, for n = 64 more than 82. All other results are those of ``torch.softmax``.

    Args:
        logits: float32 or float64.
        dim: over which the results add up to 1.
        out: in the shape and dtype of ``logits``, or ``logits`` itself.
    """
    least = math.log(2 * logits.shape[dim] * torch.finfo(logits.dtype).tiny)
    low, high = torch.aminmax(logits)
    if not low - high > least:  # logits spread, or one is NaN; else no result is so small
        logits = torch.sub(logits, logits.amax(dim, keepdim=True), out=out)
        F.threshold(out, least, -math.inf, inplace=True)
    torch.softmax(logits, dim, out=out)
