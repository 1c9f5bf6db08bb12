"""Labels of one image from a model, with all arguments checked."""

import numpy as np
import torch
from torch import Tensor, nn

from emanet_triton.errors import InputError
from emanet_triton.inference.arguments import (
    check_dtype,
    checked_image,
    checked_protocol,
    unwrapped,
)
from emanet_triton.inference.predictor import NOT_FINITE, Predictor
from emanet_triton.models.fused import FusedEMANet
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.verified import verified_fuse


def segment(
    model: nn.Module,
    image: np.ndarray | Tensor,
    *,
    protocol: Protocol | None = None,
    ms_flip: bool = False,
    return_probabilities: bool = False,
    fuse: bool = False,
) -> np.ndarray | Tensor | tuple[np.ndarray, np.ndarray] | tuple[Tensor, Tensor]:
    """Segment one image (mmseg ``EncoderDecoder.simple_test`` and ``aug_test``).

    Runs the network that it is given, on its device and in its dtype, in the caller's autocast
    and TF32 settings.

    Args:
        model: an EMANet, or what ``fuse`` made of one, in evaluation mode. DataParallel,
            DistributedDataParallel and AveragedModel around it are left out; what
            ``torch.compile`` made of it runs as it is.
        image: uint8 RGB [H, W, 3], array or tensor.
        protocol: how to resize, place windows and scale; ``model.protocol`` by default.
        ms_flip: average the probabilities of ``protocol.ratios``, each plain and mirrored.
        return_probabilities: also return the class probabilities; the labels are then their
            maxima, and may differ where the two best classes are equal but for rounding.
        fuse: fuse an EMANet for this call alone, in the dtype of autocast. For many images call
            ``fuse`` once and pass what it returns.

    Returns:
        uint8 labels (class indices) [H, W]; with ``return_probabilities`` a pair of those and
        float32 probabilities [num_classes, H, W]. Arrays for an array, tensors on the image's
        device for a tensor.

    Raises:
        InputError: memory does not suffice, or the network's logits are not finite.
        ValueError: an image of another shape or dtype, a model in training mode or that cannot
            run, no protocol or no right one, or with ``fuse`` a model that ``fuse`` refuses.
    """
    array = checked_image(image)
    network, inner = unwrapped(model)
    if fuse and not isinstance(inner, FusedEMANet):
        network = verified_fuse(inner, _autocast_dtype(inner))
    check_dtype(network)
    predictor = Predictor(network, checked_protocol(protocol, inner), ms_flip=ms_flip)
    labels, *probabilities = predictor.results([array], probabilities=return_probabilities)
    if (labels[0] == NOT_FINITE).all():
        raise InputError("the logits of the network are not finite for this image")
    results = (labels[0], *(p[0] for p in probabilities))
    if isinstance(image, Tensor):
        results = tuple(result.to(image.device) for result in results)
    else:
        results = tuple(result.cpu().numpy() for result in results)
    return results if return_probabilities else results[0]


def _autocast_dtype(model: nn.Module) -> torch.dtype:
    device = next(model.parameters()).device.type
    enabled = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else torch.float32
