"""Finding the weights of a network among the entries of a file."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from emanet_triton.models.checkpoint_files.inert import Inert
from emanet_triton.models.checkpoint_files.layouts import BACKBONES, PADDLE_NAMES
from emanet_triton.models.checkpoint_files.refusals import UnsupportedError, shown
from emanet_triton.models.checkpoint_files.stored import StoredTensor

AUXILIARY = "auxiliary_head"  # used in training only
PARTS = ("backbone", "decode_head", AUXILIARY)
COUNTER = "num_batches_tracked"  # of batch norms; no network uses it
_USUAL = "state_dict"  # of mmcv, mmengine and Lightning
_WRAPPERS = frozenset(  # parts of names that DDP, torch.compile, checkpointing and FSDP insert
    ["module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"]
)
_EMA = "ema_"  # prefix of the copies that mmcv's EMAHook keeps in the model
_COUNT = "n_averaged"  # an entry of torch's AveragedModel
_SAVE = "torch.save(model.state_dict(), ...)"
_NOTHING = "holds no weights; expected a state dict of tensors"
_LISTED = 8
_DEPTH = 4  # levels of nested dicts that are searched

_Dict = dict[Any, Any]


def find_weights(value: object) -> tuple[dict[str, StoredTensor], list[str]]:
    """Find the state dict and remove from its names all that wrappers inserted.

    ``state_dict`` is preferred to other containers, because mmcv and mmengine store averaged
    weights there. A file may also have one dict for each part of the network. The network may be
    one of another project, see ``layouts``. This function leaves out ``ema_*`` copies,
    ``n_averaged``, the dict of Paddle's names, and counters ``num_batches_tracked`` that are no
    single integer. ``load_into`` leaves out all other entries that no network uses.

    Returns:
        The weights in the order of the file, and notes on the choice of the container.

    Raises:
        UnsupportedError: there are no weights, several sets of weights, or entries that are no
            tensors.
    """
    state_dict, notes = _container(value)
    state_dict = _joined(state_dict)
    state_dict = {key: entry for key, entry in state_dict.items() if not _is_names(key, entry)}
    others = [key for key, entry in state_dict.items() if not _is_weight(key, entry)]
    if others:
        raise UnsupportedError(
            f"expected a state dict of tensors, but {len(others)} of {len(state_dict)} "
            f"entries are something else, first {_quoted(others[0])}"
        )
    weights = _stripped(state_dict)
    if not weights:
        raise UnsupportedError(_NOTHING)
    return weights, notes


class _Search:
    """Searches nested dicts for networks. It looks at each dict and each name once.

    Args:
        parts: a network has one of them in the names of its weights.
    """

    def __init__(self, parts: Collection[str] = PARTS) -> None:
        self.parts = parts
        self.holding: dict[int, bool] = {}
        self.naming: dict[str, bool] = {}

    def networks(self, value: _Dict) -> list[tuple[str, _Dict]]:
        """Path and dict of all networks on the uppermost level that has any."""
        level, seen = [("", value)], {id(value)}
        for _ in range(_DEPTH):
            found = [(path, entry) for path, entry in level if self.is_network(entry)]
            if found:
                return found
            level = list(_inside(level, seen))
        return []

    def is_network(self, entry: _Dict) -> bool:
        return self.is_in_parts(entry) or any(
            isinstance(value, StoredTensor) and self.names_part(key) for key, value in entry.items()
        )

    def is_in_parts(self, entry: _Dict) -> bool:
        """Whether a dict has a state dict for each part of a network but the auxiliary head."""
        return all(self.holds_tensors(entry.get(part)) for part in PARTS[:2])

    def holds_tensors(self, entry: object) -> bool:
        if not isinstance(entry, dict):
            return False
        if id(entry) not in self.holding:
            tensors = (isinstance(value, StoredTensor) for value in entry.values())
            self.holding[id(entry)] = any(tensors)
        return self.holding[id(entry)]

    def names_part(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        if key not in self.naming:
            self.naming[key] = _prefix(key, self.parts) is not None
        return self.naming[key]


def _inside(level: list[tuple[str, _Dict]], seen: set[int]) -> Iterator[tuple[str, _Dict]]:
    """The dicts inside the dicts of a level that were not seen before, with their paths."""
    for path, holder in level:
        for key, entry in holder.items():
            if isinstance(entry, dict) and id(entry) not in seen:
                seen.add(id(entry))
                yield f"{path}.{_name(key)}" if path else _name(key), entry


def _container(value: object) -> tuple[_Dict, list[str]]:
    """The dict of weights in a file, and a note if the file has others."""
    search, notes = _Search(), []
    if isinstance(value, dict) and _USUAL in value:
        rest = {key: entry for key, entry in value.items() if key != _USUAL}
        beside = [f"'{path}'" for path, _ in search.networks(rest) if path]
        notes = [f"uses '{_USUAL}', not {_listed(beside)}"] if beside else []
        value = value[_USUAL]
    value = _checked_dict(value)
    networks = search.networks(value) or _Search(BACKBONES).networks(value)
    modules = [entry for entry in value.values() if isinstance(entry, Inert) and entry.is_module]
    if not networks and modules:
        raise UnsupportedError(_object_problem(modules[0]))
    if not networks and not search.holds_tensors(value):
        items = value.items()
        networks = [(_name(key), entry) for key, entry in items if search.holds_tensors(entry)]
    if len(networks) > 1:
        paths = [f"'{path}'" for path, _ in networks]
        raise UnsupportedError(
            f"holds weights under {_listed(paths)}; expected one state dict: "
            f"save the right one alone, {_SAVE}"
        )
    return (networks[0][1] if networks else value), notes


def _checked_dict(entry: object) -> _Dict:
    if isinstance(entry, Inert):
        raise UnsupportedError(_object_problem(entry))
    if not isinstance(entry, dict) or not entry:
        raise UnsupportedError(_NOTHING)
    return entry


def _joined(state_dict: _Dict) -> _Dict:
    """One state dict, joined from the state dicts of the network's parts if these are separate."""
    if not _Search().is_in_parts(state_dict):
        return state_dict
    parts = [part for part in PARTS if isinstance(state_dict.get(part), dict)]
    return {
        f"{part}.{key}" if isinstance(key, str) else key: entry
        for part in parts
        for key, entry in state_dict[part].items()
    }


def _object_problem(found: Inert) -> str:
    kind = "a whole module" if found.is_module else "an object"
    return (
        f"holds {kind} ({shown(found.path)}); expected its weights alone: load it where it was "
        f"made and save them, {_SAVE}"
    )


def _is_names(key: object, entry: object) -> bool:
    return key == PADDLE_NAMES and isinstance(entry, dict)


def _is_weight(key: object, entry: object) -> bool:
    """Whether an entry is a tensor under a name that can be written as UTF-8."""
    if not isinstance(key, str) or not isinstance(entry, StoredTensor):
        return False
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _stripped(state_dict: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The weights that a network uses, by its own names."""
    names = {key: _unwrapped(key) for key in state_dict if key.rpartition(".")[2] != _COUNT}
    known = _prefixes(names.values(), PARTS) or _prefixes(names.values(), BACKBONES)
    if len(known) > 1:
        raise UnsupportedError(
            f"holds several networks, under {_listed([_quoted(p) for p in known])}; expected one: "
            f"save the right one alone, {_SAVE}"
        )
    prefix = known[0] if known else ""
    keys: dict[str, str] = {}
    for key, name in names.items():
        own = name.removeprefix(prefix)
        if keys.setdefault(own, key) != key:
            raise UnsupportedError(
                f"holds {_quoted(own)} twice, as {_quoted(keys[own])} and {_quoted(key)}; "
                f"expected one network: save the right one alone, {_SAVE}"
            )
    return _without_extras({name: state_dict[key] for name, key in keys.items()})


def _unwrapped(key: str) -> str:
    """A name without the parts that wrappers inserted."""
    *holders, last = key.split(".")
    return ".".join([*(name for name in holders if name not in _WRAPPERS), last])


def _prefixes(keys: Iterable[str], parts: Collection[str]) -> list[str]:
    """The different texts before parts of networks."""
    prefixes = dict.fromkeys(_prefix(key, parts) for key in keys)
    return [prefix for prefix in prefixes if prefix is not None]


def _prefix(key: str, parts: Collection[str]) -> str | None:
    """The text of a key before a part of the network, or ``None`` if the key names no part."""
    names = key.split(".")
    places = [names.index(part) for part in parts if part in names]
    return "".join(f"{name}." for name in names[: min(places)]) if places else None


def _without_extras(weights: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    copies = {_EMA + key.replace(".", "_") for key in weights}
    return {
        key: entry
        for key, entry in weights.items()
        if key not in copies and (key.rpartition(".")[2] != COUNTER or _is_counter(entry))
    }


def _is_counter(entry: StoredTensor) -> bool:
    return not entry.dtype.is_floating_point and not entry.dtype.is_complex and entry.shape == ()


def _name(key: object) -> str:
    return shown(key.path if isinstance(key, Inert) else str(key))


def _quoted(key: object) -> str:
    return f"'{_name(key)}'"


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
