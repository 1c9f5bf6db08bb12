"""``conv_bias_act`` by the kernel in Gluon; without a GPU ``gluon_simulator`` runs the kernel."""

import pytest
import torch
from conv_reference import assert_close_to_eager, make
from device import DEVICE, HALF, NATIVE, only_on
from gluon_simulator import simulate

from emanet_triton.kernels.conv import backends, hopper
from emanet_triton.kernels.conv.op import conv_bias_act

pytestmark = only_on("sm_90")
SINGLE = torch.float32


@pytest.fixture(autouse=True)
def _simulated(monkeypatch):
    """Without a GPU, simulate the kernel."""
    if NATIVE:
        return

    def launch(kernel, tile, device, programs, *arguments, **constants):
        simulate(kernel, programs, arguments, constants, tile)

    monkeypatch.setattr(hopper, "launch", launch)
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(hopper, "INTERPRETED", True)  # this fixture's interpreter
    monkeypatch.setattr(backends, "gluon_arch", lambda x: "sm_90")


def of(shape, outputs, kernel, options):
    return make(shape, outputs, kernel, dtype=HALF, **options)


def convolve(case, **options):
    options = {"backend": "gluon", **case.options, **options}
    return conv_bias_act(*case.operands, **options)


# Few shapes, since a GPU compiles a kernel for each; ``test_conv_boxes`` has more.
ONE = (2, 64, 7, 13), 72, 3, {"residual": True}
FLAT = (3, 192, 7, 13), 200, 1, {"residual": True}


@pytest.mark.parametrize(
    ("shape", "outputs", "kernel", "options", "out"),
    [
        (*ONE, HALF),
        (*FLAT, HALF),
        ((8, 64, 5, 9), 264, 3, {"dilation": 2, "residual": SINGLE}, HALF),
        ((1, 64, 129, 128), 256, 1, {"residual": True}, HALF),  # the widest tile
        ((1, 64, 129, 128), 256, 3, {"relu": False}, SINGLE),
    ],
    ids=str,
)
def test_against_float64(shape, outputs, kernel, options, out):
    case = of(shape, outputs, kernel, options)
    found = convolve(case, out_dtype=out)
    assert found.dtype == out
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_close_to_eager(found, case.eager(torch.float64), case.eager(HALF))


def test_images_of_other_memory_and_a_residual_within_another_tensor():
    case = of(*ONE)
    want = convolve(case)
    x, weight, bias, residual = case.operands
    wide = torch.full((2, 200, 7, 13), float("nan"), dtype=HALF, device=DEVICE)
    inner = wide.contiguous(memory_format=torch.channels_last)[:, 128:].copy_(residual)
    found = conv_bias_act(x.contiguous(), weight.contiguous(), bias, inner, backend="gluon")
    assert torch.equal(found, want)


def test_the_same_bits_on_every_run_and_in_every_batch():
    case = of(*ONE)
    together = convolve(case)
    assert torch.equal(convolve(case), together)
    x, weight, bias, residual = case.operands
    alone = conv_bias_act(x[1:], weight, bias, residual[1:], backend="gluon")
    if NATIVE:  # the simulator's products depend on the rows beside them
        assert torch.equal(alone, together[1:])
    else:
        torch.testing.assert_close(alone, together[1:])


def test_a_value_that_is_not_finite_stays_in_its_pixel():
    case = of(*FLAT)
    clean = convolve(case)
    for value in (float("nan"), float("inf")):
        case.x[1, 5, 3, 4] = value
        found = convolve(case)
        assert not found[1, :, 3, 4].isfinite().all()
        found[1, :, 3, 4] = clean[1, :, 3, 4]
        assert torch.equal(found, clean)


def test_no_images():
    case = of((0, *ONE[0][1:]), *ONE[1:])
    assert convolve(case).shape == (0, 72, 7, 13)


def test_it_can_be_compiled_and_exported():
    case = of(*ONE)
    want = convolve(case)

    class Module(torch.nn.Module):
        def forward(self, x):
            return conv_bias_act(x, *case.operands[1:], **case.options, backend="gluon")

    module = Module()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    program = torch.export.export(module, (case.x,))
    for other in (compiled, program.module()):
        assert torch.equal(other(case.x), want)
