"""E and M step in one pass over the features: 512 channels, channels-last, half precision.

Without a GPU, ``gluon_simulator`` runs ``em_stage`` and ``em_output``, and Triton's interpreter the
other kernels.
"""

import pytest
import torch
from device import DEVICE, HALF, NATIVE, only_on
from em_cases import (
    Case,
    assert_as_exact,
    channels_first,
    eager_block,
    eager_em_attention,
    every_other,
)
from gluon_simulator import simulate
from torch.utils._python_dispatch import TorchDispatchMode

from emanet_triton.kernels.em import attention, block, hopper, output, passes, reference, tiles
from emanet_triton.kernels.em.op import as_positions, em_attention, em_attention_block
from emanet_triton.kernels.em.tiles import ONE_PASS, ONE_PASS_CHANNELS

pytestmark = only_on("sm_90")
# Six tiles of 64 positions, of which the last is not full, and bases that do not fill a tile.
CASE = Case(2, ONE_PASS_CHANNELS, (9, 37), 7, stages=2, own_bases=True)
CASES = (
    CASE,
    Case(1, ONE_PASS_CHANNELS, (1, 1), 7, "channels_last", stages=1),
)
RANGES = (1, 4)  # of six and of two tiles
TOLERANCE = torch.finfo(HALF).eps / 4  # components of bases and reconstructions are about 0.05
BLOCK_N = tiles.tile("em_stage", "sm_90", "bf16", ONE_PASS_CHANNELS, 64).meta["BLOCK_N"]


@pytest.fixture(autouse=True)
def _simulated(monkeypatch):
    """Without a GPU, simulate the kernels in Gluon."""
    if NATIVE:
        return
    launch = attention.launch

    def launch_or_simulate(kernel, tile, device, programs, *arguments, **constants):
        constants.pop("launch_pdl", None)
        if kernel not in (hopper.em_stage, output.em_output):
            return launch(kernel, tile, device, programs, *arguments, **constants)
        return simulate(kernel, programs, arguments, constants, tile)

    monkeypatch.setattr(attention, "launch", launch_or_simulate)
    monkeypatch.setattr(passes, "gluon_arch", lambda feats: "sm_90")


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    return case.feats(HALF).relu(), case.initial_bases(HALF), case.weights(HALF)


def stages_of(case: Case, ranges: int) -> attention.Stages:
    return attention.Stages(case.feats(HALF), case.bases, "ieee", 0.0, ranges)


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, ranges):
    x, mu, _ = inputs(case)
    feats = as_positions(x)
    got, bases = attention.run_attention(feats, mu, case.stages, 0.0, "ieee", ranges)
    assert got.stride() == feats.stride()
    exact = reference.em_attention(channels_first(x).double(), mu.double(), case.stages)
    plain = eager_em_attention(channels_first(x), mu, case.stages)
    assert_as_exact(got.mT, plain[0], exact[0])
    assert_as_exact(bases, plain[1], exact[1])


@pytest.mark.parametrize("backend", ["one-pass-128"] if not NATIVE else ONE_PASS)
def test_the_block_against_float64(backend):
    x, mu, weights = inputs(CASE)
    stages = 3  # the middle one is a kernel of its own
    found = em_attention_block(x, mu, *weights, stages, backend=backend)
    doubles = (channels_first(x), mu, *weights)
    exact = reference.em_attention_block(*(t.double() for t in doubles), stages)
    plain = eager_block(channels_first(x), mu, weights, stages)
    assert_as_exact(channels_first(found[0]), plain[0], exact[0])
    assert_as_exact(found[1], plain[1], exact[1])


@pytest.mark.parametrize("backend", ONE_PASS)
def test_it_agrees_with_two_kernels(backend):
    x, mu, _ = inputs(CASE)
    one, two = (em_attention(x, mu, norm_shift=1e-6, backend=name) for name in (backend, "triton"))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


class Noted(TorchDispatchMode):
    """Notes the operations of PyTorch that read or write elements of tensors."""

    IDLE = ("aten::empty", "aten::new_empty", "aten::transpose", "aten::unbind", "aten::select")

    def __init__(self, events: list) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not operation.name().startswith(self.IDLE):
            self.events.append(operation.name())
        return operation(*args, **(kwargs or {}))


def between_addresses(tensor: torch.Tensor) -> torch.Tensor:
    """The same values where no tensor descriptor takes them."""
    place = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:]
    return place.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("inputs_are", ["as wanted", "of other strides and dtypes", "misplaced"])
@pytest.mark.parametrize("operator", ["attention", "block"])
def test_each_kernel_but_the_first_may_start_early(operator, inputs_are, monkeypatch):
    """It may read what is older than the kernel before, so nothing else runs between the two."""
    events = []

    def launch(kernel, tile, device, programs, *arguments, **constants):
        assert constants.get("OVERLAP", True)
        events.append((kernel.__name__, constants.get("launch_pdl", False)))

    monkeypatch.setattr(attention, "INTERPRETED", False)
    monkeypatch.setattr(attention, "launch", launch)
    x, mu, weights = inputs(CASE)
    x, mu = as_positions(x)[:1], mu[:1]
    if inputs_are == "of other strides and dtypes":
        weights = [w.float().mT if w.ndim == 2 else every_other(w) for w in weights]
    elif inputs_are == "misplaced":
        mu, *weights = map(between_addresses, (mu, *weights))
    with Noted(events):
        if operator == "attention":
            attention.run_attention(x, mu, 3, 0.0, "ieee", 16)
            kernels = ["em_stage", "em_reduce"] * 3
            assert events.pop() == ("em_reconstruct", False)
        else:
            block.run_block(x, mu, *weights, 3, 0.0, False, "ieee", 16)
            stage = ["em_stage", "em_reduce", "em_project"]
            kernels = ["em_fold", *stage * 3, "em_normalise", "em_output"]
    wanted = [(name, i > 0) for i, name in enumerate(kernels)]
    assert events[-len(wanted) :] == wanted
    assert wanted[0] not in events[: -len(wanted)]
    assert attention.Stages(x, CASE.bases, "ieee", 0.0).overlap["OVERLAP"] is False


@pytest.mark.parametrize("backend", ONE_PASS)
@pytest.mark.usefixtures("ordered_products")
def test_the_same_bits_on_every_run_and_in_every_batch(backend):
    x, mu, _ = inputs(CASE)
    together = em_attention(x, mu, backend=backend)
    again = em_attention(x, mu, backend=backend)
    alone = em_attention(x[1:], mu[1:], backend=backend)
    for i in range(2):
        assert torch.equal(together[i], again[i])
        assert torch.equal(together[i][1:], alone[i])


@pytest.mark.parametrize("left", [0, 1, 2])
def test_responsibilities_are_written_in_the_last_stage_only(left):
    stages = stages_of(CASE, 2)
    old = attention.Bases(CASE.initial_bases(HALF).mT.contiguous())
    new = torch.empty_like(old.rows)
    stages.z.fill_(float("nan"))
    stages.stage(old, new, left=left)
    assert not new.isnan().any()
    if left:
        assert stages.z.isnan().all()
        return
    z = stages.z[..., : CASE.bases].double() / attention.Z_SCALES[HALF]
    torch.testing.assert_close(z.sum(2), torch.ones_like(z[..., 0]), rtol=0, atol=4e-3)
    assert stages.z[..., CASE.bases :].count_nonzero() == 0


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.usefixtures("ordered_products")
def test_the_order_of_the_programs_changes_no_bit(ranges):
    found = []
    for left in (1, 2):
        stages = stages_of(CASE, ranges)
        for workspace in (stages.partial, stages.colsum):
            workspace.fill_(float("nan"))  # every program must write its own
        old = attention.Bases(CASE.initial_bases(HALF).mT.contiguous())
        found.append(torch.empty_like(old.rows))
        stages.stage(old, found[-1], left=left)
        assert stages.partial.isfinite().all()
        assert stages.colsum.isfinite().all()
    assert torch.equal(*found)


@pytest.mark.parametrize("positions", [1, BLOCK_N, BLOCK_N + 1, 9409, 32768, 131072])
@pytest.mark.parametrize("ranges", [1, 16, 128])
def test_ranges_are_full_tiles_and_at_most_so_many(positions, ranges):
    length = tiles.range_length(positions, ranges, BLOCK_N)
    assert length % BLOCK_N == 0
    assert length * ranges >= positions
    assert (length - BLOCK_N) * ranges < positions  # no shorter range would do


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("position", [0, 332])
@pytest.mark.parametrize("backend", ONE_PASS)
def test_nan_stays_in_its_image(backend, position):
    x, mu, _ = inputs(CASE)
    clean = em_attention(x, mu, backend=backend)
    x[1, position, 7] = float("nan")
    found = em_attention(x, mu, backend=backend)
    for got, want in zip(found, clean, strict=True):
        assert got[1].isnan().all()
        assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("backend", ONE_PASS)
def test_a_base_that_no_position_takes_becomes_zero(backend):
    x = CASE.feats(HALF).abs() + 1
    mu = torch.full_like(CASE.initial_bases(HALF), 10)
    mu[..., 2] = -100
    _, bases = em_attention(x, mu, 1, backend=backend)
    assert bases[..., 2].count_nonzero() == 0
    _, want = reference.em_attention(x.mT.double(), mu.double(), 1)
    eps = torch.finfo(HALF).eps
    torch.testing.assert_close(bases.double(), want, rtol=8 * eps, atol=eps)


def test_a_base_that_fades_keeps_its_direction_in_float16():
    # Its responsibilities, of 6e-9 at most, would all round to zero in float16.
    case = Case(1, ONE_PASS_CHANNELS, (9, 37), 7)
    x = case.feats(torch.float16).abs()
    x[..., 0] = 19 + x[..., 1]
    mu = torch.zeros_like(case.initial_bases(torch.float16))
    mu[0, 0, 0] = 1
    _, bases = em_attention(x, mu, 1, backend="one-pass-16")
    _, want = reference.em_attention(x.mT.double(), mu.double(), 1)
    torch.testing.assert_close(bases.double(), want, rtol=2e-3, atol=2e-3)


def one_base_each(positions: int) -> torch.Tensor:
    """Responsibilities [N, K], 0 or 1: of nine positions in a row two belong to no base."""
    base = torch.arange(positions, device=DEVICE)[:, None] % 9
    return (base == torch.arange(CASE.bases, device=DEVICE)).to(HALF)


def end_of_block(x: torch.Tensor, out_relu: bool = False) -> torch.Tensor:
    """The block's output for these responsibilities."""
    _, mu, (*_, weight, bias) = inputs(CASE)
    stages = block.BlockStages(x, CASE.bases, "ieee", 0.0, 16)
    stages.z.zero_()
    stages.z[..., : CASE.bases] = one_base_each(x.shape[1]) * stages.z_scale["Z_SCALE"]
    return stages.epilogue(mu[: len(x)].mT.contiguous(), weight, bias, out_relu)


@pytest.mark.parametrize("out_relu", [False, True])
def test_the_end_of_the_block(out_relu):
    x, mu, (*_, weight, bias) = inputs(CASE)
    x -= 1
    recon = one_base_each(x.shape[1]).double() @ mu.mT.double()
    out = recon.relu() @ weight.mT.double() + bias.double()
    want = ((out.relu() if out_relu else out) + x.double()).relu()
    torch.testing.assert_close(end_of_block(x, out_relu).double(), want, rtol=8e-3, atol=8e-3)


def test_images_that_alternate_in_memory():
    x, *_ = inputs(CASE)
    alternating = x.transpose(0, 1).contiguous().transpose(0, 1)
    found = end_of_block(alternating)
    assert found.stride() == alternating.stride()
    assert torch.equal(found, end_of_block(x))


@pytest.mark.parametrize(("images", "positions"), [(1, 5), (2, 1), (1, 1)])
def test_an_axis_of_length_1_has_any_stride(images, positions):
    x = inputs(CASE)[0][:images, :positions].contiguous()
    sizes = zip(x.shape, x.stride(), strict=True)
    odd = x.as_strided(x.shape, [stride if size > 1 else 8 for size, stride in sizes])
    assert torch.equal(end_of_block(odd), end_of_block(x))


def test_features_between_others_in_memory():
    x, mu, _ = inputs(CASE)
    wide = torch.full((4, 333, 1024), float("nan"), dtype=HALF, device=DEVICE)
    inner = wide[1:3, :, 512:]
    inner.copy_(x)
    want = em_attention(x, mu, backend="one-pass-16")
    for got, same in zip(em_attention(inner, mu, backend="one-pass-16"), want, strict=True):
        assert torch.equal(got, same)


@pytest.mark.parametrize("backend", ONE_PASS)
@pytest.mark.parametrize(
    ("case", "dtype", "needs"),
    [
        (Case(1, 512, (3, 5), 7), torch.float32, "float16 or bfloat16 on an NVIDIA Hopper GPU"),
        (Case(1, 256, (3, 5), 7), HALF, "512 channels and at most 64 bases, got 256 and 7"),
        (Case(1, 512, (3, 5), 65), HALF, "512 channels and at most 64 bases, got 512 and 65"),
        (Case(1, 512, (3, 5), 7, "nchw"), HALF, "channels-last features"),
        (Case(1, 512, (3, 5), 7, "sliced"), HALF, "channels-last features"),
    ],
    ids=str,
)
def test_where_it_cannot_run(case, dtype, needs, backend):
    with pytest.raises(ValueError, match=f"backend '{backend}' needs {needs}"):
        em_attention(case.feats(dtype), case.initial_bases(dtype), backend=backend)


def test_other_gpus_have_no_tile(monkeypatch):
    x, mu, _ = inputs(CASE)
    for arch in ("sm_80", "sm_100", "gfx942"):
        monkeypatch.setattr(passes, "gluon_arch", lambda _, a=arch: a)
        with pytest.raises(ValueError, match=f"Hopper GPU, got {HALF} on {arch}"):
            em_attention(x, mu, backend="one-pass-16")


def test_positions_that_begin_between_two_addresses():
    wide = torch.zeros(1, 15, 516, dtype=HALF, device=DEVICE)
    mu = CASE.initial_bases(HALF)[:1]
    for x in (wide[..., :512], wide[..., 4:]):
        with pytest.raises(ValueError, match="positions begin at multiples of 16 bytes"):
            em_attention(x, mu, backend="one-pass-16")


def test_a_single_base_and_bases_between_two_addresses():
    for x, mu, _ in (inputs(Case(2, ONE_PASS_CHANNELS, (9, 37), 1)), inputs(CASE)):
        for bases in (mu, between_addresses(mu.mT).mT):
            found = em_attention(x, bases, 1, backend="one-pass-16")
            want = em_attention(x, bases, 1, backend="torch")
            for a, b in zip(found, want, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


def test_no_images():
    x, mu, weights = inputs(CASE)
    out, bases = em_attention_block(x[:0], mu[:1], *weights, backend="one-pass-16")
    assert out.shape == (0, 333, 512)
    assert bases.shape == (0, 512, 7)
