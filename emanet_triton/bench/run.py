"""Where cases are measured: on a CPU in this process, on a GPU in workers that may be lost."""

import functools
import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from emanet_triton.bench.case import Case, Cases
from emanet_triton.bench.machine import Machine, measure_machine
from emanet_triton.bench.measure import Lost, Watch, failed_row, measure
from emanet_triton.bench.memory import peak_in_child
from emanet_triton.bench.method import Method
from emanet_triton.bench.options import Selection
from emanet_triton.bench.rows import Row
from emanet_triton.bench.worker import Worker
from emanet_triton.errors import InputError
from emanet_triton.kernels.precision import cuda_fp32

Found = Callable[[Row], None]


@dataclass(frozen=True)
class Here:
    """Measures in this process.

    Attributes:
        selection: what the user asked for.
        method: how long to time it.
    """

    selection: Selection
    method: Method

    def machine(self, dtypes: Iterable[str]) -> Machine:
        """The machine and its rates for these dtypes."""
        with cuda_fp32("ieee"):
            return measure_machine(self.selection.device, dtypes, self.selection.tiny)

    def measure(self, cases: Cases, case: Case, machine: Machine, found: Found) -> None:
        """Report the row of every provider of a case, which is one of ``cases``."""
        peak = functools.partial(peak_in_child, cases, self.selection, case.name)
        with cuda_fp32("ieee"):
            for row in measure(case, self.method, machine, peak):
                found(row)

    def close(self) -> None:
        """Nothing is left behind."""


class Elsewhere:
    """Measures in a worker, which is replaced when a provider breaks its CUDA context or hangs.

    A row comes as soon as a provider has passed its gate, and again when its case is finished.

    Args:
        selection: what the user asked for.
        method: how long to time it.
        silence: seconds without a sign of life after which a provider is given up.
    """

    def __init__(self, selection: Selection, method: Method, silence: float) -> None:
        self.selection, self.method = selection, method
        self._worker = Worker(silence)

    def machine(self, dtypes: Iterable[str]) -> Machine:
        """As ``Here.machine``.

        Raises:
            InputError: the device cannot even multiply.
        """
        arguments = self.selection.device, list(dtypes), self.selection.tiny
        try:
            return self._worker.run(functools.partial(_machine, *arguments))
        except Lost as lost:
            message = f"--device {self.selection.device}: cannot be measured: {lost.reason}"
            raise InputError(message) from None

    def measure(self, cases: Cases, case: Case, machine: Machine, found: Found) -> None:
        """As ``Here.measure``.

        The provider that broke a worker fails. A new worker measures the other providers.
        """
        left = list(case.providers)
        while left:
            asked = cases, self.selection, case.name, tuple(left), self.method, machine
            try:
                for row in self._worker.run(functools.partial(_measure, *asked), found):
                    found(row)
                return
            except Lost as lost:
                guilty = [lost.provider] if lost.provider in left else list(left)
                for provider in guilty:
                    found(failed_row(case, provider, machine, lost.reason))
                    left.remove(provider)

    def close(self) -> None:
        """End the worker's process."""
        self._worker.close()


def _machine(device: str, dtypes: list[str], tiny: bool, _: Watch) -> Machine:
    return measure_machine(device, dtypes, tiny)


def _measure(
    cases: Cases,
    selection: Selection,
    name: str,
    providers: tuple[str, ...],
    method: Method,
    machine: Machine,
    watch: Watch,
) -> list[Row]:
    """Make a case anew in a worker and measure some of its providers."""
    case = next(case for case in cases(selection) if case.name == name)
    kept = {provider: case.providers[provider] for provider in providers}
    try:
        return measure(replace(case, providers=kept), method, machine, watch=watch)
    finally:
        del case, kept
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
