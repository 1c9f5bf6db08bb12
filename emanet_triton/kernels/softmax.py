"""A softmax without subnormal numbers, on which many processors are ten times slower."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def softmax_without_subnormals(logits: Tensor, dim: int, out: Tensor, divisor: int = 1) -> None:
    """Write softmax(logits) to ``out``; on a CPU exactly 0 in place of what could be subnormal.

    Let n be the length of ``dim`` and ``tiny`` the smallest normal number, 1.2e-38 for float32.
    A result becomes 0 if its logit lies more than -log(2 n ``divisor`` ``tiny``) below the largest,
    for n = 64 more than 82; such a result is below 2 n ``divisor`` ``tiny``. All other results are
    those of ``torch.softmax``, and at least 2 ``divisor`` ``tiny``.

    Args:
        logits: float32 or float64.
        dim: over which the results add up to 1.
        out: in the shape and dtype of ``logits``, or ``logits`` itself.
        divisor: by which the caller will divide sums of the results.
    """
    if logits.device.type == "cpu":  # a GPU is as fast with subnormal numbers, and need not wait
        least = math.log(2 * logits.shape[dim] * divisor * torch.finfo(logits.dtype).tiny)
        low, high = torch.aminmax(logits)
        if not low - high > least:  # also if a logit is NaN; else no result can be subnormal
            logits = torch.sub(logits, logits.amax(dim, keepdim=True), out=out)
            F.threshold(out, least, -math.inf, inplace=True)
    torch.softmax(logits, dim, out=out)
