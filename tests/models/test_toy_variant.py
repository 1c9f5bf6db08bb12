"""A variant costs a module and an entry of the zoo: a toy one, added from outside the package."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_eval
import torch
from golden_data import relative_error
from tiny_models import random_image
from torch import Tensor, nn
from torch.nn import functional as F

from emanet_triton import create_model, fuse, list_models, segment
from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.png import read_image
from emanet_triton.errors import InputError
from emanet_triton.eval import metric
from emanet_triton.inference import reference
from emanet_triton.models.checkpoint import read_checkpoint
from emanet_triton.models.entries import ZooEntry
from emanet_triton.models.fused import fused_conv
from emanet_triton.models.network import FusedNetwork, Network
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.trial import Trial, Verdict, attempt
from emanet_triton.models.verified import verified_fuse
from emanet_triton.models.zoo import ZOO, name_of

WHOLE = Protocol((64, 32), ratios=(0.5, 1.0))
SLIDE = Protocol((64, 32), "slide", (21, 25), (15, 15), ratios=(0.75, 1.0))


@dataclass(frozen=True)
class Width:
    """The architecture of a toy."""

    channels: int


class Toy(Network):
    """Two convolutions, with another stride and another normalisation than EMANet's."""

    stride = 4
    mean = (90.0, 100.0, 110.0)
    std = (50.0, 60.0, 70.0)

    def __init__(self, architecture: Width, protocol: Protocol, num_classes: int) -> None:
        super().__init__(architecture, protocol, num_classes)
        self.features = nn.Conv2d(3, architecture.channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(architecture.channels)
        self.classifier = nn.Conv2d(architecture.channels, num_classes, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.norm(self.features(images)).relu())


class FusedToy(FusedNetwork):
    def __init__(self, model: "FusableToy", dtype: torch.dtype, channels_last: bool) -> None:
        super().__init__(model, dtype, channels_last)
        self.features = fused_conv(model.features, model.norm, dtype, channels_last)
        self.classifier = fused_conv(model.classifier, None, dtype, channels_last, relu=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images.to(self.dtype)))


class FusableToy(Toy):
    def fused_form(self, dtype: torch.dtype, channels_last: bool) -> FusedToy:
        return FusedToy(self, dtype, channels_last)


@pytest.fixture(params=[FusableToy, Toy], ids=["fusable", "plain"])
def toy(request, monkeypatch, tmp_path):
    """The class of a toy in the zoo under the name "toy", and a checkpoint in half precision."""
    entry = ZooEntry(Width(8), WHOLE, network=request.param)
    monkeypatch.setitem(ZOO, "toy", entry)
    torch.manual_seed(0)
    model = create_model("toy")
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(model.classifier.weight)  # so that pixels differ clearly
    checkpoint = tmp_path / "toy.pth"
    torch.save({"state_dict": model.half().state_dict()}, checkpoint)
    return SimpleNamespace(kind=request.param, checkpoint=checkpoint)


@pytest.fixture
def model(toy):
    return create_model("toy", checkpoint=toy.checkpoint)


def test_create_model(toy, model, monkeypatch):
    assert list_models()[-1] == "toy"
    assert type(model) is toy.kind
    assert (model.protocol, model.num_classes) == (WHOLE, 19)
    stored = torch.load(toy.checkpoint)["state_dict"]
    assert all(
        torch.equal(value, stored[key].to(value)) for key, value in model.state_dict().items()
    )
    seven = replace(CITYSCAPES, classes=CITYSCAPES.classes[:7])
    monkeypatch.setitem(ZOO, "toy", replace(ZOO["toy"], dataset=seven))
    assert create_model("toy").num_classes == 7
    assert create_model("toy", num_classes=3).num_classes == 3


def test_it_needs_no_checkpoint_in_the_zoo(toy):
    message = "toy: the zoo has no checkpoint of this model; expected a file"
    with pytest.raises(InputError, match=f"^{message}$"):
        create_model("toy", pretrained=True)
    assert name_of(read_checkpoint(toy.checkpoint)) is None


def test_segment_takes_stride_and_normalisation_from_the_network(model):
    image = random_image(32, 64)
    labels, got = segment(model, image, return_probabilities=True)
    pixels = torch.from_numpy(image).float()
    inputs = ((pixels - torch.tensor(Toy.mean)) / torch.tensor(Toy.std)).permute(2, 0, 1)[None]
    with torch.no_grad():
        want = F.interpolate(model(inputs), (32, 64), mode="bilinear").softmax(1)[0].numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert len(np.unique(labels)) > 5


@pytest.mark.parametrize("ms_flip", [False, True], ids=["single", "ms_flip"])
@pytest.mark.parametrize("protocol", [WHOLE, SLIDE], ids=["whole", "slide"])
def test_segment_under_any_protocol(model, protocol, ms_flip):
    image = random_image(41, 70)
    options = {"protocol": protocol, "ms_flip": ms_flip, "return_probabilities": True}
    with torch.no_grad():
        want = reference.probabilities(model, [image], protocol, ms_flip)[0]
    np.testing.assert_allclose(segment(model, image, **options)[1], want, rtol=0, atol=1e-5)
    compiled = torch.compile(model, backend="eager")
    np.testing.assert_allclose(segment(compiled, image, **options)[1], want, rtol=0, atol=1e-5)


def test_fuse(toy, model):
    image, inputs = random_image(24, 40), torch.randn(2, 3, 33, 50)
    plain = segment(model, image, return_probabilities=True)[1]
    for_one_call = segment(model, image, return_probabilities=True, fuse=True)[1]
    if toy.kind is Toy:
        with pytest.raises(ValueError, match=r"^Toy has no fused form$"):
            fuse(model)
        assert verified_fuse(model) is model
        np.testing.assert_array_equal(for_one_call, plain)
        return
    fused = fuse(model)
    assert (fused.stride, fused.mean, fused.std) == (Toy.stride, Toy.mean, Toy.std)
    with torch.no_grad():
        assert 0 < relative_error(fused(inputs), model(inputs)) < 1e-5
    got = segment(fused, image, return_probabilities=True)[1]
    np.testing.assert_array_equal(got, for_one_call)
    np.testing.assert_allclose(got, plain, rtol=0, atol=1e-5)
    trial = Trial.of("fused", model, torch.float32, torch.device("cpu"))
    assert attempt(trial) == Verdict(None)


@pytest.mark.parametrize("ms_flip", [False, True], ids=["single", "ms_flip"])
def test_evaluation(toy, model, ms_flip, tmp_path):
    city = tiny_eval.write_cityscapes(tmp_path / "city", count=2)
    (tmp_path / "out").mkdir()
    options = ["--model", "toy", *["--ms-flip"] * ms_flip]
    got = tiny_eval.run(tmp_path / "out", city, toy.checkpoint, *options)
    network = fuse(model) if toy.kind is FusableToy else model
    want = torch.zeros(19, 19, dtype=torch.int64)
    for sample in CITYSCAPES.find_samples(city):
        labels = torch.from_numpy(CITYSCAPES.read_labels(sample))
        predicted = segment(network, read_image(sample.image), ms_flip=ms_flip)
        want += metric.confusion_matrix(labels, torch.from_numpy(predicted), 19)
    assert got["model"] == "toy"
    assert got["network"] == ("fused" if toy.kind is FusableToy else "plain")
    assert got["confusion"] == want.tolist()
