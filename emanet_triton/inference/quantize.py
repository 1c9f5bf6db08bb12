"""``quantize``: the 8-bit form of a model, whose ranges come from a handful of images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from emanet_triton.errors import InputError
from emanet_triton.inference.segment import segment
from emanet_triton.kernels.conv.int8 import CAPABILITIES, has_int8
from emanet_triton.kernels.device import cpu_name
from emanet_triton.models.emanet import EMANet, FusedEMANet
from emanet_triton.models.fused import fuse
from emanet_triton.models.network import FusedNetwork, Network
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.quantized import DTYPE, QuantizedEMANet, observed
from emanet_triton.models.verified import device_of

if TYPE_CHECKING:
    from emanet_triton.inference.images import Picture


def require_int8() -> None:
    """Raise InputError if this CPU has no fast products of 8-bit integers."""
    if not has_int8():
        wanted = " or ".join(name.upper().replace("_", "-") for name in CAPABILITIES)
        raise InputError(f"int8 needs a CPU with {wanted}, got {cpu_name()}")


def quantize(
    model: Network, images: "Picture | Sequence[Picture]", *, protocol: Protocol | None = None
) -> QuantizedEMANet:
    """Make a copy of a model whose convolutions multiply 8-bit integers, for a CPU.

    The fused network in bfloat16 first segments the images, and the largest output of each
    convolution is noted: the copy can represent values up to these. One value that is far larger
    than all others costs the others accuracy. So the images should be of the kind that the copy
    will segment; about eight are enough, and their labels are not needed. Weights have a scale for
    each output channel. The first convolution, the EM attention and the layers after it stay in
    bfloat16. Later changes of the model do not reach the copy.

    Args:
        model: an EMANet in evaluation mode, on a CPU; it is not changed.
        images: one or more, as ``segment`` takes them.
        protocol: how the images are resized and cut into windows; by default ``model.protocol``.

    Returns:
        A network for ``segment`` and ``Predictor``: normalised images [B, 3, H, W] → bfloat16
        logits.

    Raises:
        InputError: the CPU lacks the instructions, an image cannot be read, or the weights, the
            outputs of a convolution or the logits are not finite.
        ValueError: there is no image, or it is none; the model is fused or on a GPU; or ``fuse``
            refuses it for one of its reasons.
    """
    if isinstance(model, FusedNetwork):
        given = type(model).__name__
        raise ValueError(f"quantize takes the model itself, not its fused form, got {given}")
    fused = fuse(model, dtype=DTYPE)
    assert isinstance(model, EMANet) and isinstance(fused, FusedEMANet)
    if device_of(model).type != "cpu":
        raise ValueError(f"a quantized network runs on a CPU, got a model on {device_of(model)}")
    require_int8()
    pictures: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
    if not pictures:
        raise ValueError("quantize needs at least one image, from which it takes the ranges")
    with observed(fused) as ranges:
        segment(fused, pictures, protocol=protocol)
    del fused  # two fused networks at once would take more memory than the images
    with torch.inference_mode(False):  # so that its tensors are always ordinary ones
        return QuantizedEMANet(model, ranges).eval()
