"""A program that runs each kernel once, for a tool that watches it: a sanitizer or a profiler."""

from collections.abc import Sequence

import torch

from emanet_triton.bench.gpu_check import own
from emanet_triton.bench.gpu_check.cases import Case, EmCase, LabelsCase, PoolCase
from emanet_triton.bench.gpu_check.conv_cases import ConvCase, ExpandReduceCase
from emanet_triton.bench.gpu_check.families import (
    MODES,
    SIZE,
    by_gluon,
    network_calls,
    small_cases,
    with_tiles,
)
from emanet_triton.bench.gpu_check.meta import Gpu
from emanet_triton.bench.gpu_check.sweep import dominant
from emanet_triton.models.network import logits_size

CONVOLUTIONS = 4  # the costliest of the networks


def main(arguments: Sequence[str]) -> int:
    """Run every case. With ``--large`` it runs twice, and the profiler records the second run."""
    parser = own.StepParser("single", __doc__)
    parser.add_argument("--large", action="store_true", help="at the networks' sizes")
    options = parser.parse(arguments)
    arch = options.arch if options.rehearse else Gpu.here().arch
    for case in with_tiles(large_cases() if options.large else small_cases(), arch):
        print(case.name, flush=True)
        if not options.rehearse:
            _run(case, options.large)
    return 0


def large_cases() -> list[Case]:
    """About ten kernels as the networks launch them."""
    costly = [swept.case for swept in dominant(False)]
    convolutions = [case for case in costly if isinstance(case, ConvCase)]
    found: list[Case] = list(convolutions[:CONVOLUTIONS])
    calls = network_calls(["r50"], MODES)
    found.append(next(case for case in costly if isinstance(case, ExpandReduceCase)))
    found.append(max(by_gluon(calls), key=lambda case: case.floor().bytes))
    pool = next(call for call in calls if call.name == "max_pool")
    found.append(PoolCase(pool.but(backend="triton")))
    blocks = ((1, "triton"), (1, "one-pass-128"), (8, "one-pass-16"))
    found += [EmCase("block", b, logits_size(*SIZE), backend=name) for b, name in blocks]
    found += [LabelsCase(mode, False, SIZE, "bf16") for mode in MODES]
    return found


def _run(case: Case, profiled: bool) -> None:
    run = case.runner(own.DEVICE)
    run()
    torch.cuda.synchronize()
    if profiled:
        torch.cuda.profiler.start()
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    own.run_main(main)
