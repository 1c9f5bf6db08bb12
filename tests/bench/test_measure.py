"""The loop of a case: the gate comes first, and a provider that fails it gets no time."""

import math

import pytest

from emanet_triton.bench import clocks
from emanet_triton.bench.case import Absent, Case
from emanet_triton.bench.cost import Cost
from emanet_triton.bench.forecasts import FORECASTS
from emanet_triton.bench.machine import Machine
from emanet_triton.bench.measure import Lost, Watch, measure
from emanet_triton.bench.method import Method
from emanet_triton.bench.rows import Row

MACHINE = Machine(
    *("A processor", 2, "", "2.15", "3.9", "abc", "2026-11-23"),
    copy_gb_s=10.0,
    matmul_tflop_s={"fp32": 0.1},
    noise=0.02,
)


def absent():
    raise Absent("ModuleNotFoundError: No module named 'tensorrt'")


def broken():
    raise RuntimeError("does not run\nat all")


def late():
    """A call that runs once and breaks when it is timed."""
    answers = iter([1.0])
    return lambda: next(answers)


def make_case(**changes):
    providers = {
        "plain": lambda: lambda: 1.0,
        "right": lambda: lambda: 1.001,
        "wrong": lambda: lambda: 1.1,
        "nan": lambda: lambda: math.nan,
        "gone": absent,
        "broken": broken,
    }
    fields = {
        "suite": "em",
        "name": "block",
        "providers": providers,
        "baseline": "plain",
        "error": lambda got: abs(got - 1),
        "bound": 0.01,
    }
    return Case(**(fields | changes))


def measured(case, peak=None):
    rows = measure(case, Method(rounds=3), MACHINE, peak)
    return {row.provider: row for row in rows}


def test_only_a_provider_with_threads_of_its_own_waits(monkeypatch):
    slept = []
    monkeypatch.setattr(clocks.time, "sleep", slept.append)
    measured(make_case())
    assert not slept
    measured(make_case(own_threads=("right",)))
    assert slept == [clocks.SPIN_SECONDS] * 4  # a warm-up and three rounds


def test_gates():
    rows = measured(make_case())
    assert {name: row.gate for name, row in rows.items()} == {
        "plain": "passed",
        "right": "passed",
        "wrong": "failed: error 1.0e-01 above 1.0e-02",
        "nan": "failed: error nan above 1.0e-02",
        "gone": "absent: ModuleNotFoundError: No module named 'tensorrt'",
        "broken": "failed: RuntimeError: does not run",
    }
    for name in ("wrong", "nan", "gone", "broken"):
        row = rows[name]
        assert row.p20_ms is row.p50_ms is row.p80_ms is row.ratio is row.rounds is None
    assert rows["right"].p50_ms > 0
    assert rows["right"].rounds == 3
    assert rows["right"].error == pytest.approx(1e-3)
    assert rows["nan"].error is None


def test_a_wrong_provider_is_never_timed():
    runs = []
    providers = {"plain": lambda: lambda: 1.0, "wrong": lambda: lambda: runs.append(1) or 2.0}
    measured(make_case(providers=providers))
    assert len(runs) == 1  # for the gate


def test_a_bound_may_depend_on_the_errors_so_far():
    seen = {}

    def bound(name, errors):
        seen[name] = dict(errors)
        return 2 * errors["plain"] + 0.01

    providers = {name: make_case().providers[name] for name in ("right", "plain", "wrong")}
    rows = measured(make_case(providers=providers, bound=bound))
    assert list(seen) == ["plain", "right", "wrong"]  # the baseline first
    assert list(seen["right"]) == ["plain", "right"]
    assert rows["wrong"].gate.startswith("failed")
    assert rows["right"].bound == 0.01


def test_without_its_baseline_a_case_has_no_ratios():
    providers = make_case().providers | {"plain": absent}
    row = measured(make_case(providers=providers))["right"]
    assert row.gate == "passed"
    assert row.p50_ms > 0
    assert row.ratio is None


def test_figures_against_the_floor():
    row = measured(make_case(floor=Cost(bytes=10**9, flops=5 * 10**9)))["right"]
    assert row.floor_ms == pytest.approx(100.0)  # 1 GB at 10 GB/s; the FLOPs take 50 ms
    assert row.x_floor == pytest.approx(row.p50_ms / 100)
    assert row.gb_s == pytest.approx(1e3 / row.p50_ms)
    assert row.tflop_s == pytest.approx(5 / row.p50_ms)


def test_a_floor_without_a_ceiling_is_left_out():
    row = measured(make_case(floor=Cost(1, 1), dtype="bf16"))["right"]
    assert row.floor_ms is row.x_floor is row.matmul_tflop_s is None


def test_a_forecast_stays_in_its_column(monkeypatch):
    case = make_case()
    monkeypatch.setitem(FORECASTS, (case.suite, "right"), {case.name: "1-2"})
    rows = measured(case)
    assert (rows["right"].predicted_ms, rows["plain"].predicted_ms) == ("1-2", "")


def test_rows_say_where_they_are_from():
    row = measured(make_case())["gone"]
    assert (row.device, row.threads, row.commit, row.noise) == ("A processor", 2, "abc", 0.02)
    assert (row.copy_gb_s, row.matmul_tflop_s) == (10.0, 0.1)


def test_peak_memory_of_what_passed():
    rows = measured(make_case(peak=True), peak=lambda name: 10.0 * len(name))
    assert {name: row.peak_mb for name, row in rows.items() if row.peak_mb} == {
        "plain": 50.0,
        "right": 50.0,
    }
    assert measured(make_case(), peak=lambda name: 1.0)["plain"].peak_mb is None


def test_a_peak_that_cannot_be_measured_fails_its_provider():
    def peak(name):
        if name == "right":
            raise RuntimeError("the process ended")
        return 1.0

    rows = measured(make_case(peak=True), peak)
    assert rows["right"].gate == "failed: peak memory: RuntimeError: the process ended"
    assert rows["right"].p50_ms is None
    assert rows["plain"].peak_mb == 1.0


def test_inputs_are_prepared_first():
    order = []
    providers = {"plain": lambda: order.append("make") or (lambda: 1.0)}
    measured(make_case(providers=providers, prepare=lambda: order.append("prepare")))
    assert order == ["prepare", "make"]


def test_a_case_that_cannot_be_prepared_fails_all_its_rows():
    rows = measured(make_case(prepare=broken))
    assert {row.gate for row in rows.values()} == {"failed: RuntimeError: does not run"}
    assert all(row.p50_ms is None for row in rows.values())


def test_who_breaks_while_it_is_timed_fails_alone():
    rows = measured(make_case(providers=make_case().providers | {"right": late}))
    assert rows["right"].gate == "failed: StopIteration"
    assert rows["right"].p50_ms is None
    assert rows["plain"].p50_ms > 0


class Diary(Watch):
    """Records all that it is told."""

    early = True

    def __init__(self, lost: str = "none") -> None:
        self.lost, self.said = lost, []

    def begins(self, provider: str) -> None:
        self.said.append(provider)

    def found(self, row: Row) -> None:
        self.said.append(row)

    def is_lost(self, error: Exception) -> bool:
        return self.lost in str(error)


def test_every_provider_has_an_early_row_of_its_own():
    diary = Diary()
    case = make_case(providers={n: make_case().providers[n] for n in ("plain", "wrong", "right")})
    final = measure(case, Method(rounds=5), MACHINE, watch=diary)
    assert [getattr(said, "provider", said) for said in diary.said[:6]] == [
        *("plain", "plain", "wrong", "wrong", "right", "right")
    ]
    plain, wrong, right = (said for said in diary.said if isinstance(said, Row))
    assert (right.gate, right.rounds, right.ratio) == ("passed", 3, None)
    assert right.error == pytest.approx(1e-3)
    assert (plain.ratio, plain.rounds) == (1.0, 3)
    assert wrong == final[1]
    assert final[2].rounds == 5
    assert final[2].ratio > 0
    assert diary.said[6:10] == ["plain", "right", "plain", "right"]  # while they are timed in turns


def test_the_early_row_of_a_long_call_is_of_one_time(monkeypatch):
    monkeypatch.setattr("emanet_triton.bench.measure.EARLY_SECONDS", 0)
    diary = Diary()
    measure(
        make_case(providers={"plain": lambda: lambda: 1.0}), Method(rounds=3), MACHINE, None, diary
    )
    assert [said.rounds for said in diary.said if isinstance(said, Row)] == [1]


@pytest.mark.parametrize("when", ["made", "timed"])
def test_nothing_runs_where_the_process_is_lost(when):
    def dies():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def dies_late():
        answers = iter([1.0] * 5)
        return lambda: next(answers, None) or dies()

    diary = Diary("CUDA error")
    dead = dies if when == "made" else dies_late
    providers = {"plain": lambda: lambda: 1.0, "dead": dead, "after": lambda: lambda: 1.0}
    with pytest.raises(Lost) as caught:
        measure(make_case(providers=providers), Method(rounds=5), MACHINE, watch=diary)
    assert caught.value.provider == "dead"
    assert caught.value.reason == (
        "RuntimeError: CUDA error: an illegal memory access was encountered"
    )
    assert diary.said[-1] == "dead"
    assert ("after" in diary.said) == (when == "timed")


def test_a_case_that_is_lost_before_its_first_provider_names_none():
    def prepare():
        raise RuntimeError("CUDA error: unknown")

    with pytest.raises(Lost) as caught:
        measure(make_case(prepare=prepare), Method(), MACHINE, watch=Diary("CUDA error"))
    assert caught.value.provider == ""
