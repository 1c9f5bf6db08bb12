"""From an image to labels as in mmsegmentation, without logits of the image's size.

``reference`` is the plain sequence of operations that this is held against.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from emanet_triton.errors import InputError
from emanet_triton.eval.inputs import cut_windows, scaled_inputs
from emanet_triton.eval.taps import tap_tables
from emanet_triton.eval.views import view_sizes
from emanet_triton.kernels.resample import (
    Taps,
    resample_confusion,
    resample_labels,
    resample_probabilities,
)
from emanet_triton.models.protocol import Protocol

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
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
        return_probabilities: also return the class probabilities; the labels are then their
            maxima, and may differ where the two best classes are equal but for rounding.

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
        low = _low_logits(model, [array], protocol or model.protocol, ms_flip, device=device)
        results = resample_probabilities(*low) if return_probabilities else (resample_labels(*low),)
    if isinstance(image, Tensor):
        results = tuple(result[0].to(image.device) for result in results)
    else:
        results = tuple(result[0].cpu().numpy() for result in results)
    return results if return_probabilities else results[0]


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
        self._half = HALF.get(precision)

    def __call__(self, images: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Yield uint8 labels [H, W], on the model's device, for each uint8 RGB [H, W, 3].

        Raises:
            InputError: memory does not even suffice for one network input.
        """
        for labels in self._in_batches(self._labels, images):
            yield from labels

    def confusion(self, images: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> Tensor:
        """Count the pixels of each (target, label) pair, over all images.

        Args:
            images: uint8 RGB [H, W, 3].
            targets: train ids of each image, uint8 [H, W]; 255 is left out.

        Returns:
            int64 [classes, classes] on the model's device, rows = target, columns = label.

        Raises:
            InputError: memory does not even suffice for one network input.
            ValueError: a target of another shape, or of a value that is no class.
        """

        return sum(self._in_batches(self._confusion, images, targets))

    def _in_batches(self, run: Callable[..., Tensor], *columns: Sequence) -> Iterator[Tensor]:
        """Yield ``run`` of batch after batch of equally large images and what goes with them."""
        items = zip(*columns, strict=True)
        for _, group in groupby(items, key=lambda item: item[0].shape):
            waiting = list(group)
            while waiting:
                batch = waiting[: self.batch_size]
                try:
                    result = run(*zip(*batch, strict=True))
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    self._halve_batch(error, batch[0][0].shape)
                else:
                    yield result
                    del waiting[: len(batch)]

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
        return resample_labels(*self._low(images))

    @torch.inference_mode()
    def _confusion(self, images: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> Tensor:
        on_device = torch.from_numpy(np.stack(targets)).to(self.device)
        return resample_confusion(*self._low(images), on_device)

    def _low(self, images: Sequence[np.ndarray]) -> tuple[Tensor, Taps, Taps]:
        return _low_logits(self._forward, images, self.protocol, self.ms_flip, device=self.device)

    def _forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self._half, enabled=self._half is not None):
            return torch.cat([self.model(part) for part in inputs.split(self.batch_size)])


def _low_logits(
    forward: Forward,
    images: Sequence[np.ndarray],
    protocol: Protocol,
    ms_flip: bool,
    *,
    device: torch.device,
) -> tuple[Tensor, Taps, Taps]:
    """What the network says of equally large images, and how their rows and columns tap it.

    Returns:
        Logits of all views and windows [B, classes, P], laid out as ``tap_tables`` says, and
        the taps of the rows and of the columns.
    """
    height, width = images[0].shape[:2]
    views, low_sizes = [], []
    for size in view_sizes(protocol, (width, height), ms_flip):
        inputs = scaled_inputs(images, size, device)
        for mirrored in (False, True) if ms_flip else (False,):
            logits = forward(cut_windows(inputs.flip(3) if mirrored else inputs, protocol))
            windows = logits.unflatten(0, (-1, len(images)))  # [windows, B, classes, h, w]
            views.append(windows.permute(1, 2, 0, 3, 4).flatten(2))
        low_sizes.append(tuple(logits.shape[2:]))
    rows, columns = tap_tables(protocol, (width, height), tuple(low_sizes), ms_flip, device)
    return torch.cat(views, 2) if len(views) > 1 else views[0], rows, columns
