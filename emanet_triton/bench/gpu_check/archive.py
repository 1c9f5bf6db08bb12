"""One tar archive of a folder, whole at any time, of a limited size."""

import contextlib
import io
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from emanet_triton.bench.gpu_check.caches import NAME
from emanet_triton.files import write_whole

LIMIT = 15_000_000  # bytes
BLOCK = 512  # bytes: a tar file consists of such blocks


@dataclass
class Archive:
    """The files of a folder in a tar file.

    The tar file is replaced as a whole, so that it is readable whenever this process is killed.

    Attributes:
        path: of the tar file.
        folder: whose files the tar file holds, except hidden files.
        limit: the largest size of the tar file in bytes. The largest files are left out first, the
            compiled kernels last.
        left_out: names and sizes of the files that were left out.
        problem: why the last update could not be written; empty if it was written.
    """

    path: Path
    folder: Path
    limit: int = LIMIT
    left_out: list[str] = field(default_factory=list)
    problem: str = ""
    _written: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def update(self) -> None:
        """Write the archive anew if a file has changed."""
        files = self._files()
        if files == self._written:
            return
        try:
            write_whole(self.path, self._packed(files))
        except OSError as error:  # the run is worth more than its archive
            self.problem = f"{self.path}: cannot be written ({error.strerror})"
        else:
            self._written, self.problem = files, ""

    def _files(self) -> dict[Path, tuple[int, int]]:
        """Bytes and time of the last change of each file."""
        found = {}
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):  # its step has just removed it
                    stat = path.stat()
                    found[path] = stat.st_size, stat.st_mtime_ns
        return found

    def _packed(self, files: dict[Path, tuple[int, int]]) -> bytes:
        self.left_out = []
        buffer, size = io.BytesIO(), 20 * BLOCK  # of the end
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for path in sorted(files, key=lambda path: (path.name != NAME, files[path])):
                name, content = path.relative_to(self.folder).as_posix(), path.read_bytes()
                size += BLOCK * (2 + len(content) // BLOCK)
                if size > self.limit:
                    self.left_out.append(f"{name} ({len(content) / 1e6:.1f} MB)")
                    continue
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(content), files[path][1] // 10**9
                tar.addfile(info, io.BytesIO(content))
        return buffer.getvalue()
