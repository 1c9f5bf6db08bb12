"""The pooling of the stem: equal to PyTorch's to the last bit."""

import pytest
import torch
from device import DEVICE, DTYPES, HALF
from torch.nn import functional as F

from emanet_triton.kernels.pool.op import max_pool

BACKENDS = ("torch", "triton")
SHAPES = {
    "one-pixel": (1, 64, 1, 1),
    "row": (1, 64, 1, 37),
    "odd": (3, 64, 9, 17),
    "mixed": (1, 64, 10, 33),
    "one-channel": (2, 1, 5, 6),
    "7-channels": (1, 7, 8, 9),
    "200-channels": (1, 200, 7, 4),
}
NAN, INF = float("nan"), float("inf")


def make_image(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Noise, channels-last."""
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return image.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def plain(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, stride=2, padding=1)


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_it_equals_pytorch(name, backend, dtype):
    x = make_image(SHAPES[name], dtype)
    assert_same(max_pool(x, backend=backend), plain(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite(backend, dtype):
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor([NAN, -NAN, INF, -INF, -1.0, 2.0])
    few = torch.tensor([0.02, 0.02, 0.05, 0.4, 0.3, 0.2])
    drawn = few.multinomial(2 * 64 * 9 * 17, replacement=True, generator=generator)
    x = values[drawn].view(2, 64, 9, 17).to(DEVICE, dtype)
    want = plain(x)
    for kind in (want.isnan(), want == INF, want == -INF, want == 2):
        assert kind.any()
    assert_same(max_pool(x, backend=backend), want)


@pytest.mark.parametrize("value", [NAN, INF, -INF, -5.0], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_place_of_a_window(backend, value):
    """An image for each pixel of a 3x3 window, which has the value; all others are -7."""
    x = torch.full((9, 8, 5, 6), -7.0, device=DEVICE)
    for place in range(9):
        x[place, :, 1 + place // 3, 1 + place % 3] = value
    assert_same(max_pool(x, backend=backend), plain(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_padding_is_never_the_maximum(backend):
    x = make_image((1, 64, 9, 9)).abs() - 100
    got = max_pool(x, backend=backend)
    assert (got < 0).all()
    assert_same(got, plain(x))
    assert (max_pool(torch.full_like(x, -INF), backend=backend) == -INF).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    x = make_image((2, 64, 9, 17), HALF)
    want = plain(x)
    wide = make_image((2, 72, 9, 20), HALF)
    part = wide[:, 3:67, :, 2:19]
    part.copy_(x)
    for other in (x.contiguous(), part, x.mT.contiguous().mT):
        assert_same(max_pool(other, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_that_is_not_aligned(backend):
    x = make_image((1, 64, 6, 8), HALF)
    memory = torch.empty(x.numel() + 1, dtype=HALF, device=DEVICE)[1:]
    shifted = memory.view(1, 6, 8, 64).permute(0, 3, 1, 2)
    assert_same(max_pool(shifted.copy_(x), backend=backend), plain(x))


def test_an_image_alone_has_the_same_bits():
    x = make_image((3, 64, 10, 33))
    got = max_pool(x, backend="triton")
    assert torch.equal(max_pool(x[1:2], backend="triton"), got[1:2])


def test_auto_is_pytorch_on_a_cpu():
    x = make_image((1, 8, 6, 6)).cpu()
    assert torch.equal(max_pool(x), plain(x))


def test_no_gradient_flows_through_it():
    assert not max_pool(make_image((1, 8, 6, 6)).requires_grad_()).requires_grad


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", ["odd", "row", "one-channel"])
def test_the_operator_is_registered_well(name, backend):
    arguments = make_image(SHAPES[name]), backend
    torch.library.opcheck(torch.ops.emanet_triton.max_pool.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend):
    x = make_image((1, 64, 6, 8))

    def pool_and_more(x):
        return max_pool(2 * x, backend=backend) + 1

    compiled = torch.compile(pool_and_more, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), pool_and_more(x))


BAD = {
    "three-dimensional": (
        (torch.zeros(64, 8, 8),),
        r"x must be \[B, C, H, W\], only B may be 0, got \[64, 8, 8\]",
    ),
    "no-pixels": ((torch.zeros(1, 64, 0, 8),), r"only B may be 0, got \[1, 64, 0, 8\]"),
    "integer": (
        (torch.zeros(1, 8, 4, 4, dtype=torch.int32),),
        "x must be float32, float16 or bfloat16, got torch.int32",
    ),
    "double": ((torch.zeros(1, 8, 4, 4).double(),), "or bfloat16, got torch.float64"),
    "backend": (
        (torch.zeros(1, 8, 4, 4), "cudnn"),
        "backend must be one of auto, triton, torch, got 'cudnn'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    (x, *backend), message = BAD[name]
    with pytest.raises(ValueError, match=message):
        max_pool(x, **({"backend": backend[0]} if backend else {}))


@pytest.mark.parametrize(
    "shape", [(2, 3, 7, 9), (1, 5, 1, 1), (1, 4, 2, 1), (3, 8, 10, 11)], ids=str
)
def test_8_bit_integers(shape):
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    found = max_pool(x, backend="torch")
    assert found.dtype == torch.uint8
    assert torch.equal(found.float(), F.max_pool2d(x.float(), 3, stride=2, padding=1))
    assert found.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="x must be float32, float16 or bfloat16"):
        max_pool(x)
