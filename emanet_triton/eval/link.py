"""Messages between the ranks of a torchrun, through its key-value store. No rank waits for ever."""

import functools
import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from emanet_triton.errors import InputError, first_line
from emanet_triton.eval.torchrun import Place

T = TypeVar("T")
_Question = Callable[[dist.Store], Any]

BEAT_SECONDS = 5.0  # between two signs of life
POLL_SECONDS = 0.05, 0.5  # between two looks at the others, at first and later
NOTE_SECONDS = 15.0, 60.0  # before the first note about waiting, and between two notes
SILENT_SECONDS = 60.0  # after them a rank without a sign of life is dead, stopped or unreachable
START_SECONDS = 180.0  # in which all ranks must begin
STORE_SECONDS = 60.0  # in which torchrun's store, which starts before the ranks, must answer
IDLE_SECONDS = 30 * 60.0  # in which a rank must finish a step
LEAVE_SECONDS = 10.0  # for which the host of the store waits until the others have left
_PART = 2**22  # bytes; the store refuses values of more than 8 MiB
_LISTED = 4  # ranks that a note names


class _Beat(NamedTuple):
    """A sign of life: its number, the number of finished steps, and a text about the progress."""

    number: int = 0
    steps: int = 0
    text: str = ""


class Link:
    """This rank's connection to the others.

    Only a separate thread speaks with the store, because the store's client waits for ever for a
    machine that has vanished, and cannot be interrupted.

    Args:
        place: of this rank in the torchrun.
        say: prints a line for the user.

    Raises:
        InputError: the store does not answer.
    """

    def __init__(self, place: Place, say: Callable[[str], None]) -> None:
        self.place, self._say = place, say
        self._steps, self._text, self._exchanges, self._beats = 0, "", 0, 0
        self._trouble: str | None = None
        self._questions: queue.SimpleQueue[tuple[Future, _Question] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise InputError(f"rank {place.rank} cannot start a thread ({error})") from None
        self._wait_for_store()

    def progress(self, text: str) -> None:
        """Count a finished step; ``text`` tells people about the progress."""
        self._steps += 1
        self._text = text

    def require_others(self) -> None:
        """Check that the last beat found no failed rank and could reach the store.

        Raises:
            InputError: another rank has failed, or the store is lost.
        """
        if self._trouble:
            raise InputError(self._trouble)

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in the order of the ranks.

        Raises:
            InputError: a rank has failed, is silent or makes no progress.
        """
        self._exchanges += 1
        key, text = f"value/{self._exchanges}", json.dumps(value)
        self._ask(lambda store: _put(store, f"{key}/{self.place.rank}", text))
        texts: dict[int, str] = {}
        watch = _Watch(self._say if self.place.rank == 0 else None)
        while missing := [rank for rank in range(self.place.count) if rank not in texts]:
            found = self._ask(functools.partial(_look, key=key, ranks=missing))
            texts |= found.texts
            if found.failure and len(texts) < self.place.count:
                raise InputError(json.loads(found.failure))
            watch.see({rank: beat for rank, beat in found.beats.items() if rank not in texts})
        return [json.loads(texts[rank]) for rank in range(self.place.count)]

    def fail(self, message: str) -> str:
        """Tell the others why this rank ends, unless another rank has failed before.

        Returns:
            The message of the first rank that failed, for this process to print. Empty if another
            process on this machine prints it.
        """

        def first(store: dist.Store) -> str:
            winner = store.compare_set("failure", "", json.dumps(message)).decode()
            return json.loads(winner) if store.add(f"told/{self.place.node}", 1) == 1 else ""

        try:
            return self._ask(first, LEAVE_SECONDS)
        except InputError:
            return message

    def leave(self) -> None:
        """End the connection. The host of the store first waits until the others have left."""
        deadline = time.monotonic() + LEAVE_SECONDS
        try:
            left = self._ask(lambda store: store.add("left", 1), LEAVE_SECONDS)
            while self._hosts and left < self.place.count and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS[0])
                left = self._ask(lambda store: store.add("left", 0), LEAVE_SECONDS)
        except InputError:
            pass  # the store is gone already
        self._questions.put(None)
        self._thread.join(LEAVE_SECONDS)

    @property
    def _hosts(self) -> bool:
        return not self.place.hosted and self.place.rank == 0

    def _wait_for_store(self) -> None:
        connected = self._submit(lambda store: None)
        if not wait([connected], NOTE_SECONDS[0]).done and self.place.rank == 0:
            self._say(f"waiting for the store at {self.place.host}:{self.place.port}")
        # The store's client must give up first, because Python must not end while it works.
        self._answer_of(connected, self._most_seconds + SILENT_SECONDS)

    @property
    def _most_seconds(self) -> float:
        """The seconds in which the store must answer."""
        return STORE_SECONDS if self.place.hosted else START_SECONDS

    def _ask(self, question: Callable[[dist.Store], T], seconds: float | None = None) -> T:
        """The store's answer to a question, within ``SILENT_SECONDS`` or the given seconds."""
        return self._answer_of(self._submit(question), seconds or SILENT_SECONDS)

    def _submit(self, question: Callable[[dist.Store], Any]) -> Future:
        future: Future = Future()
        self._questions.put((future, question))
        return future

    def _answer_of(self, future: Future, seconds: float) -> Any:
        try:
            return future.result(seconds)
        except TimeoutError:
            reason = "no answer"
        except RuntimeError as error:  # all errors of the store have this type
            reason = first_line(error)
        raise InputError(self._lost(reason))

    def _lost(self, reason: str) -> str:
        place = self.place
        host = "torchrun" if place.hosted else "rank 0"
        return (
            f"rank {place.rank} has no connection to the store that {host} keeps at "
            f"{place.host}:{place.port} ({reason})"
        )

    def _serve(self) -> None:
        """Answer questions and give signs of life, until told to end."""
        try:
            store = self._connect()
        except (RuntimeError, ValueError, OSError) as error:
            self._refuse(error)
            return
        due = 0.0
        while True:
            try:
                job = self._questions.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                self._beat(store)
                due = time.monotonic() + BEAT_SECONDS
                continue
            if job is None:
                return
            future, question = job
            _answer(future, question, store)

    def _refuse(self, error: Exception) -> None:
        """Answer every question with an error, until told to end."""
        while job := self._questions.get():
            job[0].set_exception(RuntimeError(str(error)))

    def _connect(self) -> dist.Store:
        """The part of the store that belongs to this evaluation alone."""
        place = self.place
        store = dist.TCPStore(
            place.host,
            place.port,
            is_master=self._hosts,
            timeout=timedelta(seconds=self._most_seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
        store.set_timeout(timedelta(seconds=SILENT_SECONDS))
        name = f"emanet_triton/{place.attempt}/{place.count}"
        number = store.add(f"{name}/started/{place.rank}", 1)  # a torchrun may evaluate repeatedly
        return dist.PrefixStore(f"{name}/{number}", store)

    def _beat(self, store: dist.Store) -> None:
        self._beats += 1
        beat = _Beat(self._beats, self._steps, self._text)
        try:
            store.set(f"beat/{self.place.rank}", json.dumps(beat))
            if store.check(["failure"]):
                self._trouble = json.loads(store.get("failure"))
        except RuntimeError as error:
            self._trouble = self._lost(first_line(error))


class _Found(NamedTuple):
    """The values and signs of life of some ranks, and the message of the first failure."""

    texts: dict[int, str]
    beats: dict[int, _Beat]
    failure: str


class _Watch:
    """Measures how long other ranks give no sign of life, and how long they finish no step.

    The time between two looks counts as one second at most, so that a stop of this process itself
    does not count as silence of the others.
    """

    def __init__(self, say: Callable[[str], None] | None) -> None:
        self._say = say
        self._beats: dict[int, _Beat] = {}
        self._silent: dict[int, float] = {}
        self._idle: dict[int, float] = {}
        self._waited, self._next_note = 0.0, NOTE_SECONDS[0]
        self._pause, self._looked = POLL_SECONDS[0], time.monotonic()

    def see(self, beats: dict[int, _Beat]) -> None:
        """Note the latest beats of the ranks that this rank waits for, then pause.

        Raises:
            InputError: a rank is silent or makes no progress.
        """
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 1.0), now
        self._waited += passed
        for rank, beat in beats.items():
            before = self._beats.get(rank, _Beat())
            self._beats[rank] = beat
            same, idle = beat.number == before.number, beat.steps == before.steps
            self._silent[rank] = self._silent.get(rank, 0.0) + passed if same else 0.0
            self._idle[rank] = self._idle.get(rank, 0.0) + passed if idle else 0.0
            self._require_life(rank, beat)
        if beats and self._say and self._waited >= self._next_note:
            self._say(_waiting_for(beats))
            self._next_note += NOTE_SECONDS[1]
        if beats:
            time.sleep(self._pause)
            self._pause = min(1.5 * self._pause, POLL_SECONDS[1])

    def _require_life(self, rank: int, beat: _Beat) -> None:
        if not beat.number and self._silent[rank] >= START_SECONDS:
            raise InputError(
                f"rank {rank} has not begun within {START_SECONDS:.0f} s; all ranks of a torchrun "
                "must run the evaluation (unset TORCHELASTIC_RUN_ID to run alone)"
            )
        if beat.number and self._silent[rank] >= SILENT_SECONDS:
            raise InputError(
                f"rank {rank} gives no sign of life for {SILENT_SECONDS:.0f} s: it is dead, "
                "stopped or unreachable"
            )
        if self._idle[rank] >= IDLE_SECONDS:
            raise InputError(
                f"rank {rank} is alive and has finished nothing for {IDLE_SECONDS / 60:.0f} minutes"
            )


def _waiting_for(beats: dict[int, _Beat]) -> str:
    ranks = [
        f"rank {rank}: {beat.text or 'at work'}" if beat.number else f"rank {rank}: not begun yet"
        for rank, beat in list(beats.items())[:_LISTED]
    ]
    more = len(beats) - len(ranks)
    return "waiting for " + "; ".join(ranks) + (f"; and {more} more" if more else "")


def _answer(future: Future, question: Callable[[dist.Store], Any], store: dist.Store) -> None:
    try:
        future.set_result(question(store))
    except Exception as error:
        future.set_exception(error)


def _put(store: dist.Store, key: str, text: str) -> None:
    """Store a text of any length; a reader sees all of it or nothing."""
    parts = [text[i : i + _PART] for i in range(0, len(text), _PART)]
    for i, part in enumerate(parts):
        store.set(f"{key}/{i}", part)
    store.set(key, str(len(parts)))


def _get(store: dist.Store, key: str) -> str:
    return "".join(store.get(f"{key}/{i}").decode() for i in range(int(store.get(key))))


def _look(store: dist.Store, key: str, ranks: Sequence[int]) -> _Found:
    arrived = [rank for rank in ranks if store.check([f"{key}/{rank}"])]
    beats = {
        rank: _Beat(*json.loads(store.get(f"beat/{rank}")))
        if store.check([f"beat/{rank}"])
        else _Beat()
        for rank in ranks
    }
    failure = store.get("failure").decode() if store.check(["failure"]) else ""
    return _Found({rank: _get(store, f"{key}/{rank}") for rank in arrived}, beats, failure)
