"""Which entries of a file are the weights: containers, wrappers, copies and counters."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import refusal_of, save, tiny_emanet
from torch import Tensor

from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.checkpoint_files.refusals import UnsupportedError
from emanet_triton.models.checkpoint_files.stored import Storage, StoredTensor
from emanet_triton.models.checkpoint_files.weights_in import PARTS, find_weights
from emanet_triton.models.loading import load_into

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return tiny_emanet().state_dict()


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + key: value for key, value in weights.items()}


def with_ema_hook(weights: Weights) -> Weights:
    """mmcv's EMAHook keeps a second copy of every parameter as a buffer of the model."""
    copies = {f"ema_{key.replace('.', '_')}": value + 1 for key, value in weights.items()}
    return {**weights, **copies}


def averaged(weights: Weights) -> Weights:
    return {"n_averaged": torch.tensor(3), **prefixed("module.")(weights)}


def averaged_in_lightning(weights: Weights) -> Weights:
    return {"model.n_averaged": torch.tensor(3), **prefixed("model.module.")(weights)}


def inside(place: str, wrapper: str) -> Callable[[Weights], Weights]:
    """Only one module of the network is wrapped."""
    return lambda weights: {
        key.replace(place, place + wrapper, 1): value for key, value in weights.items()
    }


def in_wrapped_ema_hook(weights: Weights) -> Weights:
    return prefixed("module.")(with_ema_hook(weights))


def in_parts(weights: Weights) -> dict[str, Weights]:
    """A state dict for each part of the network."""
    return {
        part: {k.removeprefix(part + "."): v for k, v in weights.items() if k.startswith(part)}
        for part in PARTS
    }


STATE_DICTS = {
    "bare": lambda w: w,
    "ema-hook": with_ema_hook,
    "ema-hook-ddp": in_wrapped_ema_hook,
    "compiled": prefixed("_orig_mod."),
    "ddp-compiled": prefixed("module._orig_mod."),
    "compiled-ddp": prefixed("_orig_mod.module."),
    "averaged": averaged,
    "lightning": prefixed("model."),
    "other-name": prefixed("segmentor.net."),
    "averaged-lightning": averaged_in_lightning,
    "backbone-compiled": inside("backbone.", "_orig_mod."),
    "block-compiled": inside("backbone.layer1.0.", "_orig_mod."),
    "block-checkpointed": inside("backbone.layer2.0.", "_checkpoint_wrapped_module."),
    "block-fsdp": inside("backbone.layer2.0.", "_fsdp_wrapped_module."),
    "backbone-ddp": inside("backbone.", "module."),
    "fsdp": prefixed("_fsdp_wrapped_module."),
    "fsdp-compiled": prefixed("_fsdp_wrapped_module._orig_mod.module."),
}
CONTAINERS = {
    "model_state_dict": lambda w: {"model_state_dict": w, "epoch": 3},
    "model": lambda w: {"model": w, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "net": lambda w: {"net": prefixed("module.")(w), "best": 0.5},
    "best-beside": lambda w: {"model": w, "epoch": 3, "best_miou": torch.tensor(0.7)},
    "random-state-beside": lambda w: {"model": w, "rng_state": torch.get_rng_state()},
    "class-weights-beside": lambda w: {"net": w, "class_weights": torch.ones(19)},
    "epoch-and-optimizer-beside": lambda w: {
        "epoch": torch.tensor(3),
        "model": w,
        "optimizer": {"state": {0: {"step": torch.ones(1)}}},
    },
    "nested": lambda w: {"model": {"state_dict": w}},
    "nested-beside": lambda w: {"model": {"net": w, "best": torch.ones(1)}, "lr": torch.ones(1)},
    "parts": lambda w: {**in_parts(w), "epoch": 3},
    "wrapped-parts": lambda w: {k: prefixed("module.")(p) for k, p in in_parts(w).items()},
    "model-beside-a-loss": lambda w: {"model": w, "loss": {"weight": torch.ones(19)}},
}


def outer(content: Callable[[Weights], Weights]) -> Callable[[Weights], dict[str, Weights]]:
    return lambda weights: {"state_dict": content(weights)}


CONTENTS = (
    STATE_DICTS | CONTAINERS | {f"{name}-inside": outer(c) for name, c in STATE_DICTS.items()}
)


@pytest.mark.parametrize("name", CONTENTS)
def test_finds_the_weights(tmp_path, weights, name):
    path = save(CONTENTS[name](weights), tmp_path / "x.pth")
    found = read_checkpoint(path).state_dict
    assert list(found) == list(weights)
    assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_averaged_weights_stand_under_state_dict(tmp_path, weights):
    """mmengine's EMAHook stores averaged weights there, and the other weights beside them."""
    beside = prefixed("module.")({key: value + 1 for key, value in weights.items()})
    path = save({"state_dict": weights, "ema_state_dict": beside}, tmp_path / "x.pth")
    with pytest.warns(UserWarning) as caught:
        found = read_checkpoint(path).state_dict
    assert [str(w.message) for w in caught] == [f"{path}: uses 'state_dict', not 'ema_state_dict'"]
    assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_several_containers_are_listed(tmp_path, weights):
    path = save({"model": weights, "model_ema": dict(weights), "epoch": 1}, tmp_path / "x.pth")
    assert refusal_of(path) == (
        "holds weights under 'model', 'model_ema'; expected one state dict: "
        "save the right one alone, torch.save(model.state_dict(), ...)"
    )


def test_several_networks_are_listed(tmp_path, weights):
    content = {**prefixed("model.")(weights), **prefixed("ema_model.")(weights)}
    assert refusal_of(save(content, tmp_path / "x.pth")) == (
        "holds several networks, under 'model.', 'ema_model.'; expected one: "
        "save the right one alone, torch.save(model.state_dict(), ...)"
    )


def test_names_that_differ_only_by_wrappers_are_listed(tmp_path, weights):
    content = {**weights, "backbone._orig_mod.stem.0.weight": torch.ones(1)}
    assert refusal_of(save(content, tmp_path / "x.pth")) == (
        "holds 'backbone.stem.0.weight' twice, as 'backbone.stem.0.weight' and "
        "'backbone._orig_mod.stem.0.weight'; expected one network: "
        "save the right one alone, torch.save(model.state_dict(), ...)"
    )


def test_one_dict_under_two_names_is_one_set_of_weights(tmp_path, weights):
    path = save({"model": weights, "best": weights}, tmp_path / "x.pth")
    assert read_checkpoint(path).state_dict.keys() == weights.keys()


SHARED = {str(i): i for i in range(20_000)}
LONG = ".".join(["a"] * 500_000)
STORED = StoredTensor(Storage("0", torch.float32, 1), torch.float32, 0, (1,), (1,))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (dict.fromkeys(range(20_000), SHARED), "20000 of 20000 entries are something else"),
        (
            {i: dict.fromkeys(["a", "b"], SHARED) for i in range(20_000)},
            "20000 of 20000 entries are something else",
        ),
        ({i: {LONG: STORED} for i in range(2_000)}, "holds weights under '0', '1', "),
    ],
    ids=["shared-dict", "shared-deeper", "long-name"],
)
def test_shared_dicts_and_names_are_looked_at_once(value, expected):
    start = time.process_time()
    with pytest.raises(UnsupportedError, match=expected):
        find_weights(value)
    assert time.process_time() - start < 2


def test_unknown_entries_beside_the_network_stay(tmp_path, weights):
    content = {**prefixed("model.")(weights), "teacher": torch.ones(1)}
    found = read_checkpoint(save(content, tmp_path / "x.pth")).state_dict
    assert found.keys() - weights.keys() == {"teacher"}


@pytest.mark.parametrize("change", [None, torch.Tensor.half, torch.Tensor.float, lambda n: n[None]])
def test_counters_may_be_missing_or_of_any_kind(tmp_path, weights, change):
    content = {
        key: change(value) if key.endswith("num_batches_tracked") else value
        for key, value in weights.items()
        if change or not key.endswith("num_batches_tracked")
    }
    model = tiny_emanet()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_into(model, read_checkpoint(save(content, tmp_path / "x.pth")))
    for key, value in model.state_dict().items():
        counter = key.endswith("num_batches_tracked")
        assert torch.equal(value, torch.tensor(0) if counter else weights[key]), key


def test_an_infinite_counter_is_no_infinite_weight(tmp_path, weights):
    """``{k: v.half()}`` makes infinity of 80000 steps."""
    key = "backbone.stem.1.num_batches_tracked"
    path = save({**weights, key: torch.tensor(80000.0).half()}, tmp_path / "x.pth")
    load_into(tiny_emanet(), read_checkpoint(path))


def test_control_characters_of_names_are_escaped(tmp_path, weights):
    key = "backbone.\x1b[2J\r"
    path: Path = save({**weights, key: torch.tensor(torch.nan)}, tmp_path / "x.pth")
    assert refusal_of(path).endswith("first backbone.\\x1b[2J\\r")
    path = save({**weights, key: torch.ones(1)}, path)
    with pytest.raises(ValueError) as error:
        load_into(tiny_emanet(), read_checkpoint(path))
    assert "left over in the file (1):\n  backbone.\\x1b[2J\\r" in str(error.value)
