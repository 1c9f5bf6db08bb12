"""Networks in the hands of others: mmsegmentation itself, ONNX Runtime, TensorRT.

None of them is a dependency; where one does not import it is ``Absent``.
"""

import functools
import importlib
import io
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from emanet_triton.bench.case import Absent
from emanet_triton.bench.peers import mmseg_network
from emanet_triton.errors import describe
from emanet_triton.models.emanet import EMANet

# From a network and an example of its inputs, on the same device, to what runs it.
Maker = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]


def import_peer(name: str) -> ModuleType:
    """Import a package that need not be there.

    Raises:
        Absent: it does not import, with the reason.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package built for another PyTorch may raise anything
        raise Absent(describe(error)) from None


class LogitsOnly(nn.Module):
    """A network as mmseg's operations, for exporters: images → logits."""

    def __init__(self, model: EMANet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return mmseg_network(self.model, images)


def onnxruntime(device: str) -> Maker:
    """ONNX Runtime on "cpu" or "cuda".

    Raises:
        Absent: it is not there, or not for this device.
    """
    runtime = import_peer("onnxruntime")
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    if provider not in runtime.get_available_providers():
        raise Absent(f"onnxruntime has no {provider}")
    import_peer("onnxscript")  # which torch.onnx needs
    return functools.partial(_exported, runtime, provider)


def _exported(
    runtime: ModuleType, provider: str, model: nn.Module, example: Tensor
) -> Callable[[Tensor], Tensor]:
    file = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(model, (example,), dynamo=True, verbose=False).save(file)
        shape = model(example).shape
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    settings = {"use_tf32": "0"} if example.is_cuda else {}
    session = runtime.InferenceSession(file.getvalue(), options, providers=[(provider, settings)])
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
        Absent: it is not there, or there is no GPU.
    """
    if device != "cuda":
        raise Absent("Torch-TensorRT needs a GPU")
    import_peer("torch_tensorrt")  # registers the backend
    return _by_tensorrt


def _by_tensorrt(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    model = model.to(torch.bfloat16)
    network = torch.compile(model, backend="tensorrt", dynamic=False)
    return lambda images: network(images.to(torch.bfloat16))


def mmsegmentation(model: EMANet, device: str) -> Callable[[Tensor, tuple[int, int]], Tensor]:
    """mmsegmentation 0.x's network with the weights of ours.

    Returns:
        A function of normalised inputs and the image's (height, width) that returns the labels,
        int64 [1, H, W] on the host.
    """
    mmseg = import_peer("mmseg")
    if not mmseg.__version__.startswith("0."):
        raise Absent(f"mmsegmentation 0.x is needed, {mmseg.__version__} is installed")
    config = import_peer("mmcv").ConfigDict(_config(model))
    network = import_peer("mmseg.models").build_segmentor(config)
    network.load_state_dict(model.state_dict())
    network = network.to(device).eval()

    def simple_test(inputs: Tensor, size: tuple[int, int]) -> Tensor:
        shape = *inputs.shape[2:], 3
        meta = {
            "ori_shape": (*size, 3),
            "img_shape": shape,
            "pad_shape": shape,
            "flip": False,
        }
        return torch.from_numpy(network.simple_test(inputs, [meta])[0])[None]

    return simple_test


def _config(model: EMANet) -> dict[str, object]:
    """As mmseg's configs/_base_/models/emanet_r50-d8.py, with one process's batch norm."""
    sizes, protocol = model.architecture, model.protocol
    norm = {"type": "BN"}
    stage3, stage4 = (32 * sizes.base_channels // 2**shift for shift in (1, 0))
    head = {
        "num_classes": model.num_classes,
        "norm_cfg": norm,
        "align_corners": protocol.align_corners,
        "dropout_ratio": 0.1,
    }
    return {
        "type": "EncoderDecoder",
        "backbone": {
            "type": "ResNetV1c",
            "depth": {6: 50, 23: 101}[sizes.blocks[2]],
            "stem_channels": sizes.base_channels,
            "base_channels": sizes.base_channels,
            "strides": (1, 2, 1, 1),
            "dilations": (1, 1, 2, 4),
            "norm_cfg": norm,
            "norm_eval": False,
            "style": "pytorch",
            "contract_dilation": True,
        },
        "decode_head": head
        | {
            "type": "EMAHead",
            "in_channels": stage4,
            "in_index": 3,
            "channels": sizes.head_channels,
            "ema_channels": sizes.ema_channels,
            "num_bases": sizes.num_bases,
            "num_stages": sizes.num_stages,
            "momentum": 0.1,
        },
        "auxiliary_head": head
        | {
            "type": "FCNHead",
            "in_channels": stage3,
            "in_index": 2,
            "channels": sizes.head_channels,
            "num_convs": 1,
            "concat_input": False,
        },
        "test_cfg": {"mode": protocol.mode, "crop_size": protocol.crop, "stride": protocol.stride},
    }
