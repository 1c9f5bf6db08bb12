"""The plan of each stage: it fits, and its commands name what exists."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from emanet_triton.bench.forecasts import FORECASTS
from emanet_triton.bench.gpu_check import plan
from emanet_triton.bench.gpu_check.families import FAMILIES
from emanet_triton.bench.gpu_check.own import REHEARSAL
from emanet_triton.bench.gpu_check.plan import SECONDS, STAGES, Way, make_plan
from emanet_triton.bench.gpu_check.steps import GRACE, OUT
from emanet_triton.bench.networks import NETWORKS
from emanet_triton.bench.options import Selection, parse
from emanet_triton.bench.suites import SUITES, model

GPU = Way(rehearse=False, tiny=False, arch="sm_90", processes=16)


class Parsed(Exception):  # noqa: N818 (a command's arguments are right, and it goes no further)
    """Raised in the place of what a command does."""


@pytest.fixture
def only_parse(monkeypatch):
    """Commands end once their arguments are parsed."""
    parse_args = argparse.ArgumentParser.parse_args

    def parsed(self, *arguments):
        raise Parsed(parse_args(self, *arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_fits_into_nine_minutes(stage):
    steps = make_plan(stage, GPU)
    assert SECONDS <= 540
    assert sum(step.seconds for step in steps) + GRACE <= SECONDS
    assert len({step.name for step in steps}) == len(steps)
    assert [step.name for step in steps][:2] == ["versions", "warm"]
    assert steps[-1].name == "versions-after"


@pytest.mark.parametrize("tiny", [False, True], ids=["whole", "tiny"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_suites_of_a_stage_exist(stage, tiny):
    found = [
        step
        for step in make_plan(stage, GPU._replace(tiny=tiny))
        if step.command[2] == "emanet_triton.bench"
    ]
    assert len(found) == {"run": 4, "profile": 0, "rows": 5}[stage]
    for step in found:
        check_suite(list(step.command[3:]), step.name)


def check_suite(arguments, name):
    """They parse, name cases, and providers that a case of the suite on a GPU has."""
    given = parse(arguments, list(SUITES))
    assert given.device == "cuda"
    assert str(given.csv) == f"{OUT}/{name}.csv"
    assert set(given.networks) <= set(NETWORKS)
    (suite,) = given.suites
    selection = Selection(
        "cuda",
        tiny=given.tiny,
        sizes=tuple(given.sizes),
        dtypes=tuple(given.dtypes),
        batches=tuple(given.batches),
        networks=tuple(given.networks),
        providers=tuple(given.providers),
    )
    cases = [
        c
        for c in SUITES[suite].cases(selection)
        if not given.cases or any(t in c.name for t in given.cases)
    ]
    for text in given.cases:
        assert any(text in case.name for case in cases)
    assert set(given.providers) <= {provider for case in cases for provider in case.providers}
    assert cases


def own_modules(steps):
    """Module and arguments of every step's command of this package."""
    for step in steps:
        for number, part in enumerate(step.command):
            if part.startswith("emanet_triton."):
                main = "" if ".gpu_check." in part else ".__main__"
                yield importlib.import_module(part + main), list(step.command[number + 1 :])


@pytest.mark.parametrize("rehearse", [False, True], ids=["measured", "rehearsed"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_commands_of_a_stage_parse(stage, rehearse, only_parse):
    for module, arguments in own_modules(make_plan(stage, GPU._replace(rehearse=rehearse))):
        with pytest.raises(Parsed) as parsed:
            module.main(arguments)
        (given,) = parsed.value.args
        if rehearse and module.__name__.endswith((".warm", ".correct", ".sweep")):
            assert given.rehearse


def test_a_run_checks_every_family():
    correct, choose = (
        next(step for step in make_plan("run", GPU) if step.name == name)
        for name in ("correct", "choose")
    )
    named = {part for step in (correct, choose) for part in step.command} & set(FAMILIES)
    assert named == set(FAMILIES) - {"chosen"}
    assert "chosen" in next(s for s in make_plan("rows", GPU) if s.name == "correct").command


def test_a_run_waits_for_no_compiler_but_tritons():
    """``torch.compile`` would take the seconds of the step."""
    (em,) = (step for step in make_plan("run", GPU) if step.name == "em")
    given = parse(list(em.command[3:]), list(SUITES))
    assert given.providers
    assert not any("compiled" in name for name in given.providers)


def test_only_a_sweep_compiles_its_tiles():
    swept = [stage for stage in STAGES if "--sweep" in make_plan(stage, GPU)[1].command]
    assert swept == ["profile"]


def test_results_are_named_as_the_report_reads_them():
    names = {step.name for step in make_plan("rows", GPU)}
    kept = {
        path.name.replace("_cpu", "_gpu")
        for path in (plan.ROOT / "benchmarks" / "results").glob("*_cpu.csv")
    }
    assert kept == {f"{name}.csv" for name in names if name.endswith("_gpu")}


def test_what_measures_is_no_part_of_a_rehearsal():
    for stage in STAGES:
        for step in make_plan(stage, GPU._replace(rehearse=True)):
            own = any(part.startswith("emanet_triton.bench.gpu_check.") for part in step.command)
            assert step.absent == REHEARSAL or (own and step.command[0] == sys.executable)


@pytest.mark.parametrize("has_tests", [True, False])
def test_the_kernel_tests_run_where_they_are(tmp_path, monkeypatch, has_tests):
    if not has_tests:
        monkeypatch.setattr(plan, "ROOT", tmp_path)
    (step,) = (step for step in make_plan("run", GPU) if step.name == "tests")
    assert step.absent == ("" if has_tests else "there are no tests here")
    assert step.needs == "pytest"
    ignored = [part.partition("=")[2] for part in step.command if part.startswith("--ignore=")]
    assert len(ignored) > 5
    assert all(Path(file).exists() == has_tests for file in ignored)


def test_the_commands_of_the_page_can_be_copied():
    text = (plan.ROOT / "docs" / "gpu.md").read_text()
    given = re.findall(r"^    (?:make|python -m \S+) (gpu-check.*)$", text, re.MULTILINE)
    assert len(given) == 3
    assert not re.search(r"^    \.\.\.", text, re.MULTILINE)
    assert "summary.txt" not in text


def test_the_page_times_torch_compile():
    text = (plan.ROOT / "docs" / "gpu.md").read_text().replace("\\\n", "")
    (command,) = re.findall(r"^    python -m emanet_triton.bench (model .*)$", text, re.MULTILINE)
    given = parse(shlex.split(command), list(SUITES))
    selection = Selection("cuda", networks=("r50",), providers=tuple(given.providers))
    (case,) = (c for c in model.cases(selection) if any(t in c.name for t in given.cases))
    assert set(given.providers) < set(case.providers)


def test_the_page_for_a_gpu_names_what_exists():
    text = (plan.ROOT / "docs" / "gpu.md").read_text()
    assert len(text.splitlines()) <= 200
    names = {step.name for stage in STAGES for step in make_plan(stage, GPU)}
    assert set(re.findall(r"`\*-([\w-]+)/", text)) <= names
    for stage in STAGES:
        assert f"STAGE={stage}" in text
    results = (plan.ROOT / "docs" / "h200.md").read_text()
    quoted = re.findall(r"`([^`\n]+)`", results)
    predicted = [
        n for (suite, _), own in FORECASTS.items() if suite in ("model", "conv") for n in own
    ]
    missing = [name for name in predicted if not any(name.startswith(q) for q in quoted)]
    assert missing == [n for n in missing if n.startswith("r101")]  # "the same of r101"
    assert {f"{mode} 1024x2048 bf16" for mode in ("whole", "slide")} <= set(quoted)
