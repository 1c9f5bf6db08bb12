"""Partial results: the counts of an unfinished evaluation, from which another run continues."""

import contextlib
import hashlib
import json
import math
import re
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from emanet_triton.cache_folder import cache_folder
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.dataset import Sample
from emanet_triton.data.png_chunks import MAX_PIXELS
from emanet_triton.eval.ranks import Ranks
from emanet_triton.files import read_plain, write_whole
from emanet_triton.kernels.cache import digest, triton_version
from emanet_triton.versions import versions

_SECONDS_BETWEEN_WRITES = 5.0
_REST = 20  # times as long as the last write took, at least, no other follows
_LONGEST = 1e9  # seconds, some 30 years; no run has taken longer
_SECONDS_KEPT = 30 * 24 * 3600.0  # after which an unused partial result is removed

# Reasons for which something is left out, in the singular and in the plural.
_DAMAGED = "1 damaged file", "{} damaged files"
_OTHER_VERSIONS = "1 file of other versions", "{} files of other versions"
_CHANGED = (
    "1 image of a batch whose files have changed",
    "{} images of batches whose files have changed",
)
_NOT_DRAWN = (
    "1 image of a batch whose pictures are missing or have changed",
    "{} images of batches whose pictures are missing or have changed",
)
_Reason = tuple[str, str]

Stamp = list[int]  # size in bytes and time in ns of each file that exists


class Earlier(NamedTuple):
    """The finished images of earlier runs.

    Attributes:
        names: of the images.
        counts: of the images, int64 [M, C, C].
        seconds: that the earlier runs took.
    """

    names: set[str]
    counts: Tensor
    seconds: float


class _Piece(NamedTuple):
    """The images of one batch.

    Attributes:
        names: of the images.
        stamps: of their files.
        pictures: the stamps of the pictures that were written for them.
        counts: of the images, int64 [M, C, C].
    """

    names: list[str]
    stamps: list[Stamp | None]
    pictures: list[Stamp]
    counts: np.ndarray


class _OtherVersionsError(Exception):
    """Other versions of the software have made the partial result."""


def stamps(samples: Iterable[Sample]) -> dict[str, Stamp]:
    """The stamp of each sample's image and label, by the sample's name."""
    return {sample.name: stamp(sample.image, sample.label) for sample in samples}


def stamp(*paths: Path) -> Stamp:
    """Size in bytes and time in ns of each file; a missing file has none."""
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            state = path.stat()
            found += [state.st_size, state.st_mtime_ns]
    return found


def software(device: torch.device) -> dict[str, str]:
    """The versions on which counts may depend, and a digest of this package's source."""
    package = Path(__file__).parents[1]
    rooms = "kernels", "models", "data", "inference", "eval"
    source = [file for room in rooms for file in (package / room).rglob("*.py")]
    gpu = {"triton": triton_version()} if device.type == "cuda" else {}
    return versions() | gpu | {"source": digest(source)}


class PartialResult:
    """The images that one process has finished, and their counts.

    All processes of a run write into one folder, which is named after the settings; each has a
    file of its own, whose name begins with the start of the run. A run that continues reads all
    files there and adds new ones. A file contains a checksum, the versions of the software and the
    stamps of its images.

    Args:
        settings: everything that determines the result, as JSON values; ``"samples"`` lists the
            names of the images.
        rank: of the process, for the file's name.
        matrices: M, the number of confusion matrices.
        classes: C, of the data set.
        versions: of the software; a file with other versions is left out.
        stamps: of the samples by name, see ``stamps``; an image with another stamp is left out.

    Attributes:
        names: of the images that this process has finished.
        counts: of these images, int64 [M, C, C].
        left_out: a text that says what ``earlier`` left out and why, or an empty text.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        rank: int = 0,
        matrices: int = 1,
        *,
        classes: int = len(CITYSCAPES.classes),
        versions: dict[str, str] | None = None,
        stamps: dict[str, Stamp] | None = None,
    ) -> None:
        text = json.dumps(settings, sort_keys=True)
        self.settings = json.loads(text)  # JSON turns tuples into lists
        self.folder = cache_folder() / "partial" / _sha256(text)[:16]
        self._rank = rank
        self._begin_run(str(time.time_ns()))
        self._versions, self._stamps = versions or {}, stamps or {}
        self._samples = set(settings["samples"])
        self._shape = (matrices, classes, classes)
        cells = math.prod(self._shape)
        self._largest = 2**20 + 2 * len(text) + len(self._samples) * (12 * cells + 2048)
        self.names: list[str] = []
        self.counts = torch.zeros(self._shape, dtype=torch.int64)
        self.seconds = 0.0
        self.left_out = ""
        self._finished: list[dict[str, Any]] = []
        self._next_write = time.monotonic() + _SECONDS_BETWEEN_WRITES

    def earlier(
        self, ranks: Ranks | None = None, drawn: Callable[[str], Stamp] | None = None
    ) -> Earlier:
        """All images that earlier runs have finished; every rank gets the same answer.

        The ranks also agree on the start of their run. A damaged file is left out. If a file or
        picture of an image has changed, its whole batch is left out.

        Args:
            ranks: the processes that read, each on its machine.
            drawn: gives the stamp of an image's pictures as they are now; ``None`` if the pictures
                do not matter.
        """
        ranks = ranks or Ranks()
        files: Counter[_Reason] = Counter()
        images: dict[str, _Reason] = {}
        pieces: list[_Piece] = []
        seconds: dict[str, float] = {}
        for file in sorted(self.folder.glob("*.json")):
            try:
                content = self._read(file)
                found = self._pieces(content["finished"])
            except _OtherVersionsError:
                files[_OTHER_VERSIONS] += 1
            except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError):
                files[_DAMAGED] += 1
            else:
                usable, changed = self._usable(found, drawn)
                pieces += usable
                images |= changed
                seconds[file.name] = content["seconds"] * len(usable) / max(1, len(found))
        own = [[piece.names for piece in pieces], seconds, self._start]
        everywhere = ranks.gather(own)
        self._begin_run(everywhere[0][2])
        names, mine = _shared_out([part[0] for part in everywhere], ranks.rank)
        counts = sum((pieces[i].counts for i in mine), np.zeros(self._shape, np.int64))
        took = _seconds_of_runs(part[1] for part in everywhere)
        reasons = files + Counter(why for name, why in images.items() if name not in names)
        self.left_out = ", ".join(
            one if number == 1 else many.format(number) for (one, many), number in reasons.items()
        )
        return Earlier(names, ranks.sum(torch.from_numpy(counts)), took)

    def discard(self) -> None:
        """Remove the files of all runs with these settings."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def discard_forgotten(self) -> None:
        """Remove partial results with other settings that no run has used for a month."""
        with contextlib.suppress(OSError):
            for folder in self.folder.parent.iterdir():
                named = re.fullmatch("[0-9a-f]{16}", folder.name)
                if named and folder != self.folder and _age(folder) > _SECONDS_KEPT:
                    shutil.rmtree(folder, ignore_errors=True)

    def add(
        self, names: list[str], counts: Tensor, seconds: float, pictures: list[Stamp] | None = None
    ) -> None:
        """Add a batch of finished images.

        Args:
            names: of the images.
            counts: of these images, int64 [M, C, C].
            seconds: that this run has taken so far.
            pictures: the stamp of each image's pictures; by default no pictures were written.
        """
        self.names += names
        self.counts += counts
        self.seconds = seconds
        marks = [self._stamps.get(name) for name in names]
        batch = {"images": names, "stamps": marks, "pictures": pictures or [[] for _ in names]}
        self._finished.append(batch | {"counts": counts.tolist()})
        if time.monotonic() > self._next_write:
            self.write()

    def write(self) -> None:
        """Write this process's file again; a reader never sees a part of it.

        If it cannot be written, a warning says so and the evaluation goes on.
        """
        begin = time.monotonic()
        content = {
            "settings": self.settings,
            "versions": self._versions,
            "finished": self._finished,
            "seconds": self.seconds,
        }
        text = json.dumps(content)
        sealed = json.dumps({"sha256": _sha256(text), "content": text})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, sealed.encode())
        except OSError as error:
            warnings.warn(f"{self._file}: the partial result is not kept ({error})", stacklevel=2)
        end = time.monotonic()
        self._next_write = end + max(_SECONDS_BETWEEN_WRITES, _REST * (end - begin))

    def _begin_run(self, start: str) -> None:
        """Name this process's file after the start of its run, which all ranks share."""
        self._start = start
        self._file = self.folder / f"{start}-{self._rank}.json"

    def _read(self, file: Path) -> dict[str, Any]:
        """The content of a file, if it is undamaged and has these settings and versions."""
        sealed = json.loads(read_plain(file, self._largest))
        text = sealed["content"]
        if not isinstance(text, str) or sealed["sha256"] != _sha256(text):
            raise ValueError("its checksum is wrong")
        content = json.loads(text)
        if content["settings"] != self.settings:
            raise ValueError("it is of other settings")
        if content["versions"] != self._versions:
            raise _OtherVersionsError
        if not 0 <= content["seconds"] < _LONGEST:
            raise ValueError("its time is impossible")
        return content

    def _pieces(self, finished: list[dict[str, Any]]) -> list[_Piece]:
        """The batches of a file; ValueError if one of them is impossible."""
        pieces = [
            _Piece(b["images"], b["stamps"], b["pictures"], np.array(b["counts"])) for b in finished
        ]
        for piece in pieces:
            names = piece.names
            known = isinstance(names, list) and self._samples.issuperset(names)
            if not names or not known or len(set(names)) < len(names):
                raise ValueError("not the images of a batch")
            if not self._plausible(piece.counts, len(names)):
                raise ValueError("not the counts of a batch")
        return pieces

    def _usable(
        self, pieces: list[_Piece], drawn: Callable[[str], Stamp] | None
    ) -> tuple[list[_Piece], dict[str, _Reason]]:
        """The batches whose files and pictures are unchanged; the other images, and why."""
        usable: list[_Piece] = []
        left_out: dict[str, _Reason] = {}
        for piece in pieces:
            if piece.stamps != [self._stamps.get(name) for name in piece.names]:
                left_out |= dict.fromkeys(piece.names, _CHANGED)
            elif drawn and piece.pictures != list(map(drawn, piece.names)):
                left_out |= dict.fromkeys(piece.names, _NOT_DRAWN)
            else:
                usable.append(piece)
        return usable, left_out

    def _plausible(self, counts: np.ndarray, images: int) -> bool:
        """Whether ``counts`` can be the pixel counts of this number of images."""
        right_kind = counts.dtype == np.int64 and counts.shape == self._shape
        return bool(
            right_kind
            and counts.min() >= 0
            and counts.max() <= images * MAX_PIXELS
            and counts.sum((1, 2)).max() <= images * MAX_PIXELS
        )


def _shared_out(found: list[list[list[str]]], rank: int) -> tuple[set[str], list[int]]:
    """All finished images, and the indices of the pieces that this rank counts.

    ``found`` lists the names in each piece of each rank. Several ranks may have read the same
    file, so each piece must be counted by one rank only.
    """
    names: set[str] = set()
    mine = []
    for reader, pieces in enumerate(found):
        for i, piece in enumerate(pieces):
            if names.isdisjoint(piece):
                names.update(piece)
                mine += [i] if reader == rank else []
    return names, mine


def _seconds_of_runs(found: Iterable[dict[str, float]]) -> float:
    """The seconds that all runs took, from the seconds in each file by its name.

    The files of a run are of ranks that ran at the same time. Several ranks may have read a file.
    """
    runs: dict[str, float] = {}
    for files in found:
        for name, seconds in files.items():
            run = name.partition("-")[0]
            runs[run] = max(seconds, runs.get(run, 0.0))
    return sum(runs.values())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _age(folder: Path) -> float:
    """Seconds since anything in the folder was written."""
    newest = max(path.lstat().st_mtime for path in (folder, *folder.iterdir()))
    return time.time() - newest
