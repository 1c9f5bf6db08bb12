"""EMANet's head as a decoder of segmentation_models_pytorch, trained on a toy problem.

pip install segmentation-models-pytorch
python examples/smp_encoder.py resnet18
python examples/smp_encoder.py mobilenet_v2
"""

import sys
from typing import Any

import segmentation_models_pytorch as smp
import torch
import toy
from segmentation_models_pytorch.base import SegmentationModel
from torch import Tensor, nn

from emanet_triton import EMAHead


class EMADecoder(nn.Module):
    """EMANet's head, which reads the last of the encoder's features."""

    def __init__(self, in_channels: int, num_classes: int, **options: Any) -> None:
        super().__init__()
        self.head = EMAHead(in_channels, num_classes=num_classes, **options)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.head(features[-1])


class SmpEMANet(SegmentationModel):
    """A model of segmentation_models_pytorch, with its ``predict`` and ``save_pretrained``.

    Args:
        encoder_name: one of ``smp.encoders.get_encoder_names()``.
        encoder_weights: such as "imagenet"; ``None`` for random weights.
        classes: channels of the logits.
        output_stride: pixels per feature in each direction; EMANet's is 8.
        head: further arguments of ``EMAHead``.

    Shape:
        normalised images [B, 3, H, W], H and W multiples of ``output_stride`` → logits
        [B, classes, H, W].
    """

    def __init__(
        self,
        encoder_name: str = "resnet50",
        encoder_weights: str | None = None,
        classes: int = 1,
        output_stride: int = 8,
        head: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = smp.encoders.get_encoder(
            encoder_name, weights=encoder_weights, output_stride=output_stride
        )
        self.decoder = EMADecoder(self.encoder.out_channels[-1], classes, **(head or {}))
        # ``initialize`` is not called: it would replace the initial weights of EMANet's head.
        self.segmentation_head = nn.Upsample(scale_factor=output_stride, mode="bilinear")
        self.classification_head = None


def main(encoder: str = "resnet18") -> None:
    torch.manual_seed(0)
    small = {"ema_channels": 64, "num_bases": 16, "channels": 64}
    toy.train(SmpEMANet(encoder, classes=len(toy.CLASSES), head=small))


if __name__ == "__main__":
    main(*sys.argv[1:])
