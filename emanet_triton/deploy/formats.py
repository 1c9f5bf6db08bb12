"""The kinds of files: how each is written, and how each is run again to check it."""

import contextlib
import copy
import importlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from emanet_triton.deploy.parts import IMAGE_TO_LABELS, LOGITS
from emanet_triton.deploy.program import OWN, Program, Request, make_program
from emanet_triton.errors import InputError, describe
from emanet_triton.models.checkpoint import layout_metadata, read_checkpoint
from emanet_triton.models.checkpoint_files.safetensors_file import write_safetensors
from emanet_triton.models.loading import load_into

Runner = Callable[[Tensor], Tensor]
OPSET = 18
_CUDA = "CUDAExecutionProvider"  # of ONNX Runtime
INPUT = "images"
INSTALL = "pip install '.[export]'"


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        suffix: of the file's name.
        write: writes what is requested to a path.
        run: opens the file, and returns a function from an input to the output.
        packages: that ``write`` imports.
        runtime: the package that ``run`` imports; empty: PyTorch.
        beside: the suffix of a second file; empty if there is none.
    """

    suffix: str
    write: Callable[[Request, Path], None]
    run: Callable[[Path, Request], Runner]
    packages: tuple[str, ...] = ()
    runtime: str = ""
    beside: str = ""

    def files(self, file: Path) -> tuple[Path, ...]:
        """The file, and the second one if there is one."""
        return (file, file.with_suffix(self.beside)) if self.beside else (file,)


def require(name: str) -> ModuleType:
    """Import an optional package.

    Raises:
        InputError: it cannot be imported. The message has the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package built for another PyTorch may raise anything
        raise InputError(
            f"{name} is needed and cannot be imported ({describe(error)}): {INSTALL}"
        ) from None


def onnx_model(program: Program) -> Any:
    """A program as an ONNX model (``onnx.ModelProto``) with operators of the standard alone."""
    with _quiet():
        converted = torch.onnx.export(
            program.exported,
            (program.example,),
            input_names=[INPUT],
            output_names=[program.request.output],
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert converted is not None  # it is None only if the model goes to a file
    model = converted.model_proto
    _name_free_axes(model)
    for key, text in program.metadata.items():
        model.metadata_props.add(key=key, value=text)
    return model


def _name_free_axes(model: Any) -> None:
    """Replace the exporter's names of free lengths, such as s34, everywhere."""
    (given,) = model.graph.input
    axes = [axis.dim_param for axis in given.type.tensor_type.shape.dim]
    free = dict(zip(filter(None, axes), ("batch", "height", "width"), strict=False))
    if not free:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, free)) + r")\b")
    for value in (given, *model.graph.output, *model.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = pattern.sub(lambda found: free[found[0]], axis.dim_param)


def _write_onnx(request: Request, path: Path) -> None:
    path.write_bytes(onnx_model(make_program(request)).SerializeToString())


def _run_onnx(path: Path, request: Request) -> Runner:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers: list[Any] = ["CPUExecutionProvider"]
    if request.device.type == "cuda":
        providers.insert(0, (_CUDA, {"use_tf32": "0"}))
        if _CUDA not in runtime.get_available_providers():
            raise InputError("this onnxruntime has no CUDA: pip install onnxruntime-gpu")
    session = runtime.InferenceSession(path, options, providers=providers)

    def run(images: Tensor) -> Tensor:
        (output,) = session.run(None, {INPUT: images.cpu().numpy()})
        return torch.from_numpy(output)

    return run


def _write_openvino(request: Request, path: Path) -> None:
    openvino = require("openvino")
    program = make_program(request)
    model = openvino.convert_model(io.BytesIO(onnx_model(program).SerializeToString()))
    for key, text in program.metadata.items():
        model.set_rt_info(text, [key])
    openvino.save_model(model, path, compress_to_fp16=request.precision == "fp16")


def _run_openvino(path: Path, request: Request) -> Runner:
    openvino = require("openvino")
    # OpenVINO computes in bfloat16 where the processor can, unless it is told otherwise.
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda images: torch.from_numpy(compiled([images.cpu().numpy()])[0])


def _write_torch(request: Request, path: Path) -> None:
    program = make_program(request)
    with _quiet():
        torch.export.save(program.exported, path, extra_files=program.metadata)


def _run_torch(path: Path, request: Request) -> Runner:
    return torch.export.load(path).module()


def _write_aoti(request: Request, path: Path) -> None:
    program = make_program(request)
    settings = {
        "aot_inductor.metadata": program.metadata,
        # Of the code around the kernels: long to optimise, and of no weight when it runs.
        "aot_inductor.compile_wrapper_opt_level": "O0",
    }
    with _quiet():
        torch._inductor.aoti_compile_and_package(
            program.exported, package_path=str(path), inductor_configs=settings
        )


def _run_aoti(path: Path, request: Request) -> Runner:
    return torch._inductor.aoti_load_package(str(path))


def _write_weights(request: Request, path: Path) -> None:
    layout = getattr(getattr(request.model, "architecture", None), "layout", None)
    metadata = {"format": "pt"} | layout_metadata(layout)
    metadata |= request.about.metadata() if request.about else {}
    path.write_bytes(write_safetensors(request.model.state_dict(), metadata))


def _run_weights(path: Path, request: Request) -> Runner:
    model = copy.deepcopy(request.model).float()
    load_into(model, read_checkpoint(path))
    return torch.no_grad()(model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings of exporters, which are about their own inner workings."""
    logger = logging.getLogger("torch.utils.cpp_extension")  # misses CUDA on every CPU
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


_ONNX = ("onnx", "onnxscript")
SAFETENSORS = "safetensors"  # the kind of file without a program
FORMATS = {
    "onnx": Format(".onnx", _write_onnx, _run_onnx, _ONNX, "onnxruntime"),
    "openvino": Format(
        ".xml", _write_openvino, _run_openvino, (*_ONNX, "openvino"), "openvino", ".bin"
    ),
    "torch": Format(".pt2", _write_torch, _run_torch),
    "aoti": Format(".pt2", _write_aoti, _run_aoti),
    SAFETENSORS: Format(".safetensors", _write_weights, _run_weights),
}


def refusal(to: str, request: Request) -> str:
    """Why a kind of file cannot be written; empty if it can."""
    plain = replace(request, batch=None, dynamic=False, protocol=request.model.protocol)
    if to == SAFETENSORS and (
        request != plain or (request.part, request.precision) != (LOGITS, "fp32")
    ):
        return (
            "a safetensors file has the model's weights alone; expected part logits, fp32, and no "
            "batch, dynamic or scale"
        )
    if request.part != LOGITS and request.model.num_classes > 255:
        return f"labels are uint8: expected at most 255 classes, got {request.model.num_classes}"
    resized_and_padded = request.protocol.base_scale and request.protocol.pad_size
    if request.part == IMAGE_TO_LABELS and request.dynamic and resized_and_padded:
        # torch.export would fix on which side of the padding's size the resized image is.
        return (
            f"{IMAGE_TO_LABELS} for all sizes does not both resize images and pad them to a size; "
            f"expected --scale native, no --dynamic, or --part {LOGITS}"
        )
    if request.operators == OWN and to != "torch":
        return f"a file of {to} has standard operators only; expected --operators standard"
    if to == "onnx" and request.precision == "bf16":
        return f"ONNX has no bfloat16 convolution in opset {OPSET}; expected fp32 or fp16"
    if to == "openvino" and request.precision == "bf16":
        return (
            "an OpenVINO file has no bfloat16 network; expected fp32, and where the file is loaded "
            "the setting INFERENCE_PRECISION_HINT=bf16"
        )
    if to == "openvino" and request.device.type != "cpu":
        return f"OpenVINO's file is made on a CPU, but the model is on {request.device}"
    return ""


def notes(to: str, request: Request) -> tuple[str, ...]:
    """Sentences that a user of such a file must know."""
    device = request.device.type
    if request.operators == OWN:
        return (
            "the program that loads this file must import emanet_triton first, and run it on the "
            f"same kind of device ({device})",
        )
    if to == "aoti":
        return (
            f"compiled for a {device} such as this one; others may not run it",
            "the package does not check its input: give it the recorded shape and dtype, "
            "contiguous in memory (AOTI_RUNTIME_CHECK_INPUTS=1 in the environment checks them)",
        )
    if to == "openvino":
        return (
            "OpenVINO computes in bfloat16 on processors that can, unless "
            "INFERENCE_PRECISION_HINT is f32 where the file is loaded",
        )
    return ()
