"""From a network to a program of ``torch.export``, from which all files are written."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from emanet_triton.deploy.parts import (
    IMAGE_TO_LABELS,
    LABELS,
    LOGITS,
    ImageToLabels,
    Labels,
    Logits,
)
from emanet_triton.errors import InputError
from emanet_triton.inference.views import Size
from emanet_triton.models.description import Description
from emanet_triton.models.fused import fuse
from emanet_triton.models.network import Network
from emanet_triton.models.protocol import Protocol
from emanet_triton.versions import versions

STANDARD, OWN = "standard", "own"
OPERATORS = STANDARD, OWN
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
METADATA = "emanet_triton_export"  # the key of a file's description in its metadata
_SIZE_TO_COMPARE = (512, 512)  # of a file for all sizes, where the protocol has none


@dataclass(frozen=True)
class Request:
    """What is exported.

    Attributes:
        model: an EMANet in evaluation mode, on the device for which the file is.
        protocol: how images are resized and cut into windows.
        part: one of ``PARTS``.
        precision: of the network's weights and activations, a key of ``DTYPES``.
        size: (height, width) in pixels of the part's input.
        batch: images at once; ``None``: one, and ``image-to-labels`` has no axis for a batch.
        dynamic: whether batch and size are free; ``size`` is then only an example.
        operators: ``"standard"``: PyTorch's own; ``"own"``: this package's, which are faster.
        about: the model, if it is known.
    """

    model: Network
    protocol: Protocol
    part: str
    precision: str
    size: Size
    batch: int | None
    dynamic: bool
    operators: str
    about: Description | None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def single(self) -> bool:
        """Whether the input has no axis for a batch."""
        return self.part == IMAGE_TO_LABELS and self.batch is None and not self.dynamic

    @property
    def output(self) -> str:
        """The name of the output."""
        return LOGITS if self.part == LOGITS else LABELS

    def description(self) -> dict[str, Any]:
        """What a user of the file must know, as JSON values."""
        height, width = ("height", "width") if self.dynamic else self.size
        batch = "batch" if self.dynamic else self.batch or 1
        if self.part == IMAGE_TO_LABELS:
            image = [height, width, 3] if self.single else [batch, height, width, 3]
            given = {"dtype": "uint8", "shape": image, "values": "RGB, 0 to 255"}
        else:
            shape = [batch, 3, height, width]
            values = "RGB, minus mean, divided by std"
            given = {"dtype": "float32", "shape": shape, "values": values}
        return {
            "part": self.part,
            "input": given,
            "output": self.output,
            "mean": self.model.mean,
            "std": self.model.std,
            "model": self.about and self.about.model,
            "classes": self.about and list(self.about.classes),
            "protocol": asdict(self.protocol),
            "precision": self.precision,
            "operators": self.operators,
            "device": self.device.type,
            "versions": versions(),
        }


@dataclass(frozen=True)
class Program:
    """A recorded program.

    Attributes:
        exported: the program.
        example: an input.
        request: what it computes.
        metadata: texts for the file.
    """

    exported: ExportedProgram
    example: Tensor
    request: Request
    metadata: dict[str, str] = field(default_factory=dict)


def make_program(request: Request) -> Program:
    """Record the program of a request.

    Raises:
        InputError: the weights do not fit the precision.
        ValueError: the model was changed so that an export would compute something else.
    """
    if request.operators == OWN:
        network: Network = fuse(request.model, dtype=request.dtype)
    else:
        network = request.model.standard_form(request.dtype)
    part = _part(network, request)
    example = example_input(request)
    with torch.no_grad():  # else the program would switch gradients off, and could not be saved
        exported = torch.export.export(part, (example,), dynamic_shapes=_free_axes(request))
        exported = exported.run_decompositions()
    return Program(exported, example, request, {METADATA: json.dumps(request.description())})


def least_side(model: Network) -> int:
    """Pixels of a side, at least, in a program for all sizes: one logit takes other branches."""
    return 2 * model.stride


def example_input(request: Request) -> Tensor:
    """An input of the part, of zeros."""
    height, width = request.size
    # A program for one image at a time would be recorded for a batch of 1.
    batch = 2 if request.dynamic else request.batch or 1
    if request.part != IMAGE_TO_LABELS:
        return torch.zeros(batch, 3, height, width, device=request.device)
    shape = (height, width, 3) if request.single else (batch, height, width, 3)
    return torch.zeros(shape, dtype=torch.uint8, device=request.device)


def _part(network: Network, request: Request) -> nn.Module:
    if request.part == LOGITS:
        return Logits(network)
    if request.part == LABELS:
        return Labels(network, request.protocol)
    return ImageToLabels(network, request.protocol, request.single)


def _free_axes(request: Request) -> dict[str, dict[int, Any]] | None:
    if not request.dynamic:
        return None
    first = 1 if request.part == IMAGE_TO_LABELS else 2
    # Not named: PyTorch 2.11 refuses named sizes, because it records whether they are even.
    return {"images": dict.fromkeys((0, first, first + 1), Dim.DYNAMIC)}


def default_size(protocol: Protocol, part: str, any_size: bool = False) -> Size:
    """(height, width) of a part's input, if nobody says it.

    It is the size of a window, for the logits of sliding windows; else the size into which an image
    is fitted. Where an image keeps its own size, it is the size to which inputs are padded, for the
    logits alone: the other parts take images and pad them.

    Args:
        protocol: how images are resized, padded and cut into windows.
        part: of the evaluation.
        any_size: whether the file has no size, so that only its comparison needs one. Then there
            is always a size.

    Raises:
        InputError: the part takes images, and these keep their own size; or the protocol names no
            size at all.
    """
    if part == LOGITS and protocol.crop is not None:
        return protocol.crop
    if protocol.base_scale is not None:
        return protocol.base_scale[1], protocol.base_scale[0]
    if protocol.pad_size is not None and (part == LOGITS or any_size):
        return protocol.pad_size
    if any_size:
        return _SIZE_TO_COMPARE
    raise InputError("images keep their size with this protocol; expected --size, such as 512x512")
