"""Memory of a process, and peak memory of a provider: on a CPU in a process of its own."""

import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from emanet_triton.bench.case import Case, Cases
from emanet_triton.bench.clocks import Call
from emanet_triton.bench.interrupts import no_interrupts
from emanet_triton.bench.machine import MEGABYTE
from emanet_triton.bench.options import Selection
from emanet_triton.heap import give_back

T = TypeVar("T")


class CudaPeak:
    """Counts from the memory that is allocated when this object is made, before the provider."""

    def __init__(self) -> None:
        self._before = torch.cuda.memory_allocated()

    def of(self, call: Call) -> float:
        """MB that the provider and one more of its calls take."""
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - self._before) / MEGABYTE


def peak_in_child(cases: Cases, selection: Selection, name: str, provider: str) -> float | None:
    """MB by which a provider and its call raise the resident memory of a fresh process.

    Memory that is needed only while the provider is made does not count. A compiled provider has
    no figure, because the compiler's memory would count.

    Args:
        cases: makes the cases of a suite anew in the child.
        selection: the argument of ``cases``.
        name: the case's name.
        provider: the provider's name.
    """
    if "compiled" in provider:
        return None
    return in_child(_peak, cases, selection, name, provider) / MEGABYTE


def in_child(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a fresh process, and return its result.

    Raises:
        BrokenProcessPool: the process ended without a result.
        KeyboardInterrupt: Ctrl-C; the process is ended.
    """
    spawn = multiprocessing.get_context("spawn")
    before = multiprocessing.active_children()
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        with no_interrupts():  # this process answers for both
            result = pool.submit(function, *arguments)
        try:
            return result.result()
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                if process not in before:
                    process.kill()  # the pool would wait for it
            raise


def _peak(cases: Cases, selection: Selection, name: str, provider: str) -> int:
    if selection.threads:
        torch.set_num_threads(selection.threads)
    tiny = replace(selection, tiny=True, sizes=(), batches=())
    warm_up = next(case for case in cases(tiny) if provider in case.providers)
    _prepare(warm_up)
    warm_up.providers[provider]()()  # loads what the libraries load at their first call
    case = next(case for case in cases(selection) if case.name == name)
    _prepare(case)
    before = resident_bytes("VmRSS")
    call = case.providers[provider]()
    warm_up.providers[provider]()  # PyTorch's exporter keeps the last network: let it be this one
    begin_peak()
    call()
    return max(0, resident_bytes("VmHWM") - before)  # less if free memory was given back


def _prepare(case: Case) -> None:
    if case.prepare:
        case.prepare()


def begin_peak() -> None:
    """Let the peak of this process's resident memory start anew, without memory that is free."""
    gc.collect()
    give_back()
    Path("/proc/self/clear_refs").write_text("5")


def resident_bytes(field: str) -> int:
    """Bytes of this process that are in memory, now ("VmRSS") or at most so far ("VmHWM")."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])
