"""The fused form of a model where it works, and the model itself elsewhere.

On the CPU the tests prove that fused networks work. On a GPU their kernels may never have run.
There a fused network is used only if a trial in another process succeeds on the same device, and
if its logits, from the model's own weights, agree with those of PyTorch's operations. On a Hopper
GPU, in half precision, the network is first tried with the kernels in Gluon, which no GPU has run.
"""

import copy
import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from emanet_triton.errors import describe
from emanet_triton.kernels import choice
from emanet_triton.kernels.device import has_gluon
from emanet_triton.models import trial
from emanet_triton.models.fused import fuse_if_possible
from emanet_triton.models.head import attentions
from emanet_triton.models.network import Network
from emanet_triton.models.trial import disagreement, plain_logits


def verified_fuse(model: nn.Module, dtype: torch.dtype = torch.float32) -> Network:
    """Fuse a model. Return the model itself if it has no fused form.

    On a Hopper GPU, in half precision, the fused network is first tried with the kernels in Gluon,
    of which it takes those that were the fastest in a trial, and then without them. If it fails on
    a GPU in both forms, the model itself is returned. If the model's EM attention fails too, a copy
    is returned that shares the weights and runs the EM attention by PyTorch's operations. A warning
    names each failure.

    Raises:
        InputError, ValueError: for the same reasons as ``fuse``.
    """
    fused = fuse_if_possible(model, dtype)
    assert isinstance(model, Network)  # fuse refuses all others
    if fused is None:
        return model
    device = device_of(model)
    if device.type == "cpu":
        return fused
    if has_gluon(device, dtype) and choice.may_search() and fused.choose_by("fastest-known"):
        problem = _problem("fastest", fused, model, dtype)
        if problem is None:
            return fused
        fused.choose_by("auto")
        warnings.warn(
            f"the fused network with kernels in Gluon fails on {device} ({problem}); it is tried "
            "without them",
            stacklevel=2,
        )
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
    """The device of a model whose tensors all lie on one device."""
    return next(model.parameters()).device


def with_torch_attention(model: Network) -> Network:
    """A copy that shares all weights and runs the EM attention by PyTorch's operations."""
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for attention in attentions(copied):
        attention.backend = "torch"
    return copied


def _problem(
    name: str, network: Callable[[Tensor], Tensor], model: Network, dtype: torch.dtype
) -> str | None:
    """What is wrong with a network that has the model's weights, or ``None``."""
    device = device_of(model)
    if device.type == "cuda":
        problem = trial.problem_of(trial.Trial.of(name, model, dtype, device))
        if problem is not None:
            return problem
    try:
        return disagreement(network, model, dtype)
    except Exception as error:  # whatever a kernel that does not compile or launch raises
        return describe(error)
