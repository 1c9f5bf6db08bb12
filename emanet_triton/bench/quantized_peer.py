"""A network in 8 bits without our code: ONNX Runtime quantizes it, and OpenVINO runs it."""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor, nn

from emanet_triton.bench import runtimes

# A network of one input, examples of the input → a function that runs the network on an input of
# the same shape.
Maker = Callable[[nn.Module, Sequence[Tensor]], Callable[..., Tensor]]
TOOLS = ("onnx", "onnxruntime.quantization")


def openvino_int8(device: str) -> Maker:
    """OpenVINO on "cpu" with 8-bit convolutions; the rest is bf16 where the CPU has it.

    Raises:
        Absent: OpenVINO or ONNX Runtime is not installed, or the device is no CPU.
    """
    runtime, core = runtimes.find_openvino(device)
    for name in TOOLS:
        runtimes.import_peer(name)
    hint = runtimes.HINTS["bf16" if runtimes.has_bf16(core) else "fp32"]  # OpenVINO's default

    def make(model: nn.Module, examples: Sequence[Tensor]) -> Callable[..., Tensor]:
        model_file = quantized(runtimes.exported(model, examples[0]), examples)
        return runtimes.by_openvino(runtime, core, hint, model_file)

    return make


def quantized(model_file: bytes, examples: Sequence[Tensor]) -> bytes:
    """An ONNX file whose convolutions read and write 8-bit integers.

    Inputs and outputs are unsigned; their ranges go from the smallest to the largest value over all
    examples. Weights are signed, with a scale for each output channel.

    Args:
        model_file: an ONNX file with one input.
        examples: of this input, contiguous on the CPU.
    """
    onnx, tools = (runtimes.import_peer(name) for name in TOOLS)
    name = onnx.load_from_string(model_file).graph.input[0].name
    feeds = iter([{name: example.numpy()} for example in examples])
    with tempfile.TemporaryDirectory() as folder, _quiet():
        plain, result = Path(folder, "plain.onnx"), Path(folder, "quantized.onnx")
        plain.write_bytes(model_file)
        tools.quantize_static(
            plain,
            result,
            SimpleNamespace(get_next=lambda: next(feeds, None)),
            quant_format=tools.QuantFormat.QDQ,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["Conv"],
        )
        return result.read_bytes()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the advice to optimise the file first: the export has done it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
