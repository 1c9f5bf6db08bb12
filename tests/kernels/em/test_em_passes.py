"""The choice between one pass and two: what is measured, and what a result is compared with."""

import pytest
import torch
from em_cases import Case, channels_first

from emanet_triton.kernels import choice
from emanet_triton.kernels.checks import OPEN_BACKENDS, fits_descriptor
from emanet_triton.kernels.em import op, passes, reference, tiles

CASE = Case(2, 512, (2, 5), 7, own_bases=True)
HALF = torch.bfloat16


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.fixture
def chosen(monkeypatch):
    """Arguments of every ``choose``; the last candidate wins."""
    calls = []

    def choose(key, device, candidates, last_resort, make_checks, package):
        calls.append((key, list(candidates), last_resort, make_checks, package))
        return list(candidates)[-1]

    monkeypatch.setattr(choice, "choose", choose)
    monkeypatch.setattr(passes, "gluon_arch", lambda x: "sm_90" if x.is_cuda else "cpu")
    return calls


def inputs(case=CASE, dtype=HALF):
    """Features on a pretended GPU, bases, and the weights of the block, on the CPU."""
    x = case.feats(dtype).cpu().relu().as_subclass(OnGpu)
    bases = case.initial_bases(dtype).cpu()
    return x, bases, tuple(w.cpu() for w in case.weights(dtype))


def run(backend, x, bases, weights=(), options=(3, 0.0)):
    """The ranges that run."""
    by_torch = op.eager.run_block if weights else op.eager.run_attention
    return passes.run(backend, x, (bases, *weights), options, lambda ranges: ranges, by_torch)


def test_the_fastest_is_the_winner(chosen):
    x, bases, _ = inputs()
    assert run("fastest", x, bases) == 16
    [(_, candidates, last_resort, _, package)] = chosen
    assert candidates == ["triton", "one-pass-128", "one-pass-16"]
    assert (last_resort, package) == ("triton", "em")


def test_an_earlier_winner_is_taken_if_there_is_one(chosen, monkeypatch):
    x, bases, weights = inputs()
    run("fastest", x, bases)
    key = chosen.pop()[0]
    known = {(key, x.device, "em"): "one-pass-128"}
    monkeypatch.setattr(choice, "known", lambda *asked: known.get(asked))
    assert run("fastest-known", x, bases) == 128
    assert run("fastest-known", x, bases, weights, (3, 0.0, False)) is None
    assert run("fastest-known", x.as_subclass(torch.Tensor), bases) is None
    known[key, x.device, "em"] = "damaged"
    assert run("fastest-known", x, bases) is None
    assert chosen == []


@pytest.mark.parametrize("backend", OPEN_BACKENDS)
def test_on_a_cpu_pytorch_runs_whoever_chooses(backend):
    x, bases, _ = inputs(dtype=torch.float32)
    x = x.as_subclass(torch.Tensor)
    found, wanted = (op.em_attention(x, bases, backend=name)[0] for name in (backend, "torch"))
    assert torch.equal(found, wanted)


def test_a_named_backend_is_not_measured(chosen):
    x, bases, _ = inputs()
    named = {"auto": None, "triton": None, "one-pass-128": 128, "one-pass-16": 16}
    assert {name: run(name, x, bases) for name in named} == named
    assert chosen == []


@pytest.mark.parametrize(
    "case", [Case(1, 256, (2, 5), 7), Case(1, 512, (2, 5), 65), Case(1, 512, (2, 5), 7, "first")]
)
def test_where_one_pass_cannot_run_nothing_is_measured(chosen, case):
    x, bases, _ = inputs(case)
    assert run("fastest", x, bases) is None
    assert chosen == []


def test_nothing_is_measured_on_a_cpu(chosen):
    x, bases, _ = inputs()
    assert run("fastest", x.as_subclass(torch.Tensor), bases) is None
    assert chosen == []


def test_the_batch_is_no_part_of_what_is_chosen_for(chosen):
    x, bases, weights = inputs()
    run("fastest", x, bases)
    run("fastest", x[:1], bases[:1])
    other = inputs(Case(2, 512, (2, 6), 7))
    run("fastest", other[0], other[1])
    run("fastest", x.half(), bases.half())
    run("fastest", x, bases[..., :6])
    run("fastest", x, bases, options=(2, 0.0))
    run("fastest", x, bases, weights, (3, 0.0, False))
    keys = [key for key, *_ in chosen]
    assert keys[0] == keys[1]
    assert len(set(keys)) == len(keys) - 1
    assert keys[-1] == (
        "EM attention block of [10, 512], 7 bases, torch.bfloat16, options [3, 0.0, False]"
    )


@pytest.mark.parametrize("dtype", [HALF, torch.float16], ids=str)
@pytest.mark.parametrize("is_block", [False, True])
def test_a_result_is_compared_with_the_operator_in_higher_precision(chosen, is_block, dtype):
    x, bases, weights = inputs(dtype=dtype)
    by_torch, exact = op.eager.run_attention, reference.em_attention
    options, weights = (2, 1e-6), weights if is_block else ()
    if is_block:
        by_torch, exact = op.eager.run_block, reference.em_attention_block
        options = (2, 1e-6, True)
    plain = x.as_subclass(torch.Tensor)
    doubles = (t.double() for t in (channels_first(plain), bases, *weights))
    out, new_bases = exact(*doubles, *options)
    found = out.mT.to(dtype), new_bases.to(dtype)
    passes.run("fastest", x, (bases, *weights), options, lambda _: found, by_torch)
    checks = chosen[0][3]()
    for check, output, want in zip(checks, found, (out.mT, new_bases), strict=True):
        rounding = (output.double() - want).abs().max().item()
        assert 0 < check.error(output) == pytest.approx(rounding, rel=0.05)
        assert check.error(output) < check.allowed() < 4 * rounding
        assert (check.out_shape, check.out_dtype) == (output.shape, dtype)
        for image in range(2):
            wrong = output.clone()
            wrong[image, -1, -1] += 1
            assert check.error(wrong) > 0.9
            wrong[image, 0, 0] = float("nan")
            assert not check.error(wrong) <= check.allowed()


def test_every_backend_by_name_has_ranges():
    assert list(passes.RANGES) == ["triton", *tiles.ONE_PASS]
    assert {*op.EM_BACKENDS} == {"torch", *OPEN_BACKENDS, *passes.RANGES}


def test_what_a_descriptor_takes():
    x = torch.zeros(2, 5, 512, dtype=HALF)
    assert fits_descriptor(x)
    assert fits_descriptor(x[:, ::2])
    assert fits_descriptor(x[..., 8:])
    for other in (x[..., 4:], x[..., ::2], x.mT, x[:1].expand(2, 5, 512), x.view(-1, 1)[:, :1]):
        assert not fits_descriptor(other)
