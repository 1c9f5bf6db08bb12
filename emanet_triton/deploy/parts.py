"""The parts of an evaluation that can be exported, as modules of PyTorch's operators.

``inference.predictor`` computes the same labels with less memory.
"""

import torch
from torch import Tensor, nn

from emanet_triton.deploy.resize import (
    Length,
    Lengths,
    fitted,
    pad_inputs,
    resize_images,
    resize_logits,
)
from emanet_triton.deploy.windows import slide
from emanet_triton.inference.inputs import normalise
from emanet_triton.models.network import Network
from emanet_triton.models.protocol import Protocol

LOGITS, LABELS, IMAGE_TO_LABELS = "logits", "labels", "image-to-labels"
PARTS = LOGITS, LABELS, IMAGE_TO_LABELS


class Logits(nn.Module):
    """The network alone.

    Shape:
        normalised images, float32 [B, 3, H, W] → logits, float32 [B, classes, h, w].
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).float()


class Labels(nn.Module):
    """The network, with sliding windows if the protocol has them, and a label for every pixel.

    Shape:
        normalised images, float32 [B, 3, H, W] → labels, uint8 [B, H, W].
    """

    def __init__(self, network: Network, protocol: Protocol) -> None:
        super().__init__()
        self.network, self.protocol = network, protocol

    def forward(self, images: Tensor) -> Tensor:
        return self.full_logits(images, None).argmax(1).to(torch.uint8)

    def full_logits(self, images: Tensor, size: Lengths | None) -> Tensor:
        """Logits float32 [B, classes, height, width].

        Args:
            images: normalised images [B, 3, H, W].
            size: (height, width); ``None``: those of the images.
        """
        protocol, own = self.protocol, (images.shape[2], images.shape[3])
        if protocol.direct:
            return resize_logits(self.network(images).float(), size or own, protocol.align_corners)
        inputs = pad_inputs(images, protocol) if protocol.padded else images
        if protocol.mode == "slide":
            logits = slide(self.network, inputs, protocol)
        else:
            padded = inputs.shape[2], inputs.shape[3]
            logits = resize_logits(self.network(inputs).float(), padded, protocol.align_corners)
        if protocol.padded:
            logits = logits[:, :, : own[0], : own[1]]
        return resize_logits(logits, size, protocol.later_align_corners) if size else logits


class ImageToLabels(Labels):
    """All from images as a camera gives them to labels of the same size.

    Args:
        network: normalised images → logits.
        protocol: how images are resized and cut into windows.
        single: whether one image comes without an axis for the batch.

    Shape:
        RGB images, uint8 [B, H, W, 3] → labels, uint8 [B, H, W]; single: [H, W, 3] → [H, W].
    """

    def __init__(self, network: Network, protocol: Protocol, single: bool) -> None:
        super().__init__(network, protocol)
        self.single = single

    def forward(self, images: Tensor) -> Tensor:
        images = images[None] if self.single else images
        size = images.shape[1], images.shape[2]
        target = self._input_size(size)
        resized = target is not size
        inputs = normalise(resize_images(images, target) if resized else images, self.network)
        logits = self.full_logits(inputs, size if resized else None)
        labels = logits.argmax(1).to(torch.uint8)
        return labels[0] if self.single else labels

    def _input_size(self, size: tuple[Length, Length]) -> tuple[Length, Length]:
        """Of the network's input; ``size`` itself if it is known that nothing is resized."""
        if self.protocol.base_scale is None:
            return size
        target = fitted(size, self.protocol.base_scale[::-1])
        known = all(isinstance(side, int) for side in size)
        return size if known and target == size else target
