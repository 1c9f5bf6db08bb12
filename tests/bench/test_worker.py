"""A provider that ends or hangs its worker fails alone. The tests use workers on the CPU."""

import os
import time

import pytest
import torch
import worker_cases

from emanet_triton.bench import __main__ as command
from emanet_triton.bench import run, worker
from emanet_triton.bench.measure import Lost
from emanet_triton.bench.method import Method
from emanet_triton.bench.options import Selection
from emanet_triton.bench.rows import read_rows, write_csv
from emanet_triton.bench.suite import Suite

SILENCE = 4.0  # seconds


def elsewhere(selection, method, _):
    return run.Elsewhere(selection, method, SILENCE)


def test_who_costs_the_process_fails_alone(monkeypatch, tmp_path, capsys):
    suite = Suite("em", "Costly", "nothing", worker_cases.cases)
    monkeypatch.setattr(command, "SUITES", {"em": suite})
    monkeypatch.setattr(command, "_place", elsewhere)
    written = []

    def write(path, rows):
        written.append(list(rows))
        write_csv(path, written[-1])

    monkeypatch.setattr(command, "write_csv", write)
    path = tmp_path / "rows.csv"
    assert command.main(["em", "--tiny", "--csv", str(path)]) == 1
    assert [(row.case, row.provider, row.gate) for row in read_rows(path)] == [
        ("unprepared", "plain", "failed: its process ended with exit code 3"),
        ("unprepared", "ours", "failed: its process ended with exit code 3"),
        ("costly", "plain", "passed"),
        ("costly", "aborts", "failed: its process ended by SIGABRT"),
        ("costly", "late", "failed: its process ended by SIGABRT"),
        ("costly", "hangs", "failed: hung: no sign of life for 4 s"),
        ("costly", "wrong", "failed: error 1.0e+00 above 1.0e-02"),
        (
            *("costly", "sticky"),
            "failed: RuntimeError: CUDA error: an illegal memory access was encountered",
        ),
        ("costly", "ours", "passed"),
        ("healthy", "plain", "passed"),
        ("healthy", "ours", "passed"),
    ]
    timed = [row for row in read_rows(path) if row.gate == "passed"]
    assert all(row.rounds == 5 and row.ratio > 0 for row in timed)  # in turns, to the end
    early = next(rows for rows in written if rows[-1].provider == "aborts")
    assert [row.rounds for row in early[2:]] == [3, None]  # a run that is cut here has a time
    assert "CUDA error" in capsys.readouterr().out


class Report:
    """A worker that runs a case without a process: it reports rows, then is lost or done."""

    def __init__(self, *lost):
        self.lost, self.asked = list(lost), []

    def run(self, work, found):
        _, _, _, providers, _, _ = work.args
        self.asked.append(providers)
        for provider in providers:
            found((provider, "early"))
            if self.lost and self.lost[0].provider == provider:
                raise self.lost.pop(0)
        return [(provider, "final") for provider in providers]


def test_rows_come_with_every_provider_and_the_rest_begins_anew(monkeypatch):
    monkeypatch.setattr(run, "failed_row", lambda case, provider, *_: (provider, "failed"))
    place = run.Elsewhere(Selection(), Method(), SILENCE)
    place._worker = Report(Lost("b", "dead"))
    case = next(iter(worker_cases.cases(None)))
    case.providers.clear()
    case.providers.update(dict.fromkeys("abc"))
    rows = []
    place.measure(worker_cases.cases, case, None, rows.append)
    assert rows == [
        *(("a", "early"), ("b", "early"), ("b", "failed")),
        *(("a", "early"), ("c", "early"), ("a", "final"), ("c", "final")),
    ]
    assert place._worker.asked == [("a", "b", "c"), ("a", "c")]


def process_id(_):
    return os.getpid()


def raises(_):
    raise ValueError("no such case")


def test_one_process_serves_until_it_is_lost():
    process = worker.Worker(30)
    try:
        first, second = (process.run(process_id) for _ in range(2))
        assert first == second != os.getpid()
        with pytest.raises(Lost) as caught:
            process.run(raises)
        assert (caught.value.provider, caught.value.reason) == ("", "ValueError: no such case")
        assert process.run(process_id) != first
    finally:
        process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_device_that_cannot_be_measured_is_bad_input(monkeypatch, capsys):
    class Dead:
        def run(self, work):
            raise Lost("", "RuntimeError: CUDA error: unknown error")

    place = run.Elsewhere(Selection("cuda"), Method("cuda"), SILENCE)
    place._worker = Dead()
    with pytest.raises(run.InputError) as caught:
        place.machine(["fp32"])
    assert str(caught.value) == (
        "--device cuda: cannot be measured: RuntimeError: CUDA error: unknown error"
    )


def test_a_gpu_is_measured_elsewhere_and_a_cpu_here():
    options = command.parse(["em", "--silence", "5"], ["em"])
    assert isinstance(command._place(Selection("cuda"), Method("cuda"), options), run.Elsewhere)
    assert isinstance(command._place(Selection("cpu"), Method("cpu"), options), run.Here)


@pytest.mark.parametrize(
    ("error", "dead", "lost"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, True),
        (torch.AcceleratorError("unspecified launch failure"), False, True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True, True),
        (RuntimeError("unable to find an engine to execute this computation"), False, False),
        (torch.OutOfMemoryError("CUDA out of memory"), False, False),
    ],
    ids=["message", "type", "dead device", "no engine", "memory"],
)
def test_a_context_is_lost(monkeypatch, error, dead, lost):
    def synchronize():
        if dead:
            raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert worker.is_lost(error) == lost


def sleeps(_):
    time.sleep(600)


def test_a_worker_that_is_closed_ends_at_once():
    process = worker.Worker(30)
    pid = process.run(process_id)
    process._started[1].send(sleeps)
    begin = time.monotonic()
    process.close()
    assert time.monotonic() - begin < 5
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
