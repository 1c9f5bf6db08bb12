"""The loop that measures a case: it checks every provider first, then times them in turns."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from emanet_triton.bench.case import Absent, Case
from emanet_triton.bench.clocks import (
    Call,
    Timed,
    Timer,
    events_timer,
    graph_timer,
    host_seconds,
    poison,
    synchronised_timer,
    wall_timer,
)
from emanet_triton.bench.forecasts import forecast
from emanet_triton.bench.machine import Machine
from emanet_triton.bench.memory import CudaPeak
from emanet_triton.bench.method import FEWEST_ROUNDS, Method, Statistics, ratio
from emanet_triton.bench.rows import PASSED, Row
from emanet_triton.errors import describe

Times = Mapping[str, list[Timed]]
EARLY_SECONDS = 1.0  # the early row of a provider gets no further times after these


class Lost(Exception):  # noqa: N818 (it says what happened to the process)
    """This process cannot go on: another process has to measure the rest of the case.

    Attributes:
        provider: the provider that ran; empty if none did.
        reason: why the process cannot go on.
    """

    def __init__(self, provider: str, reason: str) -> None:
        super().__init__(provider, reason)
        self.provider, self.reason = provider, reason


class Watch:
    """Is told of each provider while a case is measured. This one ignores all it is told.

    Attributes:
        early: whether to time each provider alone as soon as it has passed its gate, and to report
            the row, so that the row exists if the case never ends.
    """

    early = False

    def begins(self, provider: str) -> None:
        """A provider is about to run."""

    def found(self, row: Row) -> None:
        """There is an early row of a provider. The row of the finished case replaces it."""

    def is_lost(self, error: Exception) -> bool:
        """Whether nothing more can run in this process after an error."""
        return False

    def gate_of(self, name: str, error: Exception) -> str:
        """The gate "failed: why" of a provider that raised an error.

        Raises:
            Lost: nothing more can run in this process.
        """
        if self.is_lost(error):
            raise Lost(name, describe(error)) from error
        return f"failed: {describe(error)}"


@dataclass
class _Tried:
    """What is known of a provider before it is timed in turns with the others."""

    gate: str
    timer: Timer | None = None
    error: float | None = None
    bound: float | None = None
    peak_mb: float | None = None
    host_us: float | None = None


def measure(
    case: Case,
    method: Method,
    machine: Machine,
    peak: Callable[[str], float | None] | None = None,
    watch: Watch | None = None,
) -> list[Row]:
    """One row for every provider. A provider that is absent, fails or is wrong gets no time.

    Args:
        case: what to measure.
        method: how long to time it.
        machine: its rates give the floors.
        peak: measures the peak memory of a provider, in MB, where this process cannot.
        watch: is told of the providers meanwhile.

    Raises:
        Lost: ``watch`` says that this process is lost.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # else the cases together exhaust its limit of recompilations
    return _Measurement(case, method, machine, watch or Watch()).rows(peak)


def failed_row(case: Case, provider: str, machine: Machine, reason: str) -> Row:
    """The row of a provider that could not be measured."""
    return _row(case, provider, _Tried(f"failed: {reason}"), {}, machine)


class _Broken(Exception):  # noqa: N818 (it holds the error)
    """A provider raised while it was timed."""

    def __init__(self, provider: str, error: Exception) -> None:
        super().__init__(provider)
        self.provider, self.error = provider, error


class _Measurement:
    """A case on its way from providers to rows."""

    def __init__(self, case: Case, method: Method, machine: Machine, watch: Watch) -> None:
        self.case, self.method, self.machine, self.watch = case, method, machine, watch
        self.cuda = method.device == "cuda"
        self.tried: dict[str, _Tried] = {}
        self.errors: dict[str, float] = {}

    def rows(self, peak: Callable[[str], float | None] | None) -> list[Row]:
        if not self._prepared():
            return [self._row(name) for name in self.case.providers]
        for name in sorted(self.case.providers, key=lambda name: name != self.case.baseline):
            self._try(name)
        times = self._times_in_turns()
        if self.case.peak and peak:
            self._peaks(peak)
        return [self._row(name, times) for name in self.case.providers]

    def _prepared(self) -> bool:
        try:
            if self.case.prepare:
                self.case.prepare()
        except Exception as error:  # a case that breaks does not end the run
            self.tried = dict.fromkeys(self.case.providers, self._ended("", error))
            return False
        return True

    def _try(self, name: str) -> None:
        """Check a provider and, if the watch wants it, report a row of it alone."""
        self.watch.begins(name)
        alone: Times = {}
        try:
            tried = self.tried[name] = self._gated(name)
            if self.watch.early and tried.timer:
                alone = {name: _few_times(tried.timer)}
        except Exception as error:  # a peer that does not run is a row too
            self.tried[name] = self._ended(name, error)
        if self.watch.early:
            self.watch.found(self._row(name, alone))

    def _gated(self, name: str) -> _Tried:
        watch = CudaPeak() if self.case.peak and self.cuda else None
        call = self.case.providers[name]()
        tried = self._judged(name, self._error(call()))
        if tried.gate != PASSED:
            return tried
        peak_mb = watch.of(call) if watch else None
        timer = self._timer(call)
        if self.cuda and self.case.graph:
            tried = self._judged(name, self._error_of_poisoned(timer.run))
        if tried.gate == PASSED:
            tried.timer, tried.peak_mb = timer, peak_mb
            if self.cuda and not self.case.wall:
                tried.host_us = 1e6 * host_seconds(call)
        return tried

    def _judged(self, name: str, error: float) -> _Tried:
        """Whether a provider passes its gate; the worst of its errors so far counts."""
        error = self.errors[name] = max(self.errors.get(name, 0.0), error, key=_severity)
        bound = self.case.bound
        most = bound(name, self.errors) if callable(bound) else bound
        failure = f"failed: error {error:.1e} above {most:.1e}"
        return _Tried(PASSED if error <= most else failure, None, _finite(error), _finite(most))

    def _error(self, result: object) -> float:
        return float(self.case.error(result))

    def _error_of_poisoned(self, run: Call) -> float:
        """The error of one more call, before which the memory of its result is overwritten.

        A replay writes its result to the memory of the previous result. So do launches, nearly
        always.
        """
        result = run()
        poison(result, self.method.device)
        del result
        return self._error(run())

    def _timer(self, call: Call) -> Timer:
        if not self.cuda:
            return wall_timer(call)
        if self.case.wall:
            return synchronised_timer(call)
        return graph_timer(call) if self.case.graph else events_timer(call)

    def _times_in_turns(self) -> Times:
        """Times of all providers that passed. Without one that breaks, all are timed anew."""
        while True:
            passed = {name: tried.timer for name, tried in self.tried.items() if tried.timer}
            timers = {name: self._announced(name, timer) for name, timer in passed.items()}
            try:
                return self.method.times(timers)
            except _Broken as broken:
                self.tried[broken.provider] = self._ended(broken.provider, broken.error)

    def _announced(self, name: str, timer: Timer) -> Callable[[], Timed]:
        def timed() -> Timed:
            self.watch.begins(name)
            try:
                return timer()
            except Exception as error:
                raise _Broken(name, error) from error

        return timed

    def _peaks(self, peak: Callable[[str], float | None]) -> None:
        for name, tried in self.tried.items():
            if tried.timer:
                try:
                    tried.peak_mb = peak(name)
                except Exception as error:  # such as the end of a process that took all memory
                    self.tried[name] = _Tried(f"failed: peak memory: {describe(error)}")

    def _ended(self, name: str, error: Exception) -> _Tried:
        """What remains of a provider that raised an error.

        Raises:
            Lost: nothing more can run in this process.
        """
        if isinstance(error, Absent):
            return _Tried(f"absent: {error}")
        return _Tried(self.watch.gate_of(name, error))

    def _row(self, name: str, times: Times | None = None) -> Row:
        return _row(self.case, name, self.tried[name], times or {}, self.machine)


def _few_times(timer: Timer) -> list[Timed]:
    """Three times, or fewer if a call is long."""
    begin, times = time.monotonic(), [timer()]
    while len(times) < FEWEST_ROUNDS and time.monotonic() - begin < EARLY_SECONDS:
        times.append(timer())
    return times


def _severity(error: float) -> tuple[bool, float]:
    """Orders errors. NaN is the worst."""
    return math.isnan(error), error


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _row(case: Case, name: str, tried: _Tried, times: Times, machine: Machine) -> Row:
    columns: dict[str, Any] = {}
    rate = machine.matmul_tflop_s.get(case.dtype)
    if name in times and tried.timer:
        columns |= _timed_columns(tried, tried.timer, times[name], times.get(case.baseline))
    if case.floor:
        seconds = columns["p50_ms"] / 1e3 if columns else None
        if rate:
            floor = case.floor.floor_seconds(machine.copy_gb_s * 1e9, rate * 1e12)
            columns["floor_ms"] = 1e3 * floor
            columns["x_floor"] = seconds and seconds / floor
        if seconds:
            columns["gb_s"] = case.floor.bytes / seconds / 1e9
            columns["tflop_s"] = case.floor.flops / seconds / 1e12
    return Row(
        case.suite,
        case.name,
        name,
        tried.gate,
        error=tried.error,
        bound=tried.bound,
        peak_mb=tried.peak_mb,
        predicted_ms=forecast(case.suite, case.name, name),
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


def _timed_columns(
    tried: _Tried, timer: Timer, times: list[Timed], baseline: list[Timed] | None
) -> dict[str, Any]:
    warm = [timed.warm for timed in times]
    own = Statistics.of(warm)
    columns: dict[str, Any] = {"rounds": own.rounds, "clock": timer.clock, "host_us": tried.host_us}
    columns |= {"p20_ms": 1e3 * own.p20, "p50_ms": 1e3 * own.p50, "p80_ms": 1e3 * own.p80}
    cold = [timed.cold for timed in times if timed.cold is not None]
    if cold:
        columns["cold_ms"] = 1e3 * Statistics.of(cold).p50
    if baseline:
        against = ratio([timed.warm for timed in baseline], warm)
        columns |= {"ratio": against.p50, "ratio_p20": against.p20, "ratio_p80": against.p80}
    return columns
