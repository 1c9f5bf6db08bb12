"""A dilated ResNet, with the parameter names of mmseg's ``ResNetV1c``."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

Stages = tuple[int, int, int, int]  # a number for each stage


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around an identity (mmseg ``Bottleneck``, style "pytorch").

    Args:
        in_channels: channels of the input.
        planes: channels of the 3x3 convolution; the output has ``4 * planes`` channels.
        stride: of the 3x3 convolution and of the 1x1 convolution in the identity.
        dilation: of the 3x3 convolution.
        downsample: whether the identity needs a 1x1 convolution.
        avg_down: whether the identity's stride is an average pool's, before the 1x1 convolution.

    Attributes:
        pool: pixels that the average pool of the identity takes in each direction; 1: no pool.
        checkpointing: in training, keep only the block's input for the backward pass, which
            computes the rest again (mmseg ``with_cp``).
    """

    expansion = 4
    checkpointing = False

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        dilation: int,
        downsample: bool,
        avg_down: bool = False,
    ) -> None:
        super().__init__()
        channels = planes * self.expansion
        self.pool = stride if avg_down else 1
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
                nn.Conv2d(in_channels, channels, 1, stride=stride // self.pool, bias=False),
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
        identity = x if self.downsample is None else self.downsample(average_pool(x, self.pool))
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + identity)


def average_pool(x: Tensor, size: int) -> Tensor:
    """Means of ``size`` x ``size`` pixels, of fewer at the right and the bottom edge.

    Shape:
        [B, C, H, W] → [B, C, ceil(H / size), ceil(W / size)]; ``x`` itself if ``size`` is 1.
    """
    if size == 1:
        return x
    return F.avg_pool2d(x, size, ceil_mode=True, count_include_pad=False)


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


class ResNet(nn.Module):
    """A stem of three 3x3 convolutions and four stages, of which some are dilated, not strided.

    By default it is mmsegmentation's ResNetV1c-D8; with ``avg_down`` it is ResNetV1d. The weights
    are initialised as mmseg does without a pretrained file.

    Args:
        blocks: number of bottlenecks of each of the four stages.
        base_channels: ``planes`` of the first stage, doubled at each further stage.
        strides, dilations, contract_dilation, multi_grid, stem_channels, avg_down: as in
            ``Architecture``.

    Shape:
        [B, 3, H, W] → four maps of 4, 8, 16 and 32 times ``base_channels`` channels. By default
        the first has 1/4 of the size and the others 1/8; the strides decide. Sizes are rounded up.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        blocks: Stages,
        base_channels: int = 64,
        *,
        strides: Stages = (1, 2, 1, 1),
        dilations: Stages = (1, 1, 2, 4),
        contract_dilation: bool = True,
        multi_grid: tuple[int, ...] = (1, 1, 1),
        stem_channels: tuple[int, int, int] | None = None,
        avg_down: bool = False,
    ) -> None:
        super().__init__()
        half = base_channels // 2
        first, second, channels = stem_channels or (half, half, base_channels)
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(inplace=True),
            nn.Conv2d(first, second, 3, padding=1, bias=False),
            nn.BatchNorm2d(second),
            nn.ReLU(inplace=True),
            nn.Conv2d(second, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for stage, depth in enumerate(blocks):
            planes = base_channels * 2**stage
            layer = nn.Sequential()
            for block in range(depth):
                is_first = block == 0
                dilation = dilations[stage]
                if is_first and contract_dilation:
                    dilation = max(dilation // 2, 1)
                if stage == 3:
                    dilation *= multi_grid[block % len(multi_grid)]
                layer.append(
                    Bottleneck(
                        channels,
                        planes,
                        stride=strides[stage] if is_first else 1,
                        dilation=dilation,
                        downsample=is_first,
                        avg_down=avg_down,
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
