"""The fused network of a model where it can be relied on, and the model itself elsewhere.

On the CPU the tests stand for it. On a GPU nobody may have run its kernels yet, so there it is
used only after it has agreed with the plain network on that very device.
"""

import warnings
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from emanet_triton.kernels.precision import cuda_fp32
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.fused import fuse

FP32_ERROR = 1e-4  # relative error of the logits, as the golden tests allow
HALF_ERROR = 1e-3  # beside twice the error of plain half precision

_KEPT: WeakKeyDictionary[EMANet, tuple[tuple, nn.Module]] = WeakKeyDictionary()


def verified_fuse(model: EMANet, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Fuse ``model``; on a GPU return it as it is, with a warning, if the two do not agree.

    Raises:
        ValueError: as ``fuse``.
    """
    fused = fuse(model, dtype=dtype)
    device = next(model.parameters()).device
    if device.type == "cpu":
        return fused
    try:
        problem = disagreement(fused, model, dtype)
    except Exception as error:  # whatever a kernel that does not compile or launch raises
        problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if problem is None:
        return fused
    warnings.warn(
        f"the fused network does not work on {device} ({problem}); the plain one runs instead",
        stacklevel=2,
    )
    return model


def kept_fuse(model: EMANet, dtype: torch.dtype = torch.float32) -> nn.Module:
    """``verified_fuse``, remembered for as long as the model lives and its weights stay.

    A model of inference tensors, which do not tell when they change, is returned as it is.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_inference() for tensor in tensors):
        return model
    state = dtype, *((t.data_ptr(), t._version) for t in tensors)
    kept = _KEPT.get(model)
    if kept is None or kept[0] != state:
        kept = _KEPT[model] = state, verified_fuse(model, dtype)
    return kept[1]


@torch.inference_mode()
def disagreement(fused: nn.Module, model: EMANet, dtype: torch.dtype) -> str | None:
    """What is wrong with the logits of ``fused`` on noise of the protocol's size, if anything.

    In half precision its error may be twice that of the plain network under autocast.
    """
    device = next(model.parameters()).device
    height, width = model.protocol.crop or model.protocol.base_scale[::-1]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, height, width, generator=generator).to(device)
    with torch.autocast(device.type, enabled=False), cuda_fp32("ieee"):
        want = model(images).double()
        error = _relative_error(fused(images), want)
    bound = FP32_ERROR
    if dtype != torch.float32:
        with torch.autocast(device.type, dtype):
            bound = 2 * _relative_error(model(images), want) + HALF_ERROR
    return None if error <= bound else f"relative error {error:.1e}, expected at most {bound:.1e}"


def _relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; not a number if ``got`` is."""
    return ((got.double() - want).norm() / want.norm()).item()
