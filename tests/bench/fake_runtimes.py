"""A module that takes the place of OpenVINO: it runs the network by PyTorch."""

import ctypes
import sys
from types import ModuleType, SimpleNamespace

import torch

from emanet_triton.bench import runtimes

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class FakeTensor:
    """Has the memory of an array, but does not keep it alive, as OpenVINO's."""

    def __init__(self, array, shape, dtype):
        assert array.flags.c_contiguous
        self.pointer = array.__array_interface__["data"][0]
        self.bytes, self.shape, self.dtype = array.nbytes, shape, TYPES[dtype]

    def torch(self):
        memory = (ctypes.c_byte * self.bytes).from_address(self.pointer)
        return torch.frombuffer(memory, dtype=self.dtype).view(self.shape)


class FakeModel:
    """A compiled model and its request in one."""

    def __init__(self, model, examples, settings):
        self.model, self.settings, self.inputs = model, settings, {}
        with torch.no_grad():
            result = model(*examples)
        names = {dtype: name for name, dtype in TYPES.items()}
        type_name = names[result.dtype]
        kind = SimpleNamespace(get_type_name=lambda: type_name)
        self.result = SimpleNamespace(shape=list(result.shape), element_type=kind)

    def create_infer_request(self):
        return self

    def output(self, i):
        return (self.result,)[i]

    def set_input_tensor(self, i, tensor):
        self.inputs[i] = tensor

    def set_output_tensor(self, i, tensor):
        self.out = tensor

    def infer(self):
        inputs = [self.inputs[i].torch() for i in range(len(self.inputs))]
        self.out.torch().copy_(self.model(*inputs))


def fake_openvino(monkeypatch):
    """Install the module. It holds what the CPU can do and the models that it has compiled."""
    module = ModuleType("openvino")
    module.capabilities, module.compiled = ["FP32", "BF16"], []

    def compile_model(exported, device, settings):
        assert device == "CPU"
        module.compiled.append(FakeModel(*exported, settings))
        return module.compiled[-1]

    module.Core = lambda: SimpleNamespace(
        get_property=lambda *_: module.capabilities,
        read_model=lambda exported: exported,
        compile_model=compile_model,
    )
    module.Type = SimpleNamespace(**{name: name for name in TYPES})
    module.Tensor = FakeTensor
    monkeypatch.setitem(sys.modules, "openvino", module)
    monkeypatch.setitem(sys.modules, "onnxscript", ModuleType("onnxscript"))
    monkeypatch.setattr(runtimes, "exported", lambda model, *examples: (model, examples))
    return module
