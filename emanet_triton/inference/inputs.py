"""From images to network inputs: the resizes, the normalisation, the padding and the windows."""

import functools
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.inference.views import Size, scales
from emanet_triton.kernels.device import auto_backend, triton_kernels
from emanet_triton.models.network import input_form
from emanet_triton.models.protocol import Protocol, window_grid


def resize_image(image: np.ndarray, size: Size, out: np.ndarray | None = None) -> np.ndarray:
    """Resize uint8 RGB [H, W, 3] to (height, width) as mmcv does: OpenCV, bilinear, on uint8.

    OpenCV rounds in fixed point. Any other bilinear resize changes up to 0.7% of the labels. The
    result is written to ``out`` if it is given.
    """
    return cv2.resize(image, size[::-1], dst=out, interpolation=cv2.INTER_LINEAR)


def resize_to_device(images: Sequence[np.ndarray], size: Size, device: torch.device) -> Tensor:
    """``resize_image`` of each image: uint8 [B, height, width, 3] on the device.

    OpenCV writes to the memory that the device reads. Each copy between them would take longer than
    the resize of an image that has its size already: the system first has to map new memory.

    Raises:
        ValueError: an image is not uint8 RGB [H, W, 3].
    """
    pinned = device.type == "cuda"
    resized = torch.empty(len(images), *size, 3, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    for image, out in zip(images, resized.numpy(), strict=True):
        if image.dtype != np.uint8 or image.shape[2:] != (3,):  # OpenCV would not write to ``out``
            raise ValueError(
                f"images must be uint8 RGB [H, W, 3], got {image.dtype} {list(image.shape)}"
            )
        resize_image(image, size, out)
    return to_device(resized, device)


def normalise(images: Tensor, network: object = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 RGB [B, H, W, 3] → [B, 3, H, W], minus the mean, divided by the deviation.

    Mean and deviation are the network's, see ``input_form``. Differences and quotients are float32,
    then rounded to ``dtype``. The result is channels-last in memory.
    """
    form = input_form(network)
    if auto_backend(images.is_cuda) == "triton" and not torch.compiler.is_compiling():
        with triton_kernels("pixels", images) as kernels:
            return kernels.normalise(images, form.mean, form.std, dtype)
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=images.device)
        for values in (form.mean, form.std)
    )
    return images.float().sub_(mean).div_(std).to(dtype).permute(0, 3, 1, 2)


def scaled_inputs(
    images: Sequence[np.ndarray],
    protocol: Protocol,
    ms_flip: bool,
    device: torch.device,
    network: object = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Tensor]:
    """Yield the network input of each scale of a protocol: [B, 3, h, w], not mirrored.

    The images have one size. The inputs have the order of ``views.scales``. They are in ``dtype``
    where the protocol scales the image (``scaling`` is "image"), else float32.
    """
    each = scales(protocol, images[0].shape[:2], ms_flip)
    if protocol.scaling == "image":
        for scale in each:
            yield _padded_inputs(images, scale.resized, scale.padded, device, network, dtype)
        return
    single = inputs = _padded_inputs(images, *each[0][:2], device, network, torch.float32)
    for scale, ratio in zip(each, protocol.ratios if ms_flip else (1.0,), strict=True):
        source = inputs if protocol.scaling == "previous" else single
        if protocol.scaling != "input":
            inputs = F.interpolate(source, scale.size, mode="bilinear", align_corners=False)
        elif ratio != 1:
            # F.interpolate(source, scale_factor=ratio), but for sides that would vanish. With a
            # factor, source pixels are 1 / ratio apart, and not in / out.
            resize = torch.ops.aten.upsample_bilinear2d
            inputs = resize(source, scale.size, protocol.align_corners, ratio, ratio)
        else:
            inputs = source
        yield inputs


def _padded_inputs(
    images: Sequence[np.ndarray],
    size: Size,
    padded: Size,
    device: torch.device,
    network: object,
    dtype: torch.dtype,
) -> Tensor:
    """Images resized to (height, width), normalised and padded with 0: [B, 3, ...] in ``dtype``."""
    inputs = normalise(resize_to_device(images, size, device), network, dtype)
    bottom, right = padded[0] - size[0], padded[1] - size[1]
    return F.pad(inputs, (0, right, 0, bottom)) if bottom or right else inputs


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device.

    A GPU copies it while this process goes on, and on a stream of its own, while the kernels run
    that were launched before.
    """
    if device.type != "cuda":
        return tensor.to(device)
    current = torch.cuda.current_stream(device)
    copies = _copy_stream(current.device)  # it has an index, also where ``device`` has none
    with torch.cuda.stream(copies):
        copied = tensor.pin_memory().to(current.device, non_blocking=True)
    current.wait_stream(copies)
    copied.record_stream(current)  # else the next copy could overwrite it before it is read
    return copied


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def cut_windows(inputs: Tensor, protocol: Protocol, at_once: int | None = None) -> Iterator[Tensor]:
    """Yield the windows of inputs [B, 3, h, w], row by row, ``at_once`` at a time or all.

    Each piece is [windows * B, 3, ...]: the first window of every image, then the second.
    """
    rows, columns = window_grid(protocol, (inputs.shape[2], inputs.shape[3]))
    windows = [inputs[:, :, slice(*r), slice(*c)] for r in rows for c in columns]
    at_once = at_once or len(windows)
    for i in range(0, len(windows), at_once):
        piece = windows[i : i + at_once]
        yield torch.cat(piece) if len(piece) > 1 else piece[0]
