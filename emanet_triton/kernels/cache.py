"""Findings about a device, such as its fastest kernels, kept on disk for the next process."""

import errno
import hashlib
import importlib
import json
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from emanet_triton.cache_folder import cache_folder
from emanet_triton.files import open_plain, read_plain, write_whole
from emanet_triton.kernels.device import HAS_TRITON, cpu_capability, processor_name

MOST_BYTES = 4 << 20  # about ten thousand findings; a longer file is begun anew


class _Finding(NamedTuple):
    """A line of the file."""

    environment: str
    key: str
    finding: str


class Cache:
    """Findings of one environment, in a file of JSON lines that other environments share.

    Processes and threads may share the file: a finding is one line, appended by one write. If two
    lines have the same key, the later counts. If the file cannot be read or written, a warning says
    so and the work goes on without it. Damaged lines are skipped with a warning.

    Args:
        name: file name in ``cache_folder()``. A line is an object of three strings,
            "environment", "key" and "finding".
        environment: versions and hardware for which the findings hold.

    Attributes:
        path: path of the file.
    """

    def __init__(self, name: str, environment: str) -> None:
        self.path = cache_folder() / name
        self._environment = environment
        self._findings = self._read()

    def get(self, key: str) -> str | None:
        return self._findings.get(key)

    def put(self, key: str, finding: str) -> None:
        self._findings[key] = finding
        line = json.dumps(_Finding(self._environment, key, finding)._asdict())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, f"{line}\n".encode())
        except OSError as error:
            warnings.warn(
                f"{self.path}: cannot be written, so the next process repeats the work: {error}",
                stacklevel=2,
            )

    def _read(self) -> dict[str, str]:
        try:
            content = read_plain(self.path, MOST_BYTES + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._warn(f"ignored: {error.strerror}")
            return {}
        if len(content) > MOST_BYTES:
            self._warn(f"ignored, and begun anew: longer than {MOST_BYTES} bytes")
            return {}
        lines = [line for line in content.split(b"\n") if line]
        found = [finding for line in lines if (finding := _parse(line))]
        if damaged := len(lines) - len(found):
            self._warn(
                f"{damaged} of {len(lines)} lines are damaged and ignored; "
                "delete the file to end this warning"
            )
        return {f.key: f.finding for f in found if f.environment == self._environment}

    def _warn(self, problem: str) -> None:
        warnings.warn(f"{self.path}: {problem}", stacklevel=4)


def _append(path: Path, line: bytes) -> None:
    """Add a line in one write, so that no other process's line is lost or cut."""
    with os.fdopen(
        open_plain(path, os.O_RDWR | os.O_APPEND | os.O_CREAT), "r+b", buffering=0
    ) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_BYTES:
            write_whole(path, line)
            return
        if (
            size and os.pread(file.fileno(), 1, size - 1) != b"\n"
        ):  # a process was killed while it wrote a line
            line = b"\n" + line
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _parse(line: bytes) -> _Finding | None:
    """The finding of a line; ``None`` if it is damaged."""
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):  # RecursionError: nested too deeply
        return None
    if not isinstance(found, dict) or set(found) != set(_Finding._fields):
        return None
    return _Finding(**found) if all(isinstance(v, str) for v in found.values()) else None


def environment(device: torch.device) -> str:
    """Device, driver and versions: they decide how fast kernels are and whether they are right."""
    if device.type == "cpu":
        threads = f"{torch.get_num_threads()} threads"
        return f"{processor_name()}, {cpu_capability()}, {threads}, torch {torch.__version__}"
    return ", ".join(
        (
            torch.cuda.get_device_name(device),
            f"driver {driver_version()}",
            f"torch {torch.__version__}",
            f"cudnn {torch.backends.cudnn.version()}",
            f"triton {triton_version() or 'none'}",
        )
    )


def driver_version() -> str:
    """Version of the NVIDIA driver, or "unknown"."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else "unknown"


def triton_version() -> str:
    """Version of Triton; empty if it is not installed."""
    return importlib.import_module("triton").__version__ if HAS_TRITON else ""


def digest(files: Iterable[Path]) -> str:
    """Eight hex digits that change with the contents of some source files."""
    contents = b"".join(file.read_bytes() for file in sorted(files))
    return hashlib.sha256(contents).hexdigest()[:8]
