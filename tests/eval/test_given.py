"""What ``segment`` says to images and models that it cannot take, and how it unwraps models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_inference import random_image, tiny_model
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

from emanet_triton import segment
from emanet_triton.models.protocol import Protocol

IMAGES = {
    "float": (np.zeros((4, 4, 3), np.float32), "float32 [4, 4, 3]"),
    "grey": (np.zeros((4, 4), np.uint8), "uint8 [4, 4]"),
    "rgba": (np.zeros((4, 4, 4), np.uint8), "uint8 [4, 4, 4]"),
    "empty": (np.zeros((0, 4, 3), np.uint8), "uint8 [0, 4, 3]"),
    "chw": (
        torch.zeros((3, 4, 5), dtype=torch.uint8),
        "torch.uint8 [3, 4, 5], whose first axis has the channels",
    ),
    "int64": (torch.zeros((4, 4, 3), dtype=torch.int64), "torch.int64 [4, 4, 3]"),
    "meta": (
        torch.zeros((4, 4, 3), dtype=torch.uint8, device="meta"),
        "torch.uint8 [4, 4, 3] on the meta device",
    ),
    "sparse": (
        torch.zeros((4, 4, 3), dtype=torch.uint8).to_sparse(),
        "torch.uint8 [4, 4, 3] that is not dense: tensor.to_dense() makes it so",
    ),
    "none": (None, "None, as cv2.imread returns it for a file that it cannot read"),
    "string": ("street.png", "the path 'street.png' in place of the pixels of that file"),
    "path": (Path("street.png"), "the path 'street.png' in place of the pixels of that file"),
    "pil": (
        Image.new("RGB", (4, 4)),
        "a PIL image: numpy.asarray(image.convert('RGB')) makes an array of it",
    ),
    "list": ([[[0, 0, 0]]], "a list"),
}


@pytest.mark.parametrize(("image", "got"), IMAGES.values(), ids=IMAGES)
def test_bad_image(image, got):
    with pytest.raises(ValueError) as raised:
        segment(tiny_model(), image)
    wanted = "image must be uint8 RGB [H, W, 3], an array or a tensor, got "
    assert str(raised.value) == wanted + got


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
AN_EMANET = "an EMANet or what fuse made of one"


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
