"""Compiled kernels and the choices among them, carried from one machine to another."""

import io
import json
import lzma
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emanet_triton.bench.gpu_check.own import read_json
from emanet_triton.errors import InputError, first_line
from emanet_triton.files import write_whole

NAME = "triton_cache.tar.xz"
TRITON, PACKAGE = "triton", "xdg"  # folders in it
BINARIES = (".cubin", ".hsaco")
KEPT = (*BINARIES, ".json", ".so")  # the other files of Triton are earlier stages of the binaries
QUICK = 1  # xz then takes a tenth of the time, and half as much space again


@dataclass(frozen=True)
class Caches:
    """The caches of a stage: a folder with Triton's cache and this package's cache."""

    folder: Path

    @property
    def triton(self) -> Path:
        """``TRITON_CACHE_DIR``."""
        return self.folder / TRITON

    @property
    def package(self) -> Path:
        """``XDG_CACHE_HOME``."""
        return self.folder / PACKAGE

    def count(self) -> int:
        """Kernels in Triton's cache."""
        return sum(path.suffix in BINARIES for path in self.triton.glob("*/*"))

    def fill(self, given: Path | None) -> None:
        """Make the folders, and fill them from another machine's.

        Args:
            given: a cache folder of Triton, or the tar archive of a stage.

        Raises:
            InputError: ``given`` does not exist, or holds no kernels.
        """
        for path in (self.triton, self.package):
            path.mkdir(parents=True, exist_ok=True)
        if given is None:
            return
        if given.is_dir():
            _copy(given, self.triton)
        else:
            _unpack(given, self.folder)
        for group in self.triton.glob("*/__grp__*.json"):
            _move_group(group)
        if not self.count():
            raise InputError(f"--triton-cache {given}: holds no compiled kernels")

    def state(self) -> tuple[int, int]:
        """Changes whenever ``pack`` would write something else."""
        times = [path.stat().st_mtime_ns for path in self._files()]
        return len(times), max(times, default=0)

    def pack(self, path: Path) -> None:
        """Write an archive of the kernels, their launchers and this package's choices.

        Raises:
            OSError: the archive cannot be written, or a file has just been removed.
        """
        buffer = io.BytesIO()
        with (
            lzma.open(buffer, "wb", preset=QUICK) as compressed,
            tarfile.open(fileobj=compressed, mode="w") as tar,
        ):
            for file in self._files():
                tar.add(file, file.relative_to(self.folder).as_posix())
        write_whole(path, buffer.getvalue())

    def _files(self) -> list[Path]:
        return [*_kept(self.triton), *self.package.glob("emanet_triton/*.jsonl")]


def _kept(folder: Path) -> Iterator[Path]:
    yield from (path for path in sorted(folder.glob("*/*")) if path.suffix in KEPT)


def _copy(source: Path, target: Path) -> None:
    for path in _kept(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)


def _unpack(path: Path, folder: Path) -> None:
    """Unpack the archive of ``pack`` that the archive of a stage holds."""
    try:
        with tarfile.open(path) as tar:
            inner = tar.extractfile(NAME)
            if inner is None:  # a folder of this name
                raise KeyError
            with tarfile.open(fileobj=inner) as packed:
                packed.extractall(folder, filter="data")
    except KeyError:
        return  # there are no kernels in it
    except FileNotFoundError:
        raise InputError(f"--triton-cache {path}: there is no such file or folder") from None
    except tarfile.ReadError:
        raise InputError(
            f"--triton-cache {path}: expected a folder of Triton's, or the tar of a stage"
        ) from None
    except (OSError, tarfile.TarError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"--triton-cache {path}: cannot be read: {first_line(error)}") from None


def _move_group(group: Path) -> None:
    """Correct the paths of a kernel's files: Triton keeps full paths, here of another machine."""
    names = read_json(group).get("child_paths")
    if not isinstance(names, dict):  # it was being written when it was packed
        group.unlink()
        return
    here = {name: str(group.with_name(name)) for name in names if group.with_name(name).exists()}
    group.write_text(json.dumps({"child_paths": here}))
