"""From a picture and the choices of the page to labels, with one network in memory."""

import dataclasses
import time
from dataclasses import dataclass

import numpy as np
import torch

from emanet_triton.data.dataset import Dataset
from emanet_triton.errors import InputError
from emanet_triton.inference.build import ready_network
from emanet_triton.inference.predictor import NOT_FINITE_MESSAGE, Predictor, are_finite
from emanet_triton.models.network import Network
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.zoo import find_entry, read_published


@dataclass(frozen=True)
class Choice:
    """What the page lets its user choose.

    Attributes:
        model: one of ``list_models()``.
        precision: one of ``precisions(device)``.
        ms_flip: average over the scales of the protocol, each also mirrored.
        own_size: the network sees the picture in its own size, and not in the protocol's.
    """

    model: str
    precision: str = "fp32"
    ms_flip: bool = False
    own_size: bool = False


@dataclass(frozen=True)
class Result:
    """A segmented picture.

    Attributes:
        image: uint8 RGB [H, W, 3].
        labels: class indices, uint8 [H, W].
        dataset: whose classes the labels are.
        choice: with which the labels were computed.
        seconds: for resizing, the network, and labels of the picture's size.
        network: ``Predictor.network_name``.
    """

    image: np.ndarray
    labels: np.ndarray
    dataset: Dataset
    choice: Choice
    seconds: float
    network: str


class Segmenter:
    """Segments pictures. It keeps the network of the last model and precision.

    It must not be called from two threads at once.

    Args:
        device: of the networks.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._key: tuple[str, str] | None = None
        self._network: Network | None = None

    def __call__(self, image: np.ndarray, chosen: Choice) -> Result:
        """Segment an image, uint8 RGB [H, W, 3].

        Raises:
            InputError: the checkpoint cannot be downloaded or is damaged, there is too little
                memory, or the network's logits are not finite.
        """
        network = self._load(chosen.model, chosen.precision)
        predictor = Predictor(
            network,
            protocol_of(network, chosen),
            ms_flip=chosen.ms_flip,
            precision=chosen.precision,
        )
        start = time.perf_counter()
        (labels,) = (each.cpu() for each in predictor([image]))
        seconds = time.perf_counter() - start
        if not are_finite(labels):
            raise InputError(f"{NOT_FINITE_MESSAGE} for this picture")
        dataset = find_entry(chosen.model).dataset
        return Result(image, labels.numpy(), dataset, chosen, seconds, predictor.network_name)

    def _load(self, model: str, precision: str) -> Network:
        if self._network is None or self._key != (model, precision):
            self._network = None  # first: two networks would take twice the memory
            published = read_published(model)
            # For many images convolutions would be measured, longer than a user wants to wait.
            self._network = ready_network(model, published, self.device, precision, images=1)
            self._key = model, precision
        return self._network


def protocol_of(network: Network, chosen: Choice) -> Protocol:
    """The network's protocol, without its size if the picture's own size is chosen."""
    if not chosen.own_size:
        return network.protocol
    return dataclasses.replace(network.protocol, base_scale=None)


def precisions(device: torch.device) -> list[str]:
    """The precisions that the page offers on a device.

    On a CPU float16 runs, but takes twice the time of float32.
    """
    return ["fp32", "bf16"] if device.type == "cpu" else ["fp32", "bf16", "fp16"]
