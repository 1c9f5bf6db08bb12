"""The peak memory of a provider, measured in a process of its own."""

import os
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
import torch

from emanet_triton.bench.case import Case
from emanet_triton.bench.memory import peak_in_child
from emanet_triton.bench.options import Selection

MEGABYTES = 64


def cases(selection):
    """One case whose provider takes 64 MB beside its shared input of 128 (1 MB if tiny)."""
    size = 2**20 if selection.tiny else MEGABYTES * 2**20
    shared = []
    yield Case(
        suite="em",
        name="block",
        providers={"plain": lambda: lambda: torch.ones(size, dtype=torch.uint8).max()},
        baseline="plain",
        error=lambda got: 0.0,
        bound=0.0,
        prepare=lambda: shared.append(torch.ones(2 * size, dtype=torch.uint8)),
    )


def test_the_peak_is_the_providers():
    peak = peak_in_child(cases, Selection(threads=1), "block", "plain")
    assert peak == pytest.approx(MEGABYTES * 2**20 / 1e6, rel=0.1)


LAST = []  # what a library keeps of the last provider


def kept_cases(selection):
    """As ``cases``, but twice the provider's memory is kept until another provider is made."""
    (case,) = cases(selection)

    def make():
        LAST[:] = [torch.ones((1 if selection.tiny else 2 * MEGABYTES) * 2**20, dtype=torch.uint8)]
        return case.providers["plain"]()

    yield replace(case, providers={"plain": make})


def test_what_a_library_keeps_of_the_last_network_does_not_count():
    peak = peak_in_child(kept_cases, Selection(threads=1), "block", "plain")
    assert peak == pytest.approx(MEGABYTES * 2**20 / 1e6, rel=0.1)


def hole_cases(selection):
    """As ``cases``, but free memory lies below a small tensor that was made last."""
    (case,) = cases(selection)

    def make():
        small = 1 if selection.tiny else 16 * MEGABYTES
        LAST[:] = [torch.ones(2**16, dtype=torch.uint8) for _ in range(small)][-1:]
        return case.providers["plain"]()

    yield replace(case, providers={"plain": make})


def test_what_the_c_library_keeps_does_not_count():
    peak = peak_in_child(hole_cases, Selection(threads=1), "block", "plain")
    assert peak == pytest.approx(MEGABYTES * 2**20 / 1e6, rel=0.1)


def giving_cases(selection):
    """As ``cases``, but the provider frees its shared input, of 128 MB."""
    (case,) = cases(selection)
    shared = [torch.ones((1 if selection.tiny else 2 * MEGABYTES) * 2**20, dtype=torch.uint8)]

    def make():
        shared.clear()
        return case.providers["plain"]()

    yield replace(case, providers={"plain": make}, prepare=None)


def test_no_peak_is_below_zero():
    assert peak_in_child(giving_cases, Selection(threads=1), "block", "plain") == 0


def dying_cases(selection):
    """One case whose provider ends its process, as running out of memory does."""
    (case,) = cases(selection)
    yield replace(case, providers={"plain": lambda: lambda: os._exit(9)})


def test_a_process_that_dies_is_an_error_not_a_wait():
    with pytest.raises(BrokenProcessPool):
        peak_in_child(dying_cases, Selection(threads=1), "block", "plain")


def test_what_compiles_itself_has_no_peak():
    assert peak_in_child(cases, Selection(), "block", "plain-compiled") is None
