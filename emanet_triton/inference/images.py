"""The images that ``segment`` takes: which ones it refuses, and how they become RGB arrays."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor

from emanet_triton.errors import InputError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

    Picture: TypeAlias = np.ndarray | Tensor | PilImage | str | os.PathLike[str]

Indexed = tuple[int, np.ndarray]  # an image, uint8 RGB [H, W, 3], and its index in the list

_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
_WANTED = (
    "must be uint8 RGB [H, W, 3], grey [H, W] or RGBA [H, W, 4], an array or a tensor, a PIL image "
    "or the path of a file"
)
_GROUPS = 4  # groups' worth of images that wait for others of their size


def named(image: object, index: int | None) -> str:
    """How an error names an image: by its path, its index in the list, or as the only one."""
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    return "this image" if index is None else f"image {index} of the list"


def check_image(image: object, index: int | None = None) -> None:
    """Raise ValueError if this is no image. A file is not opened, and nothing is decoded.

    Args:
        image: anything.
        index: its index, if it is of a list.
    """
    if isinstance(image, str | os.PathLike):
        fine = isinstance(os.fspath(image), str)
    elif _is_pil(image):
        fine = not _is_deep(image) and 0 not in image.size
    else:
        fine = isinstance(image, np.ndarray | Tensor) and _has_pixels(image)
    if not fine:
        of_list = "" if index is None else f"image {index} of the list: "
        raise ValueError(f"{of_list}image {_WANTED}, got {_described(image)}")


def pixels(image: "Picture", name: str) -> np.ndarray:
    """The pixels of an image that ``check_image`` accepts, uint8 RGB [H, W, 3].

    Args:
        image: the image.
        name: what errors call it, see ``named``.

    Raises:
        InputError: a file cannot be read.
        ValueError: a PIL image has a mode that does not convert to RGB.
    """
    if isinstance(image, str | os.PathLike):
        from emanet_triton.data.picture import read_picture  # imports Pillow when it reads

        return read_picture(Path(image))
    if _is_pil(image):
        return _of_pil(image, name)
    array = image.cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 2 or array.shape[2] == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    return array[..., :3]


def groups(images: Sequence["Picture"], names: Sequence[str], most: int) -> Iterator[list[Indexed]]:
    """Yield images of equal size together, at most ``most``, with their indices in ``images``.

    Images are read as they come. At most ``4 * most`` of them wait for others of their size, so
    that a long list of files takes little memory; then the group that began first goes on.

    Raises:
        InputError: a file cannot be read.
    """
    waiting: dict[tuple[int, ...], list[Indexed]] = {}
    for index, (image, name) in enumerate(zip(images, names, strict=True)):
        array = pixels(image, name)
        group = waiting.setdefault(array.shape, [])
        group.append((index, array))
        if len(group) == most:
            yield waiting.pop(array.shape)
        elif sum(map(len, waiting.values())) == _GROUPS * most:
            yield waiting.pop(next(iter(waiting)))
    yield from waiting.values()


def _is_pil(image: object) -> "TypeGuard[PilImage]":
    """Whether this is a PIL image; ``isinstance`` would import Pillow."""
    names = ((kind.__module__, kind.__name__) for kind in type(image).__mro__)
    return ("PIL.Image", "Image") in names


def _is_deep(image: "PilImage") -> bool:
    """Whether a PIL image has more than 8 bits; Pillow would clip them."""
    return image.mode[:1] in ("I", "F")


def _of_pil(image: "PilImage", name: str) -> np.ndarray:
    try:
        if image.mode == "P":  # Pillow warns about some palettes with transparent colours
            image = image.convert("RGBA")
        return np.asarray(image.convert("RGB"))
    except OSError as error:  # Pillow decodes a file when its pixels are needed
        raise InputError(
            f"{name}: not a readable PIL image ({first_line(error)}); expected an intact one"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{name} must be a PIL image of a mode that converts to RGB, got {image.mode}"
        ) from error


def _has_pixels(image: np.ndarray | Tensor) -> bool:
    """Whether an array is uint8 [H, W] or [H, W, C], dense and not empty."""
    if _lacks_pixels(image) or 0 in image.shape:
        return False
    is_uint8 = image.dtype == (torch.uint8 if isinstance(image, Tensor) else np.uint8)
    is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in _CHANNELS)
    return bool(is_uint8 and is_image)


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
        if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[2] not in _CHANNELS:
            return f"{shape}, whose first axis has the channels"
        if image.ndim == 4:
            return f"{shape}: list(images) makes a list of its images"
        return shape
    if image is None:
        return "None, as cv2.imread returns it for a file that it cannot read"
    if _is_pil(image):
        size = "x".join(map(str, image.size))
        bits = ", which has more than 8 bits a channel" if _is_deep(image) else ""
        return f"a PIL image of {size} pixels and mode {image.mode}{bits}"
    return f"a {type(image).__name__}"
