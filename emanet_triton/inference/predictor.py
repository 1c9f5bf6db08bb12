"""From an image to labels by a protocol, without logits of the image's size.

The tests compare the results with those of ``reference``, the plain sequence of operations.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn

from emanet_triton.errors import InputError
from emanet_triton.inference.graphs import GraphedNetwork
from emanet_triton.inference.inputs import cut_windows, scaled_inputs
from emanet_triton.inference.taps import tap_tables
from emanet_triton.inference.views import logits_grid, view_sizes, views
from emanet_triton.kernels.out_of_memory import MemoryWatch, is_out_of_memory
from emanet_triton.kernels.precision import cuda_fp32
from emanet_triton.kernels.resample.op import Taps, resample_labels, resample_probabilities
from emanet_triton.models.network import FusedNetwork, input_form
from emanet_triton.models.protocol import MOST_INPUTS, Protocol, num_windows
from emanet_triton.models.quantized import QuantizedEMANet

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
NOT_FINITE = 255  # the label of every pixel of an image whose logits are not finite
NOT_FINITE_MESSAGE = "the logits of the network are not finite"


class Predictor:
    """Labels of many images, in batches that shrink when memory runs out.

    Args:
        model: an EMANet, or a fused or quantized network, in evaluation mode.
        protocol: how images are resized, cut into windows and scaled.
        ms_flip: average over scales and mirroring.
        precision: ``"fp32"``, ``"tf32"`` (on a GPU), ``"bf16"`` or ``"fp16"`` (autocast), or
            ``"int8"`` for a quantized network; by default the caller's settings hold.
        batch_size: the largest number of images and of network inputs (images or windows) at once.
            By default one image. Its windows go through a GPU together, up to 64, and through a
            CPU one by one, because several at once are no faster there.
        compile: compile the model with ``torch.compile`` for each input size.
        cuda_graphs: on a GPU, replay the network as a CUDA graph for sizes that come again. Do not
            change the model afterwards, and call the predictor from one thread.
    """

    def __init__(
        self,
        model: nn.Module,
        protocol: Protocol,
        *,
        ms_flip: bool = False,
        precision: str | None = None,
        batch_size: int | None = None,
        compile: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        if (precision == "int8") != isinstance(model, QuantizedEMANet) and precision is not None:
            raise ValueError(
                f"precision {precision!r} does not fit a {type(model).__name__}; int8 is that of "
                "the networks that quantize makes"
            )
        self.model = model
        self.protocol = protocol
        self.ms_flip = ms_flip
        first = next(model.parameters())
        self.device, self._dtype = first.device, first.dtype
        self.images_at_once = batch_size or 1
        self.inputs_at_once = batch_size or (MOST_INPUTS if self.device.type == "cuda" else 1)
        self.cuda_graphs = cuda_graphs and self.device.type == "cuda"
        self.stride = input_form(model).stride
        nhwc = isinstance(model, FusedNetwork) and model.channels_last
        self._layout = torch.channels_last if nhwc else torch.contiguous_format
        network = torch.compile(model, dynamic=False) if compile else model
        self._network = GraphedNetwork(network) if self.cuda_graphs else network
        self.precision, self._compiled = precision, compile

    @property
    def network_name(self) -> str:
        """``"quantized"``, ``"fused"`` or ``"plain"``, after ``"compiled "`` if it is compiled.

        ``"fused (fastest-known)"`` names the backend by which a fused network chooses its kernels,
        if it is not "auto".
        """
        name = "plain"
        if isinstance(self.model, QuantizedEMANet):
            name = "quantized"
        elif isinstance(self.model, FusedNetwork):
            backend = self.model.backend
            name = "fused" if backend == "auto" else f"fused ({backend})"
        return f"compiled {name}" if self._compiled else name

    def __call__(self, images: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Yield uint8 labels [H, W] for each uint8 RGB [H, W, 3], without waiting for the device.

        If the logits of an image are not finite, all its labels are ``NOT_FINITE``. The labels are
        on the model's device, or on the CPU if the device has too little memory for them.

        Raises:
            InputError: there is too little memory even for one network input.
        """
        for _, group in groupby(images, key=lambda image: image.shape):
            waiting = list(group)
            while waiting:
                (labels,) = self.results(waiting[: self.images_at_once])
                yield from labels
                del waiting[: len(labels)]

    def results(
        self,
        images: Sequence[np.ndarray],
        *,
        probabilities: bool = False,
        same_labels: bool = False,
        adjust: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Segment the first images together, as many as fit into memory.

        Args:
            images: uint8 RGB [H, W, 3], all of one size.
            probabilities: whether to return probabilities, too. Their highest give the labels.
            same_labels: return the labels that a call without ``probabilities`` returns. They
                differ where two classes are equal but for rounding, and take another resize.
            adjust: changes the network's logits [B, C, P] of all views before they are resized,
                such as ``Smoothing``.

        Returns:
            Labels, uint8 [B, H, W]; with ``probabilities`` also float32 [B, C, H, W]. Devices and
            errors are those of a call.
        """
        with_both = _labels_and_probabilities if same_labels else resample_probabilities
        resample = functools.partial(
            with_both if probabilities else _labels_only, average=self.protocol.average
        )
        images = images[: self.images_at_once]
        watch = MemoryWatch(self.device)
        while True:
            try:
                with torch.no_grad():  # inference mode would return tensors of restricted use
                    logits, *taps = self._low_logits(images)
                    if adjust:
                        logits = adjust(logits)
                    labels, *rest = _resampled(resample, logits, *taps)
                    finite = logits.isfinite().flatten(1).all(1).to(labels.device)
                    return labels.masked_fill_(~finite[:, None, None], NOT_FINITE), *rest
            except Exception as error:  # too little memory has many exception types
                if not watch.explains(error):
                    raise
            self._take_less(images)
            images = images[: self.images_at_once]

    def _take_less(self, images: Sequence[np.ndarray]) -> None:
        """Halve the number of inputs that go through the network at once.

        Raises:
            InputError: the number is one already.
        """
        height, width = images[0].shape[:2]
        sizes = view_sizes(self.protocol, (height, width), self.ms_flip)
        used = len(images) * max(num_windows(self.protocol, size) for size in sizes)
        if min(used, self.inputs_at_once) == 1:
            raise InputError(
                f"out of memory on {self.device} with an image of {width}x{height} pixels "
                "at batch size 1; a smaller image, another device or half precision is needed"
            )
        self.inputs_at_once = min(used, self.inputs_at_once) // 2
        self.images_at_once = min(self.images_at_once, self.inputs_at_once)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory on {self.device}; going on with batch size {self.inputs_at_once}",
            stacklevel=4,
        )

    def _low_logits(self, images: Sequence[np.ndarray]) -> tuple[Tensor, Taps, Taps]:
        """Run the network on images of one size.

        Returns:
            Logits of all views and windows [B, classes, P], laid out as ``tap_tables`` says, and
            the taps of the rows and of the columns.
        """
        image_size = images[0].shape[:2]
        sizes = [view.size for view in views(self.protocol, image_size, self.ms_flip)]
        grids = (logits_grid(self.protocol, size, self.stride) for size in sizes)
        positions = sum(map(math.prod, grids))
        packed, begin = torch.empty(0), 0
        for inputs in self._network_inputs(images):
            with self._arithmetic():
                logits = self._network(inputs)
            windows = logits.unflatten(0, (-1, len(images))).permute(1, 2, 0, 3, 4)
            end = begin + windows[0, 0].numel()
            if (begin, end) == (0, positions):  # all windows at once: nothing has to be copied
                packed = windows.flatten(2)
            else:
                if begin == 0:
                    packed = logits.new_empty(*windows.shape[:2], positions)
                packed[:, :, begin:end].unflatten(2, windows.shape[2:]).copy_(windows)
            begin = end
        tables = tap_tables(self.protocol, image_size, self.ms_flip, self.device, self.stride)
        return packed, *tables

    def _network_inputs(self, images: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Yield windows of all images, [windows * B, 3, h, w], view after view, a few at a time."""
        windows_at_once = self.inputs_at_once // len(images)
        options = self.protocol, self.ms_flip, self.device, self.model, self._dtype
        every = scaled_inputs(images, *options)
        for inputs in every:
            for mirrored in (False, True) if self.ms_flip else (False,):
                view = inputs.flip(3) if mirrored else inputs
                view = view.to(self._dtype)  # first: windows overlap, and half the bytes are cut
                for windows in cut_windows(view, self.protocol, windows_at_once):
                    yield windows.contiguous(memory_format=self._layout)

    def first_logits(self, image: np.ndarray) -> Tensor:
        """Logits of the first input of an image, from the model itself: not compiled, no graph."""
        inputs = next(self._network_inputs([image]))
        with torch.no_grad(), self._arithmetic():
            return self.model(inputs[:1])

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        if self.precision is None:
            yield
            return
        half = HALF.get(self.precision)
        # A CUDA graph must not use weights that autocast's cache frees later.
        cached = not self.cuda_graphs
        with (
            cuda_fp32("tf32" if self.precision == "tf32" else "ieee"),
            torch.autocast(self.device.type, half, enabled=half is not None, cache_enabled=cached),
        ):
            yield


def are_finite(labels: Tensor) -> bool:
    """Whether the logits of an image with these labels were finite."""
    return not bool((labels == NOT_FINITE).all())


def _labels_only(logits: Tensor, rows: Taps, columns: Taps, average: str) -> tuple[Tensor]:
    return (resample_labels(logits, rows, columns, average=average),)


def _labels_and_probabilities(
    logits: Tensor, rows: Taps, columns: Taps, average: str
) -> tuple[Tensor, Tensor]:
    _, probabilities = resample_probabilities(logits, rows, columns, average=average)
    return resample_labels(logits, rows, columns, average=average), probabilities


def _resampled(
    resample: Callable[..., tuple[Tensor, ...]], logits: Tensor, rows: Taps, columns: Taps
) -> tuple[Tensor, ...]:
    """Resample. If memory runs out, resample blocks of rows and collect them on the CPU."""
    height = block = rows.index.shape[2]
    results: tuple[Tensor, ...] = ()
    begin = 0
    while begin < height:
        part = slice(begin, begin + block)
        try:
            got = resample(logits, Taps(*(t[:, :, part] for t in rows)), columns)
        except Exception as error:  # too little memory has many exception types
            if block == 1 or not is_out_of_memory(error):
                raise
            block = -(-block // 2)
            warnings.warn(
                f"out of memory on {logits.device}; going on with {block} of {height} rows at once",
                stacklevel=4,
            )
            continue
        if block == height:
            return got
        results = results or tuple(
            torch.empty((*t.shape[:-2], height, t.shape[-1]), dtype=t.dtype, device="cpu")
            for t in got
        )
        for whole, rows_of_it in zip(results, got, strict=True):
            whole[..., part, :] = rows_of_it
        begin += block
    return results
