import pytest
import torch
from conv_reference import make
from golden_data import relative_error
from torch.nn import functional as F

from emanet_triton.kernels import device
from emanet_triton.kernels.conv import onednn as conv_cpu
from emanet_triton.kernels.conv.onednn import conv_bias_act_
from emanet_triton.kernels.conv.packed import COPIES

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
NHWC = torch.channels_last

CASES = {
    "1x1": ((1, 64, 7, 13), 32, 1, {"residual": True}),
    "3x3": ((2, 16, 9, 8), 24, 3, {}),
    "3x3-residual": ((1, 16, 9, 8), 24, 3, {"residual": True}),
    "no-relu": ((1, 16, 9, 8), 19, 1, {"relu": False}),
    "residual-no-relu": ((1, 16, 9, 8), 16, 1, {"residual": True, "relu": False}),
    "stride2": ((1, 3, 17, 15), 32, 3, {"stride": 2}),
    "stride2-1x1": ((1, 16, 8, 9), 32, 1, {"stride": 2, "residual": True}),
    "dilation2": ((1, 16, 11, 9), 8, 3, {"dilation": 2}),
    "one-pixel": ((1, 40, 1, 1), 64, 3, {"residual": True}),
    "one-pixel-1x1": ((1, 64, 1, 1), 64, 1, {"residual": True}),
    "one-channel": ((2, 1, 5, 4), 1, 1, {"residual": True}),
    "two-channels": ((2, 2, 5, 4), 2, 3, {"residual": True}),
}


WAYS = {  # dtype, and the dtypes that oneDNN has
    "fp32-onednn": (FP32, {FP32}),
    "bf16-onednn": (BF16, {FP32, BF16}),
    "bf16-in-fp32": (BF16, {FP32}),
    "fp16-in-fp32": (FP16, {FP32}),
    "fp32-plain": (FP32, set()),
    "bf16-plain": (BF16, set()),
    "fp16-plain": (FP16, set()),
}


@pytest.mark.parametrize(("dtype", "onednn"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(("shape", "outputs", "kernel", "options"), CASES.values(), ids=CASES)
def test_against_float64(shape, outputs, kernel, options, dtype, onednn, monkeypatch):
    if dtype in onednn and not device.has_onednn(dtype):
        pytest.skip("this CPU has no fast bfloat16; the other ways are tested")
    monkeypatch.setattr(conv_cpu, "has_onednn", onednn.__contains__)
    case = make(shape, outputs, kernel, dtype=dtype, device="cpu", **options)
    exact, eager = case.eager(torch.float64), case.eager(dtype)
    residual = case.residual
    if residual is not None:
        residual = residual.contiguous(memory_format=NHWC)
    got = conv_bias_act_(case.x, case.weight, case.bias.to(dtype), residual, **case.options)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=NHWC)
    assert got is residual or residual is None
    if onednn == {FP32} != {dtype}:  # it is rounded once
        assert relative_error(got, exact) <= torch.finfo(dtype).eps
    assert relative_error(got, exact) <= 2 * relative_error(eager, exact) + 1e-7


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_a_nan_of_float16_stays(residual):
    """An overflow becomes NaN in a later layer, and must be found in the logits."""
    case = make((1, 8, 4, 4), 8, 1, dtype=FP16, device="cpu", residual=residual)
    case.x[0, 3, 1, 2] = torch.inf
    case.weight[::2, 3], case.weight[1::2, 3] = 1, torch.nan
    added = case.residual.contiguous(memory_format=NHWC) if residual else None
    got = conv_bias_act_(case.x, case.weight, case.bias.to(FP16), added)
    assert got[0, ::2, 1, 2].isposinf().all()
    assert got[0, 1::2].isnan().all()


def test_operators_are_registered_in_full():
    case = make((1, 16, 9, 8), 16, 3, residual=True, dtype=FP32, device="cpu")
    geometry = case.x, case.weight, case.bias, 1, 1, True
    torch.library.opcheck(torch.ops.emanet_triton.conv_cpu, geometry)
    residual = case.residual.contiguous(memory_format=NHWC)
    torch.library.opcheck(torch.ops.emanet_triton.conv_cpu_add_, (residual, *geometry))


def test_a_residual_of_another_layout_is_read_only():
    case = make((1, 16, 9, 8), 16, 3, residual=True, dtype=FP32, device="cpu")
    before = case.residual.clone()
    got = conv_bias_act_(case.x, case.weight, case.bias, case.residual)
    in_place = case.residual.contiguous(memory_format=NHWC)
    assert torch.equal(got, conv_bias_act_(case.x, case.weight, case.bias, in_place))
    assert torch.equal(case.residual, before)
    assert torch.equal(in_place, got)


def test_wrong_residual():
    case = make((1, 16, 9, 8), 16, 3, residual=True, dtype=FP32, device="cpu")
    with pytest.raises(ValueError, match=r"like x, got torch\.bfloat16"):
        conv_bias_act_(case.x, case.weight, case.bias, case.residual.bfloat16())


@pytest.fixture
def _keeps_copies(monkeypatch):
    """Keep copies of float32 weights in oneDNN's layout, as for bfloat16 with AMX."""
    monkeypatch.setattr(conv_cpu, "PACKS", {(conv_cpu.cpu_capability(), FP32)})


@pytest.mark.usefixtures("_keeps_copies")
@pytest.mark.parametrize("name", ["1x1", "3x3", "3x3-residual", "stride2", "dilation2"])
def test_copies_of_weights_are_kept(name):
    shape, outputs, kernel, options = CASES[name]
    case = make(shape, outputs, kernel, dtype=FP32, device="cpu", **options)

    def error():
        residual = None if case.residual is None else case.residual.contiguous(memory_format=NHWC)
        got = conv_bias_act_(case.x, case.weight, case.bias, residual, **case.options)
        return relative_error(got, case.eager(torch.float64))

    held = len(COPIES)
    for _ in range(2):
        assert error() < 1e-6
    assert len(COPIES) == held + 1
    with torch.no_grad():
        case.weight.mul_(2)  # a change of the weight reaches its copy
    assert error() < 1e-6
    case.weight.data = case.weight.data / 2
    assert error() < 1e-6
    case.weight.data = case.weight.data.clone()
    error()
    assert len(COPIES) == held + 1


@pytest.mark.usefixtures("_keeps_copies")
@pytest.mark.parametrize(("channels", "copies"), [(16, 1), (15, 1), (17, 2)])
def test_an_image_of_another_size_takes_a_layout_of_its_own(channels, copies, monkeypatch):
    """Of many channels; with the layout for another size, the product would take half a second."""
    monkeypatch.setattr(conv_cpu, "CHANNELS_OF_MANY_LAYOUTS", 17)
    weight, bias, kept = torch.randn(8, channels, 3, 3), torch.randn(8), []
    for height in (9, 9, 40):
        x = torch.randn(1, channels, height, 12).contiguous(memory_format=NHWC)
        found = conv_bias_act_(x, weight, bias, relu=False)
        assert (
            relative_error(found, F.conv2d(x.double(), weight.double(), bias.double(), padding=1))
            < 1e-6
        )
        kept.append(COPIES[weight][1])
    assert len({id(copy) for copy in kept}) == copies


@pytest.mark.usefixtures("_keeps_copies")
def test_weights_of_inference_mode_run_without_a_copy():
    with torch.inference_mode():
        case = make((1, 16, 9, 8), 24, 3, dtype=FP32, device="cpu")
        got = conv_bias_act_(case.x, case.weight, case.bias, **case.options)
        assert relative_error(got, case.eager(torch.float64)) < 1e-6


@pytest.mark.usefixtures("_keeps_copies")
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("columns", [16, 32])
def test_a_wide_image_is_convolved_in_blocks(columns, dilation, monkeypatch):
    case = make((2, 8, 11, 37), 6, 3, dtype=FP32, device="cpu", dilation=dilation)
    whole = conv_bias_act_(case.x, case.weight, case.bias, **case.options)
    monkeypatch.setattr(conv_cpu, "CACHE_BYTES", 3 * 8 * 4 * columns)
    monkeypatch.setattr(conv_cpu, "BLOCK_ROWS", 4)
    convolved = []
    convolution = torch.ops.mkldnn._convolution_pointwise

    def count(x, *arguments):
        convolved.append(x.shape[3])
        return convolution(x, *arguments)

    monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise", count)
    in_blocks = conv_bias_act_(case.x, case.weight, case.bias, **case.options)
    assert len(convolved) == 3 * -(-37 // columns)
    assert max(convolved) <= columns + 2 * dilation
    assert in_blocks.is_contiguous(memory_format=NHWC)
    assert relative_error(in_blocks, whole) < 1e-6


@pytest.mark.usefixtures("_keeps_copies")
@pytest.mark.parametrize("relu", [True, False])
def test_a_product_to_more_channels(relu, monkeypatch):
    case = make((2, 16, 5, 7), 24, 1, dtype=FP32, device="cpu", relu=relu)
    monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise", None)  # it is not called
    got = conv_bias_act_(case.x, case.weight, case.bias, **case.options)
    assert got.is_contiguous(memory_format=NHWC)
    assert relative_error(got, case.eager(torch.float64)) < 1e-6
