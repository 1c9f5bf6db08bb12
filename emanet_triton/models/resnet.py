"""ResNetV1c with output stride 8, with the parameter names of mmseg's ``ResNetV1c``."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around an identity (mmseg ``Bottleneck``, style "pytorch").

    Args:
        in_channels: channels of the input.
        planes: channels of the 3x3 convolution; the output has ``4 * planes`` channels.
        stride: of the 3x3 convolution and of the 1x1 convolution in the identity.
        dilation: of the 3x3 convolution.
        downsample: whether the identity needs a 1x1 convolution.

    Attributes:
        checkpointing: in training, keep only the block's input for the backward pass, which
            computes the rest again (mmseg ``with_cp``).
    """

    expansion = 4
    checkpointing = False

    def __init__(
        self, in_channels: int, planes: int, stride: int, dilation: int, downsample: bool
    ) -> None:
        super().__init__()
        channels = planes * self.expansion
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(
            planes, planes, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
        )
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels),
            )
            if downsample
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if not (self.checkpointing and self.training and x.requires_grad):
            return self._output(x)
        # The block draws no random numbers, so their state need not be kept.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if not torch.compiler.is_compiling():  # a compiled network moves its statistics once
            options["context_fn"] = lambda: (contextlib.nullcontext(), _without_statistics(self))
        return checkpoint(self._output, x, **options)

    def _output(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + identity)


@contextlib.contextmanager
def _without_statistics(block: Bottleneck) -> Iterator[None]:
    """Keep the running statistics, which the first computation of the block has moved already.

    Meanwhile the batch norms move copies.
    """
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    before = [dict(norm.named_buffers()) for norm in norms]
    for norm, buffers in zip(norms, before, strict=True):
        for name, value in buffers.items():
            setattr(norm, name, value.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            for name, value in buffers.items():
                setattr(norm, name, value)


class ResNetV1c(nn.Module):
    """ResNetV1c-D8: a stem of three 3x3 convolutions; stages 3 and 4 dilated instead of strided.

    The first block of a dilated stage has half its stage's dilation (mmseg ``contract_dilation``).
    The weights are initialised as mmseg does without a pretrained file.

    Args:
        blocks: number of bottlenecks of each of the four stages.
        base_channels: ``planes`` of the first stage, doubled at each further stage, and the
            channels of the stem's output.

    Shape:
        [B, 3, H, W] → four maps: ``4 * base_channels`` channels at 1/4 of the size, then
        8, 16 and 32 times ``base_channels`` at 1/8. Sizes are rounded up.
    """

    strides = (1, 2, 1, 1)
    dilations = (1, 1, 2, 4)
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, blocks: tuple[int, int, int, int], base_channels: int = 64) -> None:
        super().__init__()
        half = base_channels // 2
        self.stem = nn.Sequential(
            nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, base_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(base_channels),
            nn.ReLU(inplace=True),
        )
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = base_channels
        for stage, depth in enumerate(blocks):
            planes = base_channels * 2**stage
            stride, dilation = self.strides[stage], self.dilations[stage]
            layer = nn.Sequential()
            for block in range(depth):
                first = block == 0
                layer.append(
                    Bottleneck(
                        channels,
                        planes,
                        stride=stride if first else 1,
                        dilation=max(dilation // 2, 1) if first else dilation,
                        downsample=first,
                    )
                )
                channels = planes * Bottleneck.expansion
            self.add_module(f"layer{stage + 1}", layer)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.maxpool(self.stem(x))
        stage1 = self.layer1(x)
        stage2 = self.layer2(stage1)
        stage3 = self.layer3(stage2)
        return stage1, stage2, stage3, self.layer4(stage3)
