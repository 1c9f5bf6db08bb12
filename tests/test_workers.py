"""Worker threads: as many as the system lets start, which may be none."""

import threading
import time

import pytest
from thread_limit import let_threads_start

from emanet_triton.workers import Workers


@pytest.mark.parametrize("most", [0, 1, 2, 8])
def test_the_work_is_done_by_the_threads_that_start(monkeypatch, most):
    let_threads_start(monkeypatch, most)
    used = set()

    def square(number):
        used.add(threading.current_thread())
        time.sleep(0.01)
        return number**2

    with Workers(4) as pool:
        assert list(pool.map(square, range(20), ahead=8)) == [n**2 for n in range(20)]
        assert pool.submit(square, 5).result() == 25
    assert len(used) == max(1, min(4, most))
    assert (threading.main_thread() in used) is (most == 0)


@pytest.mark.parametrize("most", [0, 1])
def test_an_error_is_the_readers(monkeypatch, most):
    let_threads_start(monkeypatch, most)
    with Workers(1) as pool:
        results = pool.map(lambda n: 1 // n, [1, 0, 1], ahead=1)
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_no_more_is_done_ahead_than_asked_for():
    begun = []
    with Workers(2) as pool:
        results = pool.map(begun.append, range(100), ahead=3)
        next(results)
        time.sleep(0.1)
        assert len(begun) == 4
        results.close()


def test_leaving_waits_for_what_was_submitted():
    done = []
    with Workers(1) as pool:
        for n in range(3):
            pool.submit(lambda n=n: (time.sleep(0.02), done.append(n)))
    assert done == [0, 1, 2]
