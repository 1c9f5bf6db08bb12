"""The fused network against mmsegmentation's vectors and against the network it comes from."""

import copy
import io
import math
import pickle

import golden_data
import pytest
import torch
from golden_data import relative_error
from small_networks import SMALL, TINY, logits, small_model
from subnormal import count_subnormal
from torch.utils.flop_counter import FlopCounterMode
from torch_version import needs_free_sizes

from emanet_triton import fuse
from emanet_triton.inference.predictor import Predictor
from emanet_triton.inference.segment import segment
from emanet_triton.kernels.conv import cpu_choice, onednn, winograd
from emanet_triton.kernels.conv.packed import COPIES
from emanet_triton.kernels.device import has_onednn
from emanet_triton.models.fused import FusedBottleneck, FusedConv

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DIM = torch.export.Dim.DYNAMIC


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 49, 70, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[True, False], ids=["winograd", "direct"])
def _as_of_large_images(request, monkeypatch):
    """Without this, the tests' small images would not go through Winograd's convolution."""
    if request.param:
        monkeypatch.setattr(winograd, "FEW_PIXELS", {4: 0, 2: 0})


@pytest.mark.usefixtures("_as_of_large_images")
@pytest.mark.parametrize("name", golden_data.NAMES)
def test_golden_logits(name):
    golden = golden_data.vectors(name)
    fused = fuse(golden_data.golden_model(name))
    got = fused(golden_data.normalised(golden["image"]))
    assert relative_error(got, torch.from_numpy(golden["logits"])) <= 1e-5


def check_half_precision(model, images, want, dtype):
    """The three-way tolerance."""
    plain = logits(copy.deepcopy(model).to(dtype), images.to(dtype))
    fused = fuse(model, dtype=dtype)(images)
    assert fused.dtype == dtype
    assert relative_error(fused, want) <= 2 * relative_error(plain, want)


@pytest.mark.usefixtures("_as_of_large_images")
def test_golden_logits_in_bf16():
    name = golden_data.NAMES[0]
    golden = golden_data.vectors(name)
    images = golden_data.normalised(golden["image"])
    want = torch.from_numpy(golden["logits"])
    check_half_precision(golden_data.golden_model(name), images, want, BF16)


def test_golden_logits_in_bf16_by_onednn_alone(monkeypatch):
    """As on a CPU with AMX: without Winograd's algorithm, with copies in oneDNN's layout."""
    if not has_onednn(BF16):
        pytest.skip("this CPU has no fast bfloat16")
    for module in (cpu_choice, onednn):
        monkeypatch.setattr(module, "cpu_capability", lambda: "amx")
    name = golden_data.NAMES[0]
    golden = golden_data.vectors(name)
    images = golden_data.normalised(golden["image"])
    fused = fuse(golden_data.golden_model(name), dtype=BF16)
    convs = [module for module in fused.modules() if isinstance(module, FusedConv)]
    assert not any(conv.winograd for conv in convs)
    assert {conv.out_dtype for conv in convs} == {BF16}
    want = torch.from_numpy(golden["logits"])
    check_half_precision(golden_data.golden_model(name), images, want, BF16)
    fused(images)
    products = [block.downsample for block in fused.modules() if isinstance(block, FusedBottleneck)]
    products = [conv for conv in products if conv is not None and conv.stride == 1]
    assert len(products) == 3  # to more channels; they take weights as they are
    assert [conv for conv in convs if conv.weight not in COPIES] == products


def test_no_folded_weight_is_subnormal(images):
    model = small_model()
    bn = model.backbone.layer1[0].bn1
    with torch.no_grad():
        bn.weight[0], bn.bias[0], bn.weight[1] = 1e-41, 1e-40, -1e-20
        model.backbone.layer1[0].conv2.weight[0, 0, 0, 0] = 1e-39
    fused = fuse(model)
    for tensor in fused.state_dict().values():
        assert count_subnormal(tensor) == 0
    conv = next(m for m in fused.modules() if isinstance(m, FusedConv) and m.weight.shape[2] == 1)
    assert not conv.weight[0].any()
    assert conv.weight[1].any()  # small, but not subnormal
    assert relative_error(logits(fused, images), logits(model, images)) < 1e-5


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_half_precision(model, images, dtype):
    check_half_precision(model, images, logits(model, images), dtype)


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
def test_half_precision_without_winograd(images, channels_last):
    tiny = small_model(TINY)
    got = fuse(tiny, dtype=BF16, channels_last=channels_last)(images)
    assert relative_error(got, logits(tiny, images)) <= 0.05


@pytest.mark.parametrize("name", golden_data.NAMES[::2])
def test_labels_through_segment_and_predictor(name):
    golden = golden_data.vectors(name)
    fused = fuse(golden_data.golden_model(name))
    labels = segment(fused, golden["image"])
    assert (labels == golden["label"]).mean() >= 0.9999
    (predicted,) = Predictor(fused, fused.protocol)([golden["image"]])
    assert (predicted.numpy() == labels).all()


def test_it_keeps_what_describes_the_model(model):
    fused = fuse(model)
    assert fused.protocol == model.protocol
    assert fused.num_classes == 5
    assert fused.architecture == SMALL
    assert not fused.training
    assert not any(p.requires_grad for p in fused.parameters())


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("architecture", [SMALL, TINY], ids=["small", "tiny"])
def test_it_is_the_same_function(architecture, channels_last, images):
    model = small_model(architecture)
    want = logits(model, images)
    got = fuse(model, channels_last=channels_last)(images)
    assert got.shape == want.shape
    assert relative_error(got, want) <= 1e-5


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 8), (33, 16)], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_sizes(model, size, dtype):
    images = torch.randn(1, 3, *size)
    want = logits(model, images)
    got = fuse(model, dtype=dtype)(images)
    assert got.shape == want.shape
    assert relative_error(got, want) <= (1e-5 if dtype == FP32 else 0.1)


@pytest.mark.parametrize(
    ("dtype", "channels_last", "value"),
    [
        (FP32, True, math.nan),
        (FP32, True, math.inf),
        (BF16, True, math.nan),
        (FP16, True, math.nan),
        (FP32, False, math.nan),
    ],
    ids=["fp32", "infinity", "bf16", "fp16", "nchw"],
)
def test_an_image_that_is_not_finite_gets_nan_as_from_the_model(
    model, images, dtype, channels_last, value
):
    fused = fuse(model, dtype=dtype, channels_last=channels_last)
    broken = images.clone()
    broken[0, 1, 20, 30] = value
    assert logits(model, broken)[0].isnan().all()
    got = fused(broken)
    assert got[0].isnan().all()
    assert torch.equal(got[1], fused(images)[1])


def test_the_model_stays_as_it_is_and_shares_nothing(images):
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model)
    taken = {value.data_ptr() for value in model.state_dict().values()}
    assert not taken & {value.data_ptr() for value in fused.state_dict().values()}
    given = images.clone()
    fused(given)
    assert torch.equal(given, images)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_its_weights_take_no_more_memory_than_the_model_s(model, dtype):
    fused = fuse(model, dtype=dtype)
    held = sum(value.nbytes for value in fused.state_dict().values())
    assert held <= sum(value.numel() for value in model.state_dict().values()) * dtype.itemsize


def test_autocast_changes_nothing(model, images):
    fused = fuse(model)
    want = fused(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(images), want)


@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
def test_its_dtype_cannot_be_changed(images, change):
    fused = fuse(small_model(TINY))
    want = fused(images)
    with pytest.raises(ValueError) as raised:
        getattr(fused, change)()
    dtype = {"half": FP16, "bfloat16": BF16, "double": torch.float64}[change]
    assert str(raised.value) == (
        f"a network fused in torch.float32 cannot be changed to {dtype}; call "
        "fuse(model, dtype=...)"
    )
    with torch.device("meta"):  # the default device does not matter
        assert fused.cpu() is fused
    assert torch.equal(fused.float().to("cpu", FP32)(images), want)


def test_no_gradient_flows(model, images):
    assert not fuse(model)(images.clone().requires_grad_()).requires_grad


def test_the_convolutions_of_the_concatenation_are_split_and_shared(model):
    head = fuse(model).decode_head
    convs = [module for module in head.modules() if isinstance(module, FusedConv)]
    assert len(convs) == 4  # shared_conv, bottleneck, conv_cat, conv_seg
    assert head.shared_conv.bias.shape == (SMALL.ema_channels + SMALL.head_channels,)


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 1e-5), (BF16, 3e-2)], ids=["fp32", "bf16"])
def test_the_shared_convolution_runs_as_two_on_a_gpu(images, dtype, tolerance, channels_last):
    fused = fuse(small_model(TINY), dtype=dtype, channels_last=channels_last)
    shared = fused.decode_head.shared_conv
    assert shared.merged
    x = fused.backbone(images.to(dtype))
    (first, second), logits = shared(x), fused(images)
    shared.merged = False
    got = shared(x)
    for one, two, channels in zip((first.relu(), second), got, shared.sizes, strict=True):
        assert (two.dtype, two.shape) == (dtype, (x.shape[0], channels, *x.shape[2:]))
        assert relative_error(two, one) <= tolerance
    assert got[0].min() == 0 > got[1].min()
    assert relative_error(fused(images), logits) <= tolerance


def flops(network, images):
    with FlopCounterMode(display=False) as counter:
        network(images)
    return counter.get_total_flops()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
def test_it_has_as_many_flops_as_the_model(model, images, channels_last, device):
    fused = fuse(model, channels_last=channels_last).to(device)
    want = flops(model, images)
    assert want > 1e8
    assert flops(fused, images.to(device)) == want


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_an_empty_batch_passes(model, dtype, channels_last):
    fused = fuse(model, dtype=dtype, channels_last=channels_last)
    want = logits(model, torch.zeros(0, 3, 49, 70)).shape
    assert fused(torch.zeros(0, 3, 49, 70)).shape == want == (0, 5, 7, 9)


def through_pickle(network):
    return pickle.loads(pickle.dumps(network))


def through_save(network):
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_compile(network):
    torch.compiler.reset()
    return torch.compile(network, fullgraph=True, backend="aot_eager")


def through_export(network, size=(41, 66)):
    # Any size but those below 9, where the network's shapes take other branches.
    sizes = ({0: DIM, 2: DIM, 3: DIM},)
    example = (torch.zeros(3, 3, *size),)
    return torch.export.export(network, example, dynamic_shapes=sizes).module()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "through",
    [copy.deepcopy, through_pickle, through_save, through_compile, through_export],
    ids=["deepcopy", "pickle", "save", "compile", "export"],
)
def test_it_survives(model, images, through, dtype):
    fused = fuse(model, dtype=dtype)
    want = fused(images)
    assert torch.equal(through(fused)(images), want)


@needs_free_sizes
def test_an_exported_network_takes_any_size(model, images):
    fused = fuse(model)
    want = fused(images)
    assert torch.equal(through_export(fused, (40, 64))(images), want)


def test_it_is_made_of_ordinary_tensors(images):
    with torch.inference_mode():
        fused = fuse(small_model())
    assert not any(tensor.is_inference() for tensor in fused.state_dict().values())
    fused.load_state_dict(fused.state_dict())
