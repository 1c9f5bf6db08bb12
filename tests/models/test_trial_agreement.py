"""The reference with which networks are compared, and the bound that they must meet."""

import contextlib
import copy
from types import SimpleNamespace

import golden_data
import pytest
import torch

from emanet_triton.kernels.em import eager as em_torch
from emanet_triton.kernels.em import op as ops
from emanet_triton.models import trial
from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.fused import fuse
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.trial import disagreement, plain_logits

SINGLE, BF16 = torch.float32, torch.bfloat16
by_dtype = pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=["fp32", "bf16"])


@pytest.fixture
def model():
    torch.manual_seed(0)
    architecture = Architecture((1, 1, 1, 1), 8, ema_channels=16, num_bases=4, head_channels=8)
    return EMANet(architecture, Protocol((64, 32))).eval()


@pytest.mark.parametrize("name", golden_data.NAMES[:1])
def test_the_reference_is_mmsegmentations_network(name):
    golden, model = golden_data.vectors(name), golden_data.golden_model(name)
    with torch.inference_mode():
        got = model.reference_logits(golden_data.normalised(golden["image"]))
    assert golden_data.relative_error(got, golden["logits"]) < 1e-4


@torch.inference_mode()
def test_the_reference_is_in_the_dtype_of_the_weights(model):
    images = torch.randn(1, 3, 32, 64)
    wide = copy.deepcopy(model).double().reference_logits(images.double())
    assert wide.dtype == torch.float64
    assert 0 < golden_data.relative_error(model(images), wide) < 1e-5


@by_dtype
def test_agreement(model, dtype):
    assert disagreement(fuse(model, dtype=dtype), model, dtype) is None
    assert disagreement(lambda images: plain_logits(model, dtype, images), model, dtype) is None


def test_default_device_and_dtype_change_no_comparison(model):
    fused = fuse(model)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert disagreement(fused, model, SINGLE) is None
            assert disagreement(model, model, SINGLE) is None
    finally:
        torch.set_default_dtype(SINGLE)


@by_dtype
@pytest.mark.parametrize("wrong", [1.1, float("nan")], ids=["a-tenth", "nan"])
def test_disagreement(model, dtype, wrong):
    fused = fuse(model, dtype=dtype)
    fused.decode_head.conv_seg.weight *= wrong
    assert "relative error" in disagreement(fused, model, dtype)


def test_a_network_whose_third_call_is_wrong_is_found_out(model):
    """Only then the operators play tapes."""
    fused, calls = fuse(model), []

    def network(images):
        calls.append(images)
        return fused(images) * (1.1 if len(calls) > 2 else 1.0)

    assert "relative error" in disagreement(network, model, SINGLE)


@by_dtype
@pytest.mark.parametrize("network", ["fused", "plain"])
def test_a_wrong_em_attention_of_triton_is_found_out(model, dtype, network, monkeypatch):
    """Also if the model itself runs the wrong EM attention: the reference does not run it."""

    @contextlib.contextmanager
    def wrong_kernels(stem, tensor):
        def attention(feats, bases, *arguments):
            recon, bases = em_torch.run_attention(feats, bases, *arguments[:-2])
            return 2 * recon, bases

        def block(feats, bases, *arguments):
            out, bases = em_torch.run_block(feats, bases, *arguments[:-2])
            return 1.1 * out, bases

        yield SimpleNamespace(run_attention=attention, run_block=block)

    monkeypatch.setattr(ops, "triton_kernels", wrong_kernels)
    model.decode_head.ema_module.backend = "triton"
    networks = {
        "fused": fuse(model, dtype=dtype),
        "plain": lambda images: plain_logits(model, dtype, images),
    }
    assert "relative error" in disagreement(networks[network], model, dtype)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")
NO_ENGINE = RuntimeError("GET was unable to find an engine to execute this computation")


def failing_in_float64(monkeypatch, error):
    compute, dtypes = EMANet.reference_logits, []

    def logits(model, images):
        dtypes.append(images.dtype)
        if images.dtype == torch.float64:
            raise error
        return compute(model, images)

    monkeypatch.setattr(EMANet, "reference_logits", logits)
    return dtypes


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, NO_ENGINE], ids=["memory", "engine"])
def test_the_reference_is_in_float32_where_float64_does_not_run(model, monkeypatch, error):
    fused = fuse(model)
    dtypes = failing_in_float64(monkeypatch, error)
    assert disagreement(fused, model, SINGLE) is None
    assert dtypes == [torch.float64, SINGLE]
    fused.decode_head.conv_seg.weight *= 1.1
    assert "relative error" in disagreement(fused, model, SINGLE)


def failing_above(height, error, compute):
    """A network, or a method of one, that fails for noise of more rows; and its sizes."""
    sizes = []

    def network(*arguments):
        sizes.append(tuple(arguments[-1].shape[2:]))
        if sizes[-1][0] > height:
            raise error
        return compute(*arguments)

    return network, sizes


@pytest.mark.parametrize("who", ["reference", "network"])
def test_without_memory_smaller_noise_decides(model, monkeypatch, who):
    monkeypatch.setattr(trial, "_LEAST_SIDE", 8)
    fused = fuse(model)
    network, sizes = failing_above(8, OUT_OF_MEMORY, fused)
    if who == "reference":
        network = fused
        logits, sizes = failing_above(8, OUT_OF_MEMORY, EMANet.reference_logits)
        monkeypatch.setattr(EMANet, "reference_logits", logits)
    assert disagreement(network, model, SINGLE) is None
    assert list(dict.fromkeys(sizes)) == [(32, 64), (16, 32), (8, 16)]
    fused.decode_head.conv_seg.weight *= 1.1
    assert "relative error" in disagreement(network, model, SINGLE)


def test_there_is_an_end_to_smaller_noise(model, monkeypatch):
    monkeypatch.setattr(trial, "_LEAST_SIDE", 16)
    network, sizes = failing_above(0, OUT_OF_MEMORY, None)
    with pytest.raises(torch.OutOfMemoryError):
        disagreement(network, model, SINGLE)
    assert sizes == [(32, 64), (16, 32)]


def test_other_errors_of_the_reference_are_errors(model, monkeypatch):
    failing_in_float64(monkeypatch, RuntimeError("illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        disagreement(fuse(model), model, SINGLE)


def test_a_network_that_repeats_its_first_result_disagrees(model):
    results = []

    def stale(images):
        results.append(model(images))
        return results[0]

    assert disagreement(stale, model, SINGLE).startswith("relative error ")
    assert len(results) == 3
