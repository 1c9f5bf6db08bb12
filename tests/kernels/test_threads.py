"""Work shared among threads: numbers of threads within and after it, errors, and no hang."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from thread_limit import let_threads_start

from emanet_triton.kernels import openmp, threads
from emanet_triton.kernels.openmp import has_team
from emanet_triton.kernels.threads import for_each

CPU = torch.device("cpu")
SECONDS = 120  # something that takes longer hangs, also on a busy machine


@pytest.fixture(autouse=True, params=["team", "pool"])
def way(request, monkeypatch):
    """The threads that share: PyTorch's own, or a pool in which no thread has started yet."""
    if request.param == "pool":
        monkeypatch.setattr(threads, "has_team", lambda: False)
        monkeypatch.setattr(threads, "_POOL", threads._Pool())
    elif not has_team():
        pytest.skip("PyTorch does not share work by GNU's interface of OpenMP; the pool is tested")
    yield request.param
    threads._POOL.close()


POOL = pytest.mark.parametrize("way", ["pool"], indirect=True)


def test_every_item_runs_once_and_every_thread_has_its_own(three_threads):
    numbers, done, all_there = itertools.count(), [], threading.Barrier(3, timeout=SECONDS)

    def make_run():
        number = next(numbers)

        def run(item):
            if item < 3:
                all_there.wait()
            done.append((number, item))

        return run

    for_each(make_run, range(7), CPU)
    assert sorted(item for _, item in done) == list(range(7))
    assert {number for number, _ in done} == {0, 1, 2}
    assert next(numbers) == 3


def test_a_slow_thread_takes_fewer_items(three_threads):
    others_done, done = threading.Event(), []

    def run(item):
        if item == 0:
            assert others_done.wait(SECONDS)
        done.append(item)
        if len(done) == 8:
            others_done.set()

    for_each(lambda: run, range(9), CPU)
    assert done[-1] == 0


def test_operations_of_every_thread_use_one_thread(three_threads):
    seen = []
    for _ in range(2):  # a thread's first call of PyTorch differs from later calls
        for_each(lambda: lambda _: seen.append(torch.get_num_threads()), range(6), CPU)
    assert seen == [1] * 12


def test_one_item_alone_uses_one_thread(three_threads):
    seen = []
    for_each(lambda: lambda _: seen.append(torch.get_num_threads()), [0], CPU)
    assert seen == [1]


def test_settings_stay(three_threads):
    for_each(lambda: lambda _: None, range(3), CPU)
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3


def test_no_items(three_threads):
    made = []
    for_each(lambda: made.append(0), [], CPU)
    assert made == []


@POOL
@pytest.mark.parametrize("most", [0, 1, 2])
def test_with_as_many_threads_as_start(three_threads, monkeypatch, most):
    let_threads_start(monkeypatch, most)
    seen, done = [], []

    def run(item):
        seen.append((threading.get_ident(), torch.get_num_threads()))
        done.append(item)

    for_each(lambda: run, range(7), CPU)
    assert sorted(done) == list(range(7))
    assert {count for _, count in seen} == {1}
    identities = {thread for thread, _ in seen}
    assert len(identities) <= max(most, 1)
    assert (threading.get_ident() in identities) == (most == 0)
    assert torch.get_num_threads() == 3


@POOL
def test_a_thread_that_cannot_begin_is_none(three_threads, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    set_num_threads = torch.set_num_threads

    def short_of_memory(count):
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError
        set_num_threads(count)

    monkeypatch.setattr(torch, "set_num_threads", short_of_memory)
    done = []
    for_each(lambda: done.append, range(4), CPU)
    assert done == list(range(4))


def test_an_error_reaches_the_caller_and_ends_the_work(three_threads):
    begun = []

    def fail(item):
        begun.append(item)
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match=r"^item 4$"):
        for_each(lambda: fail, [4] * 100, CPU)
    assert len(begun) <= 3
    done = []
    for_each(lambda: done.append, range(4), CPU)  # the threads are still there
    assert sorted(done) == list(range(4))


def test_an_error_of_making_a_thread_s_own_reaches_the_caller(three_threads):
    def make_run():
        raise MemoryError("scratch")

    with pytest.raises(MemoryError, match=r"^scratch$"):
        for_each(make_run, range(4), CPU)


def test_an_error_holds_no_memory(three_threads):
    memory = torch.empty(1)
    gone = weakref.ref(memory)

    def make_run(memory=memory):
        raise MemoryError

    with pytest.raises(MemoryError):
        for_each(make_run, range(4), CPU)
    del memory, make_run
    assert gone() is None


def test_an_item_may_share_work_itself(three_threads):
    done = []

    def run(item):
        torch.set_num_threads(2)  # one thread would share nothing
        for_each(lambda: lambda inner: done.append((item, inner)), range(3), CPU)
        torch.set_num_threads(1)

    for_each(lambda: run, range(4), CPU)
    torch.set_num_threads(3)
    assert sorted(done) == list(itertools.product(range(4), range(3)))


def test_several_callers_at_once(three_threads):
    def call(caller):
        torch.set_num_threads(3)
        done = []
        for _ in range(50):
            for_each(lambda: done.append, range(5), CPU)
        return caller, sorted(done) == sorted(list(range(5)) * 50)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(4), timeout=SECONDS)) == [(i, True) for i in range(4)]


@pytest.mark.parametrize(("signals", "seconds", "most"), [(1, 0.3, 6), (2, 0.6, 3)])
def test_an_interruption_drops_what_has_not_begun(three_threads, way, signals, seconds, most):
    """A second signal does not leave the threads at work, either.

    The calling thread is one of the team, so the signal may interrupt its item.
    """
    begun, ended = [], []

    def run(item):
        begun.append(item)
        for _ in range(signals if item == 0 else 0):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        time.sleep(seconds)
        ended.append(item)

    with pytest.raises(KeyboardInterrupt):
        for_each(lambda: run, range(100), CPU)
    time.sleep(seconds)  # nothing is still running
    assert len(begun) <= most
    interrupted = len(begun) - len(ended)
    assert interrupted <= (1 if way == "team" else 0)


def test_an_interruption_goes_before_an_item_s_error(three_threads):
    both_begun = threading.Barrier(2, timeout=SECONDS)

    def run(item):
        both_begun.wait()
        if item == 0:
            raise MemoryError
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)

    with pytest.raises(KeyboardInterrupt):
        for_each(lambda: run, range(2), CPU)


def test_an_interruption_may_come_at_any_moment(way):
    """It is raised, nothing hangs, and Python prints no exception that it could not raise."""
    code = f"""
import random, signal, time, torch
from emanet_triton.kernels import threads
threads.has_team = lambda: {way == "team"}
threads.SECONDS_TO_END = 0.1  # for each thread that an interruption has lost; 5 would be long here
torch.set_num_threads(3)
signal.signal(signal.SIGALRM, signal.default_int_handler)
until = time.monotonic() + 3
while time.monotonic() < until:
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 3e-4))
        threads.for_each(lambda: lambda _: torch.ones(9), range(8), torch.device("cpu"))
        time.sleep(1)
    except KeyboardInterrupt:
        continue
    raise AssertionError("no interruption")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=SECONDS, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@POOL
def test_an_interruption_while_a_thread_starts_is_not_lost(way, three_threads, monkeypatch):
    def start(worker):
        try:
            raise KeyboardInterrupt
        finally:  # as the condition of Thread.start, whose lock the interruption has left open
            raise RuntimeError("cannot release un-acquired lock")

    monkeypatch.setattr(threads._Worker, "start", start)
    with pytest.raises(KeyboardInterrupt):
        for_each(lambda: print, range(3), CPU)


def test_another_openmp_than_that_of_pytorch_has_no_team():
    before = torch.get_num_threads()
    other = SimpleNamespace(omp_get_max_threads=lambda: 1, omp_set_num_threads=lambda _: None)
    assert not openmp._sets_threads_of_pytorch(other)
    if library := openmp._library():
        assert openmp._sets_threads_of_pytorch(library)
    assert torch.get_num_threads() == before


ENDINGS = {
    "at_exit": "import atexit; atexit.register(work)",
    "idle": "work()",
    "at_exit_after_the_threads_have_gone": "threads._close(); work()",
    "after_fork": """
work()
child = os.fork()
work()
if child:
    assert os.waitpid(child, 0)[1] == 0
""",
    "after_fork_of_parallel_operations": """
import signal
x = torch.ones(2**20)
x.add_(x)
child = os.fork()
if not child:
    signal.alarm(10)  # ends a hang
work()
if child:
    assert os.waitpid(child, 0)[1] == 0
""",
    "after_fork_with_parallel_operations": """
import signal
x = torch.ones(2**20)
assert torch.get_num_threads() == 2
x.add_(x)
work()
child = os.fork()
if not child:
    signal.alarm(10)  # ends a hang
x.add_(x)
work()
assert torch.get_num_threads() == (2 if child else 1)
if child:
    assert os.waitpid(child, 0)[1] == 0
""",
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_a_process_ends(ending, way):
    code = f"""
import os, torch
from emanet_triton.kernels import threads
from emanet_triton.kernels.openmp import has_team
from emanet_triton.kernels.threads import for_each
threads.has_team = lambda: {way == "team"}
torch.set_num_threads(2)
def work():
    done = []
    for_each(lambda: done.append, range(5), torch.device("cpu"))
    assert sorted(done) == list(range(5))
{ending}
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    done = subprocess.run(command, timeout=SECONDS, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("way", ["team"], indirect=True)
def test_openmp_may_give_fewer_threads_than_asked():
    code = """
import torch
from emanet_triton.kernels.threads import for_each
torch.set_num_threads(3)
seen = []
run = lambda item: seen.append((item, torch.get_num_threads()))
for_each(lambda: run, range(5), torch.device("cpu"))
assert sorted(seen) == [(item, 1) for item in range(5)]
assert torch.get_num_threads() == 3
"""
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, timeout=SECONDS, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no GOMP_parallel")
def test_pytorch_for_linux_has_a_team():
    assert has_team() == ("parallel backend: OpenMP" in torch.__config__.parallel_info())
