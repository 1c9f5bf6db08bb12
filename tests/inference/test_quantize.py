"""``quantize``: the 8-bit form of an EMANet, its results, and what it refuses."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from small_networks import logits, small_model
from torch.utils.flop_counter import FlopCounterMode

from emanet_triton import Predictor, create_model, fuse, quantize, segment
from emanet_triton.data.scenes.generate import TRAIN_SEEDS, VAL_SEEDS, generate_scene
from emanet_triton.errors import InputError
from emanet_triton.kernels.conv import int8
from emanet_triton.models.quantized import QuantizedBottleneck, QuantizedConv, observed

needs_int8 = pytest.mark.skipif(not int8.has_int8(), reason="no fast products of 8-bit integers")
NOISE = 0.04  # of the largest logit; the small network has 0.025, and in bfloat16 0.008


def picture(seed: int = 0, height: int = 64, width: int = 48) -> np.ndarray:
    """Smooth noise of many brightnesses, uint8 RGB."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), dtype=np.uint8))


def inputs(model, *images: np.ndarray) -> torch.Tensor:
    mean, std = torch.tensor(model.mean), torch.tensor(model.std)
    return ((torch.from_numpy(np.stack(images)).float() - mean) / std).permute(0, 3, 1, 2)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).abs().max() / wanted.abs().max())


def doubled(scale: int8.Scale) -> int8.Scale:
    return int8.Scale(2 * scale.step, scale.zero)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def images(model):
    return inputs(model, picture(0), picture(1))


@pytest.fixture(scope="module")
def quantized(model):
    return quantize(model, [picture(0), picture(1)])


@needs_int8
def test_logits_are_those_of_the_model_but_for_rounding(model, quantized, images):
    found, wanted = logits(quantized, images), logits(model, images)
    assert found.dtype == torch.bfloat16
    assert found.shape == wanted.shape
    assert error(found, wanted) <= NOISE


@needs_int8
def test_images_are_checked(quantized, images):
    for wrong in (images.byte(), images[0], images[:, :2]):
        with pytest.raises(
            ValueError, match=r"^images must be a floating-point tensor \[B, 3, H, W"
        ):
            quantized(wrong)


@needs_int8
@pytest.mark.parametrize("what", ["first", "second", "identity", "output"])
def test_a_wrong_scale_shows(model, quantized, images, what):
    wrong = copy.deepcopy(quantized)
    block = next(each for each in wrong.modules() if isinstance(each, QuantizedBottleneck))
    if what == "first":
        block.conv1.out_scale = doubled(block.conv1.out_scale)
    elif what == "second":
        block.conv3.x_scale = doubled(block.conv3.x_scale)
    elif what == "identity":
        block.identity_scale = int8.Scale(block.identity_scale.step, 0)
    else:
        block.scale = doubled(block.scale)
    assert error(logits(wrong, images), logits(model, images)) > NOISE


@needs_int8
def test_most_convolutions_multiply_8_bit_integers(quantized):
    convolutions = [each for each in quantized.modules() if isinstance(each, QuantizedConv)]
    assert len(convolutions) == 2 + 6 * 3 + 4 + 2  # stem, six blocks, four with a downsample, head
    assert {each.weight.dtype for each in convolutions} == {torch.int8}
    sizes = []
    for network in (quantized, fuse(small_model(), dtype=torch.bfloat16)):
        tensors = [*network.parameters(), *network.buffers()]
        sizes.append(sum(tensor.nbytes for tensor in tensors))
    assert sizes[0] < 0.7 * sizes[1]


@needs_int8
def test_ranges_are_the_largest_outputs_over_all_images(model, images):
    fused = fuse(model, dtype=torch.bfloat16)
    with observed(fused) as ranges:
        for image in images.split(1):
            logits(fused, image)
    outputs: dict[str, torch.Tensor] = {}
    for name, layer in fused.backbone.named_modules():
        layer.register_forward_hook(
            lambda _, __, output, name=name: outputs.update({name: output.abs().max()})
        )
    logits(fused, images)
    assert {"0", "1", "2", "4.conv1", "4.conv2", "4.conv3", "4.downsample"} <= set(ranges)
    for name, largest in ranges.items():
        assert largest == float(outputs[name]) > 0


@needs_int8
def test_observing_ends(model, images):
    fused = fuse(model, dtype=torch.bfloat16)
    with observed(fused) as ranges:
        logits(fused, images)
    before = dict(ranges)
    logits(fused, 100 * images)
    assert ranges == before


@needs_int8
def test_one_image_or_a_path(model, quantized, images, tmp_path):
    one = quantize(model, picture(0))
    assert torch.equal(logits(one, images), logits(quantize(model, [picture(0)]), images))
    assert not torch.equal(logits(one, images), logits(quantized, images))
    Image.fromarray(picture(0)).save(tmp_path / "one.png")
    read = quantize(model, tmp_path / "one.png")
    assert torch.equal(logits(one, images), logits(read, images))


@needs_int8
def test_the_model_and_its_copy_are_independent(images):
    model = small_model()
    before = logits(model, images)
    quantized = quantize(model, picture())
    first = logits(quantized, images)
    assert torch.equal(logits(model, images), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(quantized, images), first)


@needs_int8
def test_copies_have_the_same_bits(quantized, images):
    wanted = logits(quantized, images)
    buffer = io.BytesIO()
    torch.save(quantized, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for each in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)), saved):
        assert torch.equal(logits(each, images), wanted)
    other = quantize(small_model(), [picture(2), picture(3)])
    assert not torch.equal(logits(other, images), wanted)


@needs_int8
def test_a_state_dict_fits_only_the_same_ranges(model, quantized, images):
    state = quantize(model, [picture(0), picture(1)]).state_dict()
    quantized.load_state_dict(state)
    assert torch.equal(
        logits(quantized, images), logits(quantize(model, [picture(0), picture(1)]), images)
    )
    with pytest.raises(ValueError, match="quantized with other images"):
        quantize(model, picture(2)).load_state_dict(state)


@needs_int8
def test_bits_do_not_depend_on_the_batch_or_the_threads(quantized, images):
    together = logits(quantized, images)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [logits(quantized, image) for image in images.split(1)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, torch.cat(alone))


@needs_int8
def test_brighter_images_saturate(model, images):
    dark = quantize(model, picture() // 8)
    found = logits(dark, images)
    assert found.isfinite().all()
    assert error(found, logits(model, images)) > NOISE


@needs_int8
def test_segment_and_predictor_take_it(model, quantized):
    image = picture(0)
    labels = segment(quantized, image)
    (again,) = Predictor(quantized, model.protocol, precision="int8")([image])
    assert np.array_equal(labels, again.numpy())
    wanted = segment(model, image)
    assert (labels == wanted).mean() > 0.9


@needs_int8
def test_operators_are_registered_as_pytorch_wants():
    x = torch.zeros(1, 32, 5, 6, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(32, 32, 1, 1, dtype=torch.int8)
    operands = x, weight, torch.rand(32), torch.randn(32)
    operators = torch.ops.emanet_triton
    torch.library.opcheck(operators.conv_int8, (*operands, 0.03, 0.1, 128, 2, 1, False))
    arguments = x.clone(memory_format=torch.preserve_format), *operands, 0.05, 0, 0.03, 0.1
    torch.library.opcheck(operators.conv_int8_add_, arguments)


@needs_int8
def test_made_in_inference_mode(model, quantized, images):
    with torch.inference_mode():
        made = quantize(small_model(), [picture(0), picture(1)])
        inside = logits(made, images)
    assert torch.equal(logits(made, images), logits(quantized, images))
    assert torch.equal(inside, logits(quantized, images))


@needs_int8
def test_an_output_that_is_not_finite_is_named():
    model = small_model()
    with torch.no_grad():
        model.backbone.layer2[0].conv2.weight.mul_(1e38)
    with pytest.raises(InputError, match=r"output of backbone\.6\.conv2 .* is not finite"):
        quantize(model, picture())


@needs_int8
def test_an_image_that_is_not_finite_gets_nan(quantized, images):
    broken = images.clone()
    broken[0, 1, 20, 30] = float("nan")
    got = quantized(broken)
    assert got[0].isnan().all()
    assert torch.equal(got[1], quantized(images)[1])


@needs_int8
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions_that_do_not_fit(model, quantized, precision):
    with pytest.raises(ValueError, match=f"'{precision}' does not fit a QuantizedEMANet"):
        Predictor(quantized, model.protocol, precision=precision)
    with pytest.raises(ValueError, match="'int8' does not fit a EMANet; int8 is that of"):
        Predictor(model, model.protocol, precision="int8")


@needs_int8
def test_compiled(quantized, images):
    torch._dynamo.reset()
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
    assert torch.equal(logits(compiled, images), logits(quantized, images))


@needs_int8
def test_flops_are_those_of_the_model(model, quantized, images):
    counts = []
    for network in (fuse(model), quantized):
        with FlopCounterMode(display=False) as counter:
            logits(network, images)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@needs_int8
def test_it_may_be_laid_out_anew_whatever_the_default_device_is(quantized):
    with torch.device("meta"):
        assert quantized.to(memory_format=torch.channels_last) is quantized


@needs_int8
@pytest.mark.parametrize("change", ["half", "double", "meta", "bfloat16"])
def test_it_stays_as_it_is(quantized, images, change):
    wanted = logits(quantized, images)
    moves = {
        "half": lambda: quantized.half(),
        "double": lambda: quantized.double(),
        "meta": lambda: quantized.to("meta"),
        "bfloat16": lambda: quantized.bfloat16(),
    }
    with pytest.raises(ValueError, match="a quantized network stays on the CPU"):
        moves[change]()
    assert torch.equal(logits(quantized.to("cpu"), images), wanted)


def test_refusals(model, monkeypatch):
    monkeypatch.setattr(int8, "cpu_capability", lambda: "amx")
    with pytest.raises(ValueError, match="quantize needs at least one image"):
        quantize(model, [])
    with pytest.raises(ValueError, match=r"image 1 of the list: image must be uint8 RGB"):
        quantize(model, [picture(), b"not an image"])
    with pytest.raises(InputError, match=r"gone\.png"):
        quantize(model, "gone.png")
    with pytest.raises(ValueError, match="in training mode"):
        quantize(small_model().train(), picture())
    with pytest.raises(ValueError, match="quantize takes the model itself, not its fused form"):
        quantize(fuse(model), picture())
    with pytest.raises(ValueError, match="a quantized network runs on a CPU, got a model on meta"):
        quantize(small_model().to("meta"), picture())
    damaged = small_model()
    with torch.no_grad():
        damaged.backbone.layer1[0].conv1.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="is not finite"):
        quantize(damaged, picture())


def test_an_older_cpu_is_refused(model, monkeypatch):
    monkeypatch.setattr(int8, "cpu_capability", lambda: "avx2")
    with pytest.raises(InputError, match="int8 needs a CPU with AMX or AVX512-BF16, got "):
        quantize(model, picture())


@needs_int8
def test_a_trained_network_keeps_its_labels():
    model = create_model("emanet_demo", pretrained=True).eval()
    scenes = [generate_scene(VAL_SEEDS[seed])[0] for seed in range(100, 104)]
    network = quantize(model, [generate_scene(TRAIN_SEEDS[seed])[0] for seed in range(4)])
    pairs = zip(segment(model, scenes), segment(network, scenes), strict=True)
    assert np.mean([one == other for one, other in pairs]) > 0.985
