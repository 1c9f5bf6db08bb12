"""EM attention on a CPU stores no subnormal number, and what it sets to zero moves no result."""

import pytest
import torch
from subnormal import SubnormalResults, count_subnormal
from test_em_eager import BOTH, SPECIFIED, cast, inputs
from torch.utils._python_dispatch import TorchDispatchMode

from emanet_triton.kernels.device import has_onednn
from emanet_triton.kernels.em import eager as em_torch
from emanet_triton.kernels.em import reference
from emanet_triton.kernels.softmax import softmax_without_subnormals

TINY = torch.finfo(torch.float32).tiny
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
LAYOUTS = {"rows": lambda f: f, "columns": lambda f: f.mT.contiguous().mT}
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@BOTH
@DTYPES
@LAYOUT
def test_no_result_is_subnormal_however_far_logits_spread(one_thread, layout, dtype, operator):
    feats, bases, *weights = cast(inputs(1, 64, 16, 1300, 100), dtype)
    z = torch.softmax(feats.float() @ bases.float(), 2)
    assert count_subnormal(z) > 10  # what a plain softmax would store
    with SubnormalResults() as results:
        operator(layout(feats), bases, *weights)
    assert results.seen > 100
    assert results.found == []


def fading(logit):
    """Features and bases; the second base has responsibilities of about exp(-logit)."""
    feats, bases = inputs(1, 8, 3, 333)[:2]
    feats[..., 0] = logit + 0.1 * feats[..., 1]
    bases = torch.zeros_like(bases)
    bases[0, 0, 0] = 1
    return feats, bases


@LAYOUT
def test_a_base_of_tiny_responsibilities_is_exact(layout):
    """All its responsibilities are 1e-35 to 1e-33, and the base is still half as long as others."""
    feats, bases = fading(77.0)
    feats[..., 1] *= 1e7
    want = reference.em_attention(feats.mT.double(), bases.double(), 1)
    assert 1e-3 < want[1][0, :, 1].norm() < 1
    recon, got = em_torch.run_attention(layout(feats), bases, 1)
    torch.testing.assert_close(got.double(), want[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(recon.mT.double(), want[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("logit", [80.0, 83.0, 86.0, 90.0, 300.0])
def test_what_becomes_zero_moves_a_base_within_the_stated_bound(logit):
    feats, bases = fading(logit)
    _, got = em_torch.run_attention(feats, bases, 1)
    _, want = reference.em_attention(feats.mT.double(), bases.double(), 1)
    longest = feats.norm(dim=2).max()
    bound = 4 * 333 * 3 * TINY / em_torch.EPS**2 * longest
    assert bound < 1e-7
    error = (got - want)[0, :, 1:].abs().max()  # bases that nearly vanish
    assert error <= bound + 1e-4 * want[0, :, 1:].abs().max()
    assert (got[0, :, 1:] == 0).all() == (logit > 85)


def test_sums_of_the_smallest_responsibilities_are_normal(one_thread):
    feats, bases = fading(84.0)
    feats, initial = 1e-2 * feats[:, :3], 100 * bases
    z = torch.softmax(feats @ initial, 2)
    assert TINY < z[..., 1].max() < 1e3 * TINY
    assert count_subnormal(z.mT @ feats) > 4
    with SubnormalResults() as results:
        em_torch.run_attention(feats, initial, 1)
    assert results.found == []


def test_the_reconstruction_leaves_out_what_cannot_move_it():
    feats, bases = fading(30.0)
    steps = em_torch._Steps(feats[0], bases[0])
    steps.run(1)
    assert (steps._stored(slice(0, 333)) > 0).all()
    z = steps._responsibilities(slice(0, 333))
    assert (z[:, 0] > 0).all()
    assert not z[:, 1:].any()


@pytest.mark.parametrize("faint", [60.0, 85.5])
@BOTH
def test_no_base_is_subnormal(one_thread, operator, faint):
    """A channel that is zero but at one position, which hardly belongs to the base."""
    feats, eye, none = torch.tensor([50.0, 0.0]).repeat(1, 1001, 1), torch.eye(2), torch.zeros(2)
    feats[0, -1] = torch.tensor([0.0, faint])
    arguments = feats, eye[None], eye, none, eye, none
    with SubnormalResults() as results:
        got = operator(*arguments)
    before_norms = {"aten.div.Tensor", "aten.matmul.default", "aten.add.Tensor"}  # K C numbers
    assert set(results.found) <= before_norms
    assert count_subnormal(got[0]) == count_subnormal(got[1]) == 0
    for g, w in zip(got, SPECIFIED[operator](*cast(arguments, torch.float64)), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-15)


@BOTH
@DTYPES
@LAYOUT
@pytest.mark.parametrize(
    "shape", [(1, 3, 2, 1), (1, 1, 3, 50), (2, 80, 1, 50), (1, 1, 1, 1)], ids=str
)
def test_sizes_of_one(shape, layout, dtype, operator):
    rounded = cast(inputs(*shape), dtype)
    got = operator(layout(rounded[0]), *rounded[1:])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for g, w in zip(got, SPECIFIED[operator](*cast(rounded, torch.float64)), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance)


def test_the_host_reads_no_number_of_another_device():
    """On "meta" there is none; a GPU would be waited for, and no CUDA graph could be recorded."""
    feats, bases = (torch.empty(shape, device="meta") for shape in [(9000, 4), (4, 3)])
    steps = em_torch._Steps(feats, bases)
    steps.run(2)
    steps.reconstruct(torch.empty_like(feats))
    assert steps.bases.shape == (3, 4)


@pytest.mark.parametrize("count", [1, 19, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softmax_is_exact_or_zero(count, dtype):
    tiny = torch.finfo(dtype).tiny
    logits = torch.linspace(0, -800, 3001, dtype=dtype)[:, None].repeat(1, count)
    logits[:, 0] = 0
    got = torch.empty_like(logits)
    softmax_without_subnormals(logits, 1, got)
    want = torch.softmax(logits, 1)
    assert count_subnormal(got) == 0
    assert torch.equal(got[got > 0], want[got > 0])
    assert (want[got == 0] < 2.01 * count * tiny).all()
    copy = logits.T.clone()
    softmax_without_subnormals(copy, 0, copy)
    assert torch.equal(copy == 0, got.T == 0)
    assert torch.equal(copy[copy > 0], torch.softmax(logits.T, 0)[copy > 0])


def test_softmax_keeps_nan_in_its_row():
    logits = torch.zeros(3, 4)
    logits[1, 2] = torch.nan
    softmax_without_subnormals(logits, 1, logits)
    assert logits[1].isnan().all()
    assert (logits[::2] == 0.25).all()


class Products(TorchDispatchMode):
    """Notes the dtypes of matrix products, and whether oneDNN's operator for linear layers ran."""

    def __init__(self):
        super().__init__()
        self.dtypes, self.onednn = set(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith(("aten.mm", "aten.addmm")):
            self.dtypes.add(args[0].dtype)
        self.onednn |= name.startswith("mkldnn._linear")
        return func(*args, **(kwargs or {}))


@LAYOUT
@DTYPES
@pytest.mark.parametrize("onednn", [True, False])
@BOTH
def test_as_accurate_with_and_without_onednn(
    one_thread, monkeypatch, operator, onednn, dtype, layout
):
    if not onednn:
        for question in ("has_onednn", "onednn_beats_mkl"):
            monkeypatch.setattr(em_torch, question, lambda _: False)
    elif not has_onednn(dtype):
        pytest.skip("oneDNN does not multiply this dtype here")
    rounded = cast(inputs(1, 128, 64, 700, 3), dtype)
    with Products() as products:
        got = operator(layout(rounded[0]), *rounded[1:])
    want = SPECIFIED[operator](*cast(rounded, torch.float64))
    plain = SPECIFIED[operator](*rounded)
    for g, p, w in zip(got, plain, want, strict=True):
        error, allowed = ((t.double() - w).abs().max() for t in (g, p))
        assert error <= 2 * allowed + 2e-6 * w.abs().max()
    is_block = operator is em_torch.run_block
    assert (torch.bfloat16 in products.dtypes) == (onednn and is_block and dtype != torch.float32)
    by_rows = layout is LAYOUTS["rows"]
    assert products.onednn == (onednn and (dtype == torch.bfloat16 or (is_block and by_rows)))


@LAYOUT
def test_nan_fills_its_image_in_bfloat16(layout):
    feats, *rest = cast(inputs(2, 64, 7, 99), torch.bfloat16)
    feats[0, 40, 3] = torch.nan
    out, bases = em_torch.run_block(layout(feats), *rest)
    assert out[0].isnan().all()
    assert bases[0].isnan().all()
    assert out[1].isfinite().all()
