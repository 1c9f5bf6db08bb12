"""``segment``: labels of one image from a model, with all arguments checked."""

import os
from typing import Literal, TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from emanet_triton.errors import InputError, is_of_reloaded
from emanet_triton.inference.predictor import NOT_FINITE, Predictor
from emanet_triton.kernels.device import DTYPE_NAMES
from emanet_triton.models.network import FusedNetwork
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.verified import verified_fuse

_Image = TypeVar("_Image", np.ndarray, Tensor)

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
_SHARDED = {"FSDPModule", "FullyShardedDataParallel"}
_WANTED = "an EMANet or a fused network"


@overload
def segment(
    model: nn.Module,
    image: _Image,
    *,
    protocol: Protocol | None = None,
    ms_flip: bool = False,
    return_probabilities: Literal[False] = False,
    fuse: bool = False,
) -> _Image: ...


@overload
def segment(
    model: nn.Module,
    image: _Image,
    *,
    protocol: Protocol | None = None,
    ms_flip: bool = False,
    return_probabilities: Literal[True],
    fuse: bool = False,
) -> tuple[_Image, _Image]: ...


@overload
def segment(
    model: nn.Module,
    image: _Image,
    *,
    protocol: Protocol | None = None,
    ms_flip: bool = False,
    return_probabilities: bool,
    fuse: bool = False,
) -> _Image | tuple[_Image, _Image]: ...


def segment(
    model: nn.Module,
    image: _Image,
    *,
    protocol: Protocol | None = None,
    ms_flip: bool = False,
    return_probabilities: bool = False,
    fuse: bool = False,
) -> _Image | tuple[_Image, _Image]:
    """Segment one image (mmseg ``EncoderDecoder.simple_test`` and ``aug_test``).

    The model runs as it is, on its device and in its dtype. The caller's autocast and TF32
    settings apply.

    Args:
        model: an EMANet or a fused network, in evaluation mode. If it is wrapped in DataParallel,
            DistributedDataParallel or AveragedModel, the model inside runs. A compiled model runs
            compiled.
        image: uint8 RGB [H, W, 3], array or tensor.
        protocol: how the image is resized, cut into windows and scaled; by default
            ``model.protocol``.
        ms_flip: average the probabilities of all ``protocol.ratios``, each plain and mirrored.
        return_probabilities: also return the probabilities of all classes. The labels are then
            the classes of the highest probability. Where two classes are equal but for rounding,
            the labels may differ from the labels without this option.
        fuse: fuse the model for this call alone, in the dtype of autocast. For many images call
            ``emanet_triton.fuse`` once and pass the fused network instead. A network that has no
            fused form runs as it is.

    Returns:
        Labels (class indices), uint8 [H, W]. With ``return_probabilities`` a pair: the labels,
        and probabilities, float32 [num_classes, H, W]. They are arrays if the image is an array,
        and tensors on the image's device if the image is a tensor.

    Raises:
        InputError: there is too little memory, or the network's logits are not finite.
        ValueError: the image has another shape or dtype; the model is in training mode or cannot
            run; there is no valid protocol; or, with ``fuse``, the model cannot be fused.
    """
    array = _checked_image(image)
    network, inner = _unwrapped(model)
    if fuse and not isinstance(inner, FusedNetwork):
        network = verified_fuse(inner, _autocast_dtype(inner))
    _check_dtype(network)
    predictor = Predictor(network, _checked_protocol(protocol, inner), ms_flip=ms_flip)
    results = predictor.results([array], probabilities=return_probabilities)
    labels = results[0][0]
    if (labels == NOT_FINITE).all():
        raise InputError("the logits of the network are not finite for this image")
    if not return_probabilities:
        return _like(image, labels)
    return _like(image, labels), _like(image, results[1][0])


def _like(image: _Image, result: Tensor) -> _Image:
    """The result as an array, or as a tensor on the image's device."""
    return result.to(image.device) if isinstance(image, Tensor) else result.cpu().numpy()


def _autocast_dtype(model: nn.Module) -> torch.dtype:
    device = next(model.parameters()).device.type
    enabled = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else torch.float32


def _checked_image(image: np.ndarray | Tensor) -> np.ndarray:
    """The image as an array, uint8 RGB [H, W, 3]; anything else raises ValueError."""
    if isinstance(image, np.ndarray | Tensor) and not _lacks_pixels(image):
        is_uint8 = image.dtype == (torch.uint8 if isinstance(image, Tensor) else np.uint8)
        if is_uint8 and tuple(image.shape[2:]) == (3,) and 0 not in image.shape:
            return image.cpu().numpy() if isinstance(image, Tensor) else image
    raise ValueError(
        f"image must be uint8 RGB [H, W, 3], an array or a tensor, got {_described(image)}"
    )


def _lacks_pixels(image: np.ndarray | Tensor) -> bool:
    """Whether a tensor has no pixels in memory, or not one after the other."""
    return isinstance(image, Tensor) and (image.is_meta or image.layout != torch.strided)


def _described(image: object) -> str:
    if isinstance(image, np.ndarray | Tensor):
        shape = f"{image.dtype} {list(image.shape)}"
        if isinstance(image, Tensor) and image.is_meta:
            return f"{shape} on the meta device"
        if _lacks_pixels(image):
            return f"{shape} that is not dense: tensor.to_dense() makes it so"
        if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
            return f"{shape}, whose first axis has the channels"
        return shape
    if image is None:
        return "None, as cv2.imread returns it for a file that it cannot read"
    if isinstance(image, str | os.PathLike):
        return f"the path {os.fspath(image)!r} in place of the pixels of that file"
    kind = type(image)
    if kind.__module__.startswith("PIL."):
        return "a PIL image: numpy.asarray(image.convert('RGB')) makes an array of it"
    return f"a {kind.__name__}"


def _unwrapped(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Take the wrappers off a model.

    Returns ``(network, inner)``. ``inner`` is the model without any wrapper. ``network`` is the
    module to run: ``inner``, or ``inner`` compiled. Wrappers that would communicate with other
    processes or devices are taken off, and so is a compilation around such a wrapper.

    Raises:
        ValueError: the model is no module, is sharded, in training mode, or not on one device.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be {_WANTED}, got a {type(model).__name__}")
    network = inner = model
    while True:
        if _SHARDED & {kind.__name__ for kind in type(inner).__mro__}:
            raise ValueError(
                "a model under FSDP has only a part of its weights; pass an EMANet with the full "
                "state dict"
            )
        if isinstance(inner, _WRAPPERS):
            network = inner = inner.get_submodule("module")
        elif "_orig_mod" in inner._modules:  # made by torch.compile
            inner = inner.get_submodule("_orig_mod")
        else:
            break
    if inner.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    _check_tensors(inner)
    return network, inner


def _check_tensors(model: nn.Module) -> None:
    parameters = list(model.parameters())
    if not parameters:
        raise ValueError(
            f"model must be {_WANTED}, got a {type(model).__name__} without parameters"
        )
    devices = sorted({str(t.device) for t in (*parameters, *model.buffers())})
    if len(devices) > 1:
        raise ValueError(f"the model must be on one device, got {' and '.join(devices)}")
    if devices == ["meta"]:
        raise ValueError("the model is on the meta device, where it has no weights")


def _check_dtype(network: nn.Module) -> None:
    """Raise ValueError if the operators do not run in the network's dtype, such as float64."""
    dtype = next(network.parameters()).dtype
    if dtype not in DTYPE_NAMES:
        raise ValueError(
            f"the network must be in float32, float16 or bfloat16, got {dtype}; pass "
            "model.float() or fuse(model)"
        )


def _checked_protocol(protocol: Protocol | None, model: nn.Module) -> Protocol:
    """The given protocol, or else the model's own.

    Raises:
        ValueError: there is no protocol, or its class was reloaded since.
    """
    if protocol is not None and not isinstance(protocol, Protocol):
        raise ValueError(f"protocol must be a Protocol of this package, got {protocol!r}")
    protocol = protocol or getattr(model, "protocol", None)
    if is_of_reloaded(protocol, Protocol):
        raise ValueError("the model is of a package that was reloaded since; make the model anew")
    if not isinstance(protocol, Protocol):
        raise ValueError(
            f"a model of type {type(model).__name__} has no protocol; pass protocol=, or as model "
            f"{_WANTED}"
        )
    return protocol
