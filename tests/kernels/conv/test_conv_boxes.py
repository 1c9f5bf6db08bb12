"""The source of ``conv_boxes``, run by ``gluon_simulator`` on a CPU, also beside a GPU."""

import itertools

import pytest
import torch
from gluon_simulator import HangError, RaceError, simulate
from torch.nn import functional as F

from emanet_triton.kernels.conv import hopper

PROGRAMS = 3  # so that each has several tiles
ORDERS = tuple(itertools.permutations(range(3)))  # of the warps that multiply, load and store
LOADS_FIRST, LOADS_LAST = (1, 0, 2), (2, 0, 1)


class Problem:
    """A convolution of small integers, whose sums are exact in float32.

    Args:
        sizes: B, C, H, W and O.
        residual, out: their dtypes; residual may be None.
    """

    def __init__(
        self, *sizes, kernel=3, dilation=1, residual=None, out=None, relu=True, dtype=torch.bfloat16
    ):
        generator = torch.Generator().manual_seed(0)

        def integers(most, *shape):
            found = torch.randint(-most, most + 1, shape, generator=generator)
            return found.to(dtype).to(memory_format=torch.channels_last)

        batch, channels, height, width, outputs = sizes
        self.x = integers(2, batch, channels, height, width)
        self.weight = integers(2, outputs, channels, kernel, kernel)
        self.bias = torch.randint(-9, 10, (outputs,), generator=generator).to(dtype)
        self.residual = None
        if residual:
            self.residual = 30 * integers(2, batch, outputs, height, width).to(residual)
        self.dilation, self.relu, self.out_dtype = dilation, relu, out or dtype

    def run(self, monkeypatch, edit=None, order=LOADS_FIRST):
        def launch(kernel, tile, device, programs, *arguments, **constants):
            arguments[4].base.fill_(float("nan"))  # the output
            simulate(kernel, programs, arguments, constants, tile, edit, order)

        monkeypatch.setattr(hopper, "launch", launch)
        monkeypatch.setattr(hopper, "multiprocessors", lambda device: PROGRAMS)
        options = 1, self.dilation, self.relu, self.out_dtype, "ieee"
        return hopper.conv_bias_act(self.x, self.weight, self.bias, self.residual, *options)

    def wanted(self):
        padding = self.dilation * (self.weight.shape[2] // 2)
        tensors = (t.double() for t in (self.x, self.weight, self.bias))
        out = F.conv2d(*tensors, padding=padding, dilation=self.dilation)
        if self.residual is not None:
            out += self.residual
        return (out.relu() if self.relu else out).to(self.out_dtype)

    def check(self, monkeypatch, edit=None, order=LOADS_FIRST):
        found = self.run(monkeypatch, edit, order)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found, self.wanted())


HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize("order", [LOADS_FIRST, LOADS_LAST], ids=str)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((2, 64, 9, 21, 72), {}),  # of the second block of outputs only 8 are there
        ((1, 128, 13, 17, 136), {"dilation": 2, "relu": False}),
        ((8, 64, 5, 7, 8), {"dilation": 16}),  # all taps but one are outside
        ((2, 64, 9, 21, 136), {"residual": HALF}),
        ((2, 64, 9, 21, 136), {"residual": SINGLE}),
        ((2, 64, 9, 21, 136), {"residual": SINGLE, "out": SINGLE, "relu": False}),
        ((2, 64, 9, 21, 136), {"residual": HALF, "out": SINGLE}),
        ((2, 64, 9, 21, 200), {"out": SINGLE, "relu": False}),
        ((3, 128, 9, 21, 64), {"kernel": 1}),
        ((3, 576, 9, 21, 192), {"kernel": 1, "residual": HALF}),  # more steps than buffers
        ((1, 64, 1, 1, 16), {"kernel": 1, "residual": HALF}),
        ((1, 64, 1, 1, 16), {"residual": HALF}),
        ((1, 64, 130, 127, 320), {"kernel": 1, "residual": HALF}),  # with the widest tile
        ((1, 64, 130, 127, 256), {"dilation": 4}),
        ((1, 64, 130, 127, 256), {"kernel": 1, "out": SINGLE}),
    ],
    ids=str,
)
def test_every_output(monkeypatch, sizes, options, order):
    Problem(*sizes, **options).check(monkeypatch, order=order)


def test_float16(monkeypatch):
    Problem(2, 64, 9, 21, 72, residual=torch.float16, dtype=torch.float16).check(monkeypatch)


def test_nan_and_negative_zero(monkeypatch):
    problem = Problem(1, 64, 9, 21, 8, kernel=1)
    problem.x[0, 5, 3, 4] = float("nan")
    found = problem.run(monkeypatch)
    assert found[0, :, 3, 4].isnan().all()
    assert found.isnan().sum() == found.shape[1]


def test_memory_between_two_addresses(monkeypatch):
    problem = Problem(2, 64, 9, 21, 72, residual=HALF)
    for name in ("x", "weight", "residual"):
        tensor = getattr(problem, name).permute(0, 2, 3, 1)
        moved = torch.empty(tensor.numel() + 1, dtype=HALF)[1:].view(tensor.shape).copy_(tensor)
        setattr(problem, name, moved.permute(0, 3, 1, 2))
        assert moved.data_ptr() % 16
    problem.check(monkeypatch)


# It has several boxes of several images, several blocks of outputs, and more steps than buffers.
SEVERAL = (7, 128, 11, 21, 136), {"residual": HALF}


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_no_order_of_the_warps_changes_anything(monkeypatch, order):
    Problem(*SEVERAL[0], **SEVERAL[1]).check(monkeypatch, order=order)


WAITS = HangError, RaceError  # which of them depends on the order
MISTAKES = (
    ("mbarrier.wait(loaded.index(i), n // BUFFERS & 1)", "pass", WAITS),
    ("mbarrier.wait(free.index(i), (n // BUFFERS & 1) ^ 1)", "pass", WAITS),
    ("mbarrier.wait(out_full.index(i), n // OUTS & 1)", "pass", WAITS),
    ("mbarrier.wait(residual_loaded.index(i), n_out // OUTS & 1)", "pass", WAITS),
    ("(n // BUFFERS & 1) ^ 1", "n // BUFFERS & 1", HangError),
    ("wait(1, deps=[b_sum])", "wait(2, deps=[b_sum])", RaceError),
    ("wait(0, deps=[b_sum])", "wait(1, deps=[b_sum])", RaceError),
    ("pred=step > 0", "pred=True", WAITS),
    ("pred=step > 0", "pred=step > 1", HangError),
    ("mbarrier.arrive(out_free.index(i))", "pass", HangError),
    ("arrive_together(out_full.index(i))", "pass", HangError),
    ("fence_async_shared()", "pass", RaceError),
    ("tma.store_wait(0)", "pass", RaceError),
    ("STEP_BYTES)", "STEP_BYTES - 1)", HangError),
    ("y + dy, x + dx, c]", "y + dy, x - dx, c]", AssertionError),
    ("tap // KERNEL - KERNEL // 2", "tap // KERNEL", AssertionError),
    ("[o_first, step * BLOCK_C]", "[o_first, c]", AssertionError),
    ("at = [i_b, y, x, o_first + j * SLICE]", "at = [i_b, y, x, o_first]", AssertionError),
    ("step == AHEAD - 1", "step == STEPS", HangError),
    ("out_desc, [i_b, y, x, o_first + j * SLICE]", "out_desc, [i_b, y, x, o_first]", RaceError),
    ("b = columns(low, j, WIDTH)", "b = columns(high, j, WIDTH)", AssertionError),
    ("o_o = o_first + j * SLICE + o_slice", "o_o = o_first + o_slice", AssertionError),
    ("tile // rows * box[0]", "tile // rows", RaceError),
    ("tile % rows * box[1]", "tile % rows", RaceError),
    ("x = tile % columns * box[2]", "x = tile % columns", RaceError),
)


@pytest.mark.parametrize(("old", "new", "error"), MISTAKES)
def test_a_mistake_in_the_kernel_is_found(monkeypatch, old, new, error):
    problem = Problem(*SEVERAL[0], **SEVERAL[1])
    with pytest.raises(error):
        for order in ORDERS:
            problem.check(monkeypatch, (old, new), order)


def test_a_buffer_must_be_free_before_a_residual_is_loaded(monkeypatch):
    old = "mbarrier.wait(out_free.index(i), ((n_out + j) // OUTS & 1) ^ 1)"
    problem = Problem(*SEVERAL[0], **SEVERAL[1])
    with pytest.raises(WAITS):
        for order in ORDERS:
            problem.check(monkeypatch, (old, "pass"), order)


def test_a_buffer_must_be_free_before_it_is_filled(monkeypatch):
    old = "mbarrier.wait(out_free.index(i), (n_out // OUTS & 1) ^ 1)\n            if RELU"
    problem = Problem(*SEVERAL[0])
    with pytest.raises(WAITS):
        for order in ORDERS:
            problem.check(monkeypatch, (old, "pass\n            if RELU"), order)
