"""A suite's command without a GPU: the real cases as rows, in which nothing is measured.

    python -m emanet_triton.bench.gpu_check.rehearsal SUITE ...

takes the arguments of ``python -m emanet_triton.bench``. The device is always "cuda".
"""

import datetime
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from unittest import mock

import torch

from emanet_triton.bench import __main__ as bench
from emanet_triton.bench.case import Case, Cases
from emanet_triton.bench.gpu_check.own import REHEARSAL
from emanet_triton.bench.machine import Machine
from emanet_triton.bench.measure import failed_row
from emanet_triton.bench.rows import Row
from emanet_triton.versions import commit


class Nowhere:
    """Stands for the GPU: every provider of a case is absent."""

    def __init__(self, *_: object) -> None:
        """Takes the arguments of ``Elsewhere``, and uses none."""

    def machine(self, dtypes: Iterable[str]) -> Machine:
        return Machine(
            device=REHEARSAL,
            threads=None,
            driver="",
            torch=torch.__version__,
            triton="",
            commit=commit(),
            date=datetime.date.today().isoformat(),
            copy_gb_s=math.nan,
            matmul_tflop_s={},
            noise=math.nan,
        )

    def measure(
        self, cases: Cases, case: Case, machine: Machine, found: Callable[[Row], None]
    ) -> None:
        for provider in case.providers:
            found(replace(failed_row(case, provider, machine, ""), gate=f"absent: {REHEARSAL}"))

    def close(self) -> None:
        """Does nothing."""


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark's command with ``Nowhere`` in place of the GPU."""
    with (
        mock.patch.object(bench, "check_device", lambda device: None),
        mock.patch.object(bench, "Elsewhere", Nowhere),
    ):
        return bench.main([*arguments, "--device", "cuda"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
