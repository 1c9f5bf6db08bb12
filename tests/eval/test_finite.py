"""A network with values that are not finite is refused, and named."""

import errno

import numpy as np
import pytest
import torch
from tiny_models import random_image, tiny_model

from emanet_triton import fuse
from emanet_triton.data.cityscapes import CITYSCAPES, Sample
from emanet_triton.errors import InputError
from emanet_triton.eval import runner
from emanet_triton.eval.finite import check_network, finite_matrices
from emanet_triton.eval.outputs import Outputs
from emanet_triton.inference.predictor import NOT_FINITE, Predictor
from emanet_triton.kernels.resample.op import confusion_counts
from emanet_triton.workers import Workers

IMAGE = random_image(24, 40)


def predictor(fused: bool, precision: str = "fp32", damage=None, **options) -> Predictor:
    model = tiny_model()
    network = fuse(model) if fused else model
    if damage is not None:
        damage(network)
    return Predictor(network, model.protocol, precision=precision, **options)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_sound_network_passes(fused, compiled):
    checked = predictor(fused, compile=compiled)
    check_network(checked, IMAGE)
    assert not any(module._forward_hooks for module in checked.model.modules())


def inf_in_the_first_convolution(network):
    next(network.parameters()).data[0] = torch.inf


def inf_in_the_first_bias(network):
    network.backbone[0].bias.data[0] = torch.inf


def nan_in_the_last_but_one(network):
    next(network.decode_head.conv_cat.parameters()).data[0] = torch.nan


NAMES = {
    (inf_in_the_first_bias, True): "backbone.0",
    (inf_in_the_first_convolution, False): "backbone.stem.0",
    (nan_in_the_last_but_one, False): "decode_head.conv_cat.conv",
}


@pytest.mark.parametrize(("given", "name"), NAMES.items(), ids=lambda given: str(given)[:30])
def test_the_first_module_that_is_not_finite_is_named(given, name):
    damage, fused = given
    with pytest.raises(InputError) as raised:
        check_network(predictor(fused, damage=damage), IMAGE)
    kind = "fused" if fused else "plain"
    wanted = f"{name} of the {kind} network in fp32 returns values that are not finite"
    assert str(raised.value) == wanted


def test_an_overflow_in_fp16_has_a_hint():
    def damage(model):
        model.decode_head.ema_in_conv.bn.weight.data.fill_(1e6)

    check_network(predictor(False, damage=damage), IMAGE)
    with pytest.raises(InputError, match=r"; bf16 has a wider range than fp16$"):
        check_network(predictor(False, "fp16", damage), IMAGE)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=["cuda", "mapping"],
)
def test_without_memory_nothing_is_said(monkeypatch, error):
    def no_memory(*_):
        raise error

    checked = predictor(True)
    monkeypatch.setattr(checked, "first_logits", no_memory)
    check_network(checked, IMAGE)


class Overflowing(torch.nn.Module):
    """A network whose logits are not finite for the second image of a batch."""

    def __init__(self):
        super().__init__()
        self.model = tiny_model()

    def forward(self, inputs):
        logits = self.model(inputs)
        logits[1] += torch.nan
        return logits


def test_an_image_whose_logits_are_not_finite_is_named():
    network = Overflowing()
    predictor = Predictor(network, network.model.protocol, batch_size=2)
    labels = list(predictor([IMAGE, IMAGE]))
    assert (labels[0] != NOT_FINITE).all()
    assert (labels[1] == NOT_FINITE).all()
    counts = sum(confusion_counts(torch.zeros_like(each), each, 19) for each in labels)
    with pytest.raises(InputError) as raised:
        finite_matrices([counts], ["one", "two"], [predictor])
    wanted = "the logits of the plain network are not finite for one, two"
    assert str(raised.value) == wanted


@pytest.mark.parametrize(
    ("overflows", "wanted"),
    [
        ("first", "the logits of the plain network in fp32 are not finite for one, two"),
        (
            "other",
            "the logits of the plain network in fp16 are not finite for one, two; bf16 has a wider "
            "range than fp16",
        ),
    ],
)
def test_of_two_networks_that_which_overflows_is_named(tmp_path, overflows, wanted):
    model, network = tiny_model(), Overflowing()
    options = {"batch_size": 2}
    first = Predictor(network if overflows == "first" else model, model.protocol, **options)
    other = Predictor(network if overflows == "other" else model, model.protocol, **options)
    # Only their names: a CPU may not compute in float16.
    first.precision, other.precision = "fp32", "fp16"
    samples = [Sample(name, tmp_path, tmp_path) for name in ("one", "two")]
    loaded = [(IMAGE, np.zeros((24, 40), np.uint8))] * 2
    with Workers(1) as pool:
        started = runner._start(first, other, samples, loaded, Outputs(CITYSCAPES), pool)
    with pytest.raises(InputError) as raised:
        finite_matrices(started.counts, ["one", "two"], started.predictors)
    assert str(raised.value) == wanted
