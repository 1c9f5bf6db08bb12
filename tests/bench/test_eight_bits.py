"""The provider of 8-bit integers, and the gate that a wrong scale cannot pass."""

import pytest
import torch

from emanet_triton.bench.eight_bits import round_to_8_bits
from emanet_triton.bench.machine import Machine
from emanet_triton.bench.measure import measure
from emanet_triton.bench.method import Method
from emanet_triton.bench.networks import make_network, make_protocol
from emanet_triton.bench.options import Selection
from emanet_triton.bench.suites import model, model_problem
from emanet_triton.kernels.conv.int8 import has_int8
from emanet_triton.models.quantized import QuantizedBottleneck
from emanet_triton.models.resnet import Bottleneck

SELECTION = Selection(tiny=True, providers=("fused-int8",))
MODES = ("whole", "slide", "network")
MACHINE = Machine("A processor", 1, "", "2.15", "3.9", "abc", "2026-11-23", None, {}, None)
needs_int8 = pytest.mark.skipif(not has_int8(), reason="needs a CPU with AMX or AVX512-BF16")


def case_of(mode):
    return next(c for c in model.cases(SELECTION) if mode in c.name and "flip" not in c.name)


def row_of(mode):
    baseline, row = measure(case_of(mode), Method(rounds=1), MACHINE)
    assert (baseline.provider, baseline.gate) == ("plain-fp32", "passed")
    assert row.provider == "fused-int8"
    return row


@needs_int8
@pytest.mark.parametrize("mode", MODES)
def test_it_passes_its_gate(mode):
    row = row_of(mode)
    assert row.gate == "passed"
    assert 0 < row.error <= row.bound < 0.2
    assert row.p50_ms > 0


def half_a_step(blocks):
    """One of the 16 blocks reads its values with half of their scale."""
    conv = blocks[8].conv2
    conv.x_scale = conv.x_scale._replace(step=conv.x_scale.step / 2)


def another_zero(blocks):
    """The zero point of the identities is off by some steps."""
    for block in blocks:
        zero = block.identity_scale.zero
        block.identity_scale = block.identity_scale._replace(zero=zero and zero - 8)


def one_scale_for_all_channels(blocks):
    for block in blocks:
        scales = block.conv3.weight_scales
        scales.fill_(scales.mean())


@needs_int8
@pytest.mark.parametrize("damage", [half_a_step, another_zero, one_scale_for_all_channels])
def test_a_wrong_scale_fails_its_gate(damage, monkeypatch):
    def damaged(*arguments, **options):
        network = quantize(*arguments, **options)
        damage([each for each in network.modules() if isinstance(each, QuantizedBottleneck)])
        return network

    quantize = model.quantize
    monkeypatch.setattr(model, "quantize", damaged)
    row = row_of("network")  # the quickest mode
    assert row.gate.startswith("failed: error ")
    assert row.p50_ms is None


def test_without_the_instructions_it_is_absent_and_nothing_is_built(monkeypatch):
    case = case_of("network")
    monkeypatch.setattr("emanet_triton.inference.quantize.has_int8", lambda: False)
    (row,) = (row for row in measure(case, Method(rounds=1), MACHINE) if "int8" in row.provider)
    assert row.gate.startswith("absent: int8 needs a CPU with AMX or AVX512-BF16, got ")
    monkeypatch.setattr(
        model_problem, "make_network", lambda *_: pytest.fail("a network was built")
    )
    with pytest.raises(model.Absent):
        case.providers["fused-int8"]()


def test_rounded_blocks_read_and_write_what_8_bits_hold():
    protocol = make_protocol("whole", (40, 64), tiny=True)
    plain, rounded = (make_network("r50", protocol, tiny=True) for _ in range(2))
    for network in (plain, rounded):
        network.backbone.layer1[0].conv1.weight.data[0] = 0
    round_to_8_bits(rounded)
    assert not rounded.backbone.layer1[0].conv1.weight[0].any()  # and not NaN
    blocks = [each for each in rounded.backbone.modules() if isinstance(each, Bottleneck)]
    assert len(blocks) == 16
    seen = []
    for block in blocks:
        block.conv3.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
        block.register_forward_hook(lambda _, inputs, out: seen.append(out))
        assert max(row.unique().numel() for row in block.conv2.weight) <= 255
    images = torch.randn(1, 3, 40, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = plain(images), rounded(images)
    assert len(seen) == 32
    assert 50 < max(each.unique().numel() for each in seen) <= 256
    assert 1e-3 < (got - want).norm() / want.norm() < 0.2
