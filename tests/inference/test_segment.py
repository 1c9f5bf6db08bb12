"""What ``segment`` runs, returns and refuses."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny_models import random_image, tiny_model
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

from emanet_triton import fuse, segment
from emanet_triton.errors import InputError
from emanet_triton.inference.predictor import Predictor
from emanet_triton.models.protocol import Protocol


def test_tensor_in_tensor_out():
    image = random_image(20, 30)
    model = tiny_model()
    labels, probabilities = segment(model, torch.from_numpy(image), return_probabilities=True)
    assert labels.dtype == torch.uint8
    assert probabilities.shape == (19, 20, 30)
    np.testing.assert_array_equal(labels.numpy(), segment(model, image))
    torch.testing.assert_close(probabilities.sum(0), torch.ones(20, 30))
    assert torch.equal(labels, probabilities.argmax(0).to(torch.uint8))


def test_segment_runs_what_it_is_given():
    model, image = tiny_model(), random_image(24, 40)
    options = {"return_probabilities": True}
    _, plain = segment(model, image, **options)
    _, fused = segment(model, image, fuse=True, **options)
    network = fuse(model)
    for given in ({}, {"fuse": True}):
        np.testing.assert_array_equal(fused, segment(network, image, **given, **options)[1])
    assert 0 < np.abs(fused - plain).max() < 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        _, half = segment(model, image, fuse=True, **options)
    np.testing.assert_array_equal(
        half, segment(fuse(model, dtype=torch.bfloat16), image, **options)[1]
    )


def swap(model):
    for p in model.parameters():
        p.data.copy_(-p.data)


def write_by_numpy(model):
    model.decode_head.conv_seg.weight.detach().numpy()[:] *= -1


def replace_an_activation(model):
    model.decode_head.bottleneck.act = torch.nn.Identity()


def hook(model):
    model.decode_head.conv_seg.register_forward_hook(lambda module, inputs, output: -output)


def other_eps(model):
    model.backbone.layer1[0].bn1.eps = 10.0


@pytest.mark.parametrize(
    "change",
    [swap, write_by_numpy, replace_an_activation, hook, other_eps],
    ids=lambda f: f.__name__,
)
def test_segment_sees_every_change_of_the_model(change):
    model, image = tiny_model(), random_image(24, 40)
    before = segment(model, image, return_probabilities=True)[1]
    segment(model, image, fuse=True)
    change(model)
    with torch.no_grad():
        want = Predictor(model, model.protocol).results([image], probabilities=True)[1][0]
    _, got = segment(model, image, return_probabilities=True)
    np.testing.assert_array_equal(got, want.numpy())
    assert np.abs(got - before).max() > 1e-3
    if change not in (replace_an_activation, hook):  # which fuse refuses
        _, fused = segment(model, image, fuse=True, return_probabilities=True)
        np.testing.assert_allclose(fused, got, rtol=0, atol=1e-3)


def test_segment_runs_an_ablation_as_it_is():
    model, image = tiny_model(), random_image(24, 40)
    before = segment(model, image)
    model.decode_head.fixed_reconstruction = torch.zeros(1)
    assert (segment(model, image) != before).any()


def test_results_are_ordinary_tensors():
    model, image = tiny_model(), random_image(24, 40)
    labels, probabilities = segment(model, torch.from_numpy(image), return_probabilities=True)
    labels.masked_fill_(labels == 0, 255)
    weight = torch.ones((), requires_grad=True)
    (weight * probabilities).sum().backward()
    assert weight.grad > 0
    assert not next(Predictor(model, model.protocol)([image])).is_inference()


def test_threads_segment_at_once():
    network, images = fuse(tiny_model()), [random_image(24, 40, i) for i in range(8)]
    want = [segment(network, image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        got = pool.map(lambda image: segment(network, image), images)
    for labels, wanted in zip(got, want, strict=True):
        np.testing.assert_array_equal(labels, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_model_in_another_dtype(dtype):
    model, image = tiny_model(), random_image(24, 40)
    _, want = segment(model, image, return_probabilities=True)
    cast = copy.deepcopy(model).to(dtype)
    _, fused = segment(cast, image, fuse=True, return_probabilities=True)
    assert np.abs(fused - want).mean() < 0.02
    if dtype == torch.float64:
        with pytest.raises(ValueError) as raised:
            segment(cast, image)
        assert str(raised.value) == (
            "the network must be in float32, float16 or bfloat16, got torch.float64; pass "
            "model.float() or fuse(model)"
        )
    else:
        assert np.abs(segment(cast, image, return_probabilities=True)[1] - want).mean() < 0.02


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_default_device_and_dtype_change_nothing(fused):
    model, image = tiny_model(), random_image(24, 40)
    want = segment(model, image, fuse=fused, return_probabilities=True)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = segment(model, image, fuse=fused, return_probabilities=True)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_logits_that_are_not_finite_are_an_error(fused):
    model, image = tiny_model(), random_image(24, 40)
    network = fuse(model) if fused else model
    next(network.decode_head.conv_seg.parameters()).data.fill_(float("nan"))
    with pytest.raises(InputError) as raised:
        segment(network, image)
    assert str(raised.value) == "the logits of the network are not finite for this image"


def test_bad_protocol():
    with pytest.raises(ValueError) as raised:
        segment(tiny_model(), random_image(4, 4), protocol="slide")
    assert str(raised.value) == "protocol must be a Protocol of this package, got 'slide'"


def read_only(image):
    image.flags.writeable = False
    return image


VIEWS = {
    "read-only": read_only,
    "mirrored": lambda image: image[:, ::-1][:, ::-1],
    "bgr": lambda image: image[..., ::-1].copy()[..., ::-1],
    "column order": np.asfortranarray,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_arrays_of_any_memory(view):
    model = tiny_model()
    want = segment(model, random_image(24, 40))
    np.testing.assert_array_equal(segment(model, view(random_image(24, 40))), want)


def compiled(model):
    return torch.compile(model, backend="eager")


def distributed(model):
    """A DistributedDataParallel whose own forward would wait for other ranks."""
    wrapper = object.__new__(type("Waiting", (nn.parallel.DistributedDataParallel,), {}))
    nn.Module.__init__(wrapper)
    wrapper.module = model
    return wrapper


WRAPPERS = {
    "DataParallel": DataParallel,
    "DistributedDataParallel": distributed,
    "AveragedModel": AveragedModel,
    "compiled": compiled,
    "compiled DistributedDataParallel": lambda model: compiled(distributed(model)),
    "DistributedDataParallel of compiled": lambda model: distributed(compiled(model)),
    "three": lambda model: DataParallel(compiled(AveragedModel(model))),
}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_models_run(wrap, fused):
    model, image = tiny_model(), random_image(24, 40)
    want = segment(model, image, fuse=fused)
    np.testing.assert_array_equal(segment(wrap(model), image, fuse=fused), want)


class Sharded(nn.Linear):
    pass


Sharded.__name__ = "FullyShardedDataParallel"
ONE_DEVICE = "the model must be on one device, got cpu and meta"
AN_EMANET = "an EMANet or a fused network"


def on_two_devices():
    model = tiny_model()
    model.decode_head.to("meta")
    return model


MODELS = {
    "none": (lambda: None, f"model must be {AN_EMANET}, got a NoneType"),
    "path": (lambda: "weights.pth", f"model must be {AN_EMANET}, got a str"),
    "another": (
        lambda: nn.Linear(2, 2).eval(),
        f"a model of type Linear has no protocol; pass protocol=, or as model {AN_EMANET}",
    ),
    "another in training": (
        lambda: nn.Conv2d(3, 19, 1),
        f"a model of type Conv2d has no protocol; pass protocol=, or as model {AN_EMANET}",
    ),
    "no parameters": (
        lambda: nn.ReLU().eval(),
        f"model must be {AN_EMANET}, got a ReLU without parameters",
    ),
    "sharded": (
        lambda: Sharded(2, 2),
        "a model under FSDP has only a part of its weights; pass an EMANet with the full "
        "state dict",
    ),
    "training": (
        lambda: tiny_model().train(),
        "the model is in training mode; call model.eval() first",
    ),
    "training inside": (
        lambda: DataParallel(tiny_model().train()),
        "the model is in training mode; call model.eval() first",
    ),
    "two devices": (on_two_devices, ONE_DEVICE),
    "meta": (
        lambda: tiny_model().to("meta"),
        "the model is on the meta device, where it has no weights",
    ),
}


@pytest.mark.parametrize(("make", "message"), MODELS.values(), ids=MODELS)
def test_bad_model(make, message):
    with pytest.raises(ValueError) as raised:
        segment(make(), random_image(8, 8))
    assert str(raised.value) == message


def test_a_network_of_another_kind_runs_with_a_protocol():
    class Colours(nn.Conv2d):
        def forward(self, images):
            return super().forward(images)[:, :, ::8, ::8]

    labels = segment(Colours(3, 5, 1).eval(), random_image(8, 8), protocol=Protocol((16, 16)))
    assert labels.shape == (8, 8)
