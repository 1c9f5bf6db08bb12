"""The loop that measures a case: it checks every provider first, then times them in turns."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from emanet_triton.bench.case import Absent, Case, worst
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
    return _row(case, provider, machine, f"failed: {reason}")


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
        self.found: dict[str, Row] = {}
        self.timers: dict[str, Timer] = {}  # of the providers that passed
        self.errors: dict[str, float] = {}

    def rows(self, peak: Callable[[str], float | None] | None) -> list[Row]:
        if self._prepared():
            for name in sorted(self.case.providers, key=lambda name: name != self.case.baseline):
                self._try(name)
            times = self._times_in_turns()
            if self.case.peak and peak:
                self._peaks(peak)
            for name in self.timers:
                self._add_times(name, times)
        return [self.found[name] for name in self.case.providers]

    def _prepared(self) -> bool:
        try:
            if self.case.prepare:
                self.case.prepare()
        except Exception as error:  # a case that breaks does not end the run
            gate = self._gate("", error)
            for name in self.case.providers:
                self._fail(name, gate)
            return False
        return True

    def _try(self, name: str) -> None:
        """Check a provider and, if the watch wants it, report a row of it alone."""
        self.watch.begins(name)
        try:
            self._check(name)
            if self.watch.early and name in self.timers:
                self._add_times(name, {name: _few_times(self.timers[name])})
        except Exception as error:  # a peer that does not run is a row too
            self._fail(name, self._gate(name, error))
        if self.watch.early:
            self.watch.found(self.found[name])

    def _check(self, name: str) -> None:
        watch = CudaPeak() if self.case.peak and self.cuda else None
        call = self.case.providers[name]()
        if not self._passes(name, call()):
            return
        if self.cuda:
            call()  # it makes the launchers' tapes, which the next calls play
        peak_mb = watch.of(call) if watch else None
        timer = self._timer(name, call)
        if self.cuda and self.case.graph and not self._passes_poisoned(name, timer.run):
            return
        host_us = 1e6 * host_seconds(call) if self.cuda and not self.case.wall else None
        self.timers[name] = timer
        self.found[name] = replace(self.found[name], peak_mb=peak_mb, host_us=host_us)

    def _passes(self, name: str, result: object) -> bool:
        """Whether a provider passes its gate; the worst of its errors so far counts."""
        error = float(self.case.error(result))
        error = self.errors[name] = worst([self.errors.get(name, 0.0), error])
        bound = self.case.bound
        most = bound(name, self.errors) if callable(bound) else bound
        gate = PASSED if error <= most else f"failed: error {error:.1e} above {most:.1e}"
        row = _row(self.case, name, self.machine, gate)
        self.found[name] = replace(row, error=_finite(error), bound=_finite(most))
        return gate == PASSED

    def _passes_poisoned(self, name: str, run: Call) -> bool:
        """As ``_passes`` for one more call; the memory of its result is overwritten before.

        A replay writes its result to the memory of the previous result. So do launches, nearly
        always.
        """
        result = run()
        poison(result, self.method.device)
        del result
        return self._passes(name, run())

    def _timer(self, name: str, call: Call) -> Timer:
        if not self.cuda:
            return wall_timer(call, name in self.case.own_threads)
        if self.case.wall:
            return synchronised_timer(call)
        return graph_timer(call) if self.case.graph else events_timer(call)

    def _times_in_turns(self) -> Times:
        """Times of all providers that passed. Without one that breaks, all are timed anew."""
        while True:
            timers = {name: self._announced(name, timer) for name, timer in self.timers.items()}
            try:
                return self.method.times(timers)
            except _Broken as broken:
                self._fail(broken.provider, self._gate(broken.provider, broken.error))

    def _announced(self, name: str, timer: Timer) -> Callable[[], Timed]:
        def timed() -> Timed:
            self.watch.begins(name)
            try:
                return timer()
            except Exception as error:
                raise _Broken(name, error) from error

        return timed

    def _peaks(self, peak: Callable[[str], float | None]) -> None:
        for name in list(self.timers):
            try:
                self.found[name] = replace(self.found[name], peak_mb=peak(name))
            except Exception as error:  # such as the end of a process that took all memory
                self._fail(name, f"failed: peak memory: {describe(error)}")

    def _gate(self, name: str, error: Exception) -> str:
        """The gate of a provider that raised an error.

        Raises:
            Lost: nothing more can run in this process.
        """
        return f"absent: {error}" if isinstance(error, Absent) else self.watch.gate_of(name, error)

    def _fail(self, name: str, gate: str) -> None:
        self.timers.pop(name, None)
        self.found[name] = _row(self.case, name, self.machine, gate)

    def _add_times(self, name: str, times: Times) -> None:
        row, warm = self.found[name], [timed.warm for timed in times[name]]
        own = Statistics.of(warm)
        columns: dict[str, Any] = {"rounds": own.rounds, "clock": self.timers[name].clock}
        columns |= {"p20_ms": 1e3 * own.p20, "p50_ms": 1e3 * own.p50, "p80_ms": 1e3 * own.p80}
        cold = [timed.cold for timed in times[name] if timed.cold is not None]
        if cold:
            columns["cold_ms"] = 1e3 * Statistics.of(cold).p50
        if baseline := times.get(self.case.baseline):
            against = ratio([timed.warm for timed in baseline], warm)
            columns |= {"ratio": against.p50, "ratio_p20": against.p20, "ratio_p80": against.p80}
        if self.case.floor:
            columns["gb_s"] = self.case.floor.bytes / own.p50 / 1e9
            columns["tflop_s"] = self.case.floor.flops / own.p50 / 1e12
        if row.floor_ms:
            columns["x_floor"] = columns["p50_ms"] / row.floor_ms
        self.found[name] = replace(row, **columns)


def _few_times(timer: Timer) -> list[Timed]:
    """Three times, or fewer if a call is long."""
    begin, times = time.monotonic(), [timer()]
    while len(times) < FEWEST_ROUNDS and time.monotonic() - begin < EARLY_SECONDS:
        times.append(timer())
    return times


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _row(case: Case, name: str, machine: Machine, gate: str) -> Row:
    """A row without times."""
    rate, floor_ms = machine.matmul_tflop_s.get(case.dtype), None
    if case.floor and rate:
        floor_ms = 1e3 * case.floor.floor_seconds(machine.copy_gb_s * 1e9, rate * 1e12)
    return Row(
        case.suite,
        case.name,
        name,
        gate,
        floor_ms=floor_ms,
        predicted_ms=forecast(case.suite, case.name, name),
        dtype=case.dtype,
        **vars(machine) | {"matmul_tflop_s": rate},
    )
