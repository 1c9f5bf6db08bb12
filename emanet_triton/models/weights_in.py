"""Which entries of a file are a network's weights, under the network's own names."""

from typing import Any

from emanet_triton.models.damage import UnsupportedError, shown
from emanet_triton.models.inert import Inert
from emanet_triton.models.stored import StoredTensor

_USUAL = "state_dict"  # of mmcv, mmengine and Lightning
_PARTS = ("backbone", "decode_head", "auxiliary_head")
_EMA = "ema_"  # of the copies that mmcv's EMAHook keeps in the model
_COUNT = "n_averaged"  # of torch's AveragedModel
_LOSSES = ("criterion", "loss", "loss_fn", "loss_function")
_COUNTER = "num_batches_tracked"
_SAVE = "torch.save(model.state_dict(), ...)"
_NOTHING = "holds no weights; expected a state dict of tensors"
_LISTED = 8


def find_weights(value: object) -> tuple[dict[str, StoredTensor], list[str]]:
    """Find the state dict, strip wrappers' prefixes, and leave out what no network uses.

    ``state_dict`` goes before all other containers: where a hook averages weights, mmcv and
    mmengine store the averaged ones there. Left out are ``ema_*`` copies, ``n_averaged``, buffers
    of losses, and counters ``num_batches_tracked`` that are no single integer.

    Returns:
        The weights in the order of the file, and notes on what was chosen.

    Raises:
        UnsupportedError: no weights, several sets of weights, or entries that are no tensors.
    """
    state_dict, notes = _container(value)
    others = [key for key, entry in state_dict.items() if not _is_weight(key, entry)]
    if others:
        raise UnsupportedError(
            f"expected a state dict of tensors, but {len(others)} of {len(state_dict)} "
            f"entries are something else, first {_quoted(others[0])}"
        )
    weights = _without_extras(_stripped(state_dict))
    if not weights:
        raise UnsupportedError(_NOTHING)
    return weights, notes


def _container(value: object) -> tuple[dict[Any, Any], list[str]]:
    """The dict of weights inside a file, and a note where there are others beside it."""
    if isinstance(value, Inert):
        raise UnsupportedError(_object(value))
    if not isinstance(value, dict):
        raise UnsupportedError(_NOTHING)
    holders = [key for key, entry in value.items() if _holds_tensors(entry)]
    networks = [key for key in holders if any(_prefix(name) is not None for name in value[key])]
    if _USUAL in value:
        beside = [_quoted(key) for key in networks if key != _USUAL]
        return _dict(value[_USUAL]), [f"uses '{_USUAL}', not {_listed(beside)}"] if beside else []
    if _holds_tensors(value):
        return value, []
    candidates = networks or holders
    if len(candidates) > 1:
        raise UnsupportedError(
            f"holds weights under {_listed([_quoted(key) for key in candidates])}; expected one "
            f"state dict: save the right one alone, {_SAVE}"
        )
    if candidates:
        return value[candidates[0]], []
    modules = [entry for entry in value.values() if isinstance(entry, Inert) and entry.is_module]
    return _dict(modules[0] if modules else value), []


def _dict(entry: object) -> dict[Any, Any]:
    if isinstance(entry, Inert):
        raise UnsupportedError(_object(entry))
    if not isinstance(entry, dict) or not entry:
        raise UnsupportedError(_NOTHING)
    return entry


def _holds_tensors(entry: object) -> bool:
    return isinstance(entry, dict) and any(isinstance(v, StoredTensor) for v in entry.values())


def _object(found: Inert) -> str:
    kind = "a whole module" if found.is_module else "an object"
    return (
        f"holds {kind} ({shown(found.path)}); expected its weights alone: load it where it was "
        f"made and save them, {_SAVE}"
    )


def _is_weight(key: object, entry: object) -> bool:
    """Whether an entry is a tensor under a name that can be written as UTF-8."""
    if not isinstance(key, str) or not isinstance(entry, StoredTensor):
        return False
    return not any("\ud800" <= character <= "\udfff" for character in key)


def _stripped(state_dict: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Take off what wrappers put before the names: ``module.``, ``_orig_mod.``, ``model.`` ..."""
    prefixes = list(dict.fromkeys(_prefix(key) for key in state_dict))
    known = [prefix for prefix in prefixes if prefix is not None]
    if len(known) > 1:
        raise UnsupportedError(
            f"holds several networks, under {_listed([_quoted(p) for p in known])}; expected one: "
            f"save the right one alone, {_SAVE}"
        )
    prefix = known[0] if known else ""
    stripped = {key.removeprefix(prefix): entry for key, entry in state_dict.items()}
    if len(stripped) != len(state_dict):
        raise UnsupportedError(f"holds names twice, with and without {_quoted(prefix)}")
    return stripped


def _prefix(key: object) -> str | None:
    """What stands before the part of the network that a key names, if it names one."""
    if not isinstance(key, str):
        return None
    names = key.split(".")
    places = [names.index(part) for part in _PARTS if part in names]
    return "".join(f"{name}." for name in names[: min(places)]) if places else None


def _without_extras(weights: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    copies = {_EMA + key.replace(".", "_") for key in weights}
    return {
        key: entry
        for key, entry in weights.items()
        if key not in copies
        and key != _COUNT
        and key.partition(".")[0] not in _LOSSES
        and (key.rpartition(".")[2] != _COUNTER or _is_counter(entry))
    }


def _is_counter(entry: StoredTensor) -> bool:
    return not entry.dtype.is_floating_point and not entry.dtype.is_complex and entry.shape == ()


def _quoted(key: object) -> str:
    name = key.path if isinstance(key, Inert) else str(key)
    return f"'{shown(name)}'"


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
