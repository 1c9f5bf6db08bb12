"""``python -m emanet_triton.bench``: time the suites; ``report`` and ``compare`` read results."""

import contextlib
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from tabulate import tabulate
from tqdm import tqdm

from emanet_triton.bench import charts
from emanet_triton.bench.case import Case
from emanet_triton.bench.machine import check_device
from emanet_triton.bench.method import Method
from emanet_triton.bench.neighbour import beside, label
from emanet_triton.bench.options import Selection, parse, run_parser
from emanet_triton.bench.rows import Row, require_csv, write_csv
from emanet_triton.bench.run import Elsewhere, Here
from emanet_triton.bench.suites import SUITES
from emanet_triton.command import Parser, answer, run, say
from emanet_triton.cores import usable_cores
from emanet_triton.errors import InputError, printable
from emanet_triton.files import is_stream, require_folder
from emanet_triton.subcommands import Command, add_parsers, run_command

COMMANDS = {
    "report": Command("emanet_triton.bench.report", "make docs/benchmarks.md from results"),
    "compare": Command("emanet_triton.bench.compare", "say what got faster or slower"),
    "gpu-check": Command("emanet_triton.bench.gpu_check", "do all that needs a GPU"),
}
SAVED = "interrupted; what is finished is in the files asked for"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0; 1 if a provider was wrong or broke, or if ``compare`` found something slower; 2 for bad input
    or Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    threads = torch.get_num_threads()
    try:
        return answer(lambda: _dispatch(arguments), SAVED)
    finally:
        torch.set_num_threads(threads)


def make_parser() -> Parser:
    """The parser of all options, in which suites and other commands are subcommands.

    A shell's completion needs it; a run takes several suites.
    """
    parser = run_parser([])
    added = parser.add_subparsers()
    for name, suite in SUITES.items():
        parents = [run_parser(list(SUITES))]
        added.add_parser(name, parents=parents, add_help=False, help=suite.title)
    add_parsers(added, COMMANDS)
    return parser


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else ""
    name = "compare" if name == "--compare" else name
    if name in COMMANDS:
        return run_command(name, arguments[1:], COMMANDS)
    options = parse(arguments, list(SUITES))
    interrupted = SAVED if options.csv else "interrupted; nothing was saved (--csv FILE)"
    return answer(lambda: _run(options), interrupted)


def _run(options: Namespace) -> int:
    selection = _selection(options)
    short = selection.short
    method = Method(
        selection.device,
        rounds=options.rounds or (5 if short else 15),
        seconds=options.seconds or (4 if short else 60),
        until=options.repeat_until,
    )
    cases = _cases(selection, options)
    _check_selected(cases, selection, options)
    _check_outputs(options)  # before anything is measured
    torch.set_num_threads(selection.threads)
    place = _place(selection, method, options)
    with contextlib.closing(place), beside(options.neighbour):
        rows = _measure_all(cases, place, options)
    if options.plot:
        charts.write_charts(charts.charts_of(rows), options.plot)
    return 1 if any(row.gate.startswith("failed") for row in rows) else 0


def _cases(selection: Selection, options: Namespace) -> list[Case]:
    return [
        case
        for name in options.suites or SUITES
        for case in SUITES[name].cases(selection)
        if not options.cases or any(text in case.name for text in options.cases)
    ]


def _place(selection: Selection, method: Method, options: Namespace) -> Here | Elsewhere:
    if selection.cuda:
        return Elsewhere(selection, method, options.silence)
    return Here(selection, method)


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
        threads=options.threads or min(torch.get_num_threads(), usable_cores()),
    )


def _check_outputs(options: Namespace) -> None:
    """Raises InputError if a file cannot be written or replaced, or a chart cannot be drawn."""
    if options.plot:
        charts.require_matplotlib()
    outputs = (
        ("--plot", options.plot, require_folder),
        ("--csv", options.csv, require_csv),  # last: it cannot be the folder of --plot
    )
    for option, path, require in outputs:
        try:
            if path:
                require(path)
        except InputError as error:
            raise InputError(f"{option} {error}") from None


def _check_selected(cases: Sequence[Case], selection: Selection, options: Namespace) -> None:
    suites = options.suites or list(SUITES)
    where = f"{'suite' if len(suites) == 1 else 'suites'} {', '.join(suites)}"
    if not cases:
        raise InputError(
            f"nothing to run: no case of {where} fits --sizes, --batches, --dtypes, --networks "
            "and --cases"
        )
    picked = _names(cases)
    unknown = [name for name in selection.providers if name not in picked]
    if unknown:
        known = _names(_cases(replace(selection, providers=(), every=True), options))
        raise InputError(
            f"--providers: {', '.join(unknown)}: not in {where} on {selection.device}; expected "
            f"some of: {', '.join(sorted(known))}"
        )


def _names(cases: Iterable[Case]) -> set[str]:
    """The names of all providers of some cases."""
    return {name for case in cases for name in case.providers}


def _measure_all(cases: list[Case], place: Here | Elsewhere, options: Namespace) -> list[Row]:
    """Rows of all cases, written as they come; a table after each suite."""
    machine = place.machine(list(dict.fromkeys(case.dtype for case in cases)))
    if options.neighbour:
        machine = replace(machine, device=f"{machine.device}, {label(options.neighbour)}")
    say(str(machine))
    rows: dict[tuple[str, str, str], Row] = {}

    def found(row: Row) -> None:
        rows[row.suite, row.case, row.provider] = row
        _write(options, rows.values())

    try:
        with tqdm(total=len(cases), file=sys.stderr, unit="case") as progress:
            while cases:
                case = cases.pop(0)  # the list must not keep the inputs of a finished case
                progress.set_description(f"{case.suite}: {case.name}")
                place.measure(SUITES[case.suite].cases, case, machine, found)
                progress.update()
                if not cases or cases[0].suite != case.suite:
                    table = _table([row for row in rows.values() if row.suite == case.suite])
                    tqdm.write(printable(table))
    finally:
        _write(options, rows.values(), streams=True)
    return list(rows.values())


def _write(options: Namespace, rows: Iterable[Row], *, streams: bool = False) -> None:
    """Write the rows so far. A stream cannot be overwritten, so it gets them only at the end."""
    if options.csv and is_stream(options.csv) == streams:
        write_csv(options.csv, rows)


def _table(rows: Sequence[Row]) -> str:
    """The printed table of a suite, without columns that are empty, and what the suite adds."""
    lines, last = [], None
    for row in rows:
        values = [function(row) for function in PRINTED.values()]
        lines.append(["" if row.case == last else row.case, row.provider, *values])
        last = row.case
    columns = ["case", "provider", *PRINTED]
    kept = [i for i in range(len(columns)) if any(line[i] for line in lines)]
    lines = [[line[i] for i in kept] for line in lines]
    table = tabulate(lines, [columns[i] for i in kept], disable_numparse=True)
    suite = SUITES[rows[0].suite]
    summary = suite.summary(rows)
    return f"\n{suite.name}\n{table}\n" + (f"\n{summary}\n" if summary else "")


def _number(column: str, digits: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        value = getattr(row, column)
        return "" if value is None else format(value, digits)

    return text


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    return f"{row.ratio:.2f} ({row.ratio_p20:.2f}-{row.ratio_p80:.2f})"


PRINTED: dict[str, Callable[[Row], str]] = {
    "ms": _number("p50_ms", ".4g"),
    "predicted": _number("predicted_ms", ""),
    "cold ms": _number("cold_ms", ".4g"),
    "host us": _number("host_us", ".0f"),
    "clock": _number("clock", ""),
    "times faster": _ratio,
    "x floor": _number("x_floor", ".2f"),
    "peak MB": _number("peak_mb", ".0f"),
    "gate": _number("gate", ""),
}


if __name__ == "__main__":
    run(main)
