"""EMANet: a ResNetV1c-D8 backbone, the EM attention head and the auxiliary head."""

from dataclasses import dataclass

from torch import Tensor, nn

from emanet_triton.models.head import EMAHead, FCNHead
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.resnet import Bottleneck, ResNetV1c

# RGB, on 0..255 values (mmseg img_norm_cfg).
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
STRIDE = 8  # of the logits: pixels of the input for one of them


def logits_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of the logits of an input of that many pixels: halved thrice, rounded up."""
    return -(-height // STRIDE), -(-width // STRIDE)


@dataclass(frozen=True)
class Architecture:
    """The sizes that tell one EMANet from another.

    Attributes:
        blocks: bottlenecks of each of the four stages.
        base_channels: channels of the stem's output and planes of the first stage.
        ema_channels: C of the EM attention.
        num_bases: K of the EM attention.
        num_stages: EM iterations.
        head_channels: of the convolutions after the attention and of the auxiliary head.
    """

    blocks: tuple[int, int, int, int]
    base_channels: int = 64
    ema_channels: int = 512
    num_bases: int = 64
    num_stages: int = 3
    head_channels: int = 256


class EMANet(nn.Module):
    """The segmentation network (mmseg ``EncoderDecoder``), from normalised images to logits.

    Args:
        architecture: sizes of the network.
        protocol: how its checkpoint is evaluated; ``segment`` uses it by default.
        num_classes: of the logits.

    Shape:
        float [B, 3, H, W], RGB, normalised by ``MEAN`` and ``STD`` → logits
        [B, num_classes, ceil(H / 8), ceil(W / 8)].
        In training mode a pair: those logits and the auxiliary head's, of the same shape.
    """

    def __init__(
        self, architecture: Architecture, protocol: Protocol, num_classes: int = 19
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.protocol = protocol
        self.num_classes = num_classes
        stage3, stage4 = (architecture.base_channels * Bottleneck.expansion * s for s in (4, 8))
        self.backbone = ResNetV1c(architecture.blocks, architecture.base_channels)
        self.decode_head = EMAHead(
            stage4,
            architecture.ema_channels,
            architecture.num_bases,
            architecture.num_stages,
            architecture.head_channels,
            num_classes,
        )
        self.auxiliary_head = FCNHead(stage3, architecture.head_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        *_, stage3, stage4 = self.backbone(images)
        logits = self.decode_head(stage4)
        return (logits, self.auxiliary_head(stage3)) if self.training else logits
