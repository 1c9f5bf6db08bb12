"""The number of usable cores, with fake files of cgroups and a fake affinity."""

import os
from pathlib import Path

import pytest

from emanet_triton import cores
from emanet_triton.cores import default_threads, in_words, usable_cores

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "33 31 0:30 {} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
NO_SOURCE = "40 23 0:40 / /mnt rw - tmpfs  rw,size=64k"
NO_CGROUP_SOURCE = "41 23 0:26 / /sys/fs/cgroup rw - cgroup2  rw"
NOT_UTF_8 = "42 23 0:41 / /mnt/caf\udce9\u2028x rw - ext4 /dev/sda1 rw"
V1_MEMORY = "36 31 0:33 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
CPU_V1 = "sys/fs/cgroup/cpu,cpuacct/"


def v1(quota, folder=""):
    names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
    values = zip(names, (quota, 100000), strict=True)
    return {f"{CPU_V1}{folder}{name}": str(value) for name, value in values}


CASES = {  # this process's cgroups, mounts, files, cores of sixteen
    "no_quota": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "max 100000"}, 16),
    "v2": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
    "a_part_of_a_core": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "20000 100000"}, 1),
    "one_and_a_half": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
    "more_than_there_are": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "9900000 100000"}, 16),
    "the_outer_is_the_smaller": (
        "0::/pods/one",
        V2,
        {
            "sys/fs/cgroup/pods/cpu.max": "200000 100000",
            "sys/fs/cgroup/pods/one/cpu.max": "400000 100000",
        },
        2,
    ),
    "the_inner_is_the_smaller": (
        "0::/pods/one",
        V2,
        {
            "sys/fs/cgroup/pods/cpu.max": "max 100000",
            "sys/fs/cgroup/pods/one/cpu.max": "500000 100000",
        },
        5,
    ),
    "v1": ("4:cpu,cpuacct:/one", V1.format("/"), v1(400000, "one/"), 4),
    "v1_without_a_quota": ("4:cpu,cpuacct:/", V1.format("/"), v1(-1), 16),
    "v1_in_docker": ("4:cpu,cpuacct:/docker/ab", V1.format("/docker/ab"), v1(300000), 3),
    "v1_of_another_namespace": ("4:cpu,cpuacct:/../x", V1.format("/docker/ab"), v1(300000), 3),
    "both": ("4:cpu,cpuacct:/\n0::/", f"{V2}\n{V1.format('/')}", v1(600000), 6),
    "another_controller": ("3:memory:/", V1_MEMORY, {}, 16),
    "damaged": ("0::/", V2, {"sys/fs/cgroup/cpu.max": "many"}, 16),
    "no_files": ("0::/", V2, {}, 16),
    "a_mount_without_a_source": (
        "0::/",
        f"{NO_SOURCE}\n{NO_CGROUP_SOURCE}",
        {"sys/fs/cgroup/cpu.max": "300000 100000"},
        3,
    ),
    "a_mount_that_is_not_utf_8": (
        "0::/",
        f"{NOT_UTF_8}\n{V2}",
        {"sys/fs/cgroup/cpu.max": "300000 100000"},
        3,
    ),
}


@pytest.fixture
def sixteen_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(cores, "ROOT", tmp_path)
    monkeypatch.setattr(cores, "_cores", lambda: 16)
    return tmp_path


@pytest.mark.parametrize(("own", "mounts", "files", "wanted"), CASES.values(), ids=CASES)
def test_quota(sixteen_cores, own, mounts, files, wanted):
    files = {"proc/self/cgroup": own, "proc/self/mountinfo": mounts, **files}
    for name, text in files.items():
        path = sixteen_cores / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", errors="surrogateescape")
    assert usable_cores() == wanted


def test_without_proc(sixteen_cores):
    assert usable_cores() == 16


@pytest.mark.parametrize(
    ("variable", "processes", "wanted"),
    [
        (None, 1, 16),
        ("3", 1, 3),
        ("1024", 1, 1024),
        ("1025", 1, 16),
        ("9" * 5000, 1, 16),  # int() refuses more than 4,300 digits
        ("3,2", 1, 3),
        ("0", 1, 16),
        ("many", 1, 16),
        ("", 1, 16),
        (None, 4, 4),
        (None, 17, 1),
        ("1", 4, 4),  # torchrun's
    ],
)
def test_threads_are_those_of_the_variable_or_a_share_of_the_cores(
    sixteen_cores, monkeypatch, variable, processes, wanted
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert default_threads(processes) == wanted


def test_threads_in_words():
    assert [in_words(threads) for threads in (1, 2)] == ["1 thread", "2 threads"]


def test_affinity(monkeypatch):
    monkeypatch.setattr(cores, "ROOT", Path("nowhere"))
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cores() == len(before)
