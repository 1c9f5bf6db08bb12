"""From a model's name and checkpoint to the network that runs, on its device."""

import contextlib
import os
from collections.abc import Sequence

import torch

from emanet_triton.errors import InputError, first_line
from emanet_triton.inference.calibration import Calibration
from emanet_triton.inference.predictor import HALF
from emanet_triton.inference.quantize import quantize, require_int8
from emanet_triton.kernels import choice
from emanet_triton.models.checkpoint import Checkpoint
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.loading import load_into
from emanet_triton.models.network import Network
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.verified import verified_fuse
from emanet_triton.models.zoo import create_model

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
INT8 = "int8"  # a further precision, which needs images to take its ranges from
FEW_IMAGES = 20  # for fewer, no time is spent on measuring a CPU's convolutions


def open_device(name: str | None, precisions: Sequence[str | None], rank: int = 0) -> torch.device:
    """The device of ``--device``, tried with a small tensor.

    Args:
        name: such as ``"cpu"`` or ``"cuda:1"``; ``None``: a GPU if there is one.
        precisions: that will run on the device.
        rank: of this process among those of this machine; ``"cuda"`` means this GPU.

    Raises:
        InputError: there is no such device, or it lacks a precision.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{rank}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"--device {name}: no such device here ({first_line(error)}); expected cpu or cuda[:N]"
        ) from None
    if "tf32" in precisions and device.type != "cuda":
        raise InputError(f"tf32 is a precision of CUDA devices, got --device {device}")
    if INT8 in precisions:
        if device.type != "cpu":
            raise InputError(
                f"{INT8} is a precision of CPUs, got --device {device}; expected --device cpu"
            )
        require_int8()
    if device.type not in ("cpu", "cuda"):  # such as "meta", whose tensors have no values
        raise InputError(f"--device {name}: is not supported; expected cpu or cuda[:N]")
    return device


def require_compiler(device: torch.device) -> None:
    """Check that ``torch.compile`` can run the C++ compiler that it needs for a CPU.

    Raises:
        InputError: it cannot.
    """
    if device.type != "cpu":
        return
    # Here, because the import takes seconds.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):  # OSError: it may not be executed
        raise InputError(
            f"--compile: the C++ compiler {os.environ.get('CXX', 'g++')!r} cannot be run; expected "
            "g++, or another one that the environment variable CXX names"
        ) from None


def load_network(
    name: str,
    checkpoint: Checkpoint,
    device: torch.device,
    share: bool = False,
    num_classes: int | None = None,
) -> Network:
    """Build the plain network of a model on its device.

    Args:
        name: of the model in the zoo.
        checkpoint: its weights.
        device: of the network.
        share: use the checkpoint's own memory and dtypes instead of a copy in float32.
        num_classes: channels of the logits; by default the classes of the model's own data set.

    Raises:
        InputError: the weights do not fit.
    """
    model = create_model(name, num_classes=num_classes)
    load_into(model, checkpoint, share)
    return model.to(device)


def ready_network(
    name: str,
    checkpoint: Checkpoint,
    device: torch.device,
    precision: str,
    *,
    fuse: bool = True,
    images: int | None = None,
    num_classes: int | None = None,
    protocol: Protocol | None = None,
    calibration: Calibration | None = None,
) -> Network:
    """Build the network of a model as it runs: fused where it can be, and for int8 quantized.

    The checkpoint's tensors are released. tf32 runs the plain network.

    Args:
        name: of the model in the zoo.
        checkpoint: its weights.
        device: of the network.
        precision: one of ``PRECISIONS``, or ``INT8``.
        fuse: whether to fuse the network at all; int8 has no other form.
        images: how many there are; for a few, no convolution of an unknown CPU is measured.
        num_classes: channels of the logits; by default the classes of the model's own data set.
        protocol: how int8 resizes the images of ``calibration`` and cuts them into windows.
        calibration: the images from which int8 takes its ranges.

    Raises:
        InputError: the weights do not fit. For int8 also: the model has no such form, or an error
            of ``quantize``.
    """
    fused = precision == INT8 or (fuse and precision != "tf32")
    share = fused and device.type == "cpu"
    model = load_network(name, checkpoint, device, share, num_classes)
    checkpoint.release()
    if not fused:
        return model
    if precision == INT8 and not isinstance(model, EMANet):
        raise InputError(f"{name} has no int8 form; expected another precision")
    few = device.type == "cpu" and images is not None and images < FEW_IMAGES
    with choice.without_measuring() if few else contextlib.nullcontext():
        if precision == INT8:
            return quantize(model, calibration.images() if calibration else [], protocol=protocol)
        network = verified_fuse(model, HALF.get(precision, torch.float32))
    if network is model:
        model.float()  # its tensors may still be the checkpoint's
    return network
