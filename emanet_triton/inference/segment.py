"""``segment``: labels of images from a model, with all arguments checked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, Unpack, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from emanet_triton.errors import InputError, is_of_reloaded
from emanet_triton.inference.images import check_image, groups, named
from emanet_triton.inference.predictor import NOT_FINITE_MESSAGE, Predictor, are_finite
from emanet_triton.kernels.device import DTYPE_NAMES
from emanet_triton.models.network import FusedNetwork
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.verified import verified_fuse

if TYPE_CHECKING:
    import os

    from PIL.Image import Image as PilImage

    from emanet_triton.inference.images import Picture

    _Item = TypeVar("_Item")
    _List = list[_Item] | tuple[_Item, ...]
    _Unlike = PilImage | str | os.PathLike[str]  # images whose results are of another type

_Image = TypeVar("_Image", np.ndarray, Tensor)
_Listed = TypeVar("_Listed", bound="np.ndarray | _Unlike")

MANY_IMAGES = 8  # of a list at once on a GPU by default

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
_SHARDED = {"FSDPModule", "FullyShardedDataParallel"}
_WANTED = "an EMANet or a fused network"


class _Options(TypedDict, total=False):
    """The keywords of ``segment`` that do not change the type of its result."""

    protocol: Protocol | None
    ms_flip: bool
    fuse: bool
    batch_size: int | None


@overload
def segment(
    model: nn.Module,
    image: _Image,
    *,
    return_probabilities: Literal[False] = False,
    **options: Unpack[_Options],
) -> _Image: ...


@overload
def segment(
    model: nn.Module,
    image: _Image,
    *,
    return_probabilities: Literal[True],
    **options: Unpack[_Options],
) -> tuple[_Image, _Image]: ...


@overload
def segment(
    model: nn.Module,
    image: _Image,
    *,
    return_probabilities: bool,
    **options: Unpack[_Options],
) -> _Image | tuple[_Image, _Image]: ...


@overload
def segment(
    model: nn.Module,
    image: "_Unlike",
    *,
    return_probabilities: Literal[False] = False,
    **options: Unpack[_Options],
) -> np.ndarray: ...


@overload
def segment(
    model: nn.Module,
    image: "_Unlike",
    *,
    return_probabilities: Literal[True],
    **options: Unpack[_Options],
) -> tuple[np.ndarray, np.ndarray]: ...


@overload
def segment(
    model: nn.Module,
    image: "_Unlike",
    *,
    return_probabilities: bool,
    **options: Unpack[_Options],
) -> np.ndarray | tuple[np.ndarray, np.ndarray]: ...


@overload
def segment(
    model: nn.Module,
    image: "_List[Tensor]",
    *,
    return_probabilities: Literal[False] = False,
    **options: Unpack[_Options],
) -> list[Tensor]: ...


@overload
def segment(
    model: nn.Module,
    image: "_List[Tensor]",
    *,
    return_probabilities: Literal[True],
    **options: Unpack[_Options],
) -> list[tuple[Tensor, Tensor]]: ...


@overload
def segment(
    model: nn.Module,
    image: "_List[Tensor]",
    *,
    return_probabilities: bool,
    **options: Unpack[_Options],
) -> list[Tensor] | list[tuple[Tensor, Tensor]]: ...


@overload
def segment(
    model: nn.Module,
    image: "_List[_Listed]",
    *,
    return_probabilities: Literal[False] = False,
    **options: Unpack[_Options],
) -> list[np.ndarray]: ...


@overload
def segment(
    model: nn.Module,
    image: "_List[_Listed]",
    *,
    return_probabilities: Literal[True],
    **options: Unpack[_Options],
) -> list[tuple[np.ndarray, np.ndarray]]: ...


@overload
def segment(
    model: nn.Module,
    image: "_List[_Listed]",
    *,
    return_probabilities: bool,
    **options: Unpack[_Options],
) -> list[np.ndarray] | list[tuple[np.ndarray, np.ndarray]]: ...


def segment(
    model: nn.Module,
    image: "Picture | Sequence[Picture]",
    *,
    protocol: Protocol | None = None,
    ms_flip: bool = False,
    return_probabilities: bool = False,
    fuse: bool = False,
    batch_size: int | None = None,
) -> Any:
    """Segment an image, or each image of a list (mmseg ``simple_test`` and ``aug_test``).

    The model runs as it is, on its device and in its dtype. The caller's autocast and TF32
    settings apply.

    Args:
        model: an EMANet or a fused network, in evaluation mode. If it is wrapped in DataParallel,
            DistributedDataParallel or AveragedModel, the model inside runs. A compiled model runs
            compiled.
        image: an image, or a list or tuple of images. An image is one of these:

            - an array or a tensor, uint8: RGB [H, W, 3]; grey [H, W] or [H, W, 1], which is
              repeated three times; or RGBA [H, W, 4], which loses its alpha
            - a PIL image of at most 8 bits a channel: its pixels as they are, not turned by EXIF,
              converted to RGB without alpha
            - the path of a JPEG, PNG, WebP, BMP or TIFF file, str or ``os.PathLike``: the pixels
              that ``data.picture.read_picture`` gives, turned by EXIF
        protocol: how the image is resized, cut into windows and scaled; by default
            ``model.protocol``.
        ms_flip: average the probabilities of all ``protocol.ratios``, each plain and mirrored.
        return_probabilities: also return the probabilities of all classes. The labels are then
            the classes of the highest probability. Where two classes are equal but for rounding,
            the labels may differ from the labels without this option.
        fuse: fuse the model for this call alone, in the dtype of autocast. For many calls call
            ``emanet_triton.fuse`` once and pass the fused network instead. A network that has no
            fused form runs as it is.
        batch_size: the most images of a list that run together; they have one size, but need not
            be neighbours in the list. By default 8 on a GPU and 1 on a CPU, where several at once
            are no faster. Files are read as their turn comes: at most ``4 * batch_size`` images
            wait for others of their size.

    Returns:
        Labels (class indices), uint8 [H, W]. With ``return_probabilities`` a pair: the labels,
        and probabilities, float32 [num_classes, H, W]. They are tensors on the image's device if
        the image is a tensor, and arrays if it is anything else. For a list, a list of the
        results in the same order.

    Raises:
        InputError: a file cannot be read, there is too little memory, or the network's logits are
            not finite.
        ValueError: an image has another shape, dtype or type; the model is in training mode or
            cannot run; there is no valid protocol; ``batch_size`` is not positive; or, with
            ``fuse``, the model cannot be fused.
    """
    in_list = isinstance(image, list | tuple)
    images: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
    indices = range(len(images)) if in_list else [None]
    for each, index in zip(images, indices, strict=True):
        check_image(each, index)
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ValueError(f"batch_size must be a positive integer, or None, got {batch_size!r}")
    network, inner = _unwrapped(model)
    protocol = _checked_protocol(protocol, inner)
    if inner.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    if fuse and not isinstance(inner, FusedNetwork):
        network = verified_fuse(inner, _autocast_dtype(inner))
    _check_dtype(network)
    predictor = Predictor(network, protocol, ms_flip=ms_flip)
    _set_batch_size(predictor, batch_size)
    names = [named(each, index) for each, index in zip(images, indices, strict=True)]
    results = _results(predictor, images, names, return_probabilities)
    return results if in_list else results[0]


def _set_batch_size(predictor: Predictor, batch_size: int | None) -> None:
    """Let so many images run together; the windows of one image still do on a GPU."""
    default = MANY_IMAGES if predictor.device.type == "cuda" else 1
    predictor.images_at_once = batch_size or default
    predictor.inputs_at_once = max(predictor.inputs_at_once, predictor.images_at_once)


def _results(
    predictor: Predictor, images: "Sequence[Picture]", names: Sequence[str], probabilities: bool
) -> list[Any]:
    """The result of each image, in their order. Errors use the names."""
    found: list[Any] = [None] * len(images)
    for group in groups(images, names, predictor.images_at_once):
        while group:
            arrays = [array for _, array in group]
            tensors = predictor.results(arrays, probabilities=probabilities)
            done = len(tensors[0])  # fewer than the group if memory ran out
            for (index, _), *result in zip(group[:done], *tensors, strict=True):
                _check_finite(result[0], names[index])
                like = [_like(images[index], tensor, shared=done > 1) for tensor in result]
                found[index] = tuple(like) if probabilities else like[0]
            del group[:done]
    return found


def _check_finite(labels: Tensor, name: str) -> None:
    if not are_finite(labels):
        raise InputError(f"{NOT_FINITE_MESSAGE} for {name}")


def _like(image: "Picture", result: Tensor, *, shared: bool) -> np.ndarray | Tensor:
    """The result as an array, or as a tensor on the image's device if the image is a tensor.

    A ``shared`` result is a part of the memory of others, which ``torch.save`` would write whole.
    """
    if isinstance(image, Tensor):
        return result.to(image.device, copy=shared)
    return result.cpu().numpy()


def _autocast_dtype(model: nn.Module) -> torch.dtype:
    device = next(model.parameters()).device.type
    enabled = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else torch.float32


def _unwrapped(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Take the wrappers off a model.

    Returns ``(network, inner)``. ``inner`` is the model without any wrapper. ``network`` is the
    module to run: ``inner``, or ``inner`` compiled. Wrappers that would communicate with other
    processes or devices are taken off, and so is a compilation around such a wrapper.

    Raises:
        ValueError: the model is no module, is sharded, or not on one device.
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
