"""``compare A.csv B.csv``: what got faster or slower from A to B by more than the noise."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from tabulate import tabulate

from emanet_triton.bench.rows import PASSED, Key, Row, read_rows
from emanet_triton.command import Parser, program, say
from emanet_triton.cores import in_words
from emanet_triton.errors import InputError

LEAST = 0.01  # two runs of one program may differ by this relative change
VERSIONS = ("driver", "torch", "triton")


def main(arguments: Sequence[str]) -> int:
    """Compare two files. Returns 1 if something got slower or broke, else 0.

    Raises:
        InputError: bad arguments, a file that cannot be read, or two files that share no row.
    """
    options = make_parser().parse_args(arguments)
    a, b = (_by_key(path) for path in (options.a, options.b))
    shared = [key for key in a if key in b]
    if not shared:
        raise InputError(
            f"{options.a} and {options.b} share no row of the same suite, case, provider, device, "
            f"dtype and threads (devices: {_devices(a)} and {_devices(b)})"
        )
    for note in _notes(a, b, shared):
        say(f"note: {note}")
    verdicts = {key: verdict(a[key], b[key]) for key in shared}
    say(_table(a, b, verdicts))
    bad = sum(word in ("slower", "broken") for word in verdicts.values())
    return 1 if bad else 0


def make_parser() -> Parser:
    """The parser of all options."""
    parser = Parser(
        prog=program("bench compare"),
        description="Say what got faster or slower from A to B by more than the noise.",
    )
    parser.add_argument("a", type=Path, metavar="A.csv", help="before")
    parser.add_argument("b", type=Path, metavar="B.csv", help="after")
    return parser


def verdict(a: Row, b: Row) -> str:
    """One word for the change from a to b.

    Returns:
        "slower" or "faster" if the ranges from p20 to p80 are further apart than the larger noise
        of the two runs, and than 1 percent; else "same". "broken" if only b failed its gate,
        "mended" if only a failed it, "no time" if one has no time otherwise. "another clock" if
        the two were timed in different ways.
    """
    if a.p20_ms is None or a.p80_ms is None or b.p20_ms is None or b.p80_ms is None:
        if a.gate == PASSED and b.gate.startswith("failed"):
            return "broken"
        return "mended" if a.gate.startswith("failed") and b.gate == PASSED else "no time"
    if a.clock != b.clock:
        return "another clock"
    margin = 1 + max(a.noise or 0, b.noise or 0, LEAST)
    if b.p20_ms > a.p80_ms * margin:
        return "slower"
    return "faster" if b.p80_ms * margin < a.p20_ms else "same"


def _by_key(path: Path) -> dict[Key, Row]:
    rows = {Key.of(row): row for row in read_rows(path)}
    if not rows:
        raise InputError(f"{path}: expected rows, there are none")
    return rows


def _notes(a: dict[Key, Row], b: dict[Key, Row], shared: Iterable[Key]) -> Iterable[str]:
    """Differences between the two runs: versions, devices, rows."""
    for name in VERSIONS:
        pairs = {(getattr(a[key], name), getattr(b[key], name)) for key in shared}
        for before, after in sorted(pairs):
            if before != after:
                yield f"{name} differs: {before or 'none'} and {after or 'none'}"
    if _devices(a) != _devices(b):
        yield f"devices differ: {_devices(a)} and {_devices(b)}"
    for name, these, those in (("first", a, b), ("second", b, a)):
        for key in these:
            if key not in those:
                yield f"only in the {name} file: {key}"


def _devices(rows: Iterable[Key]) -> str:
    found = dict.fromkeys(
        f"{key.device or 'unnamed'}{f', {in_words(key.threads)}' if key.threads else ''}"
        for key in rows
    )
    return "; ".join(found)


def _table(a: dict[Key, Row], b: dict[Key, Row], verdicts: dict[Key, str]) -> str:
    """The rows that changed, and how many did not."""
    lines = []
    for key, word in verdicts.items():
        if word == "same" or (word == "no time" and a[key].gate == b[key].gate):
            continue
        before, after = a[key].p50_ms, b[key].p50_ms
        change = "" if before is None or after is None else f"{after / before - 1:+.1%}"
        figures = [_time(a[key]), _time(b[key]), change]
        lines.append([key.suite, key.case, key.provider, *figures, word])
    columns = ["suite", "case", "provider", "A, ms", "B, ms", "change", ""]
    table = tabulate(lines, columns, disable_numparse=True) + "\n\n" if lines else ""
    words = list(verdicts.values())
    counts = [f"{words.count(word)} {word}" for word in dict.fromkeys(("faster", "slower", *words))]
    return f"{table}{len(words)} rows compared: {', '.join(counts)}"


def _time(row: Row) -> str:
    return row.gate if row.p50_ms is None else f"{row.p50_ms:.4g}"
