"""Which provider computes a convolution: a table of measurements, else a measurement on first use.

A table in the repository serves the GPUs that were measured; on others the first call of a shape
times the candidates and the winner is kept in ``$XDG_CACHE_HOME/emanet_triton/conv_choice.json``.
``EMANET_TRITON_CONV_SEARCH=0`` switches that off: what is not in the table then goes to the
default, cuDNN.
"""

import functools
import importlib.metadata
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

# {device name: {key of the convolution: provider}}. Empty: nothing has been measured yet.
MEASURED: dict[str, dict[str, str]] = {}

# Largest difference from the default's result, relative to its largest value, that a candidate
# may show and still be timed: a few roundings of the dtype (of TF32 for float32).
_AGREEMENT = {torch.bfloat16: 2**-5, torch.float16: 2**-8, torch.float32: 2**-8}

Candidates = Mapping[str, Callable[[], Tensor]]


class Cache:
    """Winners that were measured in one environment, in a JSON file shared with other environments.

    A file that cannot be read or written is warned about and done without.

    Args:
        path: of the JSON file, {environment: {key: provider}}.
        environment: what the times depend on beside the shape.
    """

    def __init__(self, path: Path, environment: str) -> None:
        self._path = path
        self._environment = environment
        self._winners = self._read().get(environment, {})

    def get(self, key: str) -> str | None:
        return self._winners.get(key)

    def put(self, key: str, provider: str) -> None:
        self._winners[key] = provider
        content = self._read()  # other processes may have added to it
        self._winners = content.get(self._environment, {}) | self._winners
        content[self._environment] = self._winners
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self._path.parent, prefix=self._path.name, delete=False
            ) as part:
                json.dump(content, part, indent=1, sort_keys=True)
            Path(part.name).replace(self._path)
        except OSError as error:
            warnings.warn(
                f"{self._path}: cannot be written, so the fastest convolutions will be measured "
                f"again next time: {error}",
                stacklevel=2,
            )

    def _read(self) -> dict[str, dict[str, str]]:
        try:
            content = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            return self._ignore(str(error))
        is_table = isinstance(content, dict) and all(
            isinstance(winners, dict) and all(isinstance(w, str) for w in winners.values())
            for winners in content.values()
        )
        return content if is_table else self._ignore("not a table of providers")

    def _ignore(self, reason: str) -> dict[str, dict[str, str]]:
        warnings.warn(
            f"{self._path}: ignored, and written anew at the next measurement: {reason}",
            stacklevel=2,
        )
        return {}


def choose(key: str, device: torch.device, candidates: Candidates, *, search: bool) -> str:
    """The provider for a convolution on a CUDA device.

    Args:
        key: all that decides the time of the convolution on one device.
        device: where it runs.
        candidates: {provider: call that computes the convolution}, the default first.
        search: whether to go beyond the table. Nothing is measured while a CUDA graph is
            captured, nor kept when memory runs out.
    """
    default = next(iter(candidates))
    known = MEASURED.get(torch.cuda.get_device_name(device), {}).get(key)
    if known in candidates:
        return known
    if not search or os.environ.get("EMANET_TRITON_CONV_SEARCH") == "0":
        return default
    cache = _cache(device)
    known = cache.get(key)
    if known in candidates:
        return known
    if torch.cuda.is_current_stream_capturing():
        return default
    try:
        winner = fastest(key, candidates, _time)
    except torch.OutOfMemoryError as error:
        warnings.warn(f"no memory to measure {key}, so {default} it is: {error}", stacklevel=2)
        return default
    cache.put(key, winner)
    return winner


def fastest(key: str, candidates: Candidates, time: Callable[[Callable], float]) -> str:
    """The candidate of the least time among those that agree with the first.

    A candidate that fails or disagrees is left out with a warning; the first is trusted.

    Args:
        key: names the convolution in a warning.
        candidates: as in ``choose``.
        time: of a call, in any unit.
    """
    (default, run), *others = candidates.items()
    expected = run()
    times = {default: time(run)}
    for name, run in others:
        try:
            _check_agreement(run(), expected)
            times[name] = time(run)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or a driver may raise
            warnings.warn(f"provider {name} is left out for {key}: {error}", stacklevel=2)
    return min(times, key=times.__getitem__)


def _check_agreement(found: Tensor, expected: Tensor) -> None:
    difference = (found.float() - expected.float()).abs().max().item()
    allowed = _AGREEMENT[expected.dtype] * expected.float().abs().max().item()
    if not difference <= allowed:
        raise ValueError(f"differs by {difference:.3g}, where {allowed:.3g} is allowed")


def _time(run: Callable[[], Tensor]) -> float:
    """Median milliseconds on the GPU, with a cold L2 cache."""
    from triton.testing import do_bench  # not needed, nor there, where there is one candidate

    return do_bench(run, warmup=5, rep=20, return_mode="median")


@functools.cache
def _cache(device: torch.device) -> Cache:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Cache(Path(root) / "emanet_triton" / "conv_choice.json", environment(device))


def environment(device: torch.device) -> str:
    """What a time depends on beside the shape: device, driver and versions."""
    return ", ".join(
        (
            torch.cuda.get_device_name(device),
            f"driver {driver_version()}",
            f"torch {torch.__version__}",
            f"cudnn {torch.backends.cudnn.version()}",
            f"triton {importlib.metadata.version('triton')}",
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
