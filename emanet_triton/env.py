"""``emanet-triton env``: versions, hardware and settings, to paste into a report of a bug."""

import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate

from emanet_triton.cache_folder import cache_folder
from emanet_triton.command import Parser, answer, program, run, say
from emanet_triton.cores import in_words, usable_cores
from emanet_triton.errors import first_line, one_line
from emanet_triton.files import exists
from emanet_triton.kernels.cache import driver_version, triton_version
from emanet_triton.kernels.device import auto_backend, cpu_name
from emanet_triton.models.zoo import ZOO, published_path
from emanet_triton.versions import ABSENT, commit, versions

# Only these variables are printed: others may hold secrets.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
PREFIXES = ("EMANET_TRITON_", "TRITON_")
Part = tuple[str, Callable[[], str]]  # its name, and a function that finds out or raises


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 2 for bad arguments."""
    return answer(lambda: _main(arguments))


def make_parser() -> Parser:
    """The parser of all options."""
    return Parser(
        prog=program("env"),
        description="Print versions, hardware and settings, to paste into a report of a bug. "
        "Nothing is sent anywhere.",
    )


def report() -> str:
    """Aligned lines. A part that cannot be found is "unknown", with the reason."""
    lines = [(name, _found(part)) for name, part in _parts()]
    return tabulate(lines, tablefmt="plain", disable_numparse=True)


def _main(arguments: Sequence[str] | None) -> int:
    make_parser().parse_args(arguments)
    say(report())
    return 0


def _found(part: Callable[[], str]) -> str:
    try:
        return one_line(part())
    except Exception as error:  # a damaged installation is what a report is about
        return f"unknown ({one_line(first_line(error))})"


def _parts() -> Iterator[Part]:
    yield from _software()
    yield "platform", platform.platform  # with the version of the C library
    yield "cpu", cpu_name
    yield "cores", _cores
    yield "memory", _memory
    yield "auto on cpu", lambda: f"backend {auto_backend(False)}"
    yield from _gpus()
    for name in sorted(filter(_is_printed, os.environ)):
        yield name, partial(_short, os.environ[name])
    yield "cache", lambda: _short(str(cache_folder()))
    yield "checkpoints", _checkpoints


def _software() -> Iterator[Part]:
    yield "commit", commit
    try:
        found = versions() | {"triton": triton_version() or ABSENT}
    except Exception as error:
        found = {"versions": f"unknown ({first_line(error)})"}
    yield from ((name, partial(str, version)) for name, version in found.items())
    yield "cuda", lambda: torch.version.cuda or "not in this PyTorch"
    if torch.version.hip:
        yield "rocm", lambda: str(torch.version.hip)
    yield "cudnn", lambda: str(torch.backends.cudnn.version() or "not in this PyTorch")
    yield "driver", driver_version


def _gpus() -> Iterable[Part]:
    try:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception as error:
        reason = first_line(error)
        return [("gpus", lambda: f"unknown ({reason})")]
    if not count:
        return [("gpus", lambda: "PyTorch finds none")]
    return [(f"gpu {index}", partial(_gpu, index)) for index in range(count)]


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return (
        f"{found.name}, {found.total_memory / 2**30:.1f} GiB, compute capability "
        f"{found.major}.{found.minor}, backend {auto_backend(True)}; convolutions: measured"
    )


def _cores() -> str:
    return f"{usable_cores()} usable, {in_words(torch.get_num_threads())} of PyTorch"


def _memory() -> str:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = {name: value for name, _, value in (line.partition(":") for line in lines)}
    available = int(values["MemAvailable"].split()[0]) * 1024
    return f"{total / 2**30:.1f} GiB, {available / 2**30:.1f} GiB available"


def _checkpoints() -> str:
    """Which published files lie in torch's hub cache; they are not read."""
    entries = ((name, entry) for name, entry in ZOO.items() if entry.file and not entry.packaged)
    published = {name: published_path(name) for name, _ in entries}
    there = [name for name, path in published.items() if exists(path)]
    folders = dict.fromkeys(_short(str(path.parent)) for path in published.values())
    return f"{', '.join(there) or 'none'} in {' and '.join(folders)}"


def _is_printed(name: str) -> bool:
    return name in VARIABLES or name.startswith(PREFIXES)


def _short(path: str) -> str:
    """A path without the user's name, if it is in the home folder."""
    home = os.path.expanduser("~")  # noqa: PTH111 (Path.home raises where there is none)
    return f"~{path[len(home) :]}" if path.startswith(f"{home}{os.sep}") else path


if __name__ == "__main__":
    run(main)
