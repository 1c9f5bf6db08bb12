"""``report``: make docs/benchmarks.md and its charts from files of results."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from emanet_triton.bench.ahead_of_time.gates import COLUMNS as COMPILED_COLUMNS
from emanet_triton.bench.charts import Chart, charts_of, digest_of, has_matplotlib, write_charts
from emanet_triton.bench.gpu_check.own import REHEARSAL
from emanet_triton.bench.page import Results, make_page
from emanet_triton.bench.rows import Row, read_csv, read_rows, read_text
from emanet_triton.command import Parser, program, say
from emanet_triton.errors import InputError
from emanet_triton.files import require_own, write_output

COMPILED = "compiled.csv"
BEGINNING = re.compile(rb"# Benchmarks\n\n<!-- Made by ")  # of every page that was made here
COMPILED_NUMBERS = ("registers", "stack", "shared", "count")  # columns that the page reads


def main(arguments: Sequence[str]) -> int:
    """Make the page and the charts, or with ``--check`` say what is out of date.

    Returns:
        0; with ``--check`` 1 if the page or a chart disagrees with the results.

    Raises:
        InputError: bad arguments, a file that cannot be read or is malformed, or one of another
            kind in the place of the page.
    """
    options = make_parser().parse_args(arguments)
    if not options.check:
        require_own(options.page, BEGINNING, "page of emanet-triton bench report")
    results = read_results(options.results, options.page)
    charts = charts_of(results.rows)
    page = make_page(results, charts)
    superfluous = list(_superfluous(options.results, charts))
    if options.check:
        stale = [] if read_text(options.page) == page else [f"{options.page}: is out of date"]
        stale += _stale_charts(options.results, charts)
        stale += [f"{path}: there are no figures for it" for path in superfluous]
        say("\n".join(stale or ["the page and the charts agree with the results"]))
        return 1 if stale else 0
    write_output(options.page, page.encode())
    for path in superfluous:
        path.unlink()
    if has_matplotlib():
        write_charts(charts, options.results)
    elif charts:
        say("the charts are not drawn: matplotlib is not installed (extra: plot)")
    return 0


def make_parser() -> Parser:
    """The parser of all options."""
    parser = Parser(
        prog=program("bench report"),
        description="Make the page of all results and its charts from files of results.",
    )
    parser.add_argument("--check", action="store_true", help="change nothing, say what disagrees")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("benchmarks/results"),
        metavar="DIR",
        help="the folder of the results and charts; default: %(default)s",
    )
    parser.add_argument(
        "--page",
        type=Path,
        default=Path("docs/benchmarks.md"),
        metavar="FILE",
        help="the page to write; default: %(default)s",
    )
    return parser


def read_results(folder: Path, page: Path) -> Results:
    """Every CSV file of a folder, in the order of the names.

    Raises:
        InputError: no such folder, or a file that is malformed or holds rows of a rehearsal.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of results, there is none")
    link = Path(os.path.relpath(folder.resolve(), page.resolve().parent)).as_posix()
    paths = [path for path in sorted(folder.glob("*.csv")) if path.name != COMPILED]
    files = {path.name: _read_measured(path) for path in paths}
    return Results(link, files, _read_compiled(folder / COMPILED))


def _read_measured(path: Path) -> list[Row]:
    rows = read_rows(path)
    if any(row.device == REHEARSAL for row in rows):
        raise InputError(f"{path}: expected measured rows, these are of a rehearsal")
    return rows


def _read_compiled(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    found = read_csv(path, COMPILED_COLUMNS)
    for where, row in found:
        for name in COMPILED_NUMBERS:
            if not row[name].isdecimal():
                raise InputError(f"{where}: {name} must be a whole number, got {row[name]!r}")
    return [row for _, row in found]


def _stale_charts(folder: Path, charts: Sequence[Chart]) -> Iterator[str]:
    for chart in charts:
        path = folder / chart.file
        if not path.exists():
            yield f"{path}: is missing"
        elif digest_of(read_text(path)) != chart.digest:
            yield f"{path}: was drawn from other figures"


def _superfluous(folder: Path, charts: Sequence[Chart]) -> Iterator[Path]:
    """Charts of earlier results. A file that was not drawn here does not count."""
    names = {chart.file for chart in charts}
    for path in sorted(folder.glob("*.svg")):
        if path.name not in names and digest_of(read_text(path)):
            yield path
