import pytest
import torch
from conv_reference import assert_close_to_eager, make
from device import DEVICE, DTYPES, HALF, only_on, tiles_of
from torch import nn

from emanet_triton.kernels.conv import implicit_gemm as conv_triton
from emanet_triton.kernels.conv import op as conv

FP16, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32
PLACES = {"triton": DEVICE, "torch": "cpu"}

# Shapes that ``conv_rows`` takes if it has tiles, then shapes that ``conv_pointers`` takes, then
# shapes that ``conv_taps`` takes.
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
    "classes": ((1, 48, 5, 5), 19, 1, {"relu": False}),
    "8-channels": ((1, 8, 6, 7), 19, 3, {"residual": True}),
    "one-pixel": ((1, 40, 1, 1), 64, 3, {"residual": True}),
    "97-wide": ((1, 64, 2, 97), 64, 3, {"dilation": 2, "residual": True}),
}
TAPS = {
    "stem": ((1, 3, 17, 31), 32, 3, {"stride": 2}),
    "stem-even": ((2, 3, 10, 26), 64, 3, {"stride": 2, "residual": True}),
    "one-channel": ((3, 1, 5, 4), 1, 3, {"residual": True}),
    "2-channels": ((1, 2, 9, 7), 19, 3, {"dilation": 2, "relu": False}),
    "5-channels": ((2, 5, 7, 12), 72, 3, {"stride": 2, "dilation": 3, "residual": SINGLE}),
    "7-channels": ((1, 7, 13, 11), 64, 3, {"residual": SINGLE, "relu": False}),
    "stem-dilated-beyond-image": ((1, 3, 3, 5), 32, 3, {"dilation": 4}),
    "stem-one-pixel": ((1, 3, 1, 1), 32, 3, {"stride": 2, "residual": True}),
    "stem-1x1": ((2, 3, 7, 11), 32, 1, {"residual": True}),
    "63-channels": ((1, 63, 9, 8), 72, 1, {"stride": 2}),
}


def by_id(shapes):
    return [pytest.param(*case, id=name) for name, case in shapes.items()]


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


def check_triton(case, out_dtype, arch=None):
    found = conv_triton.conv_bias_act(
        *case.operands, case.stride, case.dilation, case.relu, out_dtype, "ieee", arch
    )
    assert found.dtype == out_dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    eager = case.eager(case.x.dtype)
    assert_close_to_eager(found, case.eager(torch.float64), eager)


@only_on("sm_90", "sm_100")
@pytest.mark.parametrize(("shape", "outputs", "kernel", "options"), by_id(ROWS))
def test_row_tiles(shape, outputs, kernel, options, launched):
    check_triton(make(shape, outputs, kernel, dtype=HALF, **options), HALF)
    assert [tile.kernel for tile in launched] == ["conv_rows"]


@pytest.mark.parametrize(("shape", "outputs", "kernel", "options"), by_id(POINTERS))
def test_pointers(shape, outputs, kernel, options, launched):
    check_triton(make(shape, outputs, kernel, dtype=HALF, **options), HALF)
    assert [tile.kernel for tile in launched] == ["conv_pointers"]


def check_taps(shape, outputs, kernel, options, dtype, launched):
    check_triton(make(shape, outputs, kernel, dtype=dtype, **options), dtype)
    assert [tile.kernel for tile in launched] == ["conv_taps"]


@pytest.mark.parametrize(("shape", "outputs", "kernel", "options"), by_id(TAPS))
def test_taps(shape, outputs, kernel, options, launched):
    check_taps(shape, outputs, kernel, options, HALF, launched)


@pytest.mark.parametrize("name", ["stem", "one-channel", "5-channels", "63-channels"])
def test_taps_in_float32(name, launched):
    check_taps(*TAPS[name], SINGLE, launched)


@pytest.mark.parametrize("arch", tiles_of("sm_80", "sm_90", "sm_100", "gfx942"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs", [32, 64])
def test_taps_of_every_architecture(outputs, arch, dtype):
    check_triton(make((1, 3, 19, 30), outputs, 3, stride=2, dtype=dtype), SINGLE, arch)


@pytest.mark.parametrize("arch", tiles_of("sm_80", "sm_90", "sm_100", "gfx942"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_architecture(arch, dtype):
    check_triton(make((1, 64, 2, 103), 72, 3, residual=True, dtype=dtype), dtype, arch)


@only_on("sm_90")
def test_the_widest_tile(launched, monkeypatch):
    monkeypatch.setattr("emanet_triton.kernels.conv.tiles._WIDE_PIXELS", 1)
    check_triton(make((1, 64, 2, 120), 264, 3, residual=True), FP16)
    assert launched[0].meta["BLOCK_O"] == 256


@pytest.mark.parametrize("backend", PLACES)
def test_a_convolution_may_be_split_at_its_input_channels(backend):
    whole = make((1, 128, 5, 9), 32, 3, residual=True, device=PLACES[backend])
    x, weight, bias, residual = whole.operands
    first = conv.conv_bias_act(
        x[:, :64],
        weight[:, :64],
        torch.zeros_like(bias),
        relu=False,
        out_dtype=SINGLE,
        backend=backend,
    )
    assert first.dtype == SINGLE
    found = conv.conv_bias_act(
        x[:, 64:], weight[:, 64:], bias, first + residual.float(), backend=backend
    )
    assert found.dtype == FP16
    assert_close_to_eager(found, whole.eager(torch.float64), whole.eager(FP16))


@pytest.mark.parametrize("dtype", [FP16, BF16, SINGLE], ids=str)
@pytest.mark.parametrize(("shape", "outputs", "kernel", "options"), by_id(POINTERS | TAPS))
def test_torch(shape, outputs, kernel, options, dtype):
    case = make(shape, outputs, kernel, dtype=dtype, device="cpu", **options)
    before = [operand if operand is None else operand.clone() for operand in case.operands]
    found = conv.conv_bias_act(*case.operands, **case.options, backend="torch")
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_close_to_eager(found, case.eager(torch.float64), case.eager(dtype))
    for operand, old in zip(case.operands, before, strict=True):
        assert operand is old is None or torch.equal(operand, old)


@pytest.mark.parametrize("backend", PLACES)
def test_any_memory_layout(backend):
    case = make((2, 20, 6, 5), 24, 3, residual=True, device=PLACES[backend])
    expected = conv.conv_bias_act(*case.operands, backend=backend)
    x, weight, bias, residual = case.operands
    strided = (t.repeat_interleave(2, dim=-1)[..., ::2] for t in (x.contiguous(), weight, bias))
    found = conv.conv_bias_act(*strided, residual.mT.contiguous().mT, backend=backend)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", PLACES)
def test_nan_and_infinity_reach_the_output(backend):
    case = make((1, 64, 3, 120), 64, 3, device=PLACES[backend])
    case.x[0, 5, 1, 60] = torch.nan
    case.bias[7] = torch.inf
    found = conv.conv_bias_act(*case.operands, backend=backend).cpu()
    is_nan = case.eager(SINGLE).isnan()
    assert torch.equal(found.isnan(), is_nan)
    assert torch.equal(found.isinf(), case.eager(SINGLE).isinf())
    assert is_nan.sum() == 64 * 9


@pytest.mark.usefixtures("ordered_products")
def test_an_image_does_not_depend_on_the_batch():
    case = make((3, 64, 5, 33), 64, 3, residual=True)
    found = conv.conv_bias_act(*case.operands, backend="triton")
    alone = conv.conv_bias_act(
        case.x[1:2], case.weight, case.bias, case.residual[1:2], backend="triton"
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
        ((X[0], W, B), {}, r"x must be \[B, C, H, W\], only B may be 0, got \[8, 6, 5\]"),
        ((X[:, :, :0], W, B), {}, r"x must be .* only B may be 0, got \[2, 8, 0, 5\]"),
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
            {"out_dtype": FP16},
            "out_dtype must be torch.float32, got torch.float16",
        ),
        ((X, W, B), {"backend": "cuda"}, "backend must be one of auto, fastest, .*, got 'cuda'"),
        ((X, W, B), {"precision": "fp8"}, "precision must be one of ieee, tf32x3, tf32, got 'fp8'"),
        ((X, W, B), {"backend": "cudnn"}, "'cudnn' needs an NVIDIA GPU and cuDNN; x is on cpu"),
    ],
)
def test_errors_say_what_they_got_and_wanted(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        conv.conv_bias_act(*arguments, **options)


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr(conv_triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs tensors on a GPU, or TRITON_INTERPRET=1"):
        conv.conv_bias_act(X, W, B, backend="triton")


def test_an_axis_of_one_element_may_have_any_stride(launched):
    """As one image of a larger buffer has. A descriptor takes multiples of 16 bytes only."""
    case = make((1, 64, 2, 128), 64, 3)
    _, *strides = case.x.stride()
    x = case.x.as_strided(case.x.shape, (case.x.numel() + 1, *strides))
    found = conv.conv_bias_act(x, case.weight, case.bias, backend="triton")
    assert [tile.kernel for tile in launched] == ["conv_rows"]
    assert_close_to_eager(found, case.eager(torch.float64), case.eager(FP16))


def test_triton_numbers_pixels_in_32_bits():
    x = torch.zeros(1, 1, 1, 1, dtype=FP16, device=DEVICE).expand(2**11, 1, 2**10, 2**10)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 pixels at once, got 2147483648"):
        conv.conv_bias_act(x, x[:1, :, :1, :1], x[0, 0, 0, :1], backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_changes_no_backend(backend):
    case = make((2, 8, 6, 5), 4, 3, dtype=torch.float32)
    with torch.autocast(case.x.device.type, torch.bfloat16):
        found = conv.conv_bias_act(*case.operands, backend=backend)
    assert_close_to_eager(found, case.eager(torch.float64), case.eager(torch.float32))


def test_unaligned_images_take_pointers(launched):
    case = make((1, 64, 2, 128), 64, 3)
    memory = case.x.new_zeros(case.x.numel() + 1)
    x = memory[1:].as_strided(case.x.shape, case.x.stride()).copy_(case.x)
    found = conv.conv_bias_act(x, case.weight, case.bias, backend="triton")
    assert [tile.kernel for tile in launched] == ["conv_pointers"]
    assert_close_to_eager(found, case.eager(torch.float64), case.eager(FP16))


@pytest.mark.skipif(DEVICE != "cuda" or not torch.version.cuda, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [FP16, BF16, SINGLE], ids=str)
@pytest.mark.parametrize(("shape", "outputs", "kernel", "options"), by_id(POINTERS | TAPS))
def test_cudnn_on_a_gpu(shape, outputs, kernel, options, dtype):
    case = make(shape, outputs, kernel, dtype=dtype, **options)
    found = conv.conv_bias_act(*case.operands, **case.options, backend="cudnn")
    assert_close_to_eager(found, case.eager(torch.float64), case.eager(dtype))


class Layer(nn.Module):
    """A small module of the operators, with dynamic shapes in mind."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        for name in ("first", "second"):
            case = make((1, 16, 4, 4), 16, 3)
            self.register_buffer(f"{name}_weight", case.weight)
            self.register_buffer(f"{name}_bias", case.bias)

    def forward(self, x):
        out = conv.conv_bias_act(
            x, self.first_weight, self.first_bias, stride=2, backend=self.backend
        )
        return conv.conv_bias_act(
            out, self.second_weight, self.second_bias, out, dilation=2, backend=self.backend
        )


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compile_and_export(backend):
    layer = Layer(backend)
    x = make((2, 16, 8, 6), 16, 3).x
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x[..., :5]), layer(x[..., :5]))
    sizes = {2: torch.export.Dim("H", min=3), 3: torch.export.Dim("W", min=3)}
    exported = torch.export.export(layer, (x,), dynamic_shapes=(sizes,)).module()
    assert torch.equal(exported(x), expected)
    assert torch.equal(exported(x[:, :, :7]), layer(x[:, :, :7]))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("shape", [(2, 16, 5, 6), (1, 1, 1, 1)], ids=str)
def test_opcheck(backend, shape):
    case = make(shape, 8, 3, stride=2, residual=SINGLE)
    arguments = (*case.operands, 2, 1, True, FP16, backend, "ieee")
    torch.library.opcheck(torch.ops.emanet_triton.conv_bias_act, arguments)
