"""The network run by ONNX Runtime and by TensorRT.

Neither is a dependency. If one cannot be imported, the provider is ``Absent``.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from emanet_triton.bench.case import Absent
from emanet_triton.bench.peers import mmseg_network
from emanet_triton.errors import describe
from emanet_triton.models.emanet import EMANet

# A network, an example of its inputs on the same device → a function that runs the network.
Maker = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]


def import_peer(name: str) -> ModuleType:
    """Import a package that need not be installed.

    Raises:
        Absent: it cannot be imported, with the reason.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package built for another PyTorch may raise anything
        raise Absent(describe(error)) from None


class LogitsOnly(nn.Module):
    """A network as mmseg's operations, images → logits, in a form that can be exported."""

    def __init__(self, model: EMANet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return mmseg_network(self.model, images)


def onnxruntime(device: str) -> Maker:
    """ONNX Runtime on "cpu" or "cuda".

    Raises:
        Absent: it is not installed, or not for this device.
    """
    runtime = import_peer("onnxruntime")
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    if provider not in runtime.get_available_providers():
        raise Absent(f"onnxruntime has no {provider}")
    import_peer("onnxscript")  # torch.onnx needs it
    return functools.partial(_exported, runtime, provider)


def _exported(
    runtime: ModuleType, provider: str, model: nn.Module, example: Tensor
) -> Callable[[Tensor], Tensor]:
    with torch.no_grad():
        program = torch.onnx.export(model, (example,), dynamo=True, verbose=False)
        shape = model(example).shape
    assert program is not None  # it is None only if the model goes to a file
    exported = program.model_proto.SerializeToString()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    settings = {"use_tf32": "0"} if example.is_cuda else {}
    session = runtime.InferenceSession(exported, options, providers=[(provider, settings)])
    (source,), (result,) = (
        [each.name for each in ends] for ends in (session.get_inputs(), session.get_outputs())
    )

    def forward(images: Tensor) -> Tensor:
        images = images.contiguous()
        logits = torch.empty(shape, device=images.device)
        binding = session.io_binding()
        for bind, end, tensor in (
            (binding.bind_input, source, images),
            (binding.bind_output, result, logits),
        ):
            where = tensor.device.type, tensor.device.index or 0, np.float32
            bind(end, *where, tuple(tensor.shape), tensor.data_ptr())
        if images.is_cuda:
            torch.cuda.current_stream().synchronize()  # ONNX Runtime has a stream of its own
        session.run_with_iobinding(binding)
        return logits

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
