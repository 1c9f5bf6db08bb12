"""From an image to labels, exactly as mmsegmentation's inference does it, in plain PyTorch."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emanet_triton.errors import InputError
from emanet_triton.eval.views import Size, cover_count, view_sizes, windows
from emanet_triton.models.emanet import MEAN, STD
from emanet_triton.models.protocol import Protocol

Forward = Callable[[Tensor], Tensor]  # [n, 3, h, w] → logits [n, classes, h / 8, w / 8]


def segment(
    model: nn.Module,
    image: np.ndarray | Tensor,
    *,
    protocol: Protocol | None = None,
    ms_flip: bool = False,
    return_probabilities: bool = False,
) -> np.ndarray | Tensor | tuple[np.ndarray, np.ndarray] | tuple[Tensor, Tensor]:
    """Segment one image (mmseg ``EncoderDecoder.simple_test`` and ``aug_test``).

    Runs on the model's device, in the caller's autocast and TF32 settings.

    Args:
        model: an EMANet in evaluation mode.
        image: uint8 RGB [H, W, 3], array or tensor.
        protocol: how to resize, place windows and scale; ``model.protocol`` by default.
        ms_flip: average the probabilities of ``protocol.ratios``, each plain and mirrored.
        return_probabilities: also return the class probabilities.

    Returns:
        uint8 labels (class indices) [H, W]; with ``return_probabilities`` a pair of those and
        float32 probabilities [num_classes, H, W]. Arrays for an array, tensors on the image's
        device for a tensor.

    Raises:
        ValueError: an image of another shape or dtype, or a model in training mode.
    """
    if tuple(image.shape[2:]) != (3,) or 0 in image.shape or str(image.dtype)[-5:] != "uint8":
        raise ValueError(
            f"image must be uint8 RGB [H, W, 3], got {image.dtype} {list(image.shape)}"
        )
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    array = image.cpu().numpy() if isinstance(image, Tensor) else image
    device = next(model.parameters()).device
    with torch.inference_mode():
        probabilities = _probabilities(
            model, [array], protocol or model.protocol, ms_flip, device=device
        )[0]
        labels = probabilities.argmax(0).to(torch.uint8)
    if isinstance(image, Tensor):
        labels, probabilities = labels.to(image.device), probabilities.to(image.device)
    else:
        labels, probabilities = labels.cpu().numpy(), probabilities.cpu().numpy()
    return (labels, probabilities) if return_probabilities else labels


class Predictor:
    """Labels of many images, in batches that shrink when memory runs out.

    Args:
        model: an EMANet in evaluation mode.
        protocol: how its images are resized, cut into windows and scaled.
        ms_flip: average over scales and mirroring.
        precision: ``"fp32"`` or ``"tf32"`` (the caller's TF32 settings hold), ``"bf16"`` or
            ``"fp16"`` (autocast).
        batch_size: how many network inputs, images or windows, go through the network at once.
    """

    def __init__(
        self,
        model: nn.Module,
        protocol: Protocol,
        *,
        ms_flip: bool = False,
        precision: str = "fp32",
        batch_size: int = 1,
    ) -> None:
        self.model = model
        self.protocol = protocol
        self.ms_flip = ms_flip
        self.batch_size = batch_size
        self.device = next(model.parameters()).device
        self._half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def __call__(self, images: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Yield uint8 labels [H, W], on the model's device, for each uint8 RGB [H, W, 3].

        Raises:
            InputError: memory does not even suffice for one network input.
        """
        for _, group in groupby(images, key=lambda image: image.shape):
            waiting = list(group)
            while waiting:
                try:
                    labels = self._labels(waiting[: self.batch_size])
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    self._halve_batch(error, waiting[0].shape)
                else:
                    yield from labels
                    del waiting[: len(labels)]

    def _halve_batch(self, error: Exception, shape: tuple[int, ...]) -> None:
        """Halve the batch if ``error`` says that memory ran out; raise it otherwise."""
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not out_of_memory and "can't allocate memory" not in str(error):  # CPU allocator
            raise error
        if self.batch_size == 1:
            raise InputError(
                f"out of memory on {self.device} with an image of {shape[1]}x{shape[0]} pixels "
                "at batch size 1; a smaller image, another device or half precision is needed"
            ) from None
        self.batch_size //= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory on {self.device}; going on with batch size {self.batch_size}",
            stacklevel=3,
        )

    @torch.inference_mode()
    def _labels(self, images: Sequence[np.ndarray]) -> Tensor:
        probabilities = _probabilities(
            self._forward, images, self.protocol, self.ms_flip, device=self.device
        )
        return probabilities.argmax(1).to(torch.uint8)

    def _forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self._half, enabled=self._half is not None):
            return torch.cat([self.model(part) for part in inputs.split(self.batch_size)])


def resize_image(image: np.ndarray, size: Size) -> np.ndarray:
    """Resize uint8 RGB [H, W, 3] to (width, height) as mmcv does: OpenCV, bilinear, on uint8.

    OpenCV rounds in fixed point. Any other bilinear resize changes labels (up to 0.7% of them).
    """
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


def normalise(images: Tensor) -> Tensor:
    """uint8 RGB [B, H, W, 3] → float32 [B, 3, H, W], less ``MEAN``, divided by ``STD``."""
    mean = torch.tensor(MEAN, device=images.device)
    std = torch.tensor(STD, device=images.device)
    return ((images.float() - mean) / std).permute(0, 3, 1, 2).contiguous()


def _probabilities(
    forward: Forward,
    images: Sequence[np.ndarray],
    protocol: Protocol,
    ms_flip: bool,
    *,
    device: torch.device,
) -> Tensor:
    """Class probabilities [B, classes, H, W] of equally large uint8 images [H, W, 3]."""
    height, width = images[0].shape[:2]
    total, views = None, 0
    for size in view_sizes(protocol, (width, height), ms_flip):
        resized = np.stack([resize_image(image, size) for image in images])
        inputs = normalise(torch.from_numpy(resized).to(device))
        for mirrored in (False, True) if ms_flip else (False,):
            logits = _input_logits(forward, inputs.flip(3) if mirrored else inputs, protocol)
            logits = _resize(logits, (height, width), protocol)
            view = logits.softmax(1)
            view = view.flip(3) if mirrored else view
            total = view if total is None else total.add_(view)
            views += 1
    return total / views if views > 1 else total


def _input_logits(forward: Forward, inputs: Tensor, protocol: Protocol) -> Tensor:
    """Logits [B, classes, h, w] at the size of the network's inputs [B, 3, h, w]."""
    height, width = inputs.shape[2:]
    if protocol.mode == "whole":
        return _resize(forward(inputs).float(), (height, width), protocol)
    (crop_h, crop_w), (stride_h, stride_w) = protocol.crop, protocol.stride
    rows = windows(height, crop_h, stride_h)
    columns = windows(width, crop_w, stride_w)
    places = [(slice(*row), slice(*column)) for row in rows for column in columns]
    logits = forward(torch.cat([inputs[:, :, row, column] for row, column in places])).float()
    # [windows * B, classes, h, w]: one window after another, each at its own place
    total = logits.new_zeros(len(inputs), logits.shape[1], height, width)
    size = (min(crop_h, height), min(crop_w, width))
    for (row, column), part in zip(places, logits.split(len(inputs)), strict=True):
        total[:, :, row, column] += _resize(part, size, protocol)
    count = np.outer(cover_count(height, rows), cover_count(width, columns))
    return total.div_(torch.from_numpy(count).to(total))


def _resize(logits: Tensor, size: tuple[int, int], protocol: Protocol) -> Tensor:
    """Bilinear to (height, width) in the protocol's convention."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=protocol.align_corners)
