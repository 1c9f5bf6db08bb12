"""EMANet's head on a backbone of timm, trained on a toy problem.

pip install timm
python examples/timm_backbone.py resnet18
python examples/timm_backbone.py convnext_atto
"""

import sys
from typing import Any

import timm
import torch
import toy
from torch import Tensor, nn
from torch.nn import functional as F

from emanet_triton import EMAHead


class TimmEMANet(nn.Module):
    """A segmentation network.

    Args:
        backbone: a name of ``timm.list_models()`` that has ``features_only``.
        num_classes: channels of the logits.
        output_stride: pixels per feature in each direction; EMANet's is 8.
        head: further arguments of ``EMAHead``.
        options: of ``timm.create_model``, such as ``pretrained=True``.

    Shape:
        normalised images [B, 3, H, W] → logits [B, num_classes, H, W].
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        output_stride: int = 8,
        head: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            backbone,
            features_only=True,
            out_indices=(-1,),  # the last features alone
            output_stride=output_stride,
            **options,
        )
        (channels,) = self.backbone.feature_info.channels()
        self.head = EMAHead(channels, num_classes=num_classes, **(head or {}))

    def forward(self, images: Tensor) -> Tensor:
        (features,) = self.backbone(images)
        return F.interpolate(self.head(features), images.shape[2:], mode="bilinear")


def main(backbone: str = "resnet18") -> None:
    torch.manual_seed(0)
    small = {"ema_channels": 64, "num_bases": 16, "channels": 64}
    toy.train(TimmEMANet(backbone, len(toy.CLASSES), head=small))


if __name__ == "__main__":
    main(*sys.argv[1:])
