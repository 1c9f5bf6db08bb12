"""Whole, sliding and multi-scale inference against mmsegmentation's own results."""

import copy
from concurrent.futures import ThreadPoolExecutor

import golden_data
import numpy as np
import pytest
import torch

from emanet_triton import fuse, segment
from emanet_triton.errors import InputError
from emanet_triton.eval import inference, reference
from emanet_triton.eval.inference import Predictor
from emanet_triton.eval.inputs import resize_image
from emanet_triton.eval.metric import confusion_matrix
from emanet_triton.kernels.out_of_memory import MemoryWatch
from emanet_triton.models.emanet import Architecture, EMANet
from emanet_triton.models.protocol import Protocol

R50_WHOLE = "emanet_r50-d8_512x1024_80k_cityscapes"


def tiny_model(**protocol) -> EMANet:
    torch.manual_seed(0)
    architecture = Architecture((1, 1, 1, 1), 8, ema_channels=16, num_bases=4, head_channels=8)
    model = EMANet(architecture, Protocol(**({"base_scale": (64, 32)} | protocol))).eval()
    model.decode_head.conv_seg.weight.data *= 300  # so that pixels differ clearly
    return model


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def assert_same_labels(got, want, probabilities, margin=1e-3):
    """Equal labels wherever the two best probabilities differ by more than ``margin``."""
    best = np.sort(probabilities, axis=0)[-2:]
    clear = best[1] - best[0] > margin
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(got[clear], want[clear])


class Recorded(torch.nn.Module):
    """A network's outputs, kept in their order and played back."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model, self.outputs, self.position = model, [], 0

    def record(self, inputs):
        self.outputs.append(self.model(inputs))
        return self.outputs[-1]

    def forward(self, _):
        self.position += 1
        return self.outputs[self.position - 1]


@pytest.mark.parametrize("ms_flip", [False, True], ids=["single", "ms_flip"])
@pytest.mark.parametrize("name", golden_data.NAMES)
def test_golden_protocol(name, ms_flip):
    golden, model = golden_data.vectors(name), golden_data.golden_model(name)
    image, suffix = golden["image"], "_ms_flip" if ms_flip else ""
    want, want_labels = golden[f"prob{suffix}_rows"], golden[f"label{suffix}"]
    asked = model.protocol, ms_flip
    network = Recorded(model)
    with torch.inference_mode():
        plain = reference.probabilities(network.record, [image], *asked)[0].numpy()
        given = iter(network.outputs)
        exact = reference.probabilities(lambda _: next(given).double(), [image], *asked)[0].numpy()
    np.testing.assert_allclose(plain[:, ::16], want, rtol=0, atol=1e-4)
    assert_same_labels(plain.argmax(0), want_labels, plain)

    # The same logits through the composed taps, and the fused network.
    options = {"ms_flip": ms_flip, "return_probabilities": True}
    batches = Predictor(network, model.protocol, ms_flip=ms_flip, batch_size=64)
    taps, probabilities = (r[0].numpy() for r in batches.results([image], probabilities=True))
    error, plain_error = (np.abs(got - exact).max() for got in (probabilities, plain))
    assert error <= 2 * plain_error + 1e-6
    assert_same_labels(taps, exact.argmax(0), exact, margin=1e-5)
    targets = torch.from_numpy(want_labels.copy())
    targets[:7] = 255
    counted, wanted = (
        confusion_matrix(targets, torch.from_numpy(labels.astype(np.uint8)))
        for labels in (taps, plain.argmax(0))
    )
    assert torch.equal(counted, wanted)
    fused = segment(fuse(model), image, **options)
    for labels, got in ((taps, probabilities), fused):
        assert labels.dtype == np.uint8
        assert got.dtype == np.float32
        np.testing.assert_allclose(got[:, ::16], want, rtol=0, atol=1e-4)
        assert_same_labels(labels, want_labels, got)


@pytest.mark.parametrize("name", golden_data.NAMES)
def test_golden_odd_size(name):
    golden = golden_data.vectors(name)
    model = golden_data.golden_model(name)
    labels, probabilities = segment(model, golden["image_odd"], return_probabilities=True)
    assert_same_labels(labels, golden["label_odd"], probabilities)


@pytest.mark.parametrize("size", [k for k in golden_data.vectors("imrescale") if k != "image"])
def test_golden_image_resize(size):
    golden = golden_data.vectors("imrescale")
    width, height = map(int, size.split("x"))
    np.testing.assert_array_equal(resize_image(golden["image"], (width, height)), golden[size])


def test_slide_with_one_window_is_whole():
    image = random_image(24, 40)
    model = tiny_model()
    _, whole = segment(model, image, return_probabilities=True)
    slide = Protocol((64, 32), "slide", crop=(90, 90), stride=(60, 60))
    _, windowed = segment(model, image, protocol=slide, return_probabilities=True)
    np.testing.assert_array_equal(whole, windowed)


def test_mirrored_views_make_the_result_symmetric():
    image = random_image(32, 64)
    model = tiny_model(ratios=(1.0,))
    _, plain = segment(model, image, ms_flip=True, return_probabilities=True)
    _, mirrored = segment(model, image[:, ::-1].copy(), ms_flip=True, return_probabilities=True)
    np.testing.assert_allclose(plain, mirrored[:, :, ::-1], rtol=0, atol=1e-6)


def test_versions_differ_only_in_ms_flip():
    image = random_image(40, 80)
    model = tiny_model(base_scale=(97, 49))
    first = Protocol((97, 49))
    second = Protocol((97, 49), version="mmseg-1.x")
    np.testing.assert_array_equal(
        segment(model, image, protocol=first), segment(model, image, protocol=second)
    )
    _, a = segment(model, image, protocol=first, ms_flip=True, return_probabilities=True)
    _, b = segment(model, image, protocol=second, ms_flip=True, return_probabilities=True)
    assert np.abs(a - b).max() > 1e-3


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


def test_batches_of_equal_images_give_each_image_its_labels():
    model = tiny_model()
    images = [random_image(24, 40, i) for i in range(5)] + [random_image(25, 31)]
    got = list(Predictor(model, model.protocol, batch_size=4)(images))
    for labels, image in zip(got, images, strict=True):
        want, probabilities = segment(model, image, return_probabilities=True)
        best = np.sort(probabilities, axis=0)[-2:]
        clear = best[1] - best[0] > 1e-5  # another batch size, another order of summation
        np.testing.assert_array_equal(labels.numpy()[clear], want[clear])


class LimitedMemory(torch.nn.Module):
    """A model that runs out of memory above ``limit`` inputs."""

    def __init__(self, limit: int, error: Exception, **protocol) -> None:
        super().__init__()
        self.model, self.limit, self.error = tiny_model(**protocol), limit, error
        self.protocol = self.model.protocol
        self.batches = []

    def forward(self, inputs):
        self.batches.append(len(inputs))
        if len(inputs) > self.limit:
            raise self.error
        return self.model(inputs)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory"),
    OSError(12, "Cannot allocate memory"),
]
NO_ENGINE = RuntimeError("GET was unable to find an engine to execute this computation")


@pytest.mark.parametrize(
    "error", OUT_OF_MEMORY, ids=["cuda", "cpu", "cublas", "runtime", "mapping"]
)
def test_out_of_memory_halves_the_batch_and_goes_on(error):
    model = LimitedMemory(2, error)
    images = [random_image(16, 24, i) for i in range(9)]
    predictor = Predictor(model, model.protocol, batch_size=8)
    with pytest.warns(UserWarning, match="out of memory on cpu; going on with batch size") as seen:
        got = list(predictor(images))
    assert [str(w.message)[-1] for w in seen] == ["4", "2"]
    assert model.batches == [8, 4, 2, 2, 2, 2, 1]
    for labels, want in zip(got, Predictor(model.model, model.protocol)(images), strict=True):
        assert (labels == want).float().mean() > 0.99


def test_cudnn_without_an_engine_halves_the_batch_where_memory_ran_out(monkeypatch):
    monkeypatch.setattr(MemoryWatch, "_is_short", lambda watch: True)
    model = LimitedMemory(2, NO_ENGINE)
    images = [random_image(16, 24, i) for i in range(4)]
    with pytest.warns(UserWarning, match="out of memory on cpu; going on with batch size 2"):
        assert len(list(Predictor(model, model.protocol, batch_size=4)(images))) == 4
    assert model.batches == [4, 2, 2]


def test_cudnn_without_an_engine_is_an_error_where_there_is_memory():
    model = LimitedMemory(2, NO_ENGINE)
    predictor = Predictor(model, model.protocol, batch_size=4)
    with pytest.raises(RuntimeError, match="unable to find an engine"):
        list(predictor([random_image(16, 24, i) for i in range(4)]))


def test_out_of_memory_with_the_windows_of_one_image():
    windowed = {"mode": "slide", "crop": (33, 33), "stride": (16, 16)}
    model = LimitedMemory(2, OUT_OF_MEMORY[0], **windowed)
    image = random_image(32, 64)
    predictor = Predictor(model, model.protocol, batch_size=32)
    with pytest.warns(UserWarning, match="going on with batch size") as seen:
        (labels,) = predictor([image])
    assert [str(w.message)[-2:].strip() for w in seen] == ["1"]
    assert model.batches == [3, 1, 1, 1]
    want = segment(model.model, image)
    assert (labels.numpy() == want).mean() > 0.99


@pytest.mark.parametrize("probabilities", [False, True], ids=["labels", "probabilities"])
def test_out_of_memory_in_the_resampling_goes_on_in_blocks_of_rows(monkeypatch, probabilities):
    model, image = tiny_model(), random_image(37, 50)
    predictor = Predictor(model, model.protocol)
    want = predictor.results([image], probabilities=probabilities)
    name = "resample_probabilities" if probabilities else "resample_labels"
    resample = getattr(inference, name)

    def limited(logits, rows, columns):
        if rows.index.shape[2] > 10:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return resample(logits, rows, columns)

    monkeypatch.setattr(inference, name, limited)
    with pytest.warns(UserWarning, match="of 37 rows at once") as seen:
        got = predictor.results([image], probabilities=probabilities)
    assert [str(w.message) for w in seen] == [
        f"out of memory on cpu; going on with {rows} of 37 rows at once" for rows in (19, 10)
    ]
    assert len(got) == len(want)
    assert torch.equal(got[0], want[0])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_out_of_memory_at_batch_one_is_an_input_error():
    model = LimitedMemory(0, OUT_OF_MEMORY[0])
    with pytest.raises(InputError, match="out of memory on cpu with an image of 24x16 pixels"):
        list(Predictor(model, model.model.protocol)([random_image(16, 24)]))


def test_other_runtime_errors_are_not_taken_for_memory():
    model = LimitedMemory(0, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(Predictor(model, model.model.protocol, batch_size=2)([random_image(16, 24)]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_close(precision):
    model, image = golden_data.golden_model(R50_WHOLE), golden_data.vectors(R50_WHOLE)["image"]
    labels = next(Predictor(model, model.protocol, precision=precision)([image]))
    agreement = (labels.numpy() == golden_data.vectors(R50_WHOLE)["label"]).mean()
    assert agreement > 0.9


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 3), (2, 3), (7, 3), (65, 3), (1, 8192), (8192, 1), (8192, 8192)],
    ids=lambda size: str(size),
)
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_images_of_any_size(height, width, mode):
    windowed = {"crop": (33, 33), "stride": (22, 22)} if mode == "slide" else {}
    labels = segment(tiny_model(mode=mode, **windowed), random_image(height, width))
    assert labels.shape == (height, width)
    assert labels.max() < 19
