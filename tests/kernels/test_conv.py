import pytest
import torch
from conv_reference import assert_close_to_eager, make, on_gpu
from torch import nn

from emanet_triton.kernels import conv, conv_choice, conv_providers, conv_triton

HALF, SINGLE, BF16 = torch.float16, torch.float32, torch.bfloat16

# Shapes that take the row tiles of sm_90, then shapes that take its pointers.
ROWS = {
    "3x3": ((1, 64, 3, 128), 64, 3, {"residual": True}),
    "partial-row": ((1, 64, 4, 104), 72, 3, {"dilation": 2, "residual": SINGLE}),
    "stride2": ((2, 64, 4, 208), 64, 3, {"stride": 2}),
    "stride2-1x1": ((1, 64, 2, 256), 96, 1, {"stride": 2, "relu": False}),
    "stride2-dilated": ((1, 64, 6, 256), 64, 3, {"stride": 2, "dilation": 2}),
    "1x1": ((2, 128, 9, 15), 64, 1, {"residual": True}),
    "1x1-one-pixel": ((1, 64, 1, 1), 19, 1, {"relu": False}),
}
POINTERS = {
    "3x3": ((2, 64, 7, 13), 64, 3, {"residual": True}),
    "dilation4": ((1, 64, 11, 9), 72, 3, {"dilation": 4, "residual": SINGLE}),
    "dilation-beyond-image": ((1, 64, 3, 5), 64, 3, {"dilation": 4}),
    "stride2-odd": ((2, 64, 9, 13), 64, 3, {"stride": 2}),
    "stride2-even": ((1, 32, 8, 12), 64, 3, {"stride": 2, "dilation": 2}),
    "stride2-1x1-odd": ((1, 64, 5, 7), 130, 1, {"stride": 2}),
    "stem": ((1, 3, 17, 15), 32, 3, {"stride": 2}),
    "classes": ((1, 48, 5, 5), 19, 1, {"relu": False}),
    "one-channel": ((3, 1, 5, 4), 1, 3, {"residual": True}),
    "one-pixel": ((1, 40, 1, 1), 64, 3, {"residual": True}),
    "97-wide": ((1, 64, 2, 97), 64, 3, {"dilation": 2, "residual": True}),
}


def by_id(shapes):
    return [pytest.param(*case, id=name) for name, case in shapes.items()]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a kernel leaves unwritten is NaN."""
    new_empty = torch.Tensor.new_empty

    def nan(*args, **kwargs):
        return new_empty(*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", nan)


@pytest.fixture
def launched(monkeypatch):
    """The tiles of the kernels that are launched."""
    tiles = []
    launch = conv_triton.launch

    def record(kernel, tile, *args, **kwargs):
        tiles.append(tile)
        launch(kernel, tile, *args, **kwargs)

    monkeypatch.setattr(conv_triton, "launch", record)
    return tiles


def check_triton(case, out_dtype, arch):
    found = conv_triton.conv_bias_act(
        *case.operands, case.stride, case.dilation, case.relu, out_dtype, "ieee", arch
    )
    assert found.dtype == out_dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    eager = case.eager(case.x.dtype)
    assert_close_to_eager(found, case.eager(torch.float64), eager)


@pytest.mark.parametrize(("shape", "outputs", "kernel", "options"), by_id(ROWS))
def test_row_tiles(shape, outputs, kernel, options, launched):
    check_triton(make(shape, outputs, kernel, **options), HALF, "sm_90")
    assert [tile.kernel for tile in launched] == ["conv_rows"]


@pytest.mark.parametrize(("shape", "outputs", "kernel", "options"), by_id(POINTERS))
def test_pointers(shape, outputs, kernel, options, launched):
    check_triton(make(shape, outputs, kernel, **options), HALF, "sm_90")
    assert [tile.kernel for tile in launched] == ["conv_pointers"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
def test_every_architecture(arch, dtype):
    check_triton(make((1, 64, 2, 103), 72, 3, residual=True, dtype=dtype), dtype, arch)


def test_the_widest_tile(launched, monkeypatch):
    monkeypatch.setattr("emanet_triton.kernels.conv_tiles._WIDE_PIXELS", 1)
    check_triton(make((1, 64, 2, 120), 264, 3, residual=True), HALF, "sm_90")
    assert launched[0].meta["BLOCK_O"] == 256


@pytest.mark.parametrize("provider", ["triton", "torch"])
def test_a_convolution_may_be_split_at_its_input_channels(provider):
    whole = make((1, 128, 5, 9), 32, 3, residual=True)
    x, weight, bias, residual = whole.operands
    first = conv.conv_bias_act(
        x[:, :64], weight[:, :64], torch.zeros(32), relu=False, out_dtype=SINGLE, provider=provider
    )
    assert first.dtype == SINGLE
    found = conv.conv_bias_act(
        x[:, 64:], weight[:, 64:], bias, first + residual.float(), provider=provider
    )
    assert found.dtype == HALF
    assert_close_to_eager(found, whole.eager(torch.float64), whole.eager(HALF))


@pytest.mark.parametrize("dtype", [HALF, BF16, SINGLE], ids=str)
@pytest.mark.parametrize(("shape", "outputs", "kernel", "options"), by_id(POINTERS))
def test_torch(shape, outputs, kernel, options, dtype):
    case = make(shape, outputs, kernel, dtype=dtype, **options)
    before = [operand if operand is None else operand.clone() for operand in case.operands]
    found = conv.conv_bias_act(*case.operands, **case.options, provider="torch")
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_close_to_eager(found, case.eager(torch.float64), case.eager(dtype))
    for operand, old in zip(case.operands, before, strict=True):
        assert operand is old is None or torch.equal(operand, old)


@pytest.mark.parametrize("provider", ["triton", "torch"])
def test_any_memory_layout(provider):
    case = make((2, 20, 6, 5), 24, 3, residual=True)
    expected = conv.conv_bias_act(*case.operands, provider=provider)
    x, weight, bias, residual = case.operands
    strided = (t.repeat_interleave(2, dim=-1)[..., ::2] for t in (x.contiguous(), weight, bias))
    found = conv.conv_bias_act(*strided, residual.mT.contiguous().mT, provider=provider)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("provider", ["triton", "torch"])
def test_nan_and_infinity_reach_the_output(provider):
    case = make((1, 64, 3, 120), 64, 3)
    case.x[0, 5, 1, 60] = torch.nan
    case.bias[7] = torch.inf
    found = conv.conv_bias_act(*case.operands, provider=provider)
    is_nan = case.eager(SINGLE).isnan()
    assert torch.equal(found.isnan(), is_nan)
    assert torch.equal(found.isinf(), case.eager(SINGLE).isinf())
    assert is_nan.sum() == 64 * 9


def test_an_image_does_not_depend_on_the_batch():
    case = make((3, 64, 5, 33), 64, 3, residual=True)
    found = conv.conv_bias_act(*case.operands, provider="triton")
    alone = conv.conv_bias_act(
        case.x[1:2], case.weight, case.bias, case.residual[1:2], provider="triton"
    )
    assert torch.equal(found[1:2], alone)


def test_packed_weights_are_a_matrix_and_packing_again_is_free():
    weight = torch.randn(5, 7, 3, 3)
    packed = conv.pack_weight(weight)
    assert torch.equal(packed, weight)
    matrix = packed.as_strided((5, 63), (63, 1))
    assert torch.equal(matrix, weight.permute(0, 2, 3, 1).reshape(5, 63))
    assert conv.pack_weight(packed).data_ptr() == packed.data_ptr()


X = torch.zeros(2, 8, 6, 5)
W = torch.zeros(4, 8, 3, 3)
B = torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], W, B), {}, r"x must be \[B, C, H, W\] and not empty, got \[8, 6, 5\]"),
        ((X[:0], W, B), {}, r"x must be .* not empty, got \[0, 8, 6, 5\]"),
        ((X.double(), W, B), {}, "x must be float32, float16 or bfloat16, got torch.float64"),
        (
            (X, W[:, :7], B),
            {},
            r"weight must be \[O, 8, 1, 1\] or \[O, 8, 3, 3\], got \[4, 7, 3, 3\]",
        ),
        ((X, W[..., :2], B), {}, r"weight must be .*, got \[4, 8, 3, 2\]"),
        ((X, W.repeat(1, 1, 2, 2)[..., :5, :5], B), {}, r"weight must be .*, got \[4, 8, 5, 5\]"),
        ((X, W[0], B), {}, r"weight must be .*, got \[8, 3, 3\]"),
        ((X, W.half(), B), {}, "weight must be torch.float32, got torch.float16"),
        ((X, W, B[:3]), {}, r"bias must be \[4\], got \[3\]"),
        ((X, W, B.half()), {}, "bias must be torch.float32, got torch.float16"),
        (
            (X.half(), W.half(), B.bfloat16()),
            {},
            "bias must be torch.float16 or torch.float32, got torch.bfloat16",
        ),
        ((X, W, B.to("meta")), {}, "bias must be on cpu like x, got meta"),
        ((X, W, B, X), {}, r"residual must be \[2, 4, 6, 5\], got \[2, 8, 6, 5\]"),
        ((X, W, B), {"stride": 3}, "stride must be 1 or 2, got 3"),
        ((X, W, B), {"dilation": 0}, "dilation must be at least 1, got 0"),
        (
            (X, W, B),
            {"out_dtype": HALF},
            "out_dtype must be torch.float32, got torch.float16",
        ),
        ((X, W, B), {"provider": "cuda"}, "provider must be one of auto, cudnn, .*, got 'cuda'"),
        ((X, W, B), {"precision": "fp8"}, "precision must be one of ieee, tf32x3, tf32, got 'fp8'"),
        ((X, W, B), {"provider": "cudnn"}, "'cudnn' needs an NVIDIA GPU and cuDNN; x is on cpu"),
    ],
)
def test_errors_say_what_they_got_and_wanted(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        conv.conv_bias_act(*arguments, **options)


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr(conv_triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs tensors on a GPU, or TRITON_INTERPRET=1"):
        conv.conv_bias_act(X, W, B, provider="triton")


def test_the_default_on_a_cpu_is_torch(monkeypatch):
    case = make((1, 8, 5, 5), 4, 3)
    called = []

    def record(*args):
        called.append(args)
        return conv_providers.torch_conv(*args)

    monkeypatch.setitem(conv_providers.CONVOLUTIONS, "torch", record)
    conv.conv_bias_act(*case.operands)
    assert len(called) == 1


class FakeCuda:
    """As much of a tensor on a GPU as the precision setting looks at."""

    is_cuda = True
    dtype = SINGLE


@pytest.mark.parametrize(
    ("precision", "wanted"), [("ieee", "ieee"), ("tf32x3", "ieee"), ("tf32", "tf32")]
)
def test_cudnn_multiplies_as_asked_and_its_setting_is_put_back(precision, wanted):
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision
    with conv_providers._cudnn_precision(FakeCuda(), precision):
        assert setting.fp32_precision == wanted
    assert setting.fp32_precision == before
    assert isinstance(torch.backends.cudnn.allow_tf32, bool)


@pytest.fixture
def nvidia(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.fixture
def amd(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")


def names(dtype, precision="ieee", residual=None, relu=True):
    return list(conv._candidates(on_gpu(X.to(dtype)), residual, relu, precision))


def test_what_is_measured_on_nvidia_gpus(nvidia, monkeypatch):
    assert names(HALF) == ["cudnn", "torch", "cudnn-benchmark", "triton"]
    assert names(HALF, relu=False) == ["torch", "cudnn-benchmark", "triton"]
    assert names(BF16, residual=X) == ["torch", "cudnn-benchmark", "triton"]
    assert names(SINGLE) == ["cudnn", "torch", "cudnn-benchmark", "triton-tf32x3"]
    assert names(SINGLE, "tf32") == ["cudnn", "torch", "cudnn-benchmark", "triton"]
    monkeypatch.setattr(conv, "HAS_TRITON", False)
    assert names(HALF) == ["cudnn", "torch", "cudnn-benchmark"]


def test_what_is_measured_on_amd_gpus(amd, monkeypatch):
    assert names(HALF) == ["torch", "triton"]
    assert names(SINGLE) == ["torch"]
    monkeypatch.setattr(conv, "HAS_TRITON", False)
    assert names(HALF) == ["torch"]


def test_without_a_gpu_there_is_nothing_to_measure():
    assert list(conv._candidates(X, None, True, "ieee")) == ["torch"]


@pytest.mark.parametrize(
    ("dtype", "precision", "winner", "wanted"),
    [
        (SINGLE, "ieee", "triton-tf32x3", ("triton", "tf32x3")),
        (SINGLE, "ieee", "cudnn-benchmark", ("cudnn-benchmark", "ieee")),
        (SINGLE, "tf32", "triton", ("triton", "tf32")),
        (HALF, "ieee", "triton", ("triton", "ieee")),
    ],
)
def test_the_winner_computes(nvidia, monkeypatch, dtype, precision, winner, wanted):
    called = []
    for name in conv_providers.CONVOLUTIONS:

        def compute(*args, name=name):
            called.append((name, args[-1]))
            return X

        monkeypatch.setitem(conv_providers.CONVOLUTIONS, name, compute)
    monkeypatch.setattr(conv_choice, "choose", lambda *_: winner)
    operands = on_gpu(X.to(dtype)), W.to(dtype), B.to(dtype)
    conv._run_conv_bias_act(*operands, None, 1, 1, True, dtype, "auto", precision)
    assert called == [wanted]


@pytest.fixture
def keys(monkeypatch):
    """What convolutions on a GPU are looked up by; plain PyTorch computes them."""
    found = []

    def choose(key, device, calls, last_resort, make_check):
        found.append(key)
        return last_resort

    monkeypatch.setattr(conv, "has_cudnn", lambda x: True)
    monkeypatch.setattr(conv_choice, "choose", choose)
    return found


def test_the_choice_is_made_by_all_that_decides_the_time(keys):
    residual = torch.zeros(2, 4, 6, 5)
    conv.conv_bias_act(X, W, B)
    conv.conv_bias_act(X[:1], W, B)
    conv.conv_bias_act(X.half(), W.half(), B)
    conv.conv_bias_act(X.half(), W.half(), B, out_dtype=SINGLE)
    conv.conv_bias_act(X, W, B, residual)
    conv.conv_bias_act(X, W, B, stride=2)
    conv.conv_bias_act(X, W, B, dilation=2)
    conv.conv_bias_act(X, W, B, relu=False)
    conv.conv_bias_act(X, W, B, precision="tf32")
    assert len(set(keys)) == 9
    conv.conv_bias_act(X + 1, W, B)
    assert keys[-1] == keys[0]


def test_unaligned_images_take_pointers(launched):
    case = make((1, 64, 2, 128), 64, 3)
    memory = torch.zeros(case.x.numel() + 1, dtype=HALF)
    x = memory[1:].as_strided(case.x.shape, case.x.stride()).copy_(case.x)
    found = conv.conv_bias_act(x, case.weight, case.bias, provider="triton")
    assert [tile.kernel for tile in launched] == ["conv_pointers"]
    assert_close_to_eager(found, case.eager(torch.float64), case.eager(HALF))


CUDNN_CALLS = {
    "plain": (False, True, ["cudnn_convolution_relu"]),
    "residual": (True, True, ["cudnn_convolution_add_relu"]),
    "no-relu": (True, False, []),
    "float32-residual": (SINGLE, True, []),
}


@pytest.mark.parametrize(
    ("residual", "relu", "wanted"), CUDNN_CALLS.values(), ids=CUDNN_CALLS.keys()
)
def test_cudnn_is_called_for_what_it_can_fuse(residual, relu, wanted, monkeypatch):
    calls = fake_cudnn(monkeypatch)
    case = make((1, 8, 5, 5), 4, 3, residual=residual, relu=relu, dilation=2)
    found = conv.conv_bias_act(*case.operands, **case.options, provider="cudnn")
    assert calls == wanted
    assert_close_to_eager(found, case.eager(torch.float64), case.eager(HALF))


def test_cudnn_never_gets_its_input_as_residual(monkeypatch):
    calls = fake_cudnn(monkeypatch)
    case = make((1, 8, 5, 5), 8, 1)
    found = conv.conv_bias_act(case.x, case.weight, case.bias, case.x, provider="cudnn")
    assert calls == []
    expected = conv.conv_bias_act(case.x, case.weight, case.bias, case.x, provider="torch")
    assert torch.equal(found, expected)


def fake_cudnn(monkeypatch):
    """Stand-ins with the signatures of cuDNN's operators; the names of those that were called."""
    calls = []

    def relu(x, weight, bias, stride, padding, dilation, groups):
        calls.append("cudnn_convolution_relu")
        return nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        calls.append("cudnn_convolution_add_relu")
        out = nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return (out + alpha * z).relu()

    monkeypatch.setattr(conv_providers, "has_cudnn", lambda x: True)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    return calls


NO_ENGINE = RuntimeError("GET was unable to find an engine to execute this computation")
ILLEGAL = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def refusing_cudnn(monkeypatch):
    """cuDNN's fused operators raise ``errors[0]``, or compute if there is none."""
    calls, errors = fake_cudnn(monkeypatch), []
    fused = torch.cudnn_convolution_relu

    def relu(*args):
        out = fused(*args)
        if errors:
            raise errors[0]
        return out

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(conv_providers, "_REFUSED", set())
    return calls, errors


def test_a_shape_without_an_engine_goes_to_pytorch_and_is_remembered(refusing_cudnn):
    calls, errors = refusing_cudnn
    errors.append(NO_ENGINE)
    case = make((1, 8, 5, 5), 4, 3)
    message = (
        "cuDNN has no fused convolution of torch.float16 [1, 8, 5, 5] with [4, 8, 3, 3] and "
        f"dilation 1, so PyTorch's is used: {NO_ENGINE}"
    )
    with pytest.warns(UserWarning) as warned:
        for _ in range(2):
            found = conv.conv_bias_act(*case.operands, provider="cudnn")
            assert_close_to_eager(found, case.eager(torch.float64), case.eager(HALF))
    assert [str(w.message) for w in warned] == [message]
    assert len(calls) == 1
    errors.clear()
    conv.conv_bias_act(*make((1, 8, 5, 6), 4, 3).operands, provider="cudnn")
    assert len(calls) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), ILLEGAL])
def test_other_errors_of_cudnn_are_not_taken_for_a_missing_engine(refusing_cudnn, error):
    refusing_cudnn[1].append(error)
    with pytest.raises(type(error), match=str(error)):
        conv.conv_bias_act(*make((1, 8, 5, 5), 4, 3).operands, provider="cudnn")
    assert not conv_providers._REFUSED


@pytest.mark.parametrize(
    ("short", "wanted"), [(True, torch.OutOfMemoryError), (False, RuntimeError)], ids=str
)
def test_no_engine_for_lack_of_memory(refusing_cudnn, monkeypatch, short, wanted):
    """PyTorch's convolution finds none, either, and its allocator knows why."""

    def refuse(*args):
        raise NO_ENGINE

    case = make((1, 8, 5, 5), 4, 3)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", refuse)
    monkeypatch.setattr(conv_providers.F, "conv2d", refuse)
    monkeypatch.setattr(conv_providers.MemoryWatch, "_is_short", lambda watch: short)
    with pytest.raises(RuntimeError, match="unable to find an engine") as caught:
        conv.conv_bias_act(*case.operands, provider="cudnn")
    assert type(caught.value) is wanted
    assert not conv_providers._REFUSED


@pytest.mark.parametrize("recording", [False, True], ids=["eager", "recording"])
def test_cudnn_measures_its_engines_only_where_asked(monkeypatch, recording):
    fake_cudnn(monkeypatch)
    fused, settings = torch.cudnn_convolution_relu, []

    def relu(*args):
        settings.append((torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic))
        return fused(*args)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
    case = make((1, 8, 5, 5), 4, 3)
    for provider in ("cudnn", "cudnn-benchmark", "cudnn"):
        found = conv.conv_bias_act(*case.operands, provider=provider)
        assert_close_to_eager(found, case.eager(torch.float64), case.eager(HALF))
    usual = (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)
    assert settings == [usual, (not recording, True), usual]


class Layer(nn.Module):
    """A small module of the operators, with dynamic shapes in mind."""

    def __init__(self, provider):
        super().__init__()
        self.provider = provider
        for name in ("first", "second"):
            case = make((1, 16, 4, 4), 16, 3)
            self.register_buffer(f"{name}_weight", case.weight)
            self.register_buffer(f"{name}_bias", case.bias)

    def forward(self, x):
        out = conv.conv_bias_act(
            x, self.first_weight, self.first_bias, stride=2, provider=self.provider
        )
        return conv.conv_bias_act(
            out, self.second_weight, self.second_bias, out, dilation=2, provider=self.provider
        )


@pytest.mark.parametrize("provider", ["auto", "triton"])
def test_compile_and_export(provider):
    layer = Layer(provider)
    x = make((2, 16, 8, 6), 16, 3).x
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x[..., :5]), layer(x[..., :5]))
    sizes = {2: torch.export.Dim("H", min=3), 3: torch.export.Dim("W", min=3)}
    exported = torch.export.export(layer, (x,), dynamic_shapes=(sizes,)).module()
    assert torch.equal(exported(x), expected)
    assert torch.equal(exported(x[:, :, :7]), layer(x[:, :, :7]))


@pytest.mark.parametrize("provider", ["auto", "triton"])
@pytest.mark.parametrize("shape", [(2, 16, 5, 6), (1, 1, 1, 1)], ids=str)
def test_opcheck(provider, shape):
    case = make(shape, 8, 3, stride=2, residual=SINGLE)
    arguments = (*case.operands, 2, 1, True, HALF, provider, "ieee")
    torch.library.opcheck(torch.ops.emanet_triton.conv_bias_act, arguments)
