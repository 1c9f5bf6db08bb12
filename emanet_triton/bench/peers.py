"""The competitors of our code: mmsegmentation's operations in PyTorch, plain and compiled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.bench.clocks import Call
from emanet_triton.inference.views import Size
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.protocol import Protocol, window_grid


def mmseg_attention(x: Tensor, bases: Tensor, num_stages: int = 3) -> tuple[Tensor, Tensor]:
    """The operations of mmseg's ``EMAModule`` in evaluation, in its order.

    Args:
        x: features [B, C, H, W].
        bases: initial bases [1, C, K].
        num_stages: EM iterations.

    Returns:
        The reconstruction [B, C, H, W] and the bases [B, C, K].
    """
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height * width)
    bases = bases.repeat(batch, 1, 1)
    for _ in range(num_stages):
        attention = torch.einsum("bcn,bck->bnk", x, bases)
        attention = F.softmax(attention, dim=2)
        attention_normed = F.normalize(attention, dim=1, p=1)
        bases = torch.einsum("bcn,bnk->bck", x, attention_normed)
        bases = F.normalize(bases, dim=1, p=2)
    recon = torch.einsum("bck,bnk->bcn", bases, attention)
    return recon.view(batch, channels, height, width), bases


def mmseg_network(model: EMANet, images: Tensor) -> Tensor:
    """The operations of mmseg's ``EncoderDecoder.encode_decode`` without its last resize.

    Args:
        model: in evaluation mode.
        images: [B, 3, H, W].

    Returns:
        Logits [B, classes, ceil(H / 8), ceil(W / 8)].
    """
    head = model.decode_head
    *_, x = model.backbone(images)
    feats = head.ema_in_conv(x)
    attention = head.ema_module
    recon, _ = mmseg_attention(head.ema_mid_conv(feats), attention.bases, attention.num_stages)
    recon = head.ema_out_conv(F.relu(recon, inplace=True))
    out = head.bottleneck(F.relu(feats + recon, inplace=True))
    assert head.conv_cat is not None  # mmsegmentation's EMANets have it
    return head.conv_seg(head.conv_cat(torch.cat([x, out], dim=1)))


def full_size_logits(logits: Tensor, inputs: Size, size: Size, protocol: Protocol) -> Tensor:
    """Put the logits of all windows in place, average and resize them, as mmseg does.

    ``inference.reference`` does the same, but it counts the windows of a pixel on the host, which
    a CUDA graph cannot hold.

    Args:
        logits: of all windows, [windows * B, classes, h / 8, w / 8].
        inputs: (height, width) of the network's input.
        size: (height, width) of the images.
        protocol: how windows are placed and logits resized.

    Returns:
        [B, classes, height, width], float32 or the dtype of the logits if that is wider.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if protocol.mode == "slide":
        averaged = _averaged_windows(logits, inputs, protocol)
    else:
        averaged = _resized(logits, inputs, protocol)
    return _resized(averaged, size, protocol)


def _averaged_windows(logits: Tensor, inputs: Size, protocol: Protocol) -> Tensor:
    rows, columns = window_grid(protocol, inputs)
    batch = len(logits) // (len(rows) * len(columns))
    total = logits.new_zeros(batch, logits.shape[1], *inputs)
    count = logits.new_zeros(1, 1, *inputs)
    places = [(slice(*row), slice(*column)) for row in rows for column in columns]
    for (row, column), part in zip(places, logits.split(batch), strict=True):
        window = row.stop - row.start, column.stop - column.start
        total[:, :, row, column] += _resized(part, window, protocol)
        count[:, :, row, column] += 1
    return total / count


def _resized(logits: Tensor, size: Size, protocol: Protocol) -> Tensor:
    """Bilinear to (height, width)."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=protocol.align_corners)


def without_gradients(function: Callable[..., Any], *arguments: object, **options: object) -> Call:
    """A call of a function with these arguments, in inference mode."""

    def call() -> Any:
        with torch.inference_mode():
            return function(*arguments, **options)

    return call


def compiled(function: Callable[..., Any], mode: str = "default") -> Callable[..., Any]:
    """A function after ``torch.compile``, which compiles it for the exact shapes of each call."""
    return torch.compile(function, dynamic=False, mode=mode)
