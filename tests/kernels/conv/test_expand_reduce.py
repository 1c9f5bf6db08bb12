import functools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from conv_reference import Convolution, assert_close_to_eager, make, on_gpu
from device import DEVICE, HALF, tiles_of
from torch import nn

from emanet_triton.kernels import choice
from emanet_triton.kernels.conv import exact as conv_exact
from emanet_triton.kernels.conv import expand_reduce as conv_expand_reduce
from emanet_triton.kernels.conv import op as conv
from emanet_triton.kernels.conv.expand_reduce import load_tile, store_tile
from emanet_triton.kernels.conv.tiles import EXPAND_REDUCE_CHANNELS

FP16, SINGLE = torch.float16, torch.float32


def pair(shape, outputs, reduced, dtype=FP16, device=DEVICE) -> list[Convolution]:
    """The two convolutions; the first has their input and the residual."""
    return [
        make(shape, outputs, 1, dtype=dtype, residual=True, device=device),
        make((shape[0], outputs, *shape[2:]), reduced, 1, dtype=dtype, device=device),
    ]


def arguments(convolutions):
    weights, biases = [c.weight for c in convolutions], [c.bias for c in convolutions]
    return convolutions[0].x, weights, biases, convolutions[0].residual


def eager(convolutions, dtype):
    """Both outputs by plain PyTorch, one operation after another, in one dtype, on the CPU."""
    first, second = convolutions
    out = first.eager(dtype)
    return out, Convolution(out, second.weight, second.bias, None, 1, 1, True).eager(dtype)


def assert_both_close(found, convolutions, dtype):
    for got, exact, plain in zip(
        found, eager(convolutions, torch.float64), eager(convolutions, dtype), strict=True
    ):
        assert got.dtype == dtype
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert_close_to_eager(got, exact, plain)


# Pixels below, at and above a tile; all channels of the table.
SHAPES = {
    "one-pixel": ((1, 64, 1, 1), 256, 64),
    "one-tile": ((1, 64, 8, 16), 128, 64),
    "one-more": ((1, 64, 1, 129), 64, 64),
    "batch": ((3, 64, 5, 11), 256, 64),
    **{f"{p}-{r}": ((1, p, 3, 7), 4 * p, r) for p, r in EXPAND_REDUCE_CHANNELS},
}


@pytest.mark.parametrize(("shape", "outputs", "reduced"), SHAPES.values(), ids=SHAPES.keys())
def test_one_kernel(shape, outputs, reduced):
    convolutions = pair(shape, outputs, reduced, HALF)
    found = conv.expand_reduce(*arguments(convolutions), backend="triton")
    assert_both_close(found, convolutions, HALF)


@pytest.mark.parametrize("arch", tiles_of("sm_80", "sm_100", "gfx942"))
def test_one_kernel_with_the_tiles_of(arch):
    convolutions = pair((2, 64, 7, 11), 128, 128)
    found = conv_expand_reduce.expand_reduce(*arguments(convolutions), arch)
    assert_both_close(found, convolutions, FP16)


@triton.jit
def copy_rows(
    source, target, row, num_loaded, num_stored, WIDTH: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Load rows as a matrix of ``num_loaded`` rows has them, store as one of ``num_stored`` has."""
    b = load_tile(source, row, 0, num_loaded, WIDTH, ROWS, WIDTH, False)
    store_tile(target, row, 0, b, num_stored, WIDTH, False)


def test_rows_beyond_32_bits_and_beyond_the_matrix():
    """Where there are no descriptors. Rows outside count as zero, and none of them is written."""
    width, rows = 1024, 16
    row = 2**31 // width
    # The system adds pages to such an array when they are used.
    source, target = (
        torch.from_numpy(np.zeros((row + rows, width), np.float16)).to(DEVICE) for _ in range(2)
    )
    tile = torch.arange(1, rows * width + 1, device=DEVICE).remainder(1000).view(rows, width)
    source[row:] = tile
    for num_loaded, num_stored in ((rows, rows), (11, rows), (rows, 11)):
        target[row:] = 7
        copy_rows[(1,)](source, target, row, row + num_loaded, row + num_stored, width, rows)
        wanted = tile.to(source.dtype)
        wanted[num_loaded:] = 0
        wanted[num_stored:] = 7
        torch.testing.assert_close(target[row:], wanted, rtol=0, atol=0)


def test_operands_that_no_descriptor_can_take():
    """Of an address that is no multiple of 16 bytes, and not channels-last; strided biases."""
    convolutions = pair((1, 64, 3, 5), 64, 64)
    x, weights, biases, residual = arguments(convolutions)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:]
    shifted = shifted.view(1, 3, 5, 64).permute(0, 3, 1, 2).copy_(x)
    assert shifted.data_ptr() % 16
    biases = [torch.stack([bias, bias + 1], dim=1)[:, 0] for bias in biases]
    others = shifted, weights, biases, residual.contiguous()
    found = conv.expand_reduce(*others, backend="triton")
    assert_both_close(found, convolutions, FP16)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", [0, 3], ids=["x", "residual"])
def test_a_value_that_is_not_finite_stays_in_its_pixel(value, where):
    operands = arguments(pair((1, 64, 3, 50), 64, 64))
    clean = conv.expand_reduce(*operands, backend="triton")
    operands[where][0, 5, 1, 40] = value
    found = conv.expand_reduce(*operands, backend="triton")
    plain = conv.expand_reduce(*operands, backend="separate")
    for got, want, before in zip(found, plain, clean, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True, rtol=2**-7, atol=2**-7)
        changed = (got != before).any(1)[0]
        assert changed[1, 40]
        assert changed.sum() == 1


def test_the_residual_may_be_the_input():
    """Where both have as many channels; neither is overwritten."""
    convolutions = pair((1, 64, 3, 50), 64, 64)
    x, weights, biases, _ = arguments(convolutions)
    before = x.clone()
    found = conv.expand_reduce(x, weights, biases, x, backend="triton")
    assert torch.equal(x, before)
    copied = conv.expand_reduce(x, weights, biases, before, backend="triton")
    assert all(map(torch.equal, found, copied))


@pytest.mark.parametrize("dtype", [FP16, torch.bfloat16, SINGLE], ids=str)
def test_separate_convolutions(dtype):
    convolutions = pair((2, 20, 5, 7), 12, 9, dtype)
    for backend in ("separate", "auto"):
        found = conv.expand_reduce(*arguments(convolutions), backend=backend)
        assert_both_close(found, convolutions, dtype)


def test_both_outputs_are_checked_against_higher_precision(monkeypatch):
    """By blocks of a row."""
    checks = []

    def choose(key, device, calls, last_resort, make_checks):
        if list(calls) == ["separate", "triton"]:  # and not one of the two convolutions
            checks.extend(make_checks())
        return last_resort

    monkeypatch.setattr(choice, "choose", choose)
    monkeypatch.setattr(conv_exact, "BLOCK_BYTES", 1)
    convolutions = pair((2, 64, 5, 7), 128, 64, device="cpu")
    x, *others = arguments(convolutions)
    found = conv._run_expand_reduce(on_gpu(x), *others, "auto", "ieee")
    for check, got, exact in zip(checks, found, eager(convolutions, torch.float64), strict=True):
        assert len(list(check._blocks())) == 2 * 5
        for image, rows in check._blocks():
            torch.testing.assert_close(
                check._exact(image, rows), exact[image, :, rows].float(), rtol=0, atol=1e-5
            )
        assert check.error(got) <= check.allowed()
        assert check.error(got * 1.02) > check.allowed()


@pytest.mark.parametrize(
    ("shape", "outputs", "reduced", "dtype", "message"),
    [
        ((1, 64, 3, 3), 64, 64, SINGLE, "needs float16 or bfloat16, got float32"),
        (
            (1, 128, 3, 3), 64, 64, FP16,
            "needs input and reduced channels of 64 and 64, 64 and 128, 128 and 128, "
            "128 and 256, 256 and 256, got 128 and 64",
        ),
        ((1, 64, 3, 3), 96, 64, FP16, "needs expanded channels in multiples of 64, got 96"),
    ],
)  # fmt: skip
def test_what_one_kernel_cannot_do(shape, outputs, reduced, dtype, message):
    convolutions = pair(shape, outputs, reduced, dtype)
    with pytest.raises(ValueError, match=message):
        conv.expand_reduce(*arguments(convolutions), backend="triton")


def test_errors_say_what_they_got_and_wanted():
    x, weights, biases, residual = arguments(pair((1, 4, 3, 3), 8, 6))
    cases = [
        ((weights[:1], biases, residual), "weights and biases must be two each, got 1 and 2"),
        ((weights[::-1], biases, residual), r"weight1 must be \[O, 4, 1, 1\], got \[6, 8, 1, 1\]"),
        (([weights[0]] * 2, biases, residual), r"weight2 must be \[O, 8, 1, 1\], got \[8, 4, 1, 1"),
        ((weights, biases[::-1], residual), r"bias1 must be \[8\], got \[6\]"),
        ((weights, biases, x), r"residual must be \[1, 8, 3, 3\], got \[1, 4, 3, 3\]"),
        ((weights, biases, residual.float()), "residual must be torch.float16, got torch.float32"),
    ]
    for operands, message in cases:
        with pytest.raises(ValueError, match=message):
            conv.expand_reduce(x, *operands)
    message = "backend must be one of auto, fastest, fastest-known, triton, separate, got 'cudnn'"
    with pytest.raises(ValueError, match=message):
        conv.expand_reduce(x, weights, biases, residual, backend="cudnn")


class Pair(nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        _, self.weights, self.biases, _ = arguments(pair((1, 64, 1, 1), 64, 64))

    def forward(self, x):
        return conv.expand_reduce(x, self.weights, self.biases, x, backend=self.backend)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compile_export_and_opcheck(backend):
    module = Pair(backend)
    x = make((1, 64, 3, 4), 1, 1).x
    expected = module(x)
    for other in (
        torch.compile(module, fullgraph=True, backend="aot_eager"),
        torch.export.export(module, (x,)).module(),
    ):
        assert all(map(torch.equal, other(x), expected))
    operands = x, module.weights, module.biases, x, backend, "ieee"
    torch.library.opcheck(torch.ops.emanet_triton.expand_reduce, operands)


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def measured(
    monkeypatch, shape, outputs, reduced, dtype=FP16, backend="auto", known=(), within=None
):
    """The key and the candidates that ``choose`` gets, or None if nothing is measured.

    Args:
        known: keys that were chosen for earlier, each with its device.
        within: the backend of each convolution; by default as the other arguments have it.
    """
    x, weights, biases, residual = arguments(pair(shape, outputs, reduced, dtype, "cpu"))
    calls = []
    monkeypatch.setattr(conv, "HAS_TRITON", True)
    given = []
    monkeypatch.setattr(conv, "_separate", lambda *all_: tuple(given.append(all_[-2]) or ()))
    monkeypatch.setattr(
        conv.choice, "known", lambda key, device: "triton" if (key, device) in known else None
    )
    monkeypatch.setattr(
        conv.choice,
        "choose",
        lambda key, device, candidates, *_: calls.append((key, list(candidates))) or "separate",
    )
    arguments_on_gpu = x.as_subclass(OnGpu), weights, biases, residual
    assert conv._run_expand_reduce(*arguments_on_gpu, backend, "ieee") == ()
    assert given == [within or ("auto" if backend == "fastest-known" and not known else backend)]
    return calls[0] if calls else None


def test_a_known_choice_is_taken_and_no_other_is_made(monkeypatch):
    sizes = (1, 64, 2, 3), 256, 64
    auto, fastest = (measured(monkeypatch, *sizes, backend=name) for name in ("auto", "fastest"))
    by_known = functools.partial(measured, monkeypatch, *sizes, backend="fastest-known")
    assert by_known() == auto
    assert by_known(known=[(fastest[0], torch.device("cpu"))]) == fastest


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [(((1, 64, 2, 3), 256, 64), SINGLE), (((1, 512, 2, 3), 2048, 512), FP16)],
    ids=["float32", "512 channels"],
)
def test_without_a_kernel_each_convolution_takes_what_is_known(monkeypatch, sizes, dtype):
    no_pair = {"backend": "fastest-known", "within": "fastest-known"}
    assert measured(monkeypatch, *sizes, dtype, **no_pair) is None


def test_each_pair_is_measured_for_itself(monkeypatch):
    sizes = [
        ((1, 64, 2, 3), 256, 64), ((2, 64, 2, 3), 256, 64), ((1, 64, 3, 2), 256, 64),
        ((1, 64, 2, 3), 128, 64), ((1, 64, 2, 3), 256, 128), ((1, 128, 2, 3), 256, 128),
    ]  # fmt: skip
    found = [measured(monkeypatch, *each) for each in sizes]
    found.append(measured(monkeypatch, *sizes[0], torch.bfloat16))
    found.append(measured(monkeypatch, *sizes[0], backend="fastest"))
    assert {tuple(candidates) for _, candidates in found} == {("separate", "triton")}
    assert len({key for key, _ in found}) == len(found)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [(((1, 64, 2, 3), 256, 64), SINGLE), (((1, 512, 2, 3), 2048, 512), FP16)],
    ids=["float32", "512 channels"],
)
def test_a_pair_without_a_kernel_is_not_measured(monkeypatch, sizes, dtype):
    assert measured(monkeypatch, *sizes, dtype) is None
