"""What inference and evaluation need of a network: the base classes of all networks of the zoo.

A variant is one module with a ``Network`` and perhaps its ``FusedNetwork``, and a zoo entry.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from emanet_triton.models.description import Description
from emanet_triton.models.protocol import Protocol

RGB = tuple[float, float, float]


class Network(nn.Module):
    """A segmentation network, from normalised images to logits of lower resolution.

    A subclass takes ``(architecture, protocol, num_classes)``. ``architecture`` is any value that
    can be pickled and compared. Inference gives the network float images [B, 3, H, W] and expects
    logits [B, num_classes, ceil(H / stride), ceil(W / stride)] in evaluation mode. ``forward`` may
    refuse other images by ``check_images``.

    Attributes:
        stride: pixels of the input per logit, in each direction.
        mean, std: of the RGB values 0 to 255; an image is normalised by them (mmseg
            ``img_norm_cfg``).
        protocol: how images are resized, cut into windows and scaled for the network.
        num_classes: channels of the logits.
    """

    stride: int = 8
    mean: RGB = (123.675, 116.28, 103.53)
    std: RGB = (58.395, 57.12, 57.375)

    def __init__(self, architecture: object, protocol: Protocol, num_classes: int) -> None:
        super().__init__()
        self.architecture = architecture
        self.protocol = protocol
        self.num_classes = num_classes
        self._description: Description | None = None

    def describe(self, description: Description) -> None:
        """Note what is known of this model, for the files that ``export`` writes."""
        self._description = description

    @property
    def description(self) -> Description | None:
        """The model's name and classes with its protocol of now; ``None`` if nobody noted them."""
        noted = self._description
        return None if noted is None else replace(noted, protocol=self.protocol)

    def fused_form(self, dtype: torch.dtype, channels_last: bool) -> "FusedNetwork | None":
        """A copy for inference that computes the same, faster; ``None`` if there is none.

        Raises:
            ValueError: this network was changed so that the copy would compute something else.
        """
        return None

    def standard_form(self, dtype: torch.dtype) -> "Network":
        """A copy for inference that calls PyTorch's own operators alone, as an export needs it.

        Args:
            dtype: of weights and activations: float32, float16 or bfloat16.

        Returns:
            A network in evaluation mode, float images [B, 3, H, W] → logits in ``dtype``.

        Raises:
            ValueError: this network was changed so that the copy would compute something else.
        """
        return _StandardNetwork(self, dtype).eval()

    def reference_logits(self, images: Tensor) -> Tensor:
        """The logits in evaluation mode by PyTorch's operations alone, also in float64.

        A fused form is compared with them.
        """
        return self(images)


class FusedNetwork(Network):
    """The fused form of a network, for inference in one dtype.

    Attributes:
        backend: how its operators choose a backend, as ``choose_by`` has set it; at first "auto".

    Raises:
        ValueError: a call such as ``half()`` would change the dtype for which it was folded.
    """

    def __init__(self, model: Network, dtype: torch.dtype, channels_last: bool) -> None:
        super().__init__(model.architecture, model.protocol, model.num_classes)
        self.stride, self.mean, self.std = input_form(model)
        self.dtype = dtype
        self.channels_last = channels_last
        self.backend = "auto"

    def choose_by(self, backend: str) -> bool:
        """Set how those operators choose a backend that nobody has given one.

        Args:
            backend: one of ``checks.OPEN_BACKENDS``. An operator with another backend, such as
                "triton", keeps it.

        Returns:
            Whether the network has operators that this concerns.
        """
        return False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        if dtype != self.dtype:
            raise ValueError(
                f"a network fused in {self.dtype} cannot be changed to {dtype}; call "
                "fuse(model, dtype=...)"
            )
        return super()._apply(fn, recurse)


class InputForm(NamedTuple):
    """How a network wants its images: see ``Network``."""

    stride: int
    mean: RGB
    std: RGB


class _StandardNetwork(Network):
    """A network by its ``reference_logits``, in one dtype."""

    def __init__(self, model: Network, dtype: torch.dtype) -> None:
        super().__init__(model.architecture, model.protocol, model.num_classes)
        self.stride, self.mean, self.std = input_form(model)
        self.model, self.dtype = copy.deepcopy(model).to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.model.reference_logits(images.to(self.dtype))


def input_form(network: object) -> InputForm:
    """The input form of a network. If it is no ``Network``, its images are those of an EMANet."""
    network = getattr(network, "_orig_mod", network)  # if torch.compile made it
    own = network if isinstance(network, Network) else Network
    return InputForm(own.stride, own.mean, own.std)


def check_images(images: object) -> None:
    """Check the input of a network. No size is compared, so a recorded program keeps its free axes.

    Raises:
        ValueError: it is no floating-point tensor [B, 3, H, W].
    """
    if not isinstance(images, Tensor):
        got = type(images).__name__
    elif images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        got = f"{images.dtype} {list(images.shape)}"
    else:
        return
    raise ValueError(f"images must be a floating-point tensor [B, 3, H, W], got {got}")


def logits_size(height: int, width: int, stride: int = Network.stride) -> tuple[int, int]:
    """(height, width) of the logits of an input of ``height`` x ``width`` pixels."""
    return -(-height // stride), -(-width // stride)
