"""Images that come one by one, from any thread, go through a network together."""

import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from emanet_triton.errors import InputError, describe
from emanet_triton.heap import LARGE, give_back
from emanet_triton.inference.predictor import NOT_FINITE_MESSAGE, Predictor, are_finite

_ENDED = "no more images are segmented"
_WARM_UP = 1024, 512  # width and height of the first image, if the protocol has no size


class NoLabelsError(Exception):
    """The network has no labels for an image. The message says why."""


@dataclass(eq=False)  # compared by identity: == of images is an array
class _Job:
    image: np.ndarray
    labels: "Future[np.ndarray]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """A thread that segments images, waiting images of one size together.

    The oldest image goes first. It takes others of its size with it, at most as many as the
    predictor's batch size. For these it waits, but not longer than ``wait_s``.

    Args:
        load: makes the predictor, in the thread that uses it.
        wait_s: the longest time in seconds that an image waits for others of its size.
        note: is called after each batch with the number of its images and its seconds.

    Attributes:
        ready: is done when the predictor has segmented a first, black image. If this fails it has
            the error, and images are never segmented.
        broken: the first unexpected error, or ``None``. A process often cannot use its GPU any
            more after such an error. Too little memory is no such error.
    """

    def __init__(
        self,
        load: Callable[[], Predictor],
        wait_s: float = 0.0,
        note: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        self.wait_s, self.note = wait_s, note
        self.ready: Future[None] = Future()
        self.broken: str | None = None
        self._jobs: list[_Job] = []  # the oldest first
        self._closed = False
        self._changed = threading.Condition()
        # It must not keep a process alive that ends while the network runs.
        self._thread = threading.Thread(target=self._run, args=(load,), daemon=True)
        self._thread.start()

    def submit(self, image: np.ndarray) -> "Future[np.ndarray]":
        """Hand in an image.

        Args:
            image: uint8 RGB [H, W, 3].

        Returns:
            A future that gets class indices, uint8 [H, W], or a ``NoLabelsError``, also if the
            thread has ended. If it is cancelled while the image waits, the image is not segmented.
        """
        job = _Job(image)
        with self._changed:
            if self._closed:
                job.labels.set_exception(NoLabelsError(_ENDED))
            else:
                self._jobs.append(job)
                self._changed.notify()
        return job.labels

    def waiting(self) -> int:
        """The number of images that wait and were not cancelled."""
        return sum(not job.labels.cancelled() for job in self._jobs)

    def close(self) -> None:
        """Segment the images that wait, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self, load: Callable[[], Predictor]) -> None:
        self.ready.set_running_or_notify_cancel()  # or a cancelled waiting would cancel it
        try:
            self._serve(load)
        except Exception as error:  # of ``note``
            traceback.print_exc()
            self.broken = self.broken or describe(error)
        finally:
            with self._changed:
                self._closed = True
                left, self._jobs = self._jobs, []
            for job in left:
                if job.labels.set_running_or_notify_cancel():
                    job.labels.set_exception(NoLabelsError(_ENDED))

    def _serve(self, load: Callable[[], Predictor]) -> None:
        try:
            predictor = load()
            width, height = predictor.protocol.base_scale or _WARM_UP
            (labels,) = predictor([np.zeros((height, width, 3), np.uint8)])
            if not are_finite(labels):
                raise InputError(f"{NOT_FINITE_MESSAGE} for a black image")
        except BaseException as error:
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        while jobs := self._next_jobs(predictor.images_at_once):
            self._segment(predictor, jobs)

    def _next_jobs(self, most: int) -> list[_Job]:
        """Wait for the jobs of a batch. There are none only after ``close``."""
        with self._changed:
            while True:
                self._jobs = [job for job in self._jobs if not job.labels.cancelled()]
                left = None  # seconds to wait; None: until an image comes
                if self._jobs:
                    oldest = self._jobs[0]
                    alike = [job for job in self._jobs if job.image.shape == oldest.image.shape]
                    left = oldest.arrived + self.wait_s - time.monotonic()
                    if len(alike) >= most or left <= 0 or self._closed:
                        batch = alike[:most]
                        self._jobs = [job for job in self._jobs if job not in batch]
                        batch = [job for job in batch if job.labels.set_running_or_notify_cancel()]
                        if batch:
                            return batch
                        continue
                elif self._closed:
                    return []
                self._changed.wait(left)

    def _segment(self, predictor: Predictor, jobs: list[_Job]) -> None:
        start = time.perf_counter()
        try:
            if predictor.device.type == "cpu" and jobs[0].image.size >= LARGE:
                give_back()  # or images of many sizes would leave more and more holes
            for job, labels in zip(jobs, predictor([job.image for job in jobs]), strict=True):
                labels = labels.cpu()
                if are_finite(labels):
                    job.labels.set_result(labels.numpy())
                else:
                    job.labels.set_exception(NoLabelsError(NOT_FINITE_MESSAGE))
        except Exception as error:
            if not isinstance(error, InputError):  # too little memory
                traceback.print_exc()
                self.broken = self.broken or describe(error)
            for job in jobs:
                if not job.labels.done():
                    job.labels.set_exception(NoLabelsError(str(error)))
        self.note(len(jobs), time.perf_counter() - start)
