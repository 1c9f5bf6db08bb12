"""The problem of the suite ``model``: an image, and the network that segments it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from emanet_triton.bench.clocks import Call
from emanet_triton.bench.networks import make_network
from emanet_triton.bench.peers import full_size_logits, without_gradients
from emanet_triton.inference.inputs import cut_windows, scaled_inputs
from emanet_triton.inference.views import Size
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.protocol import Protocol


@dataclass(frozen=True)
class Problem:
    """An image, the network that segments it, and where the network runs.

    Attributes:
        network: "r50" or "r101".
        protocol: how the image is resized and cut into windows.
        image: uint8 RGB [H, W, 3].
        device: "cpu" or "cuda".
        resident: whether input and labels stay on the device.
        tiny: whether the network has few channels.
        ms_flip: whether six scales, plain and mirrored, are averaged.
        alone: whether the network is timed alone: normalised input → logits.
    """

    network: str
    protocol: Protocol
    image: np.ndarray
    device: str
    resident: bool
    tiny: bool
    ms_flip: bool = False
    alone: bool = False

    @property
    def size(self) -> Size:
        """(height, width) of the image."""
        return self.image.shape[0], self.image.shape[1]

    def inputs(self) -> Tensor:
        """The normalised input, float32 [1, 3, h, w], in pinned host memory unless resident."""
        each = scaled_inputs([self.image], self.protocol, False, torch.device("cpu"))
        inputs = next(each).contiguous()
        if self.device == "cpu":
            return inputs
        return inputs.to(self.device) if self.resident else inputs.pin_memory()

    def windows(self, inputs: Tensor) -> Iterator[Tensor]:
        """What the network sees of the inputs, one by one: [1, 3, h, w]."""
        return cut_windows(inputs, self.protocol, at_once=1)

    def model(self) -> EMANet:
        return make_network(self.network, self.protocol, self.tiny)

    @property
    def finish(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The function that makes mmseg's labels [1, H, W] from all windows' logits and the inputs.

        It does not hold the image, of which ``torch.compile`` would make a tensor.
        """
        size, protocol = self.size, self.protocol

        def labels(logits: Tensor, inputs: Tensor) -> Tensor:
            height, width = inputs.shape[2:]
            full_size = full_size_logits(logits, (height, width), size, protocol)
            return full_size.softmax(1).argmax(1)

        return labels

    def labels_by(
        self,
        forward: Callable[[Tensor], Tensor],
        finish: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """mmseg's ``simple_test`` around a network, window by window: inputs → labels [1, H, W].

        It is the network itself, inputs → logits, if that is timed alone.
        """
        if self.alone:
            return forward
        finish = finish or self.finish

        def labels(inputs: Tensor) -> Tensor:
            windows = self.windows(inputs)
            return finish(torch.cat([forward(window) for window in windows]), inputs)

        return labels

    def timed(self, labels: Callable[[Tensor], Tensor]) -> Call:
        """The labels of the input, left on the host if the input comes from there."""
        inputs = self.inputs()
        if self.resident or self.device == "cpu":
            return without_gradients(labels, inputs)
        return without_gradients(lambda: labels(inputs.to(self.device, non_blocking=True)).cpu())


def make_image(size: Size) -> np.ndarray:
    """uint8 noise [H, W, 3]."""
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
