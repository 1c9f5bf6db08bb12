"""The parts of gpu-check that need neither a GPU nor a compiler: archive, caches, traces, lanes."""

import functools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu_check_cases import job

from emanet_triton.bench.gpu_check import (
    lanes,
    own,
    rehearsal,
    single,
    steps,
    trace,
    versions,
    warm,
)
from emanet_triton.bench.gpu_check.archive import Archive
from emanet_triton.bench.gpu_check.caches import NAME, Caches
from emanet_triton.bench.gpu_check.own import REHEARSAL
from emanet_triton.bench.measure import Lost
from emanet_triton.bench.rows import read_rows
from emanet_triton.errors import InputError

BENCH_TESTS = Path(__file__).parent


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_an_archive_holds_the_last_of_every_file(tmp_path):
    folder = tmp_path / "steps"
    (folder / "00-first").mkdir(parents=True)
    archive = Archive(tmp_path / "a.tar", folder)
    (folder / "00-first" / "rows.csv").write_text("one")
    archive.update()
    assert members(archive.path) == {"00-first/rows.csv": b"one"}
    written = archive.path.stat().st_mtime_ns
    archive.update()
    assert archive.path.stat().st_mtime_ns == written
    (folder / "00-first" / "rows.csv").write_text("one and two")
    (folder / "00-first" / ".rows.csv.1.tmp").write_text("half of")
    archive.update()
    assert members(archive.path) == {"00-first/rows.csv": b"one and two"}


def test_what_is_too_much_is_left_out_the_largest_first_but_not_the_kernels(tmp_path):
    folder = tmp_path / "steps"
    folder.mkdir()
    for name, size in ((NAME, 70_000), ("a.bin", 60_000), ("b.bin", 30_000)):
        (folder / name).write_bytes(os.urandom(size))
    archive = Archive(tmp_path / "a.tar", folder, limit=120_000)
    archive.update()
    assert set(members(archive.path)) == {NAME, "b.bin"}
    assert archive.left_out == ["a.bin (0.1 MB)"]
    assert archive.path.stat().st_size <= 120_000


def test_an_archive_that_cannot_be_written_is_no_end(tmp_path):
    folder = tmp_path / "steps"
    folder.mkdir()
    (folder / "a.csv").write_text("a")
    archive = Archive(tmp_path / "none" / "a.tar", folder)
    archive.update()
    assert archive.problem == (
        f"{tmp_path}/none/a.tar: cannot be written (No such file or directory)"
    )


def cache_of_one_kernel(folder):
    """As Triton writes it, from a place that is not there any more."""
    entry = folder / "ABC"
    entry.mkdir(parents=True)
    names = "kernel.cubin", "kernel.json", "kernel.llir"
    for name in names:
        (entry / name).write_text(name)
    group = {"child_paths": {name: f"/elsewhere/ABC/{name}" for name in names}}
    (entry / "__grp__kernel.json").write_text(json.dumps(group))
    (entry / "__triton_launcher.so").write_text("a launcher")
    return folder


def carried(caches):
    """The files that Triton finds in a group."""
    group = json.loads((caches.triton / "ABC" / "__grp__kernel.json").read_text())
    return group["child_paths"]


@pytest.mark.parametrize("given", ["triton's", "stage.tar"])
def test_a_cache_is_found_where_it_is_carried_to(tmp_path, given):
    here = Caches(tmp_path / "here")
    here.fill(cache_of_one_kernel(tmp_path / "triton's"))
    findings = here.package / "emanet_triton"
    findings.mkdir()
    (findings / "conv_choice.jsonl").write_text("{}")
    here.pack(tmp_path / NAME)
    with tarfile.open(tmp_path / "stage.tar", "w") as tar:
        tar.add(tmp_path / NAME, NAME)
    there = Caches(tmp_path / "there")
    there.fill(tmp_path / given)
    assert there.count() == 1
    found = carried(there)
    assert set(found) == {"kernel.cubin", "kernel.json"}  # and not what the binary is made of
    assert all(Path(file).parent == there.triton / "ABC" for file in found.values())
    assert (there.triton / "ABC" / "__triton_launcher.so").exists()
    assert (there.package / "emanet_triton" / "conv_choice.jsonl").exists() == (
        given == "stage.tar"
    )


@pytest.mark.parametrize(
    "content", ["[]", '{"child_paths": null}', '{"child_paths": {"kern', "[" * 100_000],
    ids=["list", "null", "half", "deep"],
)  # fmt: skip
def test_a_bad_group_of_a_cache_is_left_out(tmp_path, content):
    group = cache_of_one_kernel(tmp_path / "triton's") / "ABC" / "__grp__kernel.json"
    group.write_text(content)
    caches = Caches(tmp_path / "there")
    caches.fill(tmp_path / "triton's")
    assert caches.count() == 1
    assert not list(caches.triton.glob("*/__grp__*"))


@pytest.mark.parametrize("name", [NAME, "another"])
def test_a_folder_with_the_name_of_the_cache_is_no_cache(tmp_path, name):
    with tarfile.open(tmp_path / "stage.tar", "w") as tar:
        folder = tarfile.TarInfo(name)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with pytest.raises(InputError, match=f"^--triton-cache {tmp_path}/stage.tar: holds no"):
        Caches(tmp_path / "there").fill(tmp_path / "stage.tar")


def test_a_cache_that_cannot_be_packed_leaves_the_last_one(tmp_path, monkeypatch):
    caches = Caches(tmp_path / "here")
    caches.fill(cache_of_one_kernel(tmp_path / "triton's"))
    (tmp_path / NAME).write_bytes(b"the last one")
    gone = caches.triton / "gone.cubin"
    monkeypatch.setattr(Caches, "_files", lambda self: [caches.triton / "ABC", gone])
    with pytest.raises(FileNotFoundError):
        caches.pack(tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == b"the last one"


def test_a_finding_of_the_package_changes_the_state_of_a_cache(tmp_path):
    caches = Caches(tmp_path / "here")
    caches.fill(cache_of_one_kernel(tmp_path / "triton's"))
    before = caches.state()
    (caches.package / "emanet_triton").mkdir()
    (caches.package / "emanet_triton" / "conv_choice.jsonl").write_text("{}")
    assert caches.state() != before


def test_kernels_of_a_trace(tmp_path):
    def kernel(name, microseconds, grid, shared=0):
        given = {"grid": grid, "block": [256, 1, 1], "registers per thread": 96}
        given["shared memory"] = shared
        return {"cat": "kernel", "name": name, "dur": microseconds, "args": given}

    events = [
        kernel("conv_rows", 30.0, [512, 1, 1], 196_608),
        {"cat": "cpu_op", "name": "aten::add", "dur": 5.0},
        kernel("em_reduce", 4.0, [64, 1, 1]),
        kernel("conv_rows", 32.5, [512, 1, 1], 196_608),
        {"name": "process_name", "ph": "M"},
    ]
    found = trace.kernels_of({"traceEvents": events})
    assert [list(row.values()) for row in found] == [
        ["conv_rows", 2, 62.5, "512x1x1", "256x1x1", 96, 196_608],
        ["em_reduce", 1, 4.0, "64x1x1", "256x1x1", 96, 0],
    ]


def test_a_network_that_cannot_be_traced_is_not_the_end(tmp_path, monkeypatch, capsys):
    def fail(network, mode, tiny, folder):
        if mode == "slide":
            raise RuntimeError("no profiler\nhere")
        print(f"{network}_{mode}")

    monkeypatch.setattr(trace, "_trace", fail)
    monkeypatch.setattr(own, "DEVICE", "cpu")
    assert trace.main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        *("r50_whole", "r50_slide: failed: RuntimeError: no profiler", "r101_whole")
    ]


def jobs(*names):
    return [functools.partial(job, name) for name in names]


def test_a_lane_goes_on_in_a_new_process():
    found = {}
    lanes.run_lanes(
        [jobs("a", "aborts", "b", "c"), jobs("d")],
        2,
        30,
        lambda job, result: found.setdefault(job.args[0], result),
    )
    assert isinstance(found["aborts"], Lost)
    assert found["aborts"].reason == "its process ended by SIGABRT"
    pids = {name: found[name][1] for name in "abcd"}
    assert pids["b"] == pids["c"]
    assert len(set(pids.values())) == 3
    assert all(found[name][2] for name in "abcd")  # else Ctrl-C would look like a failure


def test_lanes_share_jobs():
    shared, found = iter(jobs(*"abcdef")), []
    lanes.run_lanes([shared] * 2, 2, 30, lambda job, result: found.append(result[0]))
    assert sorted(found) == list("abcdef")


def test_what_goes_wrong_outside_a_job_ends_its_lane_and_is_raised():
    def done(job, result):
        found.append(job.args[0])
        if job.args[0] == "b":
            raise OSError(28, "No space left on device")

    found = []
    with pytest.raises(OSError, match="No space left on device"):
        lanes.run_lanes([jobs(*"abc"), jobs(*"de")], 1, 30, done)
    assert found == list("abde")


def test_a_job_that_cannot_be_sent_is_raised():
    with pytest.raises(Exception, match="pickle"):
        lanes.run_lanes([[lambda watch: None]], 1, 30, lambda job, result: None)


def test_ctrl_c_ends_lanes_and_reports_nothing_wrong():
    code = (
        "import functools, gpu_check_cases as t\n"
        "from emanet_triton.bench.gpu_check.lanes import run_lanes\n"
        "if __name__ == '__main__':\n"
        "    jobs = [functools.partial(t.job, name) for name in ('a', 'sleeps')]\n"
        "    run_lanes([jobs], 1, 60, lambda job, result: print(result, flush=True))\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{BENCH_TESTS}:{BENCH_TESTS.parents[1]}"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        process_group=0,
    )
    assert process.stdout.readline().startswith("('a'")
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert out == ""
    assert process.returncode != 0


def test_a_rehearsed_suite_has_its_real_cases_and_no_number(tmp_path, capsys):
    path = tmp_path / "em.csv"
    selected = ["--device", "cpu", "--sizes", "1024x2048", "--batches", "1", "--dtypes", "bf16"]
    assert rehearsal.main(["em", *selected, "--csv", str(path)]) == 0
    rows = read_rows(path)
    assert {row.case.split()[0] for row in rows} >= {"attention", "block"}
    assert {row.gate for row in rows} == {f"absent: {REHEARSAL}"}
    assert {row.device for row in rows} == {REHEARSAL}
    for row in rows:
        assert row.p50_ms is row.cold_ms is row.host_us is row.floor_ms is row.ratio is None
    assert {row.predicted_ms for row in rows if row.provider == "triton"} == {"", "0.15-0.17"}


@pytest.mark.parametrize(
    ("options", "count"), [([], 12), (["--large"], 12)], ids=["small", "large"]
)
def test_a_single_run_names_every_kind_of_kernel(options, count, capsys):
    assert single.main(["--rehearse", *options]) == 0
    names = capsys.readouterr().out.splitlines()
    kinds = {name.split()[0] for name in names}
    assert {"3x3", "expand-reduce", "pool", "block", "labels"} <= kinds
    assert len(names) == count


def test_versions_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versions.main(["--out", str(tmp_path)]) == 0
    found = own.read_json(tmp_path / own.VERSIONS)
    assert found["nvidia-smi"] == "absent"
    assert found["tools"] == dict.fromkeys(versions.TOOLS, "absent")
    assert found["commit"] == "unknown"  # git is not on the path, either
    assert found["torch"] and found["python"]


def test_nvidia_smi_is_asked_for_the_gpu_that_pytorch_calls_the_first(monkeypatch):
    assert versions._first_gpu() == "0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = SimpleNamespace(uuid="12-34")
    monkeypatch.setattr(torch.cuda, "get_device_properties", {0: found}.__getitem__)
    assert versions._first_gpu() == "GPU-12-34"


def test_steps_measure_natively_whatever_the_environment_says(tmp_path, monkeypatch):
    for name in ("TRITON_INTERPRET", "EMANET_TRITON_CONV_SEARCH", "KEPT"):
        monkeypatch.setenv(name, "0")
    found = steps.environment(tmp_path, tmp_path, tmp_path)
    assert found["KEPT"] == "0"
    assert not found.keys() & {"TRITON_INTERPRET", "EMANET_TRITON_CONV_SEARCH"}


def test_what_nvidia_smi_says(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    answer = ", ".join(str(i) for i in range(len(versions.QUERY.split(","))))
    program.write_text(f"#!/bin/sh\necho '{answer}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert versions.versions()["nvidia-smi"]["clocks.sm"] == "3"
    program.write_text('#!/bin/sh\nfor last; do :; done; echo "no $last"; exit 9\n')
    monkeypatch.setattr(versions, "_first_gpu", lambda: "GPU-12-34")
    assert versions.versions()["nvidia-smi"] == "failed: no GPU-12-34"
    program.write_text("#!/bin/sh\necho 'no device'; exit 9\n")
    assert versions.versions()["nvidia-smi"] == "failed: no device"


def test_every_process_of_a_warm_up_takes_the_next_kernel(monkeypatch):
    called = []
    monkeypatch.setattr(warm, "run_lanes", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(warm, "plan", lambda wanted, gpu, warmed: [("launch", ["key"])] * 5)
    warm.warm([], None, 3, warm.Warmed("sm_90"))
    ((lanes, processes, _, _),) = called
    assert processes == len(lanes) == 3
    assert len(set(map(id, lanes))) == 1
    assert len(list(lanes[0])) == 5
