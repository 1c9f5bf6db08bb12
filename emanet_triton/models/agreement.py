"""Whether a network's logits are those of PyTorch's operations alone, in a higher precision."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.kernels.em import reference
from emanet_triton.kernels.out_of_memory import is_out_of_memory, is_refused
from emanet_triton.kernels.precision import cuda_fp32
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.protocol import Protocol

FP32_ERROR = 1e-4  # relative error of the logits, as the golden tests allow
HALF_ERROR = 1e-3  # beside twice the error of plain half precision


def input_size(protocol: Protocol) -> tuple[int, int]:
    """(height, width) of the network's inputs, of an image of the protocol's base scale."""
    return protocol.crop or protocol.base_scale[::-1]


@torch.inference_mode()
def disagreement(
    network: Callable[[Tensor], Tensor], model: EMANet, dtype: torch.dtype
) -> str | None:
    """What is wrong with the logits of a network on noise of the protocol's size, if anything.

    The reference is ``reference_logits`` of the model. In half precision the network's error may
    be twice that of the same operations under autocast.

    Args:
        network: float32 [1, 3, H, W] on the model's device → logits.
        model: has the network's weights, in float32.
        dtype: that the network computes in.
    """
    device = next(model.parameters()).device
    size = input_size(model.protocol)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, *size, generator=generator).to(device)
    with torch.autocast(device.type, enabled=False), cuda_fp32("ieee"):
        want = _wide_logits(model, images)
        error = _relative_error(network(images), want)
    bound = FP32_ERROR
    if dtype != torch.float32:
        with torch.autocast(device.type, dtype):
            bound = 2 * _relative_error(reference_logits(model, images), want) + HALF_ERROR
    return None if error <= bound else f"relative error {error:.1e}, expected at most {bound:.1e}"


def plain_logits(model: EMANet, dtype: torch.dtype, images: Tensor) -> Tensor:
    """As an evaluation runs a model that is not fused: half precision by autocast."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return model(images)


def reference_logits(model: EMANet, images: Tensor) -> Tensor:
    """``model(images)`` in evaluation mode, by PyTorch's operations alone and in any dtype."""
    *_, x = model.backbone(images)
    head = model.decode_head
    feats, attention = head.ema_in_conv(x), head.ema_module
    mid = head.ema_mid_conv(feats).flatten(2)
    recon, _ = reference.em_attention(mid, attention.bases, attention.num_stages)
    out = F.relu(feats + head.ema_out_conv(F.relu(recon.view_as(feats))))
    return head.conv_seg(head.conv_cat(torch.cat([x, head.bottleneck(out)], dim=1)))


def _wide_logits(model: EMANet, images: Tensor) -> Tensor:
    """The reference in float64; where that has no memory or no engine, computed in float32."""
    try:
        return reference_logits(copy.deepcopy(model).double(), images.double())
    except (RuntimeError, MemoryError) as error:
        if not (is_out_of_memory(error) or is_refused(error)):
            raise
    return reference_logits(model, images).double()


def _relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; not a number if ``got`` is."""
    return ((got.double() - want).norm() / want.norm()).item()
