"""How many cores this process may use, and how many threads compute a network on a CPU."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
MOST_THREADS = 1024  # a process that starts tens of thousands of threads is killed


def usable_cores() -> int:
    """The number of cores that this process may use, at least 1: by its affinity and by cgroups.

    A quota of one and a half cores counts as two, because one thread cannot use all of it.
    """
    quotas = (math.ceil(quota) for quota in _quotas())
    return max(1, min([_cores(), *quotas]))


def default_threads(processes: int = 1) -> int:
    """OMP_NUM_THREADS if it is set to a number of threads, else one thread for each usable core.

    Several ``processes`` that torchrun starts on this machine share its cores and ignore the
    variable: torchrun sets it to 1 where the user has not set it.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # "4,2" nests threads
    is_number = wanted.isdecimal() and len(wanted) < 10  # int() refuses thousands of digits
    threads = int(wanted) if is_number else 0
    if processes == 1 and 0 < threads <= MOST_THREADS:
        return threads
    return max(1, usable_cores() // processes)


def in_words(threads: int) -> str:
    """The number of threads in a line of output: "1 thread" or "2 threads"."""
    return f"{threads} thread{'s' * (threads != 1)}"


def _cores() -> int:
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas() -> Iterator[float]:
    """The quotas, in cores, of the cgroups from ``_cgroups``, where they have a quota."""
    for folder in _cgroups():
        try:
            if (folder / "cpu.max").exists():  # version 2
                quota, period = map(float, (folder / "cpu.max").read_text().split())
            else:
                names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
                quota, period = (float((folder / name).read_text()) for name in names)
            if quota > 0:  # -1 means no quota
                yield quota / period
        except (OSError, ValueError, ZeroDivisionError):  # no files, or "max" for no quota
            continue


def _cgroups() -> Iterator[Path]:
    """The folders of this process's cgroups, of both versions, and of all cgroups above them."""
    try:
        own = _lines(ROOT / "proc/self/cgroup")
        mounts = _lines(ROOT / "proc/self/mountinfo")
    except OSError:  # the system is not Linux
        return
    for line in mounts:
        fields, is_cgroup, end = line.partition(" - cgroup")
        if not is_cgroup:
            continue
        version, _, options = end.split(" ")[:3]  # between them is the source, which may be empty
        root, mounted = fields.split(" ")[3:5]
        for membership in own:
            number, controllers, path = membership.split(":", 2)
            of_both = set(options.split(",")) & set(controllers.split(","))
            if (version == "2" and number == "0") or (version == "" and "cpu" in of_both):
                yield from _upwards(ROOT / mounted.lstrip("/"), _inside(path, root))


def _lines(file: Path) -> list[str]:
    """The lines of a file in /proc. Paths in it may have bytes that are not UTF-8."""
    return file.read_text(errors="surrogateescape").split("\n")[:-1]


def _inside(path: str, root: str) -> PurePosixPath:
    """The path of a cgroup, relative to the mounted part of the hierarchy."""
    try:
        return PurePosixPath(path).relative_to(root)
    except ValueError:  # in another namespace the mounted part is all that is visible
        return PurePosixPath()


def _upwards(mounted: Path, inside: PurePosixPath) -> Iterator[Path]:
    for folder in dict.fromkeys((inside, *inside.parents)):
        yield mounted / folder
