"""EM attention and its block in PyTorch against the specification in float64."""

import pytest
import torch
from torch.nn import functional as F

from emanet_triton.kernels.device import cpu_capability
from emanet_triton.kernels.em import eager as em_torch
from emanet_triton.kernels.em import reference

SHAPES = {  # B, C, K, N
    "one_position": (1, 3, 1, 1),
    "63": (2, 48, 7, 63),
    "129": (5, 3, 7, 129),
    "333": (1, 48, 64, 333),
    "1000": (2, 512, 64, 1000),
}
LAYOUTS = {  # of [B, N, C]
    "nchw": lambda f: f.mT.contiguous().mT,
    "channels_last": lambda f: f,
    "every_other_channel": lambda f: f.repeat_interleave(2, 2)[..., ::2],
    "inside_a_larger_map": lambda f: F.pad(f, (3, 2, 1, 4))[:, 1:-4, 3:-2],
    "one_image_for_all": lambda f: f[:1].expand_as(f),
}


def inputs(batch, channels, bases, positions, scale=1.0, seed=0):
    """feats [B, N, C], bases and the weights of a block, float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return (
        scale * normal(batch, positions, channels),
        F.normalize(normal(1, channels, bases), dim=1),
        *(normal(channels, channels) / channels**0.5, normal(channels)),
        *(normal(channels, channels) / channels**0.5, normal(channels)),
    )


def specification(feats, *rest):
    """The block in the dtype of ``feats``, [B, N, C]."""
    out, bases = reference.em_attention_block(feats.mT, *rest)
    return out.mT, bases


def attention(feats, bases, *_):
    return em_torch.run_attention(feats, bases)


def attention_specification(feats, bases, *rest):
    options = rest[-2:] if rest and not isinstance(rest[-1], torch.Tensor) else ()
    recon, new_bases = reference.em_attention(feats.mT, bases, *options)
    return recon.mT, new_bases


SPECIFIED = {attention: attention_specification, em_torch.run_block: specification}
BOTH = pytest.mark.parametrize("operator", SPECIFIED, ids=["attention", "block"])


def cast(tensors, dtype):
    return [t.to(dtype) for t in tensors]


def assert_three_way(got, plain, want, atol):
    """The error is at most twice plain PyTorch's error in the same dtype, plus ``atol``."""
    for g, p, w in zip(got, plain, want, strict=True):
        error, plain_error = ((t.double() - w).abs().max().item() for t in (g, p))
        assert error <= 2 * plain_error + atol * w.abs().max().item()


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_exact_algebra(shape, layout, operator):
    feats, *rest = cast(inputs(*shape), torch.float64)
    feats = LAYOUTS[layout](feats)
    before = feats.clone()
    got = operator(feats, *rest)
    torch.testing.assert_close(got, SPECIFIED[operator](feats, *rest), rtol=1e-11, atol=1e-11)
    assert got[0].stride() == torch.empty_like(feats).stride()
    assert torch.equal(feats, before)


@pytest.mark.usefixtures("products")
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1, 30], ids=["ordinary", "logits_of_hundreds"])
def test_as_accurate_as_plain_pytorch(dtype, scale, operator):
    rounded = cast(inputs(1, 512, 64, 333, scale), dtype)
    got = operator(*rounded)
    assert [t.dtype for t in got] == [dtype, dtype]
    want = SPECIFIED[operator](*cast(rounded, torch.float64))
    assert_three_way(got, SPECIFIED[operator](*rounded), want, atol=2e-6)


@pytest.mark.parametrize("channels", [256, 512])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_errors_of_one_step_with_mkl_and_onednn(layout, channels, products):
    """With all channels at once oneDNN's error would be 1.5 to 1.8 times plain PyTorch's.

    Without AVX512 oneDNN's error is larger, too, but there it never computes the EM steps.
    """
    if products == "onednn" and not cpu_capability().startswith(("avx512", "amx")):
        pytest.skip("without AVX512 oneDNN does not compute the EM steps")
    feats, bases, *_ = inputs(1, channels, 64, 2048)
    got = em_torch.run_attention(LAYOUTS[layout](feats), bases, 1)
    plain = attention_specification(feats, bases, 1)
    want = attention_specification(feats.double(), bases.double(), 1)
    for g, p, w in zip(got, plain, want, strict=True):
        error, plain_error = ((t - w).square().mean().sqrt() for t in (g, p))
        assert error <= 1.4 * plain_error


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_errors_of_few_positions_with_mkl_and_onednn(layout):
    """With all 256 channels at once oneDNN would exceed the bound for every third seed."""
    for seed in range(12):
        feats, bases, *_ = inputs(1, 256, 64, 128, seed=seed)
        got = em_torch.run_attention(LAYOUTS[layout](feats), bases)
        plain = attention_specification(feats, bases)
        want = attention_specification(feats.double(), bases.double())
        assert_three_way(got, plain, want, atol=2e-6)


def test_the_largest_logits_exceed_400():
    arguments = inputs(1, 512, 64, 333, 100)
    feats, bases, mid_weight, mid_bias, *_ = arguments
    assert ((feats @ mid_weight.T + mid_bias) @ bases).max() > 400
    want = specification(*cast(arguments, torch.float64))
    got = em_torch.run_block(*arguments)
    assert_three_way(got, specification(*arguments), want, atol=2e-6)


VARIANTS = {"tiny shift": (1e-6, False), "shift": (0.5, False), "relu": (0.0, True)}


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_variants(layout, dtype, variant):
    """Both ways to add the residual, also of negative features."""
    feats, *rest = cast(inputs(2, 80, 7, 129), dtype)
    exact = cast([feats, *rest], torch.float64)
    feats = LAYOUTS[layout](feats)
    norm_shift, _ = variant
    for got, plain, want in (
        (
            em_torch.run_block(feats, *rest, 2, *variant),
            specification(feats, *rest, 2, *variant),
            specification(*exact, 2, *variant),
        ),
        (
            em_torch.run_attention(feats, rest[0], 2, norm_shift),
            attention_specification(feats, rest[0], 2, norm_shift),
            attention_specification(*exact[:2], 2, norm_shift),
        ),
    ):
        if dtype == torch.float64:
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        else:
            assert_three_way(got, plain, want, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize(("norm_shift", "bias"), [(1e-6, 18), (1e-3, 12)])
def test_a_fading_base_with_a_shift(norm_shift, bias):
    """A base whose responsibilities are below the shift becomes short, but keeps its direction."""
    feats, bases, *weights = inputs(2, 8, 3, 30)
    direction = F.normalize(weights[1], dim=0)
    weights[1] = bias * direction
    bases = torch.stack([direction, -direction, -direction], dim=1)[None]
    arguments = (feats, bases, *weights)
    got = em_torch.run_block(*arguments, 1, norm_shift)
    want = specification(*cast(arguments, torch.float64), 1, norm_shift)
    lengths = want[1][:, :, 1:].norm(dim=1)
    assert 0 < lengths.max() < 0.9  # 1 without a shift
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-6)


def test_dead_bases_become_zero():
    feats, bases, *weights = inputs(2, 8, 3, 30)
    direction = F.normalize(weights[1], dim=0)
    weights[1] = 300 * direction  # and so X lies far along the first base, against the others
    bases = torch.stack([direction, -direction, -direction], dim=1)[None]
    arguments = (feats, bases, *weights)
    got = em_torch.run_block(*arguments, 1)
    want = specification(*cast(arguments, torch.float64), 1)
    assert want[1][:, :, 1:].abs().max() < 1e-100  # dead in the specification
    assert want[1][:, :, 0].any()
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-5)


def test_constant_input():
    feats, *rest = inputs(1, 48, 7, 99)
    feats = torch.full_like(feats, 0.25)
    got = em_torch.run_block(feats, *rest)
    want = specification(feats.double(), *cast(rest, torch.float64))
    assert_three_way(got, specification(feats, *rest), want, atol=2e-6)
    torch.testing.assert_close(got[0], got[0][:, :1].expand_as(got[0]))


@BOTH
def test_an_image_does_not_see_the_others(operator):
    feats, *rest = inputs(3, 48, 7, 99)
    alone = operator(feats[2:], *rest)
    feats[0, 40, 3] = torch.nan
    out, bases = operator(feats, *rest)
    assert out[0].isnan().any()
    assert out[1:].isfinite().all()
    assert bases[1:].isfinite().all()
    assert torch.equal(out[2:], alone[0])
    assert torch.equal(bases[2:], alone[1])


@BOTH
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("sizes", [(7, 33, 8), (225, 50, 4), (1225, 65, 2)], ids=str)
def test_no_bit_depends_on_the_place_in_the_batch(sizes, layout, operator):
    """The images begin at any multiple of 4 bytes, where MKL rounds differently."""
    positions, channels, num_bases = sizes
    feats, *rest = inputs(3, channels, num_bases, positions)
    feats = LAYOUTS[layout](feats)
    together = operator(feats, *rest)
    for image in range(3):
        own = torch.empty_like(feats[:1]).copy_(feats[image : image + 1])
        for alone, all_images in zip(operator(own, *rest), together, strict=True):
            assert torch.equal(alone[0], all_images[image])


@BOTH
def test_bases_of_each_image(operator):
    feats, bases, *rest = inputs(2, 48, 7, 99)
    both = torch.cat([bases, bases.roll(1, 1)])
    got = operator(feats, both, *rest)
    want = operator(feats[1:], both[1:], *rest)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g[1:], w)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_pieces(monkeypatch, dtype, operator):
    arguments = cast(inputs(2, 48, 7, 99), dtype)
    whole = operator(*arguments)
    monkeypatch.setattr(em_torch, "POSITIONS", 40)
    monkeypatch.setattr(em_torch, "WIDE", 70)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(operator(*arguments), whole, rtol=tolerance, atol=tolerance)


@BOTH
def test_autocast_changes_nothing(operator):
    arguments = inputs(1, 48, 7, 99)
    want = operator(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        got = operator(*arguments)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0)


@BOTH
def test_no_gradient_flows(operator):
    arguments = [t.requires_grad_() for t in inputs(1, 8, 3, 6)]
    assert not any(t.requires_grad for t in operator(*arguments))


@pytest.mark.usefixtures("products")
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_depends_on_the_number_of_threads(three_threads, dtype, operator):
    arguments = cast(inputs(1, 512, 64, 1300), dtype)
    shared = operator(*arguments)
    torch.set_num_threads(1)
    alone = operator(*arguments)
    assert torch.equal(shared[0], alone[0])
    assert torch.equal(shared[1], alone[1])


@BOTH
def test_every_operation_of_a_share_uses_one_thread(three_threads, monkeypatch, operator):
    seen, softmax = [], torch.softmax

    def watched(*args, **options):
        seen.append(torch.get_num_threads())
        return softmax(*args, **options)

    monkeypatch.setattr(torch, "softmax", watched)
    operator(*inputs(1, 48, 7, 1300))
    assert seen == [1] * 6  # two shares a step


@pytest.mark.parametrize(
    ("bases", "wanted"),
    [
        (64, {16: 1, 2048: 2, 8192: 4, 9409: 4, 12000: 8, 32768: 16, 262144: 64}),
        (256, {2048: 1, 8192: 4, 32768: 16, 262144: 64}),
    ],
    ids=["64", "256"],
)
def test_positions_are_cut_into_few_shares(bases, wanted):
    sums = {}
    for positions in wanted:
        steps = em_torch._Steps(torch.empty(positions, 4), torch.empty(4, bases))
        sums[positions] = len(steps._shares)
    assert sums == wanted


def test_elsewhere_the_calling_thread_takes_all_positions_at_once():
    steps = em_torch._Steps(*(torch.empty(shape, device="meta") for shape in [(9000, 4), (4, 64)]))
    assert steps._shares == [slice(0, 9000)]
    assert steps._pieces(slice(0, 9000)) == [slice(0, 4512), slice(4512, 9000)]
