"""How many cores this process may use: by its affinity, and by the quotas of its cgroups."""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")


def usable_cores() -> int:
    """Cores that this process may use, at least 1.

    A quota of one and a half cores counts as two, since two threads use all of it.
    """
    quotas = (math.ceil(quota) for quota in _quotas())
    return max(1, min([_cores(), *quotas]))


def _cores() -> int:
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas() -> Iterator[float]:
    """The quota in cores of each cgroup around this process that has one."""
    for folder in _cgroups():
        try:
            if (folder / "cpu.max").exists():  # version 2
                quota, period = map(float, (folder / "cpu.max").read_text().split())
            else:
                names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
                quota, period = (float((folder / name).read_text()) for name in names)
            if quota > 0:  # -1 is no quota
                yield quota / period
        except (OSError, ValueError, ZeroDivisionError):  # no files, or "max", which is no quota
            continue


def _cgroups() -> Iterator[Path]:
    """The folders of this process's cgroups and of those around them, of both versions."""
    try:
        own = _lines(ROOT / "proc/self/cgroup")
        mounts = _lines(ROOT / "proc/self/mountinfo")
    except OSError:  # no Linux
        return
    for line in mounts:
        fields, is_cgroup, end = line.partition(" - cgroup")
        if not is_cgroup:
            continue
        version, _, options = end.split(" ")[:3]  # the source between them may be empty
        root, mounted = fields.split(" ")[3:5]
        for membership in own:
            number, controllers, path = membership.split(":", 2)
            of_both = set(options.split(",")) & set(controllers.split(","))
            if (version == "2" and number == "0") or (version == "" and "cpu" in of_both):
                yield from _upwards(ROOT / mounted.lstrip("/"), _inside(path, root))


def _lines(file: Path) -> list[str]:
    """Lines of a file of the kernel's, whose paths may hold bytes that are not UTF-8."""
    return file.read_text(errors="surrogateescape").split("\n")[:-1]


def _inside(path: str, root: str) -> PurePosixPath:
    """A cgroup's path below the part of the hierarchy that is mounted."""
    try:
        return PurePosixPath(path).relative_to(root)
    except ValueError:  # seen from another namespace: the mounted part is all there is
        return PurePosixPath()


def _upwards(mounted: Path, inside: PurePosixPath) -> Iterator[Path]:
    for folder in dict.fromkeys((inside, *inside.parents)):
        yield mounted / folder
