import pytest
import torch
from conv_reference import Convolution, assert_close_to_eager, make, on_gpu
from device import DEVICE, HALF, tiles_of
from torch import nn

from emanet_triton.kernels.conv import bottleneck as conv_bottleneck
from emanet_triton.kernels.conv import choice as conv_choice
from emanet_triton.kernels.conv import exact as conv_exact
from emanet_triton.kernels.conv import op as conv

FP16, SINGLE = torch.float16, torch.float32


def chain(shape, planes, outputs=None, dtype=FP16, device=DEVICE) -> list[Convolution]:
    """The three convolutions of a bottleneck; the first has its input."""
    batch, channels, height, width = shape
    wide = (batch, planes, height, width)
    return [
        make(shape, planes, 1, dtype=dtype, device=device),
        make(wide, planes, 3, dtype=dtype, device=device),
        make(wide, outputs or channels, 1, dtype=dtype, residual=True, device=device),
    ]


def eager(convolutions, residual, dtype):
    """The block in plain PyTorch, one operation after another, in one dtype, on the CPU."""
    out = convolutions[0].x
    for convolution, added in zip(convolutions, (None, None, residual), strict=True):
        step = Convolution(out, convolution.weight, convolution.bias, added, 1, 1, True)
        out = step.eager(dtype)
    return out


def parameters(convolutions):
    return [c.weight for c in convolutions], [c.bias for c in convolutions]


# Pixels below, at and above a tile; rows shorter and longer than a tile; 64 and 128 planes.
SHAPES = {
    "one-pixel": ((1, 64, 1, 1), 64, None),
    "one-row": ((1, 64, 1, 130), 64, None),
    "one-column": ((2, 64, 70, 1), 64, None),
    "batch": ((3, 128, 5, 11), 64, None),
    "one-tile": ((1, 64, 9, 14), 64, None),
    "downsample": ((1, 64, 6, 23), 64, 256),
    "128-planes": ((2, 128, 4, 9), 128, None),
}


@pytest.mark.parametrize(("shape", "planes", "outputs"), SHAPES.values(), ids=SHAPES.keys())
def test_fused_kernel(shape, planes, outputs):
    convolutions = chain(shape, planes, outputs, HALF)
    residual = None if outputs is None else convolutions[2].residual
    x = convolutions[0].x
    found = conv.bottleneck(x, *parameters(convolutions), residual, backend="triton")
    assert found.dtype == HALF
    assert found.is_contiguous(memory_format=torch.channels_last)
    added = x if residual is None else residual
    exact = eager(convolutions, added, torch.float64)
    assert_close_to_eager(found, exact, eager(convolutions, added, HALF))


@pytest.mark.parametrize("arch", tiles_of("sm_80", "sm_100", "gfx942"))
def test_fused_kernel_with_the_tiles_of(arch):
    convolutions = chain((1, 64, 5, 17), 64)
    x = convolutions[0].x
    found = conv_bottleneck.bottleneck(x, *parameters(convolutions), x, arch)
    exact = eager(convolutions, x, torch.float64)
    assert_close_to_eager(found, exact, eager(convolutions, x, FP16))


def test_nan_reaches_its_neighbours_only():
    convolutions = chain((1, 64, 7, 8), 64)
    x = convolutions[0].x
    x[0, 3, 2, 7] = torch.nan
    found = conv.bottleneck(x, *parameters(convolutions), backend="triton").cpu()
    expected = torch.zeros(7, 8, dtype=torch.bool)
    expected[1:4, 6:] = True
    assert torch.equal(found.isnan().all(1)[0], expected)
    assert torch.equal(found.isnan().any(1)[0], expected)


@pytest.mark.parametrize("dtype", [FP16, torch.bfloat16, SINGLE], ids=str)
def test_separate_convolutions(dtype):
    convolutions = chain((2, 20, 5, 7), 12, dtype=dtype)
    x = convolutions[0].x
    for backend in ("separate", "auto"):
        found = conv.bottleneck(x, *parameters(convolutions), backend=backend)
        exact = eager(convolutions, x, torch.float64)
        assert_close_to_eager(found, exact, eager(convolutions, x, dtype))


@pytest.mark.parametrize("outputs", [None, 64], ids=["identity", "downsample"])
def test_the_fused_kernel_is_checked_against_higher_precision(outputs, monkeypatch):
    """By blocks of a row: the 3x3 in the middle needs a row more at either side."""
    checks = []

    def choose(key, device, calls, last_resort, make_check):
        if list(calls) == ["separate", "triton"]:  # and not one of the three convolutions
            checks.append(make_check())
        return last_resort

    monkeypatch.setattr(conv_choice, "choose", choose)
    monkeypatch.setattr(conv_exact, "BLOCK_BYTES", 1)
    convolutions = chain((2, 128, 5, 7), 64, outputs, device="cpu")
    weights, biases = parameters(convolutions)
    residual = convolutions[2].residual if outputs else convolutions[0].x
    operands = on_gpu(convolutions[0].x), weights, biases, residual
    found = conv._run_bottleneck(*operands, "auto", "ieee")
    [check] = checks
    exact = eager(convolutions, residual, torch.float64)
    for image, rows in check._blocks():
        torch.testing.assert_close(
            check._exact(image, rows), exact[image, :, rows].float(), rtol=0, atol=1e-5
        )
    assert check.error(found) <= check.allowed()
    assert check.error(found * 1.02) > check.allowed()


@pytest.mark.parametrize(
    ("shape", "planes", "dtype", "message"),
    [
        ((1, 64, 3, 3), 64, SINGLE, "needs float16 or bfloat16, got float32"),
        ((1, 64, 3, 3), 32, FP16, "needs 64 or 128 planes, got 32"),
        ((1, 96, 3, 3), 64, FP16, "needs input and output channels in multiples of 64, got 96 and"),
    ],
)
def test_what_the_fused_kernel_cannot_do(shape, planes, dtype, message):
    convolutions = chain(shape, planes, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        conv.bottleneck(convolutions[0].x, *parameters(convolutions), backend="triton")


def test_errors_say_what_they_got_and_wanted():
    convolutions = chain((1, 8, 3, 3), 4)
    weights, biases = parameters(convolutions)
    x = convolutions[0].x
    cases = [
        ((weights[:2], biases), {}, "weights and biases must be three each, got 2 and 3"),
        ((weights[::-1], biases), {}, r"weight1 must be \[O, 8, 1, 1\], got \[8, 4, 1, 1\]"),
        (([weights[0]] * 3, biases), {}, r"weight2 must be \[O, 4, 3, 3\], got \[4, 8, 1, 1\]"),
        ((weights, biases[::-1]), {}, r"bias1 must be \[4\], got \[8\]"),
        ((weights, biases, x[..., :2]), {}, r"residual must be \[1, 8, 3, 3\], got \[1, 8, 3, 2\]"),
        ((weights, biases, x.float()), {}, "residual must be torch.float16, got torch.float32"),
        (
            (weights, biases),
            {"backend": "cudnn"},
            "backend must be one of auto, triton, separate, got 'cudnn'",
        ),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            conv.bottleneck(x, *arguments, **options)


class Block(nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        self.weights, self.biases = map(list, parameters(chain((1, 64, 1, 1), 64)))

    def forward(self, x):
        return conv.bottleneck(x, self.weights, self.biases, backend=self.backend)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compile_export_and_opcheck(backend):
    block = Block(backend)
    x = make((1, 64, 3, 4), 1, 1).x
    expected = block(x)
    assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.export.export(block, (x,)).module()(x), expected)
    arguments = x, block.weights, block.biases, x, backend, "ieee"
    torch.library.opcheck(torch.ops.emanet_triton.bottleneck, arguments)
