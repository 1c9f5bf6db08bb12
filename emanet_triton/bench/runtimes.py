"""Networks run by OpenVINO, ONNX Runtime and TensorRT.

None of them is a dependency. If one cannot be imported, the provider is ``Absent``.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emanet_triton.bench.case import Absent
from emanet_triton.bench.peers import mmseg_network
from emanet_triton.errors import describe
from emanet_triton.models.emanet import EMANet

# A network, examples of its inputs on the same device → a function that runs the network on inputs
# of the same shapes and dtypes, contiguous on a CPU.
Maker = Callable[..., Callable[..., Tensor]]
EXPORTER = "onnxscript"  # torch.onnx needs it
PEERS = ("openvino", "onnx", "onnxruntime", EXPORTER)  # packages of the extra "peers"
HINTS = {"fp32": "f32", "bf16": "bf16"}  # of precision, for OpenVINO
NAMES = {"f32": torch.float32, "bf16": torch.bfloat16}  # OpenVINO's names of dtypes


def import_peer(name: str) -> ModuleType:
    """Import a package that need not be installed, or a module of it.

    Raises:
        Absent: it cannot be imported, with the reason and the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package built for another PyTorch may raise anything
        in_extra = name.partition(".")[0] in PEERS
        command = "; pip install '.[peers]'" if in_extra else ""
        raise Absent(describe(error) + command) from None


class LogitsOnly(nn.Module):
    """A network as mmseg's operations, images → logits, in a form that can be exported."""

    def __init__(self, model: EMANet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return mmseg_network(self.model, images)


def find_openvino(device: str) -> tuple[ModuleType, Any]:
    """OpenVINO for "cpu" and its ``Core``.

    Raises:
        Absent: it or the exporter is not installed, or the device is no CPU.
    """
    if device != "cpu":
        raise Absent("OpenVINO needs a CPU")
    runtime = import_peer("openvino")
    import_peer(EXPORTER)
    return runtime, runtime.Core()


def has_bf16(core: Any) -> bool:
    """Whether OpenVINO finds bf16 instructions on this CPU."""
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def openvino(dtype: str, device: str) -> Maker:
    """OpenVINO on "cpu", which computes in "fp32" or "bf16".

    Raises:
        Absent: it is not installed, or not for this device or dtype.
    """
    runtime, core = find_openvino(device)
    if dtype == "bf16" and not has_bf16(core):
        raise Absent("OpenVINO finds no bf16 instructions on this CPU")

    def make(model: nn.Module, *examples: Tensor) -> Callable[..., Tensor]:
        return by_openvino(runtime, core, HINTS[dtype], exported(model, *examples))

    return make


def by_openvino(
    runtime: ModuleType, core: Any, hint: str, model_file: bytes
) -> Callable[..., Tensor]:
    """A function from inputs to the output of an ONNX file, on the CPU.

    Args:
        runtime: the package.
        core: its ``Core``.
        hint: the precision, in OpenVINO's words.
        model_file: with fixed shapes and one output.
    """
    settings = {
        "INFERENCE_PRECISION_HINT": hint,  # on a CPU with bf16 it would compute fp32 in bf16
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(model_file), "CPU", settings)
    request, result = compiled.create_infer_request(), compiled.output(0)
    shape, dtype = tuple(result.shape), NAMES[result.element_type.get_type_name()]
    types = {own: getattr(runtime.Type, name) for name, own in NAMES.items()}

    def shared(tensor: Tensor) -> Any:
        """OpenVINO's tensor in the same memory, which it does not keep alive."""
        # NumPy has no bf16: it sees integers.
        numbers = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        return runtime.Tensor(numbers.numpy(), list(tensor.shape), types[tensor.dtype])

    def forward(*inputs: Tensor) -> Tensor:
        inputs = tuple(tensor.contiguous() for tensor in inputs)
        out = torch.empty(shape, dtype=dtype)
        for i, tensor in enumerate(inputs):
            request.set_input_tensor(i, shared(tensor))
        request.set_output_tensor(0, shared(out))
        request.infer()
        return out

    return forward


def exported(model: nn.Module, *examples: Tensor) -> bytes:
    """A network as an ONNX file for inputs of exactly these shapes and dtypes."""
    with torch.no_grad():
        program = torch.onnx.export(model.eval(), examples, dynamo=True, verbose=False)
    assert program is not None  # it is None only if the model goes to a file
    return program.model_proto.SerializeToString()


def onnxruntime(device: str) -> Maker:
    """ONNX Runtime on "cpu" or "cuda", in float32.

    Raises:
        Absent: it is not installed, or not for this device.
    """
    runtime = import_peer("onnxruntime")
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    if provider not in runtime.get_available_providers():
        raise Absent(f"onnxruntime has no {provider}")
    import_peer(EXPORTER)
    return functools.partial(_by_onnxruntime, runtime, provider)


def _by_onnxruntime(
    runtime: ModuleType, provider: str, model: nn.Module, *examples: Tensor
) -> Callable[..., Tensor]:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else it slows the next
    settings = {"use_tf32": "0"} if provider.startswith("CUDA") else {}
    model_file = exported(model, *examples)
    session = runtime.InferenceSession(model_file, options, providers=[(provider, settings)])
    names, (result,) = [each.name for each in session.get_inputs()], session.get_outputs()

    def forward(*inputs: Tensor) -> Tensor:
        inputs = tuple(tensor.contiguous() for tensor in inputs)
        out = torch.empty(result.shape, device=inputs[0].device)
        binding = session.io_binding()
        for bind, name, tensor in (
            *((binding.bind_input, *pair) for pair in zip(names, inputs, strict=True)),
            (binding.bind_output, result.name, out),
        ):
            where = tensor.device.type, tensor.device.index or 0, np.float32
            bind(name, *where, tuple(tensor.shape), tensor.data_ptr())
        if out.is_cuda:
            torch.cuda.current_stream().synchronize()  # ONNX Runtime has a stream of its own
        session.run_with_iobinding(binding)
        return out

    return forward


def tensorrt(device: str) -> Maker:
    """Torch-TensorRT in bfloat16.

    Raises:
        Absent: it is not installed, or the device is no GPU.
    """
    if device != "cuda":
        raise Absent("Torch-TensorRT needs a GPU")
    import_peer("torch_tensorrt")  # registers the backend
    return _by_tensorrt


def _by_tensorrt(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    model = model.to(torch.bfloat16)
    network = torch.compile(model, backend="tensorrt", dynamic=False)
    return lambda images: network(images.to(torch.bfloat16))


# The providers of the suites: name → a function of the device that finds the runtime.
RUNTIMES: dict[str, Callable[[str], Maker]] = {
    "openvino-fp32": functools.partial(openvino, "fp32"),
    "openvino-bf16": functools.partial(openvino, "bf16"),
    "onnxruntime-fp32": onnxruntime,
    "tensorrt-bf16": tensorrt,
}
