"""Ranks exchange values through the store, and no rank waits for another for ever."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from emanet_triton.errors import InputError
from emanet_triton.eval import link
from emanet_triton.eval.link import Link
from emanet_triton.eval.ranks import Ranks
from emanet_triton.eval.torchrun import Place


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """All waiting times are short enough for a test."""
    monkeypatch.setattr(link, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(link, "POLL_SECONDS", (0.01, 0.05))
    monkeypatch.setattr(link, "LEAVE_SECONDS", 2.0)


@pytest.fixture
def store():
    """A store like the one that torchrun keeps."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def join(store):
    """Join as one of two ranks; all ranks leave at the end."""
    links = []

    def join_as(rank: int, count: int = 2, say=lambda line: None, node: str = "0") -> Link:
        place = Place(rank, count, rank, count, "127.0.0.1", store.port, True, node, "0")
        links.append(Link(place, say))
        return links[-1]

    yield join_as
    for one in links:
        one.leave()


def exchange(links: list[Link], values: list) -> list:
    """The values that each rank gets."""
    return at_once(
        *(lambda one=one, v=v: one.exchange(v) for one, v in zip(links, values, strict=True))
    )


def at_once(*calls) -> list:
    """Run functions that wait for one another, and return their results."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def freeze(one: Link) -> None:
    """Send no more signs of life, like a stopped process."""
    one._questions.put(None)
    one._thread.join()


def test_values_come_in_the_order_of_the_ranks(join):
    links = [join(rank, 3) for rank in (2, 0, 1)]
    for value in ("short", "long " * 2**21):  # the store takes 8 MiB at once
        got = exchange(links, [[one.place.rank, value] for one in links])
        assert got == [[[0, value], [1, value], [2, value]]] * 3


def test_sums_are_exact(join):
    counts = torch.tensor([[2**60 + 1, 3]]), torch.tensor([[2**60 + 2, -1]])
    groups = [Ranks(rank, 2, rank, 2, join(rank)) for rank in range(2)]
    sums = at_once(*(lambda g=g, c=c: g.sum(c) for g, c in zip(groups, counts, strict=True)))
    for total in sums:
        assert total.dtype == torch.int64
        assert total.tolist() == [[2**61 + 3, 2]]


def test_one_process_needs_nobody():
    group = Ranks()
    assert group.gather("x") == ["x"]
    assert group.sum(torch.tensor(3)) == 3
    assert group.fail("error: x") == "error: x"
    group.barrier()
    group.progress("1 of 2 images")
    group.require_others()


def test_a_second_evaluation_does_not_see_the_values_of_the_first(join):
    for value in ("first", "second"):
        assert exchange([join(0), join(1)], [value, value]) == [[value, value]] * 2


def test_the_wait_for_a_slow_rank_is_told(join, monkeypatch):
    monkeypatch.setattr(link, "NOTE_SECONDS", (0.5, 0.5))
    said = []
    first, second = join(0, say=said.append), join(1)
    second.progress("12 of 250 images")
    time.sleep(0.3)  # a beat

    def late():
        time.sleep(1.2)
        return second.exchange("late")

    assert at_once(lambda: first.exchange("early"), late)[0] == ["early", "late"]
    assert said == ["waiting for rank 1: 12 of 250 images"] * 2


def test_a_rank_without_a_sign_of_life_is_named(join, monkeypatch):
    monkeypatch.setattr(link, "SILENT_SECONDS", 1.0)
    first, second = join(0), join(1)
    time.sleep(0.3)
    freeze(second)
    with pytest.raises(InputError) as error:
        first.exchange("x")
    assert str(error.value) == (
        "rank 1 gives no sign of life for 1 s: it is dead, stopped or unreachable"
    )


def test_a_rank_that_never_begins_is_named(join, monkeypatch):
    monkeypatch.setattr(link, "START_SECONDS", 1.0)
    with pytest.raises(InputError) as error:
        join(0).exchange("x")
    assert str(error.value) == (
        "rank 1 has not begun within 1 s; all ranks of a torchrun must run the evaluation "
        "(unset TORCHELASTIC_RUN_ID to run alone)"
    )


def test_a_rank_that_finishes_nothing_is_named(join, monkeypatch):
    monkeypatch.setattr(link, "IDLE_SECONDS", 1.0)
    first, second = join(0), join(1)
    until = time.monotonic() + 1.5
    working = threading.Thread(
        target=lambda: [
            (time.sleep(0.2), second.progress("some"))
            for _ in iter(lambda: time.monotonic() < until, False)
        ]
    )
    working.start()
    begun = time.monotonic()
    with pytest.raises(InputError) as error:
        first.exchange("x")
    working.join()
    assert time.monotonic() - begun > 2.0  # only the time since the last step counts
    assert str(error.value) == "rank 1 is alive and has finished nothing for 0 minutes"


def test_time_for_which_this_process_was_stopped_does_not_count(monkeypatch):
    clock = iter(range(0, 10**6, 1000))
    monkeypatch.setattr(link.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(link.time, "sleep", lambda seconds: None)
    watch = link._Watch(None)
    for _ in range(59):
        watch.see({1: link._Beat(7, 0, "")})
    watch.see({1: link._Beat(7, 0, "")})
    with pytest.raises(InputError, match="no sign of life for 60 s"):
        watch.see({1: link._Beat(7, 0, "")})


def test_a_failure_ends_the_others_and_is_printed_once(join):
    first, second, far = join(0, 3), join(1, 3), join(2, 3, node="1")
    assert second.fail("error on rank 1: no such file") == "error on rank 1: no such file"
    with pytest.raises(InputError) as error:
        first.exchange("x")
    assert str(error.value) == "error on rank 1: no such file"
    assert first.fail(f"error: {error.value}") == ""
    # Another machine has a terminal of its own.
    assert far.fail("interrupted") == "error on rank 1: no such file"


def test_a_rank_at_work_hears_of_a_failure_at_the_next_beat(join):
    first, second = join(0), join(1)
    first.require_others()
    second.fail("error on rank 1: x")
    time.sleep(0.5)
    with pytest.raises(InputError) as error:
        first.require_others()
    assert str(error.value) == "error on rank 1: x"


def test_a_value_that_was_sent_before_a_failure_counts(join):
    first, second = join(0), join(1)
    second._ask(lambda store: link._put(store, "value/1/1", json.dumps("b")))  # waits for nobody
    second.fail("error on rank 1: later")
    assert first.exchange("a") == ["a", "b"]
    with pytest.raises(InputError, match="later"):
        first.exchange("c")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_without_torchruns_store_rank_0_keeps_one_until_all_have_left():
    port = free_port()
    places = [Place(rank, 2, rank, 2, "127.0.0.1", port, False, "0", "0") for rank in range(2)]
    second, first = at_once(*(lambda p=p: Link(p, print) for p in reversed(places)))
    assert exchange([first, second], [1, 2]) == [[1, 2]] * 2

    def late():
        time.sleep(0.5)
        second.leave()

    begun = time.monotonic()
    at_once(first.leave, late)
    assert 0.5 < time.monotonic() - begun < 1.9


def test_a_lost_store_is_told():
    port = free_port()
    places = [Place(rank, 2, rank, 2, "127.0.0.1", port, False, "0", "0") for rank in range(2)]
    first, second = at_once(*(lambda p=p: Link(p, print) for p in places))
    freeze(first)  # its store goes with its thread
    with pytest.raises(InputError) as error:
        second.exchange("x")
    lost = f"rank 1 has no connection to the store that rank 0 keeps at 127.0.0.1:{port} ("
    assert str(error.value).startswith(lost)
    assert second.fail("error on rank 1: y") == "error on rank 1: y"
    second.leave()


def test_a_store_that_nobody_keeps_is_told(monkeypatch):
    monkeypatch.setattr(link, "STORE_SECONDS", 1.0)
    said = []
    monkeypatch.setattr(link, "NOTE_SECONDS", (0.5, 0.5))
    port = free_port()
    with pytest.raises(
        InputError, match=f"no connection to the store that torchrun keeps at 127.0.0.1:{port} "
    ):
        Link(Place(0, 2, 0, 2, "127.0.0.1", port, True, "0", "0"), said.append)
    assert said == [f"waiting for the store at 127.0.0.1:{port}"]


def test_a_store_that_does_not_answer_is_told(join, store, monkeypatch):
    """If the machine of the store has vanished, the client waits but this process does not."""
    first = join(0)
    monkeypatch.setattr(link, "SILENT_SECONDS", 0.5)
    answered = threading.Event()
    first._submit(lambda store: answered.wait(10))
    try:
        with pytest.raises(InputError) as error:
            first.exchange("x")
    finally:
        answered.set()
    assert str(error.value) == (
        f"rank 0 has no connection to the store that torchrun keeps at 127.0.0.1:{store.port} "
        "(no answer)"
    )


def test_a_thread_that_cannot_start_is_told(monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(
        InputError, match=r"^rank 1 cannot start a thread \(can't start new thread\)$"
    ):
        Link(Place(1, 2, 1, 2, "127.0.0.1", 1, True, "0", "0"), print)
