"""Compiled kernels and what was found out about them, carried from one machine to another."""

import io
import json
import lzma
import platform
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emanet_triton.bench.gpu_check.own import read_json
from emanet_triton.errors import InputError, first_line
from emanet_triton.files import write_whole
from emanet_triton.kernels.cache import triton_version

NAME = "triton_cache.tar.xz"
TRITON, PACKAGE = "triton", "xdg"  # folders in it
MADE_WITH = "made_with.json"
BINARIES = (".cubin", ".hsaco")
KEPT = (*BINARIES, ".json", ".so")  # of Triton's files; the others are what binaries are made of
QUICK = 1  # of xz: a tenth of the time for half as much again


@dataclass(frozen=True)
class Caches:
    """The caches of a stage.

    Attributes:
        folder: holds Triton's and this package's.
    """

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
        """Make the folders, with the contents of what was packed elsewhere if it is given.

        Args:
            given: a folder of Triton's; an archive of ``pack``, or of a stage, which holds one; or
                the folder of an unpacked one.

        Raises:
            InputError: it is not there, or holds no kernels.
        """
        for path in (self.triton, self.package):
            path.mkdir(parents=True, exist_ok=True)
        if given is None:
            return
        if (given / TRITON).is_dir():
            shutil.copytree(given, self.folder, dirs_exist_ok=True)
        elif given.is_dir():
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
        """Write an archive of the kernels, of their launchers and of this package's findings.

        Raises:
            OSError: it cannot be written, or a file has just been removed.
        """
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:xz", preset=QUICK) as tar:
            for file in self._files():
                tar.add(file, file.relative_to(self.folder).as_posix())
            made = {"python": platform.python_version(), "triton": triton_version()}
            content = json.dumps(made)
            info = tarfile.TarInfo(MADE_WITH)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content.encode()))
        write_whole(path, buffer.getvalue())

    def made_with(self) -> str:
        """The versions that an archive was packed with; empty if it does not say."""
        made = read_json(self.folder / MADE_WITH)
        return ", ".join(f"{name} {value}" for name, value in made.items())

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
    """An archive of ``pack``, or one that holds such a one."""
    try:
        with tarfile.open(path) as tar:
            inner = [m for m in tar.getmembers() if Path(m.name).name == NAME and m.isfile()]
            if not inner:
                tar.extractall(folder, filter="data")
                return
            with tarfile.open(fileobj=tar.extractfile(inner[-1])) as packed:
                packed.extractall(folder, filter="data")
    except FileNotFoundError:
        raise InputError(f"--triton-cache {path}: there is no such file or folder") from None
    except tarfile.ReadError:
        raise InputError(
            f"--triton-cache {path}: expected a folder of Triton's, or the tar of a stage"
        ) from None
    except (OSError, tarfile.TarError, EOFError, lzma.LZMAError) as error:
        raise InputError(f"--triton-cache {path}: cannot be read: {first_line(error)}") from None


def _move_group(group: Path) -> None:
    """Triton keeps the full paths of a kernel's files: name those that are here."""
    names = read_json(group).get("child_paths")
    if not isinstance(names, dict):  # it was being written when it was packed
        group.unlink()
        return
    here = {name: str(group.with_name(name)) for name in names if group.with_name(name).exists()}
    group.write_text(json.dumps({"child_paths": here}))
