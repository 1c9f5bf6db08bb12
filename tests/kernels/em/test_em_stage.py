"""The source of ``em_stage``, run by ``gluon_simulator`` on the CPU, also where there is a GPU."""

import pytest
import torch
from gluon_simulator import HangError, RaceError, simulate

from emanet_triton.kernels.em import hopper, tiles

TILE = tiles.tile("em_stage", "sm_90", "bf16", tiles.ONE_PASS_CHANNELS, tiles.ONE_PASS_BASES)
BLOCK_N, BLOCK_K = TILE.meta["BLOCK_N"], TILE.meta["BLOCK_K"]
BATCH, POSITIONS, CHANNELS, BASES, PARTS = 2, 5 * BLOCK_N + 13, 32, 7, 3


class Stage:
    """One E and M step on random inputs.

    Args:
        dtype: of features and bases.
        ranges: at most so many ranges of positions an image.
        backwards: whether the programs go through the features backwards.
        parts: how many parts the norms and biases of the bases have; 0 for normalised bases.
        own_bases: whether each image has bases of its own, and a bias.
        store_z: whether the responsibilities are stored.
        k: the number of bases.
    """

    def __init__(
        self, dtype, ranges, *, backwards=False, parts=0, own_bases=True, store_z=True, k=BASES
    ) -> None:
        def normal(*shape):
            return torch.randn(shape, generator=generator)

        self.k = k
        generator = torch.Generator().manual_seed(0)
        batch = BATCH if own_bases else 1
        self.x = (2 * normal(BATCH, POSITIONS, CHANNELS)).to(dtype)
        self.bases = normal(batch, self.k, CHANNELS).to(dtype)
        self.rows = BATCH * self.k
        self.parts = parts
        self.bias = normal(parts, self.rows) if parts else normal(batch, self.k)
        self.square = normal(parts, self.rows).square() if parts else None
        self.size = normal(self.rows).abs() if parts else None
        self.has_bias = bool(parts) or own_bases
        self.split = tiles.range_length(POSITIONS, ranges, BLOCK_N)
        self.splits = -(-POSITIONS // self.split)
        self.z = torch.full((BATCH, POSITIONS, BLOCK_K), torch.nan, dtype=dtype)
        self.partial = torch.full((BATCH, self.splits, self.k, CHANNELS), torch.nan)
        self.colsum = torch.full((BATCH, self.k, self.splits), torch.nan)
        self.scale = 2.0**15 if dtype == torch.float16 else 1.0
        self.backwards, self.store_z = backwards, store_z

    def run(self, edit=None) -> "Stage":
        step = int(len(self.bases) > 1)
        programs = BATCH * self.splits
        arguments = (
            hopper.rows_of(self.x, BLOCK_N), hopper.rows_of(self.bases, BLOCK_K),
            self.bias if self.has_bias else None, self.square, self.size,
            hopper.rows_of(self.z, BLOCK_N), self.partial, self.colsum,
            POSITIONS, self.split, self.splits, (programs - 1) * self.backwards,
            self.rows, 0.25, step, step * self.k,
        )  # fmt: skip
        constants = {
            "C": CHANNELS, "K": self.k, "HAS_BIAS": self.has_bias, "PARTS": self.parts,
            "STORE_Z": self.store_z, "Z_SCALE": self.scale,
        }  # fmt: skip
        newer = [t for t in (self.bases, self.bias, self.square, self.size) if t is not None]
        simulate(hopper.em_stage, programs, arguments, constants, TILE, edit, newer=newer)
        return self

    def wanted(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Responsibilities as stored, and their products with X and their sums in each range."""
        logits = self.x.float() @ self.bases.float().mT
        if self.parts:
            norm = self.square.sum(0).sqrt() + 0.25
            scale, bias = self.size / norm, self.bias.sum(0) / norm
            logits = logits * scale.view(BATCH, 1, self.k) + bias.view(BATCH, 1, self.k)
        elif self.has_bias:
            logits = logits + self.bias[:, None]
        z = (torch.softmax(logits, 2) * self.scale).to(self.x.dtype)
        ranges = range(0, POSITIONS, self.split)
        parts = [slice(begin, begin + self.split) for begin in ranges]
        x, stored = self.x.float(), z.float() / self.scale
        sums = [stored[:, part].mT @ x[:, part] for part in parts]
        return z, torch.stack(sums, 1), torch.stack([stored[:, p].sum(1) for p in parts], 2)

    def check(self) -> None:
        z, partial, colsum = self.wanted()
        eps = torch.finfo(self.x.dtype).eps
        if self.store_z:
            torch.testing.assert_close(self.z[..., : self.k], z, rtol=2 * eps, atol=0)
            assert self.z[..., self.k :].count_nonzero() == 0
        else:
            assert self.z.isnan().all()
        # A responsibility may round the other way, which moves a sum by its rounding.
        torch.testing.assert_close(self.partial, partial, rtol=0, atol=8 * eps)
        torch.testing.assert_close(self.colsum, colsum, rtol=0, atol=2 * eps)


@pytest.mark.parametrize("ranges", [1, 2, 4, 128])  # four ranges of six tiles: one is not needed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_sum_and_every_responsibility(dtype, ranges):
    Stage(dtype, ranges).run().check()


@pytest.mark.parametrize(
    "options",
    [
        {"own_bases": False}, {"backwards": True}, {"store_z": False}, {"k": 1}, {"k": 64},
        {"parts": 1}, {"parts": PARTS}, {"parts": PARTS, "store_z": False, "backwards": True},
    ],
    ids=str,
)  # fmt: skip
def test_every_kind_of_stage(options):
    Stage(torch.bfloat16, 2, **options).run().check()


def test_the_order_of_the_programs_changes_no_bit():
    forwards, backwards = (Stage(torch.bfloat16, 3, backwards=b).run() for b in (False, True))
    for name in ("z", "partial", "colsum"):
        assert torch.equal(getattr(forwards, name), getattr(backwards, name))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stays_in_its_range(value):
    clean, stage = (Stage(torch.bfloat16, 3) for _ in range(2))
    clean.run()
    stage.x[0, -1, 5] = value  # of the last tile, which is not full
    stage.run()
    assert stage.partial[0, -1].isnan().all()
    stage.partial[0, -1] = clean.partial[0, -1]
    assert torch.equal(stage.partial, clean.partial)


MISTAKES = (
    ("fence_async_shared()", "pass", RaceError),
    ("warpgroup_mma_wait(0, deps=[b_sum])", "warpgroup_mma_wait(1, deps=[b_sum])", RaceError),
    ("wait(0, deps=[b_products])", "wait(1, deps=[b_products])", RaceError),
    ("gdc_wait()", "pass", RaceError),
    ("mbarrier.wait(loaded.index(MU), 0)", "pass", RaceError),
    ("mbarrier.wait(loaded.index(i), t // 2 % 2)", "pass", RaceError),
    ("loaded.index(i), t // 2 % 2", "loaded.index(i), 0", RaceError),
    ("loaded.index(i), t // 2 % 2", "loaded.index(i), t % 2", RaceError),
    ("has_tile = j < num_tiles", "has_tile = j < 1", HangError),
    ("has_tile = t + 2 < num_tiles", "has_tile = t + 3 < num_tiles", HangError),
    ("has_tile = t + 2 < num_tiles", "has_tile = t < num_tiles", RaceError),
    ("i = t % 2\n", "i = 0\n", RaceError),
    ("tma.store_wait(0)  # the tile before has left z", "pass", RaceError),
    ("start = begin + j * BLOCK_N", "start = begin", AssertionError),
    ("start = first + 2 * BLOCK_N", "start = first + BLOCK_N", AssertionError),
    ("o_n < N - first", "o_n < N", AssertionError),
    ("i_b * step_bases_b", "0", AssertionError),
    ("[i_b, first, 0], z_buf", "[i_b, begin, 0], z_buf", RaceError),
    ("pid.to(gl.int64) * (K * C)", "i_b.to(gl.int64) * (K * C)", RaceError),
)


@pytest.mark.parametrize(("old", "new", "error"), MISTAKES)
def test_a_mistake_in_the_kernel_is_found(old, new, error):
    stage = Stage(torch.bfloat16, 2, parts=PARTS)
    with pytest.raises(error):
        stage.run((old, new)).check()


def test_a_text_that_is_not_there_once_cannot_be_changed():
    with pytest.raises(ValueError, match="num_tiles"):
        Stage(torch.bfloat16, 1).run(("num_tiles", "N"))
