"""Networks with the features of other projects: every form of them computes the same."""

import copy

import pytest
import torch
from golden_data import relative_error
from small_networks import PADDLE, VARIANTS, logits, small_model

from emanet_triton import fuse
from emanet_triton.kernels.conv import winograd
from emanet_triton.models.network import input_form
from emanet_triton.models.resnet import average_pool
from emanet_triton.models.trial import Trial, attempt

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
STRIDES = {"stride 16": 16, "official": 8, "paddleseg": 8, "tiny mixture": 16, "stride 32": 32}
CHANNELS_LAST = pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])


@pytest.fixture(scope="module", params=VARIANTS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return small_model(VARIANTS[name])


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 49, 70, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def want(model, images):
    return logits(model, images)


def test_stride_mean_and_deviation_are_the_architecture_s(name, model, want):
    stride = STRIDES[name]
    assert want.shape == (2, 5, -(-49 // stride), -(-70 // stride))
    form = input_form(model)
    assert form == input_form(fuse(model)) == input_form(model.standard_form(FP32))
    assert form.stride == stride
    if VARIANTS[name].mean == PADDLE["mean"]:
        assert form.mean == form.std == (127.5, 127.5, 127.5)
    else:
        assert form.mean == (123.675, 116.28, 103.53)


def test_the_dilations_of_the_last_stage():
    for name, dilations in (("official", [2, 8, 16]), ("paddleseg", [4]), ("stride 16", [1])):
        layer = small_model(VARIANTS[name]).backbone.layer4
        assert [block.conv2.dilation for block in layer] == [(d, d) for d in dilations]


@CHANNELS_LAST
def test_fused_it_is_the_same_function(model, images, want, channels_last, monkeypatch):
    monkeypatch.setattr(winograd, "FEW_PIXELS", {4: 0, 2: 0})  # as in large images
    fused = fuse(model, channels_last=channels_last)
    got = fused(images)
    assert got.shape == want.shape
    assert relative_error(got, want) <= 1e-5
    assert relative_error(model.standard_form(FP32)(images), want) <= 1e-5


@CHANNELS_LAST
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_half_precision(model, images, want, channels_last, dtype):
    """The three-way tolerance."""
    plain = logits(copy.deepcopy(model).to(dtype), images.to(dtype))
    got = fuse(model, dtype=dtype, channels_last=channels_last)(images)
    assert got.dtype == dtype
    assert relative_error(got, want) <= 2 * relative_error(plain, want)


@pytest.mark.parametrize("size", [(1, 1), (17, 9), (32, 33)], ids=str)
def test_sizes(name, model, size):
    images = torch.randn(1, 3, *size)
    got = fuse(model)(images)
    assert got.shape[2:] == tuple(-(-side // STRIDES[name]) for side in size)
    assert relative_error(got, logits(model, images)) <= 1e-5


def test_with_the_kernels_of_the_em_attention(model, images):
    small = images[:, :, :33, :33]
    want = logits(model, small)
    fused = fuse(model)
    fused.decode_head.backend = "triton"
    assert relative_error(fused(small), want) <= 1e-5
    plain = copy.deepcopy(model)
    plain.decode_head.ema_module.backend = "triton"
    assert relative_error(logits(plain, small), want) <= 1e-5


def test_the_operators_of_a_gpu_take_it(model, want):
    fused = fuse(model, dtype=BF16).to("meta")
    got = fused(torch.empty(2, 3, 49, 70, device="meta"))
    assert (got.shape, got.dtype) == (want.shape, BF16)


def test_a_trial_passes(model):
    trial = Trial.of("fused", model, FP32, torch.device("cpu"))
    assert attempt(trial).problem is None


def test_the_reference_in_float64(model, images, want):
    with torch.no_grad():
        exact = copy.deepcopy(model).double().reference_logits(images.double())
    assert relative_error(want, exact) <= 1e-5


def test_a_training_step_reaches_every_trained_weight(name, model, images):
    network = copy.deepcopy(model).train()
    before = network.decode_head.ema_module.bases.clone()
    main, auxiliary = network(images)
    (main.mean() + auxiliary.mean()).backward()
    without = {name for name, p in network.named_parameters() if p.grad is None}
    frozen = {f"decode_head.ema_mid_conv.conv.{kind}" for kind in ("weight", "bias")}
    assert without == frozen
    assert not torch.equal(network.decode_head.ema_module.bases, before)


def test_means_of_fewer_pixels_at_the_edges():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert average_pool(x, 2).tolist() == [[[[2.0, 3.5]]]]
    assert average_pool(x, 1) is x
