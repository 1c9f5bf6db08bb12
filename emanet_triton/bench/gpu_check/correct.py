"""A step: every family of kernels against float64 on the GPU, at the networks' shapes.

Each family runs in a process of its own. If a case ends the process, the next case gets a new one.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from emanet_triton.bench.gpu_check import own
from emanet_triton.bench.gpu_check.cases import Case
from emanet_triton.bench.gpu_check.compared import Finding, gate_of
from emanet_triton.bench.gpu_check.families import CHOSEN, FAMILIES
from emanet_triton.bench.gpu_check.lanes import run_lanes
from emanet_triton.bench.gpu_check.meta import Gpu
from emanet_triton.bench.measure import Lost, Watch

AT_ONCE = 6  # processes, which share one GPU
MANY = 100  # cases: two processes share a family that has more, unless it measures


def main(arguments: Sequence[str]) -> int:
    """Check families of cases. Returns 1 if a case fails, else 0."""
    parser = own.StepParser("correct", __doc__)
    parser.add_argument("families", nargs="+", choices=list(FAMILIES), metavar="FAMILY")
    options = parser.parse(arguments)
    gpu = Gpu.of_arch(options.arch) if options.rehearse else Gpu.here()
    cases = {name: FAMILIES[name](gpu, options.tiny) for name in options.families}
    findings: list[Finding] = []

    def found(finding: Finding) -> None:
        findings.append(finding)
        report(options.out / own.CORRECT, finding)

    if options.rehearse:
        for family, own_cases in cases.items():
            for case in own_cases:
                found(Finding(family, case.name, f"absent: {own.REHEARSAL}"))
    else:
        run_families(cases, own.DEVICE, found)
    return 1 if any(finding.gate.startswith("failed") for finding in findings) else 0


def report(path: Path, finding: Finding) -> None:
    """Add a finding to a file. Print it if the case failed."""
    own.append_json(path, asdict(finding))
    if finding.gate.startswith("failed"):
        print(f"{finding.family}: {finding.case}: {finding.gate}", flush=True)


def run_families(
    cases: Mapping[str, Sequence[Case]], device: str, found: Callable[[Finding], None]
) -> None:
    """Check the cases of all families, by the family's name, on a device."""
    lanes = []
    for family, own_cases in cases.items():
        jobs = iter([functools.partial(check, family, case, device) for case in own_cases])
        measures = family.startswith(CHOSEN)  # a second process would disturb it
        lanes += [jobs] * (2 if len(own_cases) > MANY and not measures else 1)

    def done(job: functools.partial[Finding], result: Finding | Lost) -> None:
        family, case, _ = job.args
        if isinstance(result, Lost):
            result = Finding(family, case.name, f"failed: {result.reason}")
        found(result)

    run_lanes(lanes, min(AT_ONCE, len(lanes)), own.SILENCE, done)


def check(family: str, case: Case, device: str, watch: Watch) -> Finding:
    """Check a case in this process.

    Raises:
        Lost: the case has broken this process.
    """
    watch.begins(case.name)
    begin = time.monotonic()
    try:
        outputs = case.compare(device)
        gate = gate_of(outputs)
    except Exception as error:  # a case that breaks is not the end of its family
        outputs, gate = [], watch.gate_of(case.name, error)
    if device == "cuda":
        torch.cuda.empty_cache()
    return Finding(family, case.name, gate, time.monotonic() - begin, tuple(outputs))


if __name__ == "__main__":
    own.run_main(main)
