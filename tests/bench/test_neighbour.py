"""A busy process beside the measurements: it is there, it ends, and its rows say so."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from emanet_triton.bench import neighbour, run
from emanet_triton.bench.__main__ import main
from emanet_triton.bench.rows import read_rows

SECONDS = 30  # a longer wait means that something hangs


def children():
    """The running processes that this process started."""
    return {
        int(child)
        for file in Path("/proc/self/task/").glob("*/children")
        for child in file.read_text().split()
    }


def processor_ticks(process):
    return sum(map(int, Path(f"/proc/{process}/stat").read_text().split()[13:15]))


@pytest.mark.parametrize("kind", neighbour.PROGRAMS)
def test_it_is_busy_and_ends_whatever_happens(kind):
    before = children()
    with pytest.raises(KeyboardInterrupt), neighbour.beside(kind):
        (process,) = children() - before
        deadline = time.monotonic() + SECONDS
        while processor_ticks(process) < 20:  # hundredths of a second
            assert time.monotonic() < deadline
            time.sleep(0.05)
        raise KeyboardInterrupt
    assert children() == before


def test_it_ends_with_a_process_that_is_killed():
    code = """
import os, signal, subprocess
from emanet_triton.bench import neighbour
start = subprocess.Popen
def told(*args):
    process = start(*args)
    print(process.pid, flush=True)
    return process
subprocess.Popen = told
with neighbour.beside("spin"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=SECONDS)
    process, deadline = Path("/proc", killed.stdout.decode().strip()), time.monotonic() + SECONDS
    while process.exists() and process.joinpath("stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_machine_is_measured_beside_it(monkeypatch):
    before, beside, measure = children(), [], run.measure_machine

    def counted(*arguments):
        beside.append(len(children() - before))
        return measure(*arguments)

    monkeypatch.setattr(run, "measure_machine", counted)
    arguments = ["em", "--tiny", "--rounds", "3", "--seconds", "0.1", "--neighbour", "spin"]
    assert main(arguments) == 0
    assert beside == [1]


def test_its_rows_say_so(tmp_path):
    quiet, busy = tmp_path / "quiet.csv", tmp_path / "busy.csv"
    arguments = ["em", "--tiny", "--rounds", "3", "--seconds", "0.1", "--csv"]
    before = children()
    assert main([*arguments, str(quiet)]) == 0
    assert main([*arguments, str(busy), "--neighbour", "spin"]) == 0
    assert children() == before
    (name,) = {row.device for row in read_rows(quiet)}
    assert {row.device for row in read_rows(busy)} == {f"{name}, one busy neighbour (spin)"}
