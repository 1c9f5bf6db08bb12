"""``python -m tests.fuzz [KIND ...]``: read thousands of damaged files of each kind."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tabulate import tabulate

from tests.fuzz.driver import OUTCOMES, Report, fuzz, kinds

SHOWN = 5  # failures of a kind that are printed whole


def main() -> int:
    """Exit code 1 if a file was wrong, crashed or hung."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(kinds())}; or all")
    parser.add_argument("--files", type=int, default=1000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first file; then one more each")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there")
    args = parser.parse_args()
    if unknown := [kind for kind in args.kinds if "." not in kind and kind not in kinds()]:
        parser.error(f"no such kind: {', '.join(unknown)}; there are {', '.join(kinds())}")
    if args.files < 1:
        parser.error(f"--files {args.files}: expected at least 1")
    seeds = range(args.seed, args.seed + args.files)
    reports = []
    for kind in args.kinds or kinds():
        reports.append(fuzz(kind, seeds))
        _print_failures(reports[-1])
    print(_table(reports))
    if args.out:
        args.out.write_text(json.dumps([_figures(report) for report in reports], indent=1) + "\n")
    return int(any(report.failures for report in reports))


def _print_failures(report: Report) -> None:
    for failure in report.failures[:SHOWN]:
        print(f"{report.kind} {failure.seed}: {failure.outcome}")
        print(f"    python -m tests.fuzz {report.kind} --seed {failure.seed} --files 1")
        print("\n".join(f"    {line}" for line in failure.detail.strip().splitlines()))
    if left := [f.seed for f in report.failures[SHOWN:]]:
        print(f"{report.kind}: {len(left)} more, with the seeds {', '.join(map(str, left[:50]))}")


def _table(reports: list[Report]) -> str:
    figures = [_figures(report) for report in reports]
    columns = ["kind", "files", *OUTCOMES, "slowest_seconds", "most_mib"]
    return tabulate([[f[column] for column in columns] for f in figures], columns, floatfmt=".2f")


def _figures(report: Report) -> dict:
    return {
        "kind": report.kind,
        "files": len(report.files),
        "first_seed": min(report.files),
        **{outcome: report.count(outcome) for outcome in OUTCOMES},
        "slowest_seconds": report.seconds,
        "most_mib": report.growth / 2**20,
        "failures": [asdict(failure) for failure in report.failures],
    }


if __name__ == "__main__":
    sys.exit(main())
