"""Videos and webcams through the network: decoding, the network and encoding overlap."""

import contextlib
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from emanet_triton.data.decoding import LOG, SILENT
from emanet_triton.data.overlay import legend_entries, with_legend
from emanet_triton.errors import InputError
from emanet_triton.files import require_folder, temporary_beside
from emanet_triton.inference.predictor import NOT_FINITE_MESSAGE, Predictor
from emanet_triton.inference.smoothing import Smoothing
from emanet_triton.predict.outputs import KINDS, Outputs, Prediction
from emanet_triton.predict.pictures import as_prediction, predict
from emanet_triton.predict.sources import Source
from emanet_triton.workers import Workers

AHEAD = 4  # frames that are decoded before the network takes them, and encoded after it
USUAL_RATE = 25.0  # frames a second, where a file or a webcam does not say it
_HIGHEST_RATE = 1000.0
_EXACT_RATE = 65.0  # MPEG-4 cannot express every rate above it
_CODEC = "mp4v"  # MPEG-4, which every build of OpenCV can write


@dataclass(frozen=True)
class Clip:
    """An open video or webcam.

    Attributes:
        source: its source.
        capture: OpenCV's reader.
        rate: frames a second.
        frames: the number of frames that the file says it has; 0 if it does not say it.
    """

    source: Source
    capture: cv2.VideoCapture
    rate: float
    frames: int

    def images(self, most: int | None) -> Iterator[np.ndarray]:
        """Yield at most ``most`` frames, uint8 RGB [H, W, 3], turned as the file says."""
        count = 0
        while most is None or count < most:
            there, frame = self.capture.read()
            if not there:
                return
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            count += 1


@contextlib.contextmanager
def opened(source: Source) -> Iterator[Clip]:
    """Open a video or a webcam.

    Raises:
        InputError: it cannot be opened.
    """
    # The libraries write their own messages to standard error, in many lines.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    LOG.setLogLevel(SILENT)
    webcam = isinstance(source.path, int)
    if not isinstance(source.path, int) and not source.path.is_file():
        # A pipe would be waited for, and OpenCV would not end at a signal.
        raise InputError(f"{source}: cannot be opened; expected a video")
    path = source.path if isinstance(source.path, int) else _for_opencv(source.path)
    capture = cv2.VideoCapture(path)
    try:
        if not capture.isOpened():
            kind = "webcam that works" if webcam else "video"
            raise InputError(f"{source}: cannot be opened; expected a {kind}")
        rate = capture.get(cv2.CAP_PROP_FPS)
        if not (math.isfinite(rate) and 0 < rate <= _HIGHEST_RATE):
            rate = USUAL_RATE
        if rate > _EXACT_RATE:
            rate = float(round(rate))
        frames = 0 if webcam else max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        yield Clip(source, capture, rate, frames)
    finally:
        capture.release()


def segment_video(
    source: Source,
    predictor: Predictor,
    outputs: Outputs,
    *,
    smooth: float | None,
    most: int | None,
    progress: Callable[[int, int], None],
) -> str | None:
    """Segment the frames of a video or a webcam, and write their results.

    The results get their names when they are complete. If a file's segmentation is interrupted,
    the frames so far are kept under names with ``.part``. A recording of a webcam is complete when
    it is interrupted.

    Args:
        source: the video or webcam.
        predictor: the network.
        outputs: what is saved, and where.
        smooth: weight of the frames before, see ``Smoothing``; ``None``: each frame for itself.
        most: stop after so many frames; ``None``: at the end.
        progress: is called after each frame with the frames so far, and with their number or 0.

    Returns:
        What is wrong with the video, or ``None``.

    Raises:
        InputError: the source cannot be opened, a result cannot be written, or memory does not
            suffice.
    """
    smoothing = None if smooth is None else Smoothing(smooth)
    webcam = isinstance(source.path, int)
    with opened(source) as clip, _Results(outputs, clip) as results:
        total = min(clip.frames, most) if most and clip.frames else most or clip.frames
        count = 0
        try:
            for problem in _each_frame(clip, predictor, results, smoothing, most):
                if problem:
                    return f"{source}: frame {count + 1}: {problem}"
                count += 1
                progress(count, total)
        except KeyboardInterrupt:
            count = results.frames
            if not (webcam and count):
                raise
        if count == 0:
            return f"{source}: has no frame that can be read; expected a video"
        results.complete()
        if clip.frames and total - count > clip.rate:
            return f"{source}: ends after {count} of {total} frames; the results have these frames"
    return None


def _each_frame(
    clip: Clip,
    predictor: Predictor,
    results: "_Results",
    smoothing: Smoothing | None,
    most: int | None,
) -> Iterator[str | None]:
    """Segment and save each frame; yield what is wrong with it, or ``None``, after it is saved."""
    saving: deque[Future] = deque()
    begun = time.monotonic()
    # One thread decodes and one encodes, because both must keep the order of the frames.
    with Workers(1) as decoder, Workers(1) as encoder:
        images = clip.images(most)
        decoded = decoder.map(lambda _: next(images, None), iter(int, 1), ahead=AHEAD)
        try:
            for image in decoded:
                if image is None:
                    break
                labels, *rest = _predicted(clip, predictor, image, results.outputs, smoothing)
                seconds = time.monotonic() - begun
                job = encoder.submit(results.save, seconds, image, labels[0], *(r[0] for r in rest))
                saving.append(job)
                while len(saving) > AHEAD:
                    yield saving.popleft().result()
        finally:
            decoded.close()
        while saving:
            yield saving.popleft().result()


def _predicted(
    clip: Clip,
    predictor: Predictor,
    image: np.ndarray,
    outputs: Outputs,
    smoothing: Smoothing | None,
) -> tuple[Tensor, ...]:
    try:
        return predict(predictor, [image], outputs, smoothing)
    except InputError as error:
        raise InputError(f"{clip.source}: {error}") from None


class _Results:
    """The results of a video, in temporary folders until they are complete.

    Args:
        outputs: what is saved, and where.
        clip: the video.

    Attributes:
        frames: of the video that the results have so far.
    """

    def __init__(self, outputs: Outputs, clip: Clip) -> None:
        self.outputs = outputs
        self._clip = clip
        self._final = outputs.missing(clip.source)
        self._temporary: dict[str, Path] = {}
        self._writers: dict[str, cv2.VideoWriter] = {}
        self._shape: tuple[int, ...] | None = None  # of the first frame
        self._legend = legend_entries(outputs.dataset, outputs.classes)
        self.frames = 0

    def __enter__(self) -> "_Results":
        for kind, final in self._final.items():
            require_folder(final.parent)
            self._temporary[kind] = temporary_beside(final)
            try:
                self._temporary[kind].mkdir()
            except OSError as error:
                raise InputError(f"{final}: cannot be written ({error.strerror})") from None
        return self

    def save(
        self, seconds: float, image: np.ndarray, labels: Tensor, probabilities: Tensor | None = None
    ) -> str | None:
        """Save a frame that was segmented ``seconds`` after the first was asked for.

        A webcam's frames are repeated so that the recording takes as long as the scene took. In a
        folder, a frame has one file, numbered by its place in the recording.

        Returns:
            What is wrong with the frame, or ``None``.
        """
        prediction = as_prediction(image, labels, probabilities)
        if prediction is None:
            return NOT_FINITE_MESSAGE
        repeats = 1
        if isinstance(self._clip.source.path, int):
            repeats = max(1, round(seconds * self._clip.rate) - self.frames)
        self._shape = self._shape or image.shape
        if image.shape != self._shape:
            return "it has another size than the first frame"
        for kind, folder in self._temporary.items():
            os.utime(folder)  # or another run takes the folder for one of a killed run
            if _is_video(kind):
                picture = self._picture(kind, prediction)
                for _ in range(repeats):
                    self._writer(kind, picture).write(picture)
            else:
                suffix = Path(KINDS[kind][False]).suffix
                path = folder / f"{self.frames + 1:06}{suffix}"
                self.outputs.save_one(path, kind, prediction)
        self.frames += repeats
        return None

    def complete(self) -> None:
        """Give the results their names.

        Raises:
            InputError: a video was not written whole; OpenCV's writer does not say so.
        """
        self._close()
        for kind, final in self._final.items():
            if _is_video(kind) and _count_frames(self._content(kind)) != self.frames:
                raise InputError(f"{final}: cannot be written whole; the disk may be full")
        for kind, final in self._final.items():
            _move(self._content(kind), final)
            _remove(_part(kind, final))

    def __exit__(self, *_: object) -> None:
        """Keep what is not complete under other names."""
        self._close()
        for kind, folder in self._temporary.items():
            if self.frames and self._content(kind).exists():
                _move(self._content(kind), _part(kind, self._final[kind]))
            _remove(folder)

    def _content(self, kind: str) -> Path:
        folder = self._temporary[kind]
        return folder / "video.mp4" if _is_video(kind) else folder

    def _picture(self, kind: str, prediction: Prediction) -> np.ndarray:
        """The frame, uint8 BGR [H', W', 3], of even sides because the codec needs them."""
        picture = self.outputs.picture(kind, prediction, legend=False)
        if kind == "overlay":
            picture = with_legend(picture, self._legend)
        bottom, right = (side % 2 for side in picture.shape[:2])
        if bottom or right:
            picture = cv2.copyMakeBorder(picture, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
        return cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)

    def _writer(self, kind: str, picture: np.ndarray) -> cv2.VideoWriter:
        if kind not in self._writers:
            size = picture.shape[1::-1]
            writer = cv2.VideoWriter(
                _for_opencv(self._content(kind)),
                cv2.VideoWriter.fourcc(*_CODEC),
                self._clip.rate,
                size,
            )
            if not writer.isOpened():
                raise InputError(
                    f"{self._final[kind]}: OpenCV cannot encode a video of {size[0]}x{size[1]} "
                    f"pixels by {_CODEC}"
                )
            self._writers[kind] = writer
        return self._writers[kind]

    def _close(self) -> None:
        for writer in self._writers.values():
            writer.release()
        self._writers.clear()


def _is_video(kind: str) -> bool:
    """Whether the frames of a kind of result become a video, and not a folder of files."""
    return bool(Path(KINDS[kind][True]).suffix)


def _part(kind: str, path: Path) -> Path:
    """The name of a result that is not complete."""
    suffix = path.suffix if _is_video(kind) else ""
    return path.with_name(f"{path.name.removesuffix(suffix)}.part{suffix}")


def _for_opencv(path: Path) -> str:
    """The path as OpenCV opens it: absolute, because FFmpeg takes ``12:30.mp4`` for a protocol.

    Raises:
        InputError: the path is not UTF-8, with which OpenCV crashes.
    """
    text = os.path.abspath(path)  # noqa: PTH100 (resolve() would follow links)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: OpenCV opens no video whose path is not UTF-8") from None
    return text


def _count_frames(path: Path) -> int:
    """The frames of a video that this module has written; 0 if it cannot be read."""
    capture = cv2.VideoCapture(_for_opencv(path))
    try:
        return int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    finally:
        capture.release()


def _move(path: Path, final: Path) -> None:
    """Give a file or a folder its name, in place of another one.

    Raises:
        InputError: the system refuses it, or the encoder has left no file.
    """
    try:
        if final.is_dir() and not final.is_symlink():
            shutil.rmtree(final)
        path.replace(final)
    except OSError as error:
        raise InputError(f"{final}: cannot be written ({error.strerror})") from None


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
