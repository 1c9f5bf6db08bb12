"""Families of correctness, on the CPU in Triton's interpreter: what is planted is found."""

import json
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from gpu_check_cases import Breaks
from torch.nn import functional as F

from emanet_triton.bench.gpu_check import correct, own
from emanet_triton.bench.gpu_check.cases import ConfusionCase, EmCase, LabelsCase, PoolCase
from emanet_triton.bench.gpu_check.compared import close, equal, gate_of
from emanet_triton.bench.gpu_check.conv_cases import ConvCase, ExpandReduceCase, with_dtype
from emanet_triton.bench.gpu_check.families import FAMILIES, SMALL, small_cases
from emanet_triton.bench.gpu_check.meta import Gpu
from emanet_triton.bench.gpu_check.tf32 import CutOperands, cut
from emanet_triton.bench.measure import Watch
from emanet_triton.bench.walk import recorded
from emanet_triton.kernels.conv import implicit_gemm as conv_triton
from emanet_triton.kernels.conv.op import conv_bias_act
from emanet_triton.kernels.em import block as em_block
from emanet_triton.kernels.pool import max_pool as pool_triton
from emanet_triton.kernels.resample import gather as resample_triton


def conv_call(backend="triton", precision="ieee", dtype=torch.float16, residual=True):
    """With a residual in a part of a larger tensor, as the head has it."""
    options = {"dtype": dtype, "device": "meta", "memory_format": torch.channels_last}
    weight, bias = torch.empty(16, 16, 3, 3, **options), torch.empty(16, device="meta")
    added = torch.empty(2, 32, 5, 7, **options)[:, 16:] if residual else None
    x = torch.empty(2, 16, 5, 7, **options)
    given = {"backend": backend, "precision": precision}
    (call,) = recorded(lambda: conv_bias_act(x, weight, bias, added, **given))
    return call


def small_call(kind):
    """The call of the small case of a kind, in float16."""
    (case,) = (case for case in small_cases() if isinstance(case, kind))
    return with_dtype(case.call, torch.float16)


CASES = {
    "conv": ConvCase(conv_call()),
    "conv tf32x3": ConvCase(conv_call(precision="tf32x3", dtype=torch.float32)),
    "conv auto": ConvCase(conv_call("auto", residual=False)),
    "expand-reduce": ExpandReduceCase(small_call(ExpandReduceCase)),
    "pool": PoolCase(small_call(PoolCase)),
    "em block": EmCase("block", 2, (3, 5), 16, 5, dtype="fp16"),
    "em attention": EmCase("attention", 1, (3, 5), 16, 5, "fp32", "tf32", layout="nchw"),
    "labels": LabelsCase("slide", False, SMALL, "fp16", tiny=True),
    "probabilities": LabelsCase("whole", False, SMALL, "fp32", True, tiny=True),
    "confusion": ConfusionCase(SMALL, 19),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_right_passes(name):
    finding = correct.check("family", CASES[name], "cpu", Watch())
    assert (finding.family, finding.case, finding.gate) == ("family", CASES[name].name, "passed")
    assert all(compared.error <= compared.bound for compared in finding.outputs)
    assert all(compared.elements and not compared.wrong for compared in finding.outputs)


def spoilt(function, spoil):
    """A launcher whose first output is changed."""

    def run(*arguments, **options):
        result = function(*arguments, **options)
        spoil(result[0] if isinstance(result, tuple) else result)
        return result

    return run


def off(index, value):
    """Changes one element, and one after it."""

    def spoil(out):
        out[index] = value
        out[(*(side - 1 for side in out.shape),)] = value

    return spoil


PLANTED = {  # case: module, function, index of an element, its value
    "conv": (conv_triton, "conv_bias_act", (1, 3, 2, 4), 100.0),
    "pool": (pool_triton, "max_pool", (0, 9, 2, 3), 100.0),
    "em block": (em_block, "run_block", (1, 7, 3), -50.0),
    "labels": (resample_triton, "resample", (0, 11, 5), 200),
    "confusion": (resample_triton, "confusion", (40,), 7),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_found_where_it_is(name, monkeypatch, tmp_path, capsys):
    module, function, index, value = PLANTED[name]
    monkeypatch.setattr(module, function, spoilt(getattr(module, function), off(index, value)))
    finding = correct.check("family", CASES[name], "cpu", Watch())
    number = next(i for i, compared in enumerate(finding.outputs) if compared.wrong)
    bad = finding.outputs[number]
    assert bad.wrong == 2
    place = list(index) if name != "em block" else [3, 7]  # of [C, N]: channel, position
    assert bad.first[0].index == place
    assert bad.first[0].got == value
    assert abs(bad.first[0].got - bad.first[0].want) > bad.bound
    path = tmp_path / own.CORRECT
    correct.report(path, finding)
    assert capsys.readouterr().out == f"family: {finding.case}: {finding.gate}\n"
    (line,) = own.read_json_lines(path)
    assert line["outputs"][number]["first"][0]["index"] == place
    assert f"wrong, the first at {place}: got {value:.6g}, want " in finding.gate


def test_what_nobody_writes_is_found(monkeypatch):
    """The second run gets the memory of the first, which is filled with NaN."""
    held = torch.empty(2, 16, 5, 7, dtype=torch.float16)
    run = conv_triton.conv_bias_act

    def leaves_one_out(*arguments):
        out = run(*arguments)
        out[0, 0, 0, 0] = held[0, 0, 0, 0]
        return held.copy_(out)

    held.zero_()
    monkeypatch.setattr(conv_triton, "conv_bias_act", leaves_one_out)
    finding = correct.check("family", CASES["conv"], "cpu", Watch())
    assert finding.gate.startswith(
        "failed: out: 1 of 1120 wrong, the first at [0, 0, 0, 0]: got nan"
    )
    assert finding.outputs[0].error is None
    assert json.loads(json.dumps(asdict(finding)))["outputs"][0]["wrong"] == 1


def test_the_bound_is_three_way():
    want = torch.tensor([1.0, 256.0], dtype=torch.float64)
    plain = torch.tensor([1.5, 256.0])
    rounding = 256 * torch.finfo(torch.bfloat16).eps / 2
    assert close("out", plain, want, plain, torch.bfloat16).bound == 2 * 0.5 + rounding
    far = torch.tensor([1.0, 259.0])
    compared = close("out", far, want, plain, torch.bfloat16)
    assert (compared.wrong, compared.first[0].index, compared.error) == (1, [1], 3.0)
    assert gate_of([compared]) == (
        "failed: out: 1 of 2 wrong, the first at [1]: got 259, want 256, bound 2"
    )


def test_the_bound_of_float32_in_ieee_is_wider():
    want, plain = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    bounds = [
        close("out", plain, want.double(), plain, dtype, precision).bound
        for dtype, precision in (
            (torch.float32, "ieee"),
            (torch.float32, "tf32x3"),
            (torch.float32, "tf32"),
            (torch.bfloat16, "ieee"),
        )
    ]
    assert [round(bound, 1) for bound in bounds] == [2.0, 1.0, 1.0, 1.0]


def test_operands_are_cut_off_towards_zero():
    step = 2.0**-10  # TF32 has ten bits of mantissa
    x = torch.tensor([1 + 1.75 * step, -1 - 1.75 * step, 0.0, float("inf")])
    assert cut(x).tolist() == [1 + step, -1 - step, 0.0, float("inf")]
    assert torch.equal(cut(cut(x)), cut(x))


@pytest.mark.parametrize(
    "product",
    [
        lambda x, y, added: x @ y,
        lambda x, y, added: x[None].expand(2, -1, -1) @ y,
        lambda x, y, added: torch.addmm(added, x, y),
        lambda x, y, added: torch.baddbmm(added[None], x[None], y[None]),
        lambda x, y, added: F.linear(x, y.mT, added),
        lambda x, y, added: F.conv2d(x[None, :, :, None], y[..., None, None], added),
        lambda x, y, added: torch.einsum("nc,ck->nk", x, y),
    ],
    ids=["mm", "bmm", "addmm", "baddbmm", "linear", "conv2d", "einsum"],
)
def test_products_within_read_operands_that_are_cut_off(product):
    x, y, added = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0))
    added = added[0]
    want = product(cut(x), cut(y), added)
    with torch.no_grad(), CutOperands():
        got = product(x, y, added)
        half = product(x.bfloat16(), y.bfloat16(), added.bfloat16())
    assert torch.equal(got, want)
    assert not torch.equal(got, product(x, y, added))
    assert torch.equal(half, product(x.bfloat16(), y.bfloat16(), added.bfloat16()))


def test_labels_count_where_they_are_clear():
    got, want = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 5, 4]])
    counts = torch.tensor([[True, False, True]])
    compared = equal("labels", got, want, counts)
    assert (compared.wrong, compared.first[0].index) == (1, [0, 2])
    assert equal("labels", got, want, counts & (got < 3)).wrong == 0


def test_a_case_that_breaks_its_process_ends_alone(monkeypatch):
    monkeypatch.setattr(own, "SILENCE", 5.0)
    names = "right", "aborts", "raises", "sticky", "hangs", "wrong"
    cases = {"one": [Breaks(name) for name in names], "other": [Breaks("right")]}
    found = {}
    correct.run_families(cases, "cpu", lambda f: found.setdefault((f.family, f.case), f.gate))
    assert found == {
        ("one", "right"): "passed",
        ("one", "aborts"): "failed: its process ended by SIGABRT",
        ("one", "raises"): "failed: ValueError: no such thing",
        ("one", "sticky"): (
            "failed: RuntimeError: CUDA error: an illegal memory access was encountered"
        ),
        ("one", "hangs"): "failed: hung: no sign of life for 5 s",
        ("one", "wrong"): (
            "failed: out: 6 of 6 wrong, the first at [0, 0]: got 0, want 1, bound 0"
        ),
        ("other", "right"): "passed",
    }


@pytest.mark.parametrize(
    ("family", "processes"), [("conv-rows", 2), ("chosen", 1), ("chosen-half", 1)]
)
def test_a_family_that_measures_has_one_process(monkeypatch, family, processes):
    """It has the GPU for itself, so that no other case makes a backend slower than it is."""
    lanes = []
    monkeypatch.setattr(correct, "run_lanes", lambda given, *_: lanes.extend(given))
    cases = [SimpleNamespace(name=str(i)) for i in range(correct.MANY + 1)]
    correct.run_families({family: cases}, "cpu", print)
    assert len(lanes) == processes


def test_a_failed_case_is_exit_code_1(monkeypatch, tmp_path):
    cases = [SimpleNamespace(name="a"), SimpleNamespace(name="b")]
    monkeypatch.setattr(correct, "FAMILIES", {"some": lambda gpu, tiny: cases})
    monkeypatch.setattr(correct.Gpu, "here", lambda: None)
    monkeypatch.setattr(own, "DEVICE", "cpu")

    def run(gates):
        def families(given, device, found):
            for case, gate in zip(given["some"], gates, strict=True):
                found(correct.Finding("some", case.name, gate))

        monkeypatch.setattr(correct, "run_families", families)
        return correct.main(["some", "--out", str(tmp_path)])

    assert run(["passed", "absent: x"]) == 0
    assert run(["passed", "failed: x"]) == 1
    assert [line["gate"] for line in own.read_json_lines(tmp_path / own.CORRECT)] == [
        *("passed", "absent: x", "passed", "failed: x")
    ]


@pytest.mark.parametrize("family", ["em-block", "em-attention"])
def test_one_pass_is_checked_on_hopper_alone(family):
    backends = {
        arch: {case.backend for case in FAMILIES[family](Gpu.of_arch(arch), False)}
        for arch in ("sm_80", "sm_90", "sm_100", "gfx942")
    }
    assert backends.pop("sm_90") == {"triton", "one-pass-128", "one-pass-16"}
    assert set(map(frozenset, backends.values())) == {frozenset({"triton"})}


def test_conv_boxes_is_checked_on_hopper_alone_in_both_half_precisions():
    cases = FAMILIES["conv-boxes"](Gpu.of_arch("sm_90"), False)
    dtypes = Counter(case.call["x"].dtype for case in cases)
    assert dtypes[torch.bfloat16] == dtypes[torch.float16] > 40
    for arch in ("sm_80", "sm_100", "gfx942"):
        assert FAMILIES["conv-boxes"](Gpu.of_arch(arch), False) == []
