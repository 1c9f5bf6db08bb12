"""The check that a backend has to pass: it compares blocks of rows one by one."""

import functools

import conv_reference
import pytest
import torch

from emanet_triton.kernels import choice
from emanet_triton.kernels.conv import backends
from emanet_triton.kernels.conv import exact as conv_exact
from emanet_triton.kernels.conv import op as conv

# A pretended GPU computes on the CPU.
make = functools.partial(conv_reference.make, device="cpu")

HALF, SINGLE, BF16 = torch.float16, torch.float32, torch.bfloat16

CASES = {
    "3x3": ((2, 8, 9, 5), 4, 3, {"residual": True}),
    "1x1": ((1, 8, 7, 5), 4, 1, {"relu": False}),
    "dilation": ((1, 8, 11, 5), 4, 3, {"dilation": 3}),
    "dilation-beyond-image": ((1, 8, 3, 5), 4, 3, {"dilation": 4}),
    "stride2-odd": ((2, 8, 9, 5), 4, 3, {"stride": 2, "residual": SINGLE}),
    "stride2-even": ((1, 8, 8, 6), 4, 3, {"stride": 2, "dilation": 2}),
    "stride2-1x1": ((1, 8, 8, 6), 4, 1, {"stride": 2}),
}


@pytest.fixture
def checks(monkeypatch):
    """The checks made for convolutions; plain PyTorch computes the convolutions."""
    calls = []

    def choose(key, device, candidates, last_resort, make_checks):
        calls.extend(make_checks())
        return last_resort

    monkeypatch.setattr(choice, "choose", choose)
    monkeypatch.setattr(backends, "has_cudnn", lambda x: True)
    return calls


def check_of(case, checks, **options):
    conv.conv_bias_act(*case.operands, **case.options, **options)
    return checks[-1]


@pytest.mark.parametrize("rows", [1, 2, 100], ids=lambda n: f"{n}-rows")
@pytest.mark.parametrize("dtype", [HALF, BF16, SINGLE], ids=str)
@pytest.mark.parametrize(("shape", "outputs", "kernel", "options"), CASES.values(), ids=CASES)
def test_the_reference_is_the_convolution_in_higher_precision(
    shape, outputs, kernel, options, dtype, rows, checks, monkeypatch
):
    case = make(shape, outputs, kernel, dtype=dtype, **options)
    check = check_of(case, checks)
    wider = torch.float64 if dtype == SINGLE else SINGLE
    row_bytes = (case.stride**2 * shape[1] + outputs) * check.out_shape[3] * wider.itemsize
    monkeypatch.setattr(conv_exact, "BLOCK_BYTES", rows * row_bytes)
    exact = case.eager(torch.float64)
    blocks = list(check._blocks())
    assert len(blocks) == shape[0] * -(-exact.shape[2] // rows)
    for image, part in blocks:
        found = check._exact(image, part)
        assert found.dtype == wider
        torch.testing.assert_close(found, exact[image, :, part].to(wider), rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", [0, -1], ids=["first", "last"])
def test_the_error_is_the_largest_anywhere(where, checks, monkeypatch):
    case = make((3, 8, 9, 5), 4, 3, dtype=SINGLE)
    check = check_of(case, checks)
    monkeypatch.setattr(conv_exact, "BLOCK_BYTES", 1)
    found = case.eager(torch.float64)
    assert check.error(found) < 1e-12
    found[where, where, where, where] += 0.25
    assert check.error(found) == pytest.approx(0.25)
    found[where, where, where, where] = torch.nan
    assert check.error(found) != check.error(found)


@pytest.mark.parametrize("dtype", [HALF, BF16, SINGLE], ids=str)
def test_twice_the_error_of_plain_pytorch_and_a_rounding_are_allowed(dtype, checks):
    case = make((1, 64, 9, 5), 4, 3, dtype=dtype)
    check = check_of(case, checks)
    exact = case.eager(torch.float64)
    error = (conv.conv_bias_act(*case.operands, backend="torch").double() - exact).abs().max()
    rounding = torch.finfo(dtype).eps / 2 * exact.abs().max()
    assert check.allowed() == pytest.approx((2 * error + rounding).item(), rel=1e-3)


def test_products_rounded_to_tf32_do_not_pass_for_float32(checks):
    case = make((1, 64, 9, 5), 4, 3, dtype=SINGLE)
    check = check_of(case, checks)
    rounded = [(t.view(torch.int32) & ~0x1FFF).view(SINGLE) for t in (case.x, case.weight)]
    found = conv.conv_bias_act(*rounded, case.bias, backend="torch")
    assert check.error(found) > 10 * check.allowed()


def test_the_next_outputs_are_poisoned(checks, monkeypatch):
    case = make((1, 8, 9, 5), 4, 3, stride=2)
    check = check_of(case, checks, out_dtype=SINGLE)
    full, made = torch.full, []

    def record(shape, value, **options):
        if len(made) == 1:
            raise torch.OutOfMemoryError(
                "CUDA out of memory."
            )  # one poisoned tensor is better than none
        made.append(full(shape, value, **options))
        return made[-1]

    monkeypatch.setattr(torch, "full", record)
    check.poison()
    [poisoned] = made
    assert list(poisoned.shape) == [1, 4, 5, 3]
    assert poisoned.dtype == SINGLE
    assert poisoned.isnan().all()
