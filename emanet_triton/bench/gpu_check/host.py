"""A step: what the host needs to launch each operator without a graph, and for its first call."""

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from emanet_triton.bench.clocks import host_seconds
from emanet_triton.bench.gpu_check import own
from emanet_triton.bench.gpu_check.cases import Case, EmCase, LabelsCase
from emanet_triton.bench.gpu_check.conv_cases import BottleneckCase, ConvCase
from emanet_triton.bench.gpu_check.families import MODES, SIZE, network_calls, small_cases
from emanet_triton.bench.gpu_check.lanes import run_lanes
from emanet_triton.bench.gpu_check.meta import has_kernel
from emanet_triton.bench.measure import Lost, Watch
from emanet_triton.bench.rows import PASSED
from emanet_triton.kernels.conv.op import BOTTLENECK_PROVIDERS, PROVIDERS
from emanet_triton.models.network import logits_size

SILENCE = 45  # seconds


@dataclass(frozen=True)
class Hosted:
    """A call of an operator.

    Attributes:
        case: which, by which provider.
        gate: "passed", "absent: why" or "failed: why".
        first_ms: until the first call in a process is done; kernels may be compiled in it.
        host_us: until a later call returns.
    """

    case: str
    gate: str = f"absent: {own.REHEARSAL}"
    first_ms: float | None = None
    host_us: float | None = None


def main(arguments: Sequence[str]) -> int:
    """Time all operators: 1 where one fails, else 0."""
    options = own.parser("host", __doc__).parse_args(arguments)
    rows: list[Hosted] = []

    def found(row: Hosted) -> None:
        rows.append(row)
        own.write_table(options.out / own.HOST, map(asdict, rows))
        print(row.case, row.first_ms, row.host_us, row.gate, flush=True)

    jobs = [functools.partial(time_case, case) for case in cases(options.tiny)]

    def done(job: functools.partial, result: object) -> None:
        lost = isinstance(result, Lost)
        found(Hosted(job.args[0].name, f"failed: {result.reason}") if lost else result)

    if options.rehearse:
        for job in jobs:
            found(Hosted(job.args[0].name))
    else:
        run_lanes([jobs], 1, SILENCE, done)
    return 1 if any(row.gate.startswith("failed") for row in rows) else 0


def cases(tiny: bool) -> list[Case]:
    """Three convolutions and a bottleneck by every provider, the EM operators, the labels."""
    if tiny:
        return small_cases()
    found: list[Case] = []
    whole, slide = (network_calls(["r50"], [mode]) for mode in MODES)
    wide, narrow = (512, 512, 3, 3), (1024, 256, 1, 1)
    for calls, weight, has_residual in (
        (whole, wide, False),
        (whole, narrow, True),
        (slide, wide, False),
    ):
        call = next(
            call
            for call in calls
            if call.name == "conv_bias_act"
            and call["weight"].shape == weight
            and bool(call["residual"]) == has_residual
        )
        found += [ConvCase(call.but(provider=provider)) for provider in PROVIDERS]
    block = next(call for call in whole if call.name == "bottleneck" and has_kernel(call))
    found += [BottleneckCase(block.but(provider=provider)) for provider in BOTTLENECK_PROVIDERS]
    found += [EmCase(operation, 1, logits_size(*SIZE)) for operation in ("block", "attention")]
    return [*found, *(LabelsCase(mode, False, SIZE, "bf16") for mode in MODES)]


def time_case(case: Case, watch: Watch) -> Hosted:
    """The row of a case.

    Raises:
        Lost: it has broken this process.
    """
    watch.begins(case.name)
    row = Hosted(case.name)
    try:
        return _timed(row, case)
    except Exception as error:  # whatever a provider raises
        return replace(row, gate=watch.gate_of(case.name, error))


def _timed(row: Hosted, case: Case) -> Hosted:
    run = case.runner(own.DEVICE)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    first_ms = 1e3 * (time.perf_counter() - begin)
    return replace(row, gate=PASSED, first_ms=first_ms, host_us=1e6 * host_seconds(run))


if __name__ == "__main__":
    own.run_main(main)
