"""The fused network of a model where it can be relied on, and the model itself elsewhere.

On the CPU the tests stand for it. On a GPU nobody may have run its kernels yet, so there it is
used only after a trial in another process has gone well on that very device, and after it has
agreed with PyTorch's operations on the model's own weights.
"""

import copy
import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from emanet_triton.errors import describe
from emanet_triton.models import trial
from emanet_triton.models.agreement import disagreement, plain_logits
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.fused import fuse


def verified_fuse(model: EMANet, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Fuse ``model``; on a GPU return it as it is, with a warning, if the fused does not work.

    If its own EM attention is what does not work, return a copy that shares its weights and runs
    the EM attention by PyTorch's operations.

    Raises:
        ValueError: as ``fuse``.
    """
    fused = fuse(model, dtype=dtype)
    device = device_of(model)
    if device.type == "cpu":
        return fused
    problem = _problem("fused", fused, model, dtype)
    if problem is None:
        return fused
    message = f"the fused network fails on {device} ({problem}); the plain network runs instead"
    problem = _problem("plain", functools.partial(plain_logits, model, dtype), model, dtype)
    if problem is not None:
        message += f", with PyTorch's EM attention, because the model's own fails too ({problem})"
        model = with_torch_attention(model)
    warnings.warn(message, stacklevel=2)
    return model


def device_of(model: nn.Module) -> torch.device:
    """The device of a model, all of whose tensors lie on one."""
    return next(model.parameters()).device


def with_torch_attention(model: EMANet) -> EMANet:
    """A copy that shares all weights and runs the EM attention by PyTorch's operations."""
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    copied.decode_head.ema_module.backend = "torch"
    return copied


def _problem(
    name: str, network: Callable[[Tensor], Tensor], model: EMANet, dtype: torch.dtype
) -> str | None:
    """What is wrong with a network of the model's weights, if anything; the trial comes first."""
    device = device_of(model)
    if device.type == "cuda":
        problem = trial.problem_of(trial.Trial.of(name, model, dtype, device))
        if problem is not None:
            return problem
    try:
        return disagreement(network, model, dtype)
    except Exception as error:  # whatever a kernel that does not compile or launch raises
        return describe(error)
