"""What a run of the suite conv says of whole networks: their sums, and where they lose time."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from emanet_triton.bench.rows import Row
from emanet_triton.bench.runtimes import RUNTIMES

USES = re.compile(r"\b(r\d+-\w+)=(\d+)")  # in a case's name: how often each network uses it
CONVOLUTION = re.compile(r"\dx\d ")  # begins the name of a convolution, not of a pair or block
# Providers that a network with the backend "auto" does not use.
OTHERS = ("compiled", "gluon", *RUNTIMES)
MOST_CONVOLUTIONS = 11  # in the list of a network


@dataclass(frozen=True)
class Use:
    """A convolution of a network.

    Attributes:
        count: how often the network runs it.
        torch_ms: the time of the baseline.
        best_ms: the time of the fastest provider that our network uses.
        row: the row of this provider.
    """

    count: int
    torch_ms: float
    best_ms: float
    row: Row

    @property
    def floor_ms(self) -> float:
        return self.row.floor_ms or 0.0

    @property
    def lost_ms(self) -> float:
        """The time above the floor of all its runs."""
        return self.count * (self.best_ms - self.floor_ms)

    def __str__(self) -> str:
        layer = USES.sub("", self.row.case).strip()
        times = f"{self.best_ms:.4g} ms by {self.row.provider}, floor {self.floor_ms:.4g} ms"
        runs = f"{self.count} run{'s' if self.count > 1 else ''}"
        return f"{self.lost_ms:.4g} ms in {runs} of {layer}: {times}"


def summary(rows: Sequence[Row]) -> str:
    """All that the suite says about the rows of one run."""
    return "\n".join(filter(None, (totals(rows), losses(rows))))


def totals(rows: Sequence[Row]) -> str:
    """The time of all convolutions of a network by the baseline and by the fastest of each."""
    lines = []
    for (dtype, network), own in uses(rows).items():
        torch_ms, best_ms, floor_ms = (
            sum(use.count * getattr(use, name) for use in own)
            for name in ("torch_ms", "best_ms", "floor_ms")
        )
        lines.append(
            f"{sum(use.count for use in own)} convolutions of {network}, {dtype}: torch "
            f"{torch_ms:.4g} ms, the fastest of each {best_ms:.4g} ms, floor {floor_ms:.4g} ms"
        )
    return "\n".join(lines)


def losses(rows: Sequence[Row]) -> str:
    """The convolutions above the floor of one network in each dtype, the worst first."""
    first: dict[str, str] = {}  # of each dtype; the other networks have the same convolutions
    lines = []
    for (dtype, network), own in uses(rows).items():
        above = [use for use in own if use.row.floor_ms and use.lost_ms > 0]
        if above and first.setdefault(dtype, network) == network:
            lines.append(f"time above the floor in {network}, {dtype}:")
            worst = sorted(above, key=lambda use: -use.lost_ms)
            lines += map(str, worst[:MOST_CONVOLUTIONS])
    return "\n".join(lines)


def uses(rows: Sequence[Row]) -> dict[tuple[str, str], list[Use]]:
    """The convolutions of each dtype and network that the baseline and our code have timed."""
    plain = {row.case: row.p50_ms for row in rows if row.provider == "torch" and row.p50_ms}
    best: dict[str, tuple[float, Row]] = {}
    for row in rows:
        if (
            row.provider not in OTHERS
            and row.p50_ms
            and row.p50_ms < best.get(row.case, (float("inf"), row))[0]
        ):
            best[row.case] = row.p50_ms, row
    found: dict[tuple[str, str], list[Use]] = {}
    for case, (best_ms, row) in best.items():
        if case in plain and CONVOLUTION.match(case):
            for network, count in USES.findall(case):
                use = Use(int(count), plain[case], best_ms, row)
                found.setdefault((row.dtype, network), []).append(use)
    return found
