"""What ``fuse`` refuses, each with its reason."""

import subprocess
import sys

import pytest
import torch
from small_networks import TINY, small_model
from torch import nn

import emanet_triton
from emanet_triton import fuse
from emanet_triton.errors import InputError
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.protocol import Protocol

FP16, FP32 = torch.float16, torch.float32


def test_a_subclass_is_refused():
    class Mine(EMANet):
        def forward(self, images):
            return -super().forward(images)

    with pytest.raises(ValueError) as raised:
        fuse(Mine(TINY, Protocol((64, 48))).eval())
    assert str(raised.value) == "fuse takes an EMANet, got Mine"


RELOADED = """
import sys, numpy, emanet_triton
old = emanet_triton.create_model("emanet_demo")
given = {"model": old, "fused": emanet_triton.fuse(old)}[sys.argv[1]]
for name in [name for name in sys.modules if name.startswith("emanet_triton")]:
    del sys.modules[name]
import emanet_triton
for call in (
    lambda: emanet_triton.fuse(given),
    lambda: emanet_triton.segment(given, numpy.zeros((8, 8, 3), numpy.uint8)),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("given", ["model", "fused"])
def test_a_model_of_before_a_reload_is_refused(given):
    code = [sys.executable, "-c", RELOADED, given]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    message = "the model is of a package that was reloaded since; make the model anew\n"
    assert done.stdout == 2 * message


def negative_variance(model):
    model.backbone.layer1[0].bn1.running_var.fill_(-1)


def large_weight(model):
    model.backbone.layer1[0].conv1.weight.data.fill_(1e9)


@pytest.mark.parametrize(
    ("damage", "dtype", "message"),
    [
        (negative_variance, FP32, "torch.float32, as {}"),
        (large_weight, FP16, "torch.float16, as {}; bfloat16 has a wider range"),
    ],
    ids=["variance", "fp16"],
)
def test_weights_that_are_not_finite_are_named(damage, dtype, message):
    model = small_model()
    damage(model)
    with pytest.raises(InputError) as raised:
        fuse(model, dtype=dtype)
    why = "its weights or the statistics of its batch norm are damaged or too large"
    wanted = "backbone.4.conv1.weight of the fused network is not finite in "
    assert str(raised.value) == wanted + message.format(why)


def ablated_model():
    model = small_model()
    model.decode_head.fixed_reconstruction = torch.zeros(1)
    return model


WRONG = {
    "training": (
        lambda: (small_model().train(), {}),
        "the model is in training mode; call model.eval() first",
    ),
    "type": (lambda: (nn.Identity().eval(), {}), "fuse takes an EMANet, got Identity"),
    "fused": (lambda: (fuse(small_model()), {}), "fuse takes an EMANet, got FusedEMANet"),
    "ablated": (
        lambda: (ablated_model(), {}),
        "a model with a fixed_reconstruction is an ablation and is not fused",
    ),
    "dtype": (
        lambda: (small_model(), {"dtype": torch.float64}),
        "dtype must be float32, float16 or bfloat16, got torch.float64",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(arguments, message):
    network, options = arguments()
    with pytest.raises(ValueError) as raised:
        emanet_triton.fuse(network, **options)
    assert str(raised.value) == message


IMAGES = {
    "bytes": (torch.zeros(2, 3, 16, 24, dtype=torch.uint8), "torch.uint8 [2, 3, 16, 24]"),
    "one image": (torch.zeros(3, 16, 24), "torch.float32 [3, 16, 24]"),
    "two channels": (torch.zeros(1, 2, 16, 24), "torch.float32 [1, 2, 16, 24]"),
    "channels last": (torch.zeros(1, 16, 24, 3), "torch.float32 [1, 16, 24, 3]"),
    "array": (torch.zeros(1, 3, 16, 24).numpy(), "ndarray"),
}


@pytest.mark.parametrize("form", ["training", "plain", "fused", "compiled"])
@pytest.mark.parametrize(("images", "got"), IMAGES.values(), ids=IMAGES)
def test_wrong_images(form, images, got):
    network = small_model()
    if form == "training":
        network.train()
    elif form != "plain":
        network = fuse(network, dtype=torch.bfloat16)
    if form == "compiled":
        network = torch.compile(network, backend="eager")
    with pytest.raises(ValueError) as raised:
        network(images)
    assert str(raised.value) == (f"images must be a floating-point tensor [B, 3, H, W], got {got}")
