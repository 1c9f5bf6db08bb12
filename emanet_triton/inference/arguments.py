"""What users give to ``segment``, checked: an image, and a model in whatever is wrapped around."""

import os

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from emanet_triton.errors import is_of_reloaded
from emanet_triton.kernels.device import DTYPE_NAMES
from emanet_triton.models.protocol import Protocol

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)
_SHARDED = {"FSDPModule", "FullyShardedDataParallel"}
_WANTED = "an EMANet or what fuse made of one"


def checked_image(image: np.ndarray | Tensor) -> np.ndarray:
    """The image as an array, uint8 RGB [H, W, 3].

    Raises:
        ValueError: it is anything else.
    """
    if isinstance(image, np.ndarray | Tensor) and not _lacks_pixels(image):
        is_uint8 = image.dtype == (torch.uint8 if isinstance(image, Tensor) else np.uint8)
        if is_uint8 and tuple(image.shape[2:]) == (3,) and 0 not in image.shape:
            return image.cpu().numpy() if isinstance(image, Tensor) else image
    raise ValueError(
        f"image must be uint8 RGB [H, W, 3], an array or a tensor, got {_described(image)}"
    )


def _lacks_pixels(image: np.ndarray | Tensor) -> bool:
    """Whether it holds none, or not one after the other."""
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


def unwrapped(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Take the wrappers off a model.

    Returns ``(network, inner)``: ``inner`` is the model without all wrappers; ``network`` is what
    runs, which is ``inner`` or what ``torch.compile`` made of it. Wrappers that talk to other
    processes or devices when they run are left out, and so is a compilation around one of them.

    Raises:
        ValueError: it is no module, sharded, in training mode, or not on one device.
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
            network = inner = inner.module
        elif "_orig_mod" in inner._modules:  # of torch.compile
            inner = inner._orig_mod
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


def check_dtype(network: nn.Module) -> None:
    """Refuse a network in a dtype in which the operators do not run.

    Raises:
        ValueError: its parameters are in float64, for example.
    """
    dtype = next(network.parameters()).dtype
    if dtype not in DTYPE_NAMES:
        raise ValueError(
            f"the network must be in float32, float16 or bfloat16, got {dtype}; pass "
            "model.float() or fuse(model)"
        )


def checked_protocol(protocol: Protocol | None, model: nn.Module) -> Protocol:
    """The protocol, which is the model's own if none is given.

    Raises:
        ValueError: there is none, or one of before the package was reloaded.
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
