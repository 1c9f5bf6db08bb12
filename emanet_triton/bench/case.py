"""A case of a suite, and the one loop that measures it: the gate first, then times in turns."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from emanet_triton.bench.machine import Machine
from emanet_triton.bench.memory import CudaPeak
from emanet_triton.bench.method import Call, Method, Statistics, ratio
from emanet_triton.bench.rows import PASSED, Row
from emanet_triton.kernels.cost import Cost


class Absent(Exception):  # noqa: N818 (it is not an error)
    """A provider that cannot run here, with the reason."""


@dataclass(frozen=True)
class Case:
    """One problem that several providers solve.

    Attributes:
        suite: its suite's name.
        name: words and k=v, the key that joins rows of different runs.
        providers: name → makes its call, with whatever that needs; may raise ``Absent``.
        baseline: the provider that ratios refer to; it runs first.
        error: of a result, against the suite's reference; not a number never passes.
        bound: the largest error that passes, or a function of the provider's name and the errors
            of all so far, its own included.
        prepare: makes what the providers share, such as inputs. What it allocates is not counted
            as peak memory; what a provider allocates, its weights included, is.
        floor: least bytes and FLOPs.
        dtype: whose matmul rate is the ceiling.
        predicted_ms: provider → what was forecast before anything was measured.
        peak: whether to measure peak memory.
        wall: on a GPU, time by wall clock until the device is idle.
    """

    suite: str
    name: str
    providers: Mapping[str, Callable[[], Call]]
    baseline: str
    error: Callable[[object], float]
    bound: float | Callable[[str, Mapping[str, float]], float]
    prepare: Callable[[], object] | None = None
    floor: Cost | None = None
    dtype: str = "fp32"
    predicted_ms: Mapping[str, str] = field(default_factory=dict)
    peak: bool = False
    wall: bool = False


@dataclass
class _Tried:
    """What is known of a provider before it is timed."""

    gate: str
    call: Call | None = None
    error: float | None = None
    bound: float | None = None
    peak_mb: float | None = None


def measure(
    case: Case,
    method: Method,
    machine: Machine,
    peak: Callable[[str], float | None] | None = None,
) -> list[Row]:
    """One row for every provider. One that is absent, fails or is wrong gets no time.

    Args:
        case: what to measure.
        method: how long to time it.
        machine: whose ceilings floors are computed with.
        peak: measures the peak memory of a provider, in MB, where this process cannot.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # what many cases compile would exhaust its limit of recompilations
    try:
        if case.prepare:
            case.prepare()
        tried = _try_all(case, method.device)
        calls = {name: t.call for name, t in tried.items() if t.gate == PASSED}
        times = method.times(calls, case.wall)
    except Exception as error:  # a case that breaks is not the end of the run
        failed = _Tried(f"failed: {_describe(error)}")
        return [_row(case, name, failed, {}, machine) for name in case.providers]
    if case.peak and peak:
        for name in calls:
            try:
                tried[name].peak_mb = peak(name)
            except Exception as error:  # such as the end of a process that took all memory
                tried[name] = _Tried(f"failed: peak memory: {_describe(error)}")
                del times[name]
    return [_row(case, name, tried[name], times, machine) for name in case.providers]


def _try_all(case: Case, device: str) -> dict[str, _Tried]:
    """Every provider after its correctness gate, the baseline first."""
    tried: dict[str, _Tried] = {}
    errors: dict[str, float] = {}
    for name in dict.fromkeys((case.baseline, *case.providers)):
        try:
            tried[name] = _try(case, name, device, errors)
        except Absent as absent:
            tried[name] = _Tried(f"absent: {absent}")
        except Exception as error:  # a peer that does not run is a row too, and not the end
            tried[name] = _Tried(f"failed: {_describe(error)}")
    return tried


def _try(case: Case, name: str, device: str, errors: dict[str, float]) -> _Tried:
    watch = CudaPeak() if case.peak and device == "cuda" else None
    call = case.providers[name]()
    errors[name] = error = float(case.error(call()))
    bound = case.bound(name, errors) if callable(case.bound) else case.bound
    found = {"error": _number(error), "bound": _number(bound)}
    if not error <= bound:
        return _Tried(f"failed: error {error:.1e} above {bound:.1e}", **found)
    return _Tried(PASSED, call, **found, peak_mb=watch.of(call) if watch else None)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _describe(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _row(
    case: Case, name: str, tried: _Tried, times: Mapping[str, list[float]], machine: Machine
) -> Row:
    columns: dict[str, object] = {}
    rate = machine.matmul_tflop_s.get(case.dtype)
    floor_seconds = None
    if case.floor and rate:
        floor_seconds = case.floor.floor_seconds(machine.copy_gb_s * 1e9, rate * 1e12)
        columns["floor_ms"] = 1e3 * floor_seconds
    if name in times:
        own = Statistics.of(times[name])
        columns |= {"p20_ms": 1e3 * own.p20, "p50_ms": 1e3 * own.p50, "p80_ms": 1e3 * own.p80}
        columns["rounds"] = own.rounds
        if case.baseline in times:
            against = ratio(times[case.baseline], times[name])
            columns |= {"ratio": against.p50, "ratio_p20": against.p20, "ratio_p80": against.p80}
        if case.floor:
            columns["gb_s"] = case.floor.bytes / own.p50 / 1e9
            columns["tflop_s"] = case.floor.flops / own.p50 / 1e12
        if floor_seconds:
            columns["x_floor"] = own.p50 / floor_seconds
    return Row(
        case.suite,
        case.name,
        name,
        tried.gate,
        error=tried.error,
        bound=tried.bound,
        peak_mb=tried.peak_mb,
        predicted_ms=case.predicted_ms.get(name, ""),
        device=machine.device,
        threads=machine.threads,
        dtype=case.dtype,
        driver=machine.driver,
        torch=machine.torch,
        triton=machine.triton,
        commit=machine.commit,
        date=machine.date,
        copy_gb_s=machine.copy_gb_s,
        matmul_tflop_s=rate,
        noise=machine.noise,
        **columns,
    )
