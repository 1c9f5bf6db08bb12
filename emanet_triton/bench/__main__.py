"""``python -m emanet_triton.bench``: time the suites; ``report`` and ``compare`` read results."""

import functools
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence

import torch
from tabulate import tabulate
from tqdm import tqdm

from emanet_triton.bench.case import Case
from emanet_triton.bench.machine import Machine, check_device, measure_machine
from emanet_triton.bench.measure import measure
from emanet_triton.bench.memory import peak_in_child
from emanet_triton.bench.method import Method
from emanet_triton.bench.options import Selection, parse
from emanet_triton.bench.rows import Row, check_writable, write_csv, write_json
from emanet_triton.bench.suites import SUITES, SUMMARIES
from emanet_triton.errors import InputError
from emanet_triton.kernels.precision import cuda_fp32

FAILED = 2  # exit code of whatever the user has to mend, and of an interruption


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0, or 1 where a provider was wrong, broke, or got slower, or 2 for bad input or Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    threads = torch.get_num_threads()
    try:
        return _dispatch(arguments)
    except InputError as error:
        return _fail(f"error: {error}")
    except KeyboardInterrupt:
        return _fail("interrupted; finished cases are in the files asked for")
    finally:
        torch.set_num_threads(threads)


def _dispatch(arguments: list[str]) -> int:
    command = arguments[0] if arguments else ""
    if command == "report":
        from emanet_triton.bench import report

        return report.main(arguments[1:])
    if command in ("compare", "--compare"):
        from emanet_triton.bench import compare

        return compare.main(arguments[1:])
    if command == "gpu-check":
        from emanet_triton.bench import gpu_check

        return gpu_check.main(arguments[1:])
    return _run(parse(arguments, list(SUITES)))


def _run(options: Namespace) -> int:
    selection = _selection(options)
    short = selection.short
    method = Method(
        selection.device,
        rounds=options.rounds or (5 if short else 15),
        seconds=options.seconds or (4 if short else 60),
        until=options.repeat_until,
    )
    names = options.suites or list(SUITES)
    cases = [case for name in names for case in SUITES[name](selection)]
    _check_selected(cases, selection, names)
    for path in filter(None, (options.csv, options.json)):
        check_writable(path)  # it would show only after the first case
    if selection.threads:
        torch.set_num_threads(selection.threads)
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    with cuda_fp32("ieee"):  # fp32 means fp32
        machine = measure_machine(selection.device, dtypes, selection.tiny)
        print(machine)
        rows = _measure_all(cases, method, machine, selection, options)
    if options.plot:
        from emanet_triton.bench import plots

        plots.write_plots(rows, options.plot)
    return 1 if any(row.gate.startswith("failed") for row in rows) else 0


def _selection(options: Namespace) -> Selection:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return Selection(
        device=device,
        quick=not options.suites and not options.tiny,
        tiny=options.tiny,
        sizes=tuple(options.sizes),
        batches=tuple(options.batches),
        dtypes=tuple(options.dtypes),
        networks=tuple(options.networks),
        providers=tuple(options.providers),
        threads=options.threads,
    )


def _check_selected(cases: Sequence[Case], selection: Selection, suites: Sequence[str]) -> None:
    known = {name for case in cases for name in case.providers}
    unknown = [name for name in selection.providers if name not in known]
    where = f"{'suite' if len(suites) == 1 else 'suites'} {', '.join(suites)}"
    if unknown:
        raise InputError(f"--providers: {', '.join(unknown)}: not of {where} on {selection.device}")
    if not cases:
        raise InputError(f"nothing to run: no case of {where} is of the sizes and dtypes given")


def _measure_all(
    cases: list[Case],
    method: Method,
    machine: Machine,
    selection: Selection,
    options: Namespace,
) -> list[Row]:
    """Rows of all cases, written after each; a table after each suite."""
    rows: list[Row] = []
    with tqdm(total=len(cases), file=sys.stderr, unit="case") as progress:
        while cases:
            case = cases.pop(0)  # with it go its inputs
            progress.set_description(f"{case.suite}: {case.name}")
            rows += measure(case, method, machine, _peak(case, selection))
            progress.update()
            _write(options, rows)
            if not cases or cases[0].suite != case.suite:
                tqdm.write(_table([row for row in rows if row.suite == case.suite]))
    return rows


def _write(options: Namespace, rows: Sequence[Row]) -> None:
    if options.csv:
        write_csv(options.csv, rows)
    if options.json:
        write_json(options.json, rows)


def _peak(case: Case, selection: Selection) -> functools.partial | None:
    if selection.cuda:
        return None
    return functools.partial(peak_in_child, SUITES[case.suite], selection, case.name)


def _table(rows: Sequence[Row]) -> str:
    columns = ["case", "provider", "ms", "times faster", "x floor", "peak MB", "gate"]
    lines, last = [], None
    for row in rows:
        values = (
            "" if row.p50_ms is None else f"{row.p50_ms:.4g}",
            ""
            if row.ratio is None
            else f"{row.ratio:.2f} ({row.ratio_p20:.2f}-{row.ratio_p80:.2f})",
            "" if row.x_floor is None else f"{row.x_floor:.2f}",
            "" if row.peak_mb is None else f"{row.peak_mb:.0f}",
        )
        lines.append(["" if row.case == last else row.case, row.provider, *values, row.gate])
        last = row.case
    table = tabulate(lines, columns, disable_numparse=True)
    suite = rows[0].suite
    summary = SUMMARIES[suite](rows) if suite in SUMMARIES else ""
    return f"\n{suite}\n{table}\n" + (f"\n{summary}\n" if summary else "")


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: keep what is finished
    sys.exit(main())
