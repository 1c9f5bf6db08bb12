"""What was found out on a device, kept on disk for the next process."""

import hashlib
import importlib
import json
import re
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from emanet_triton.files import cache_folder, write_whole
from emanet_triton.kernels.device import HAS_TRITON


class Cache:
    """Findings of one environment, in a JSON file that other environments share.

    A file that cannot be read or written is warned about and done without. Threads may share it.

    Args:
        name: of the file in ``cache_folder()``: {environment: {key: finding}}, all strings.
        environment: what the findings depend on beside their keys.

    Attributes:
        path: of the file.
    """

    _changes = threading.Lock()  # one for all files: a change is short and rare

    def __init__(self, name: str, environment: str) -> None:
        self.path = cache_folder() / name
        self._environment = environment
        self._findings = self._read().get(environment, {})

    def get(self, key: str) -> str | None:
        return self._findings.get(key)

    def put(self, key: str, finding: str) -> None:
        with self._changes:
            self._findings[key] = finding
            content = self._read()  # other processes may have added to it
            self._findings = content.get(self._environment, {}) | self._findings
            content[self._environment] = self._findings
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self.path, json.dumps(content, indent=1, sort_keys=True).encode())
            except OSError as error:
                warnings.warn(
                    f"{self.path}: cannot be written, so the next process repeats the work: "
                    f"{error}",
                    stacklevel=2,
                )

    def _read(self) -> dict[str, dict[str, str]]:
        try:
            content = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:  # the last: it is nested too deeply
            return self._ignore(str(error))
        is_table = isinstance(content, dict) and all(
            isinstance(findings, dict) and all(isinstance(f, str) for f in findings.values())
            for findings in content.values()
        )
        return content if is_table else self._ignore("not a table of findings")

    def _ignore(self, reason: str) -> dict[str, dict[str, str]]:
        warnings.warn(
            f"{self.path}: ignored, and replaced when there is something to keep: {reason}",
            stacklevel=2,
        )
        return {}


def environment(device: torch.device) -> str:
    """What the speed and the soundness of kernels depend on: device, driver and versions."""
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
    """Of the NVIDIA driver, or "unknown"."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else "unknown"


def triton_version() -> str:
    """Of Triton; empty where it is not installed."""
    return importlib.import_module("triton").__version__ if HAS_TRITON else ""


def digest(files: Iterable[Path]) -> str:
    """Eight hex digits that change with the contents of some source files."""
    contents = b"".join(file.read_bytes() for file in sorted(files))
    return hashlib.sha256(contents).hexdigest()[:8]
