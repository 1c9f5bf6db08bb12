"""The source of ``em_output``, run by ``gluon_simulator`` on the CPU, also where there is a GPU."""

import itertools

import pytest
import torch
from gluon_simulator import HangError, RaceError, simulate

from emanet_triton.kernels.em import output, tiles
from emanet_triton.kernels.em.attention import Z_SCALES

CHANNELS = tiles.ONE_PASS_CHANNELS
TILE = tiles.tile("em_output", "sm_90", "bf16", CHANNELS, tiles.ONE_PASS_BASES)
BLOCK_N, BLOCK_K = TILE.meta["BLOCK_N"], TILE.meta["BLOCK_K"]
PROGRAMS = 3
ORDERS = tuple(itertools.permutations(range(3)))  # of the warps that multiply, load and store
LOADS_FIRST, LOADS_LAST = (1, 0, 2), (2, 0, 1)


class Output:
    """The end of the block for small integers, whose sums are exact in float32.

    Args:
        batch, positions, bases: of the images.
        programs: how many share the tiles.
        channels: a multiple of the tile's BLOCK_O.
        out_relu: whether a ReLU precedes the addition of the features.
        dtype: of all but the bias.
    """

    def __init__(
        self,
        batch=2,
        positions=4 * BLOCK_N + 13,
        bases=7,
        programs=PROGRAMS,
        channels=CHANNELS,
        out_relu=False,
        dtype=torch.bfloat16,
    ):
        generator = torch.Generator().manual_seed(0)

        def integers(least, most, *shape):
            return torch.randint(least, most + 1, shape, generator=generator).to(dtype)

        self.x = 20 * integers(-3, 3, batch, positions, channels)
        self.z = torch.zeros(batch, positions, BLOCK_K, dtype=dtype)
        self.z[..., :bases] = integers(0, 1, batch, positions, bases) * Z_SCALES[dtype]
        self.bases = integers(-2, 2, batch, bases, channels)
        self.weight = integers(-1, 1, channels, channels)
        self.bias = torch.randint(-999, 1000, (channels,), generator=generator).float()
        self.out_relu, self.programs = out_relu, programs

    def run(self, edit=None, order=LOADS_FIRST):
        out = torch.full_like(self.x, torch.nan)
        batch, positions, channels = out.shape
        tiles_of_image = -(-positions // BLOCK_N)
        *inputs, out_desc = output.descriptors(
            self.x, self.z, self.bases, self.weight, out, TILE.meta
        )
        arguments = *inputs, self.bias, out_desc, batch * tiles_of_image, tiles_of_image
        scale = Z_SCALES[self.x.dtype]
        constants = {"C": channels, "OUT_RELU": self.out_relu, "Z_SCALE": scale}
        newer = self.z, self.bases
        simulate(output.em_output, self.programs, arguments, constants, TILE, edit, order, newer)
        return out

    def wanted(self):
        z = self.z[..., : self.bases.shape[1]].double() / Z_SCALES[self.x.dtype]
        recon = (z @ self.bases.double()).relu()
        out = recon @ self.weight.double().mT + self.bias
        out = (out.relu() if self.out_relu else out) + self.x
        return out.relu().to(self.x.dtype)

    def check(self, edit=None, order=LOADS_FIRST):
        assert torch.equal(self.run(edit, order), self.wanted())


@pytest.mark.parametrize("order", [LOADS_FIRST, LOADS_LAST], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"out_relu": True},
        {"dtype": torch.float16},
        {"bases": 1},
        {"bases": 64},
        {"batch": 1, "positions": 1, "programs": 1},
        {"batch": 3, "positions": BLOCK_N},
        {
            "batch": 7,
            "positions": 2 * BLOCK_N + 1,
            "programs": 2,
        },  # each has tiles of several images
        {"batch": 1, "positions": 3 * BLOCK_N, "programs": 1},
        {"channels": 256},  # fewer steps
        {"channels": 1024},
    ],
    ids=str,
)
def test_every_output(options, order):
    Output(**options).check(order=order)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_no_order_of_the_warps_changes_anything(order):
    Output().check(order=order)


@pytest.mark.parametrize("out_relu", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stays_in_its_position(value, out_relu):
    case = Output(out_relu=out_relu)
    clean = case.run()
    case.z[1, -1, 3] = value  # of the last tile, which is not full
    found = case.run()
    assert not found[1, -1].isfinite().any()
    found[1, -1] = clean[1, -1]
    assert torch.equal(found, clean)


def test_a_nan_among_the_features_stays_one():
    case = Output()
    want = case.wanted()
    case.x[0, 5, 7] = float("nan")
    found = case.run()
    assert found[0, 5, 7].isnan()
    found[0, 5, 7] = want[0, 5, 7]
    assert torch.equal(found, want)


WAITS = HangError, RaceError  # which of them depends on the order
MISTAKES = (
    ("mbarrier.wait(loaded.index(i), n // BUFFERS & 1)", "pass", WAITS),
    ("mbarrier.wait(free.index(i), (n // BUFFERS & 1) ^ 1)", "pass", WAITS),
    ("mbarrier.wait(z_loaded, tile // gl.num_programs(0) & 1)", "pass", WAITS),
    ("mbarrier.wait(x_loaded.index(i), n_out // OUTS & 1)", "pass", WAITS),
    ("mbarrier.wait(out_full.index(i), n_out // OUTS & 1)", "pass", WAITS),
    ("(n // BUFFERS & 1) ^ 1", "n // BUFFERS & 1", HangError),
    ("wait(z_loaded, tile // gl.num_programs(0) & 1)", "wait(z_loaded, 0)", WAITS),
    ("wait(0, deps=[b_recon])", "wait(1, deps=[b_recon])", RaceError),
    ("wait(1, deps=[b_next])", "wait(2, deps=[b_next])", RaceError),
    ("wait(0, deps=[b_sum])", "wait(1, deps=[b_sum])", RaceError),
    ("pred=step > 0", "pred=True", WAITS),
    ("pred=step > 0", "pred=step > 1", HangError),
    ("arrive_together(out_full.index(i))", "pass", HangError),
    ("fence_async_shared()", "pass", RaceError),
    ("tma.store_wait(0)", "pass", RaceError),
    ("Z_BYTES + MU_BYTES", "Z_BYTES", HangError),
    ("Z_BYTES, pred=i_b == image", "Z_BYTES + MU_BYTES, pred=i_b == image", HangError),
    ("image = i_b", "image = 0", (*WAITS, AssertionError)),
    ("i_b, 0, j * BLOCK_C]", "i_b, 0, 0]", AssertionError),
    ("gdc_wait()\n                mbarrier", "pass\n                mbarrier", RaceError),
    ("gdc_wait()  # until", "pass  # until", RaceError),
    ("step_of_z = BUFFERS - 1", "step_of_z = BUFFERS", HangError),
    ("step_of_z = BUFFERS - 1", "step_of_z = ALL_STEPS", HangError),
    ("step_of_z = BUFFERS - 2", "step_of_z = BUFFERS", HangError),
    ("step_of_z = BUFFERS - 2", "step_of_z = BUFFERS - 3", WAITS),
    ("step // STEPS * BLOCK_O, step", "0, step", AssertionError),
    ("step % STEPS * BLOCK_C", "0", AssertionError),
    ("mus.index((step + 1) % STEPS)", "mus.index(step)", AssertionError),
    ("b_recon, use_acc=False, is_async", "b_recon, is_async", AssertionError),
    ("block * BLOCK_O + j * BLOCK_C + o_slice", "j * BLOCK_C + o_slice", AssertionError),
    ("columns(b_sum, j, BLOCK_C)", "columns(b_sum, 0, BLOCK_C)", AssertionError),
    ("n_out % (C // BLOCK_C) * BLOCK_C", "n_out % OUTS * BLOCK_C", AssertionError),
    ("x_desc, n_out + OUTS, num", "x_desc, n_out + 1, num", WAITS),
    ("[i_b, first, j * BLOCK_C]", "[i_b, first, 0]", RaceError),
    ("outs.index(i), pred=exists", "outs.index(i)", (IndexError, RaceError)),
    ("tile % tiles_of_image * desc.block_shape[1]", "tile % tiles_of_image", RaceError),
    ("tile = num_tiles - 1 - i", "tile = num_tiles - 1", RaceError),
    ("tile = num_tiles - 1 - i", "tile = num_tiles - i", AssertionError),
)


@pytest.mark.parametrize(("old", "new", "error"), MISTAKES)
def test_a_mistake_in_the_kernel_is_found(old, new, error):
    case = Output()
    with pytest.raises(error):
        for order in ORDERS:
            case.check((old, new), order)
