"""What a stage prints last: the findings in at most sixty lines."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from example_rows import GPU, row, with_floor, without_times

from emanet_triton.bench.gpu_check import own
from emanet_triton.bench.gpu_check.compared import Compared, Finding, Wrong
from emanet_triton.bench.gpu_check.steps import Outcome, Step
from emanet_triton.bench.gpu_check.summary import LINES, WIDTH, factor, rows_of, summarise
from emanet_triton.bench.rows import write_csv

ON_GPU = GPU | {"threads": None, "dtype": "bf16", "clock": "graph"}


def outcome(folder, name, result="passed", compiled=0):
    (folder / name).mkdir(exist_ok=True)
    return Outcome(Step(name, [], 10), folder / name, result, 12.3, compiled)


def conv_rows():
    """Twelve layers, the n-th n times its floor; the last is one that has a forecast."""
    rows = []
    for n in range(1, 13):
        case = f"3x3 C={n} O=64 H=64 W=128 stride=1 dilation=1 relu B=1 bf16 r50-whole={n}"
        cudnn = with_floor(row("conv", case, "cudnn", 0.1 * n, cold_ms=0.2, **ON_GPU), 0.1, 90.0)
        triton = with_floor(row("conv", case, "triton", 0.2 * n, **ON_GPU), 0.1, 90.0)
        forecast = {"predicted_ms": "1.8-2.2"} if n == 12 else {}
        rows += [cudnn, replace(triton, **forecast)]
    return rows


def model_rows():
    case = "r50 whole 1024x2048 from=device"
    plain = row("model", case, "plain-bf16", 12.0, **ON_GPU)
    chosen = row("model", case, "fused-bf16", 6.5, predicted_ms="6-6.6", **ON_GPU)
    cudnn = row("model", case, "cudnn-bf16", 7.0, **ON_GPU)
    gluon = row("model", case, "fastest-bf16", 6.4, **ON_GPU)
    return [
        plain,
        chosen,
        cudnn,
        gluon,
        without_times(plain, "triton-bf16", "failed: error 1 above 0.1"),
    ]


def other_rows():
    em, hosted = "block B=1 N=32768 bf16 channels-last", ON_GPU | {"host_us": 812.0}
    return [
        row("em", em, "triton", 0.43, 3.0, predicted_ms="0.2-0.23", cold_ms=0.5, **hosted),
        row("em", em, "one-pass-128", 0.14, 9.0, predicted_ms="0.135-0.155", **hosted),
        row("post", "whole 1024x2048 bf16", "triton", 0.05, 9.0, **ON_GPU),
        without_times(row("em", em, "mmseg", 1.0), "tensorrt", "absent: No module named 'x'"),
    ]


def sweep_rows():
    case = "3x3 C=512 O=64 W=128 relu B=1 bf16 uses=4"
    shipped = row("sweep", case, "128x256x64 w8 s3 shipped", 0.4, **ON_GPU)
    other = with_floor(row("sweep", case, "128x128x64 w8 s4", 0.3, **ON_GPU), 0.15, 90.0)
    failed = without_times(other, "64x64x64 w4 s4", "absent: it does not fit: so much")
    return [other, shipped, failed]


def findings():
    wrong = Compared("out", 3.0, 0.1, 2, 1120, [Wrong([0, 3, 2, 4], 100.0, 1.5)])
    bad = [
        Finding("conv-rows", f"layer {n}", "failed: out: 2 of 1120 wrong", 1.0, (wrong,))
        for n in range(12)
    ]
    return [
        Finding("em-block", "block", "passed"),
        *bad,
        Finding("labels", "slide", "failed: labels: 1 of 960 wrong, the first at [0, 1, 2]"),
    ]


@pytest.fixture
def outcomes(tmp_path):
    """A stage of which nearly everything is there."""
    found = [outcome(tmp_path, name) for name in ("versions", "em", "sweep")]
    found.append(outcome(tmp_path, "warm", "failed: exit code 1", 300))
    found += [outcome(tmp_path, "correct", "failed: exit code 1")]
    found += [outcome(tmp_path, name) for name in ("model", "conv", "versions-after")]
    found += [outcome(tmp_path, "ncu", "absent: there is no ncu here")]
    for name, clock in (("versions", 1980), ("versions-after", 1755)):
        state = {"clocks.sm": f"{clock} MHz", "power.draw": "600 W", "temperature.gpu": "60"}
        content = {"gpu": "Example G100", "torch": "2.11", "nvidia-smi": state}
        (tmp_path / name / own.VERSIONS).write_text(json.dumps(content))
    warm = {"arch": "sm_90", "planned": 657, "distinct": 314, "hits": 300, "compiled": 13}
    warm |= {"failed": ["em_e_step: no registers"], "launchers": "", "seconds": 31.2}
    (tmp_path / "warm" / own.WARM).write_text(json.dumps(warm))
    (tmp_path / "warm" / "log.txt").write_text("the command\nsomething\nits last words\n\n")
    for finding in findings():
        own.append_json(tmp_path / "correct" / own.CORRECT, asdict(finding))
    write_csv(tmp_path / "model" / "model.csv", model_rows())
    write_csv(tmp_path / "conv" / "conv.csv", conv_rows())
    write_csv(tmp_path / "em" / "em.csv", other_rows())
    write_csv(tmp_path / "sweep" / own.SWEEP, sweep_rows())
    return found


def test_every_finding_is_there(outcomes):
    text = summarise("the title", outcomes, ["a note", ""])
    lines = text.replace("\n    ", " ").splitlines()  # without the wrapping
    assert lines[0] == "the title"
    assert "a note" in lines
    for expected in (
        r"gpu Example G100, .*torch 2\.11.*; 1980 MHz 600 W 60 None; 1755 MHz 600 W 60 None",
        r"warm, sm_90: 657 launches planned, 314 kernels: 300 hits, 13 compiled, 1 failed, in 31 s",
        r"  em_e_step: no registers",
        r"warm +failed: exit code 1 +12 +300",
        r"  warm: its last words",
        r"model +passed +12 +4 of 5",
        r"correct: conv-rows 0 of 12, em-block 1 of 1, labels 0 of 1",
        r"  labels: slide: failed: labels: 1 of 960 wrong, the first at \[0, 1, 2\]",
        r"  \.\.\. and 7 more in correct\.jsonl",
        r"  model: r50 whole 1024x2048 from=device: triton-bf16 failed: error 1 above 0\.1",
        r"r50 whole 1024x2048 from=device +12 +7 +- +6\.5 +6\.4 +153\.8 +6-6\.6 +1\.03x",
        r"em block B=1 N=32768 bf16 channels-last +0\.43 +0\.5 +3 +0\.2-0\.23 +2\.00x",
        r"em block B=1 N=32768 bf16 \S+, one-pass-128 +0\.14 +- +9 +0\.135-0\.155 +0\.97x",
        r"post whole 1024x2048 bf16 +0\.05 +- +9",
        r"3x3 C=512 O=64 relu +128x256x64 w8 s3 +0\.4 +128x128x64 w8 s4 +0\.3 +2",
        r"eager calls by Triton +host us",
        r"em block N=32768 channels-last +812",
        r"absent \(there is no ncu here\): steps ncu",
        r"absent \(No module named 'x'\): providers tensorrt",
    ):
        assert any(re.fullmatch(expected, line.rstrip()) for line in lines), expected


def test_the_ten_layers_furthest_from_the_floor(outcomes):
    text = summarise("", outcomes)
    found = re.findall(r"^3x3 C=(\d+) O=64 H=64 relu +(\w+) .*$", text, re.MULTILINE)
    assert found == [(str(n), "cudnn") for n in range(12, 2, -1)]
    (line,) = (line for line in text.splitlines() if line.startswith("3x3 C=12 "))
    assert line.split()[-7:] == ["1.2", "0.2", "0.1", "12", "2.4", "1.8-2.2", "1.20x"]


def test_a_family_with_many_failures_does_not_hide_another(outcomes):
    lines = summarise("", outcomes).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("correct: "))
    assert [line.split(":")[0].strip() for line in lines[start + 1 : start + 4]] == [
        *("conv-rows", "labels", "conv-rows")
    ]


def test_at_most_sixty_lines_of_some_width(outcomes, tmp_path):
    more = [outcome(tmp_path, f"step {n}", "failed: " + 300 * "x") for n in range(40)]
    lines = summarise("the title", outcomes + more).splitlines()
    assert len(lines) == LINES <= 60
    assert max(map(len, lines)) == WIDTH
    assert re.fullmatch(r"\.\.\. and \d+ lines more", lines[-1])
    assert sum(len(line) + 1 for line in lines) < 12_000


def test_all_families_are_shown(tmp_path):
    names = [f"a-family-of-{n}" for n in range(12)]
    for name in names:
        (tmp_path / "correct").mkdir(exist_ok=True)
        finding = Finding(name, "case", "absent: rehearsal")
        own.append_json(tmp_path / "correct" / own.CORRECT, asdict(finding))
    text = summarise("", [outcome(tmp_path, "correct")])
    assert set(re.findall(r"(a-family-of-\d+) 0 of 1", text)) == set(names)
    assert max(map(len, text.splitlines())) <= WIDTH


def test_a_rehearsal_shows_forecasts_and_what_is_absent(tmp_path):
    step = outcome(tmp_path, "conv")
    forecast = replace(conv_rows()[-1], predicted_ms="1.8-2.2")
    unmeasured = without_times(forecast, "triton", "absent: rehearsal")
    write_csv(tmp_path / "conv" / "conv.csv", [unmeasured])
    skipped = outcome(tmp_path, "memcheck", "absent: rehearsal")
    lines = summarise("", [step, skipped]).splitlines()
    assert any(line.startswith("convolutions with a forecast ") for line in lines)
    assert not any(line.startswith("furthest") for line in lines)
    assert lines[-1] == "absent (rehearsal): steps memcheck; providers triton"


def test_the_widest_tables_fit(tmp_path):
    name = "1x1 C=512 O=2048 H=97 W=97 stride=1 dilation=1 residual relu B=8 bf16 r101-whole=12"
    step = outcome(tmp_path, "all")
    layer = row("conv", name, "cudnn-benchmark", 0.1234, cold_ms=0.1234, **ON_GPU)
    layer = with_floor(replace(layer, predicted_ms="0.065-0.075"), 0.01234, 90.0)
    write_csv(tmp_path / "all" / "conv.csv", [layer, replace(layer, provider="triton")])
    tile = row("sweep", f"{name} uses=12", "128x256x64 w8 s4 shipped", 0.1234, **ON_GPU)
    write_csv(step.folder / own.SWEEP, [with_floor(tile, 0.01234, 90.0)])
    lines = summarise("", [step]).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert not any(line.startswith("    ") for line in lines)  # none is wrapped
    assert any(re.search(r"residual relu B=8 +128x256x64 w8 s4 +0\.1234 ", line) for line in lines)


def test_nothing_at_all():
    assert summarise("the title", []) == "the title"


def test_half_a_file_is_no_crash(tmp_path):
    (tmp_path / "correct").mkdir()
    (tmp_path / "correct" / own.CORRECT).write_text(
        '{"family": "em", "case": "a", "gate": "passed"}\n{"fam'
    )
    (tmp_path / "correct" / own.WARM).write_text('{"arch"')
    (tmp_path / "correct" / "em.csv").write_text("suite,case\nem")
    text = summarise("", [Outcome(Step("correct", [], 1), tmp_path / "correct", "passed")])
    assert "correct: em 1 of 1" in text
    assert rows_of(tmp_path / "correct") == []
    assert rows_of(Path("/none")) == []


@pytest.mark.parametrize(
    ("milliseconds", "predicted", "expected"),
    [(6.6, "6-7.2", "1.00x"), (3.0, "1.5", "2.00x"), (None, "6-7", ""), (3.0, "", "")],
    ids=["range", "number", "not measured", "no forecast"],
)
def test_factor(milliseconds, predicted, expected):
    assert factor(milliseconds, predicted) == expected
