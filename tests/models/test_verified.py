"""When the fused network is used, and when the plain network."""

import sys
from dataclasses import replace

import pytest
import torch

from emanet_triton.kernels import device
from emanet_triton.models import trial, verified
from emanet_triton.models.emanet import Architecture, EMANet, FusedEMANet
from emanet_triton.models.fused import fuse
from emanet_triton.models.network import FusedNetwork
from emanet_triton.models.protocol import Protocol


def make_model():
    torch.manual_seed(0)
    architecture = Architecture((1, 1, 1, 1), 8, ema_channels=16, num_bases=4, head_channels=8)
    return EMANet(architecture, Protocol((64, 32))).eval()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(device, "gpu_arch", lambda device: "sm_90")


def form(fused):
    """Whether a fused network may take the kernels in Gluon."""
    (backend,) = {module.backend for module in fused.modules() if hasattr(module, "backend")}
    return {"fastest-known": "fastest", "auto": "fused"}[backend]


@pytest.fixture
def on_gpu(model, monkeypatch):
    """The model, and the problems that its trials and comparisons find, by network."""
    monkeypatch.setattr(verified, "device_of", lambda model: torch.device("cuda", 0))
    problems = {"trial": {}, "comparison": {}}
    order = []

    def problem_of(asked):
        order.append(f"trial of {asked.network}")
        return problems["trial"].get(asked.network)

    def disagreement(network, model, dtype):
        name = form(network) if isinstance(network, FusedEMANet) else "plain"
        order.append(f"comparison of {name}")
        found = problems["comparison"].get(name)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(verified.trial, "problem_of", problem_of)
    monkeypatch.setattr(verified, "disagreement", disagreement)
    return model, problems, order


def test_on_a_gpu_the_fused_network_runs_where_trial_and_comparison_go_well(on_gpu):
    model, _, order = on_gpu
    assert isinstance(verified.verified_fuse(model), FusedEMANet)
    assert order == ["trial of fused", "comparison of fused"]


ABORTED = "its trial was ended by Aborted: illegal access"
FAILURES = {
    "trial": ("trial", ABORTED, ABORTED, ["trial of fused"]),
    "wrong": (
        "comparison",
        "relative error 0.5",
        "relative error 0.5",
        ["trial of fused", "comparison of fused"],
    ),
    "fails": (
        "comparison",
        ValueError("no\nregisters"),
        "ValueError: no",
        ["trial of fused", "comparison of fused"],
    ),
}


@pytest.mark.parametrize(("where", "problem", "reason", "seen"), FAILURES.values(), ids=FAILURES)
def test_on_a_gpu_the_plain_network_runs_elsewhere(on_gpu, where, problem, reason, seen):
    model, problems, order = on_gpu
    problems[where]["fused"] = problem
    with pytest.warns(UserWarning) as warned:
        assert verified.verified_fuse(model) is model
    assert [str(w.message) for w in warned] == [
        f"the fused network fails on cuda:0 ({reason}); the plain network runs instead"
    ]
    assert order == [*seen, "trial of plain", "comparison of plain"]


@pytest.mark.parametrize("where", ["trial", "comparison"])
def test_the_plain_network_does_without_an_em_attention_that_does_not_work(on_gpu, where):
    model, problems, _ = on_gpu
    problems["trial"]["fused"], problems[where]["plain"] = ABORTED, "relative error 0.5"
    with pytest.warns(UserWarning) as warned:
        plain = verified.verified_fuse(model)
    assert [str(w.message) for w in warned] == [
        f"the fused network fails on cuda:0 ({ABORTED}); the plain network runs instead, with "
        "PyTorch's EM attention, because the model's own fails too (relative error 0.5)"
    ]
    assert plain.decode_head.ema_module.backend == "torch"
    assert model.decode_head.ema_module.backend == "auto"


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_hopper_gpu_kernels_in_gluon_run_where_they_work(on_gpu, dtype):
    model, _, order = on_gpu
    assert form(verified.verified_fuse(model, dtype)) == "fastest"
    assert order == ["trial of fastest", "comparison of fastest"]


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("where", ["trial", "comparison"])
def test_the_fused_network_does_without_kernels_in_gluon_if_they_fail(on_gpu, where):
    model, problems, order = on_gpu
    problems[where]["fastest"] = "its trial has not ended after 600 seconds"
    with pytest.warns(UserWarning) as warned:
        assert form(verified.verified_fuse(model, torch.bfloat16)) == "fused"
    assert [str(w.message) for w in warned] == [
        "the fused network with kernels in Gluon fails on cuda:0 (its trial has not ended after "
        "600 seconds); it is tried without them"
    ]
    assert order[-2:] == ["trial of fused", "comparison of fused"]


@pytest.mark.usefixtures("on_hopper")
def test_the_plain_network_runs_where_every_form_fails(on_gpu):
    model, problems, order = on_gpu
    problems["trial"] |= {"fastest": "first", "fused": "second"}
    with pytest.warns(UserWarning) as warned:
        assert verified.verified_fuse(model, torch.bfloat16) is model
    assert [str(w.message).partition(" fails")[0] for w in warned] == [
        "the fused network with kernels in Gluon",
        "the fused network",
    ]
    assert order[0:3] == ["trial of fastest", "trial of fused", "trial of plain"]


@pytest.mark.usefixtures("on_hopper")
def test_float32_has_no_kernels_in_gluon(on_gpu):
    model, _, order = on_gpu
    assert form(verified.verified_fuse(model)) == "fused"
    assert order == ["trial of fused", "comparison of fused"]


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("why", ["nothing-is-measured", "no-such-kernels"])
def test_nothing_is_tried_that_cannot_run(on_gpu, monkeypatch, why):
    model, _, order = on_gpu
    if why == "nothing-is-measured":
        monkeypatch.setenv("EMANET_TRITON_CONV_SEARCH", "0")
    else:
        monkeypatch.setattr(FusedEMANet, "choose_by", FusedNetwork.choose_by)
    assert form(verified.verified_fuse(model, torch.bfloat16)) == "fused"
    assert order == ["trial of fused", "comparison of fused"]


@pytest.mark.parametrize("backend", ["fastest", "fastest-known", "auto"])
def test_a_backend_that_somebody_asked_for_stays(model, backend):
    model.decode_head.ema_module.backend = "triton"
    fused = fuse(model)
    fused.backbone[0].backend = "cudnn"
    assert fused.choose_by(backend)
    backends = [m.backend for m in fused.modules() if hasattr(m, "backend")]
    assert (fused.backbone[0].backend, fused.decode_head.backend) == ("cudnn", "triton")
    assert set(backends) == {"cudnn", "triton", backend}


def test_a_network_whose_backends_are_all_asked_for_has_nothing_to_choose(model):
    fused = fuse(model)
    for module in fused.modules():
        if hasattr(module, "backend"):
            module.backend = "triton"
    assert not fused.choose_by("fastest")


def test_a_copy_with_pytorchs_em_attention_shares_the_weights(model):
    copied = verified.with_torch_attention(model)
    state = model.state_dict(keep_vars=True)
    for name, tensor in copied.state_dict(keep_vars=True).items():
        assert tensor is state[name]
    images = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        assert torch.equal(copied(images), model(images))


def test_from_a_child_that_dies_to_the_plain_network(model, monkeypatch):
    """The whole way; the child that tries the plain network lives, and tries it on the CPU."""
    monkeypatch.setattr(verified, "device_of", lambda model: torch.device("cuda", 0))
    run = trial.run
    codes = iter(["import os; os.abort()", "from emanet_triton.models.trial import main; main()"])

    def on_cpu(asked):
        return run(replace(asked, device="cpu"), [sys.executable, "-c", next(codes)])

    monkeypatch.setattr(trial, "run", on_cpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(verified, "disagreement", lambda *_: None)
    trial._cache.cache_clear()
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match=r"fails on cuda:0 \(its trial was ended by"):
            assert verified.verified_fuse(model) is model
        trial._cache.cache_clear()


def test_on_the_cpu_nothing_is_tried(model, monkeypatch):
    monkeypatch.setattr(verified, "_problem", None)
    assert isinstance(verified.verified_fuse(model), FusedEMANet)
