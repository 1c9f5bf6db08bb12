"""Whether a network was changed, so that its fused form would compute something else.

The network is compared with a fresh one of the same sizes. Forward hooks that are registered for
all modules of a process at once belong to no network and are not noticed.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from emanet_triton.errors import is_of_reloaded
from emanet_triton.models.checkpoint_files.weights_in import AUXILIARY
from emanet_triton.models.head import EMAttention
from emanet_triton.models.network import Network
from emanet_triton.models.protocol import Protocol

UNUSED = {"": (AUXILIARY,)}  # by module: its children that do nothing in evaluation mode
# Attributes that may differ: a fused form reads them, or they do nothing in evaluation mode.
FREE_OF_NETWORKS = {"architecture", "protocol", "num_classes", "_description"}
FREE = {
    EMAttention: {"num_stages", "backend", "momentum", "norm_shift"},
    nn.BatchNorm2d: {"eps", "momentum"},
    nn.Dropout2d: {"p", "inplace"},
    nn.ReLU: {"inplace"},
}
_OF_EVERY_MODULE = set(vars(nn.Module()))


def alteration(model: Network) -> str | None:
    """The first difference from a fresh network of the same class that changes its logits, if any.

    The function compares, module by module, the type, the children, the forward hooks, the training
    mode, the attributes, and the kind and shape of the tensors.

    Returns:
        A text such as "decode_head.conv_seg has a forward hook".
    """
    fresh = on_meta(type(model), model.architecture, model.protocol, model.num_classes)
    pairs = _pairs(model, fresh, "")
    return next(filter(None, (_difference(*pair) for pair in pairs)), None)


def on_meta(
    network: type[Network], architecture: Any, protocol: Protocol, num_classes: int
) -> Network:
    """A network without weights, on the meta device. No random number is drawn for it."""
    with torch.device("meta"), _WithoutRandomNumbers():
        return network(architecture, protocol, num_classes)


# What sets initial values. A mode may see a function of ``nn.init``, but nothing that it calls.
_INITIALISING = {
    Tensor.normal_,
    Tensor.uniform_,
    functional.normalize,
    nn.init.kaiming_uniform_,
    nn.init.normal_,
    nn.init.uniform_,
}


class _WithoutRandomNumbers(TorchFunctionMode):
    """Skips the initial values: on the meta device they would import PyTorch's compiler."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _INITIALISING:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _pairs(
    module: nn.Module, fresh: nn.Module, name: str
) -> Iterator[tuple[nn.Module, nn.Module, str]]:
    """(module, fresh module, name) for a module and all modules below it with equal names."""
    yield module, fresh, name
    for child, fresh_child in _children(fresh, name).items():
        own_child = module._modules.get(child)
        if fresh_child is not None and own_child is not None:
            yield from _pairs(own_child, fresh_child, f"{name}.{child}".lstrip("."))


def _children(module: nn.Module, name: str) -> dict[str, nn.Module | None]:
    unused = UNUSED.get(name, ())
    return {child: value for child, value in module._modules.items() if child not in unused}


def _difference(module: nn.Module, fresh: nn.Module, name: str) -> str | None:
    where = name or "the network"
    if is_of_reloaded(module, type(fresh)):
        return f"{where} is of a class that was reloaded since"
    if type(module) is not type(fresh):
        return f"{where} is a {type(module).__name__}, expected a {type(fresh).__name__}"
    free = FREE.get(type(fresh), set()) if name else FREE_OF_NETWORKS
    found = (
        _different_children(_children(module, name), _children(fresh, name))
        or _added_behaviour(module, fresh)
        or _different_attribute(vars(module), vars(fresh), free)
        or _different_tensor(module, fresh)
    )
    return found and f"{where} {found}"


def _different_children(children: dict, wanted: dict) -> str | None:
    for child, value in wanted.items():
        if (children.get(child) is None) != (value is None):
            return f"has {'no' if value is not None else 'a'} module {child}"
    added = [child for child in children if child not in wanted]
    if added:
        return f"has a module {added[0]}, which is none of EMANet's"
    return None if list(children) == list(wanted) else "has its modules in another order"


def _added_behaviour(module: nn.Module, fresh: nn.Module) -> str | None:
    if module._forward_pre_hooks:
        return "has a forward pre-hook"
    if module._forward_hooks:
        return "has a forward hook"
    if module.training:
        return "is in training mode"
    usual = _OF_EVERY_MODULE | vars(fresh).keys()
    for attribute in vars(module):
        # Compiling a module in place sets this attribute, and changes no result.
        if attribute in usual or attribute == "_compiled_call_impl":
            continue
        if hasattr(type(module), attribute):
            return f"has a {attribute} of its own"
    return None


def _different_attribute(attributes: dict, wanted: dict, free: set[str]) -> str | None:
    for attribute, want in wanted.items():
        if attribute in _OF_EVERY_MODULE or attribute in free:
            continue
        value = attributes.get(attribute)
        if type(value) is not type(want) or value != want:
            return f"has {attribute} {value!r}, expected {want!r}"
    return None


def _different_tensor(module: nn.Module, fresh: nn.Module) -> str | None:
    for name, want in (fresh._parameters | fresh._buffers).items():
        tensor = getattr(module, name, None)
        if want is None:
            if tensor is not None:
                return f"has a {name}, expected none"
        elif tensor is None:
            return f"has no {name}"
        elif type(tensor) not in (Tensor, nn.Parameter):
            return f"has as {name} a {type(tensor).__name__}, expected a tensor"
        elif tensor.shape != want.shape:
            return f"has a {name} of {list(tensor.shape)}, expected {list(want.shape)}"
    return None
