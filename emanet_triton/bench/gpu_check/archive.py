"""One tar archive of a folder, whole at any time, of a limited size."""

import contextlib
import gzip
import io
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from emanet_triton.bench.gpu_check.caches import NAME
from emanet_triton.files import write_whole

LIMIT = 15_000_000  # bytes
LARGE = 100_000  # bytes of a text from which it is compressed
TEXTS = (".csv", ".json", ".jsonl", ".txt")
RESULTS = "_gpu.csv"  # the end of the names of rows for benchmarks/results: never compressed
BLOCK = 512  # bytes, of which a tar file consists


@dataclass
class Archive:
    """The files of a folder in a tar file, which is replaced as a whole.

    So there is a readable one whenever this process is killed.

    Attributes:
        path: of the tar file.
        folder: whose files it holds; but for hidden ones.
        limit: its bytes at most. What is too much is left out, the largest files first, but the
            compiled kernels last.
        left_out: names of those.
        problem: why the last update could not be written, if so.
    """

    path: Path
    folder: Path
    limit: int = LIMIT
    left_out: list[str] = field(default_factory=list)
    problem: str = ""
    _members: dict[Path, tuple[tuple[int, int], str, bytes]] = field(default_factory=dict)

    def update(self) -> None:
        """Write the archive anew if a file has changed."""
        if not self._read():
            return
        try:
            write_whole(self.path, self._packed())
            self.problem = ""
        except OSError as error:  # the run is worth more than its archive
            self.problem = f"{self.path}: cannot be written ({error.strerror})"

    def _read(self) -> bool:
        """Read what has changed; whether anything has."""
        changed = False
        for path in sorted(self.folder.rglob("*")):
            if path.name.startswith(".") or not path.is_file():
                continue
            with contextlib.suppress(FileNotFoundError):  # its step has just removed it
                stat = path.stat()
                state = stat.st_size, stat.st_mtime_ns
                if path not in self._members or self._members[path][0] != state:
                    self._members[path] = state, *_content(path, self.folder)
                    changed = True
        return changed

    def _packed(self) -> bytes:
        members = sorted(self._members.values(), key=lambda m: (m[1] != NAME, len(m[2])))
        self.left_out = []
        buffer, size = io.BytesIO(), 20 * BLOCK  # of the end
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for (_, modified), name, content in members:
                size += BLOCK * (2 + len(content) // BLOCK)
                if size > self.limit:
                    self.left_out.append(f"{name} ({len(content) / 1e6:.1f} MB)")
                    continue
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(content), modified // 10**9
                tar.addfile(info, io.BytesIO(content))
        return buffer.getvalue()


def _content(path: Path, folder: Path) -> tuple[str, bytes]:
    """Name and bytes of a member; a large text is compressed, unless it holds rows."""
    name, content = path.relative_to(folder).as_posix(), path.read_bytes()
    if len(content) > LARGE and path.suffix in TEXTS and not name.endswith(RESULTS):
        return f"{name}.gz", gzip.compress(content, mtime=0)
    return name, content
