"""``report``: the blocks of figures in docs/benchmarks.md and the charts, from files of results.

A block stands between ``<!-- bench:NAME -->`` and ``<!-- /bench -->``; NAME is one of ``BLOCKS``.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from emanet_triton.bench.ahead_of_time.gates import COLUMNS as COMPILED_COLUMNS
from emanet_triton.bench.blocks import BLOCKS, Results
from emanet_triton.bench.charts import charts_of, digest_of
from emanet_triton.bench.gpu_check.own import REHEARSAL
from emanet_triton.bench.plots import has_matplotlib, write_plots
from emanet_triton.bench.rows import PASSED, Key, Row, read_csv, read_rows, read_text
from emanet_triton.command import Parser, say
from emanet_triton.errors import InputError
from emanet_triton.files import write_output

COMPILED = "compiled.csv"
COMPILED_NUMBERS = ("registers", "stack", "shared", "count")  # of its columns, those reported
CASES = {"eval": r"images=\d+( |$)", "scale": r"\d+x\d+ \S+$"}  # of what sizes are read from
BEGIN, END = re.compile(r"<!-- bench:(.*?) -->\n"), "<!-- /bench -->"


def main(arguments: Sequence[str]) -> int:
    """Rebuild the blocks and the charts, or with ``--check`` say what is out of date.

    Returns:
        0; with ``--check`` 1 where the page or a chart disagrees with the results.

    Raises:
        InputError: bad arguments, or files that are not as they should be.
    """
    parser = Parser(prog="python -m emanet_triton.bench report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, say what disagrees")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), metavar="DIR")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"), metavar="FILE")
    options = parser.parse_args(arguments)
    before = read_text(options.page)
    results = read_results(options.results, options.page)
    after = rebuilt(options.page, before, results)
    if options.check:
        stale = [*_stale_blocks(options.page, before, after)]
        stale += _stale_charts(options.results, results)
        say("\n".join(stale or ["the page and the charts agree with the results"]))
        return 1 if stale else 0
    if after != before:
        write_output(options.page, after.encode())
    for path in _superfluous(options.results, results):
        path.unlink()
    if has_matplotlib():
        write_plots(results.rows, options.results)
    elif charts_of(results.rows):
        say("the charts are not drawn: matplotlib is not installed (extra: plot)")
    return 0


def read_results(folder: Path, page: Path) -> Results:
    """Every CSV file of a folder, in the order of their names.

    Raises:
        InputError: no such folder, or a file that is not as it should be or of a rehearsal.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of results, there is none")
    link = Path(os.path.relpath(folder.resolve(), page.resolve().parent)).as_posix()
    paths = [path for path in sorted(folder.glob("*.csv")) if path.name != COMPILED]
    files = {path.name: _read_measured(path) for path in paths}
    return Results(link, files, _read_compiled(folder / COMPILED))


def rebuilt(page: Path, text: str, results: Results) -> str:
    """The page's text with every block made anew.

    Raises:
        InputError: a block of another name, one without an end, or none at all.
    """
    parts, position = [], 0
    for begin in BEGIN.finditer(text):
        end = text.find(END, begin.end())
        line = text.count("\n", 0, begin.start()) + 1
        if begin[1] not in BLOCKS:
            raise InputError(
                f"{page}, line {line}: no block '{begin[1]}'; expected {', '.join(BLOCKS)}"
            )
        if end < 0 or BEGIN.search(text, begin.end(), end):
            raise InputError(f"{page}, line {line}: expected {END} after block '{begin[1]}'")
        parts += [text[position : begin.end()], f"\n{BLOCKS[begin[1]](results)}\n\n"]
        position = end
    if not parts:
        raise InputError(f"{page}: expected blocks <!-- bench:NAME -->, there are none")
    return "".join([*parts, text[position:]])


def _read_measured(path: Path) -> list[Row]:
    rows = read_rows(path)
    if any(row.device == REHEARSAL for row in rows):
        raise InputError(f"{path}: expected measured rows, these are of a rehearsal")
    for row in rows:
        if not re.search(CASES.get(row.suite, ""), row.case):
            raise InputError(f"{path}: {Key.of(row)}: the case must match {CASES[row.suite]}")
        if row.suite == "conv" and row.gate == PASSED and row.floor_ms is None:
            raise InputError(f"{path}: {Key.of(row)}: floor_ms must be a number")
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


def _stale_blocks(page: Path, before: str, after: str) -> Iterator[str]:
    old, new = (_contents(text) for text in (before, after))
    for name, content in new:
        if (name, content) not in old:
            yield f"{page}: block '{name}' disagrees with the results"


def _contents(text: str) -> list[tuple[str, str]]:
    """Name and text of every block."""
    found = BEGIN.finditer(text)
    return [(begin[1], text[begin.end() : text.find(END, begin.end())]) for begin in found]


def _stale_charts(folder: Path, results: Results) -> Iterator[str]:
    for chart in charts_of(results.rows):
        path = folder / f"{chart.name}.svg"
        if not path.exists():
            yield f"{path}: is missing"
        elif digest_of(read_text(path)) != chart.digest:
            yield f"{path}: was drawn from other figures"
    for path in _superfluous(folder, results):
        yield f"{path}: there are no figures for it"


def _superfluous(folder: Path, results: Results) -> list[Path]:
    """Charts of earlier results."""
    names = {f"{chart.name}.svg" for chart in charts_of(results.rows)}
    paths = [path for path in sorted(folder.glob("*.svg")) if path.name not in names]
    return [path for path in paths if digest_of(read_text(path))]
