"""What ``FusedEMANet`` does in both versions of mmsegmentation."""

import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmseg.models import EncoderDecoder
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from emanet_triton.errors import InputError
from emanet_triton.inference.prepared import Prepared, prepared_labels
from emanet_triton.kernels.device import DTYPES
from emanet_triton.mmseg.head import EMAModule
from emanet_triton.models.alteration import on_meta
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.mmseg_config import described_network
from emanet_triton.models.network import Network
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.verified import verified_fuse

WEIGHTS = ("backbone.", "decode_head.")
MODES = _BatchNorm, _DropoutNd, EMAModule  # modules that compute something else in training mode
LOSSES = "decode_head.loss_decode."  # a loss may have weights; testing does not use them


class FusedEncoderDecoder(EncoderDecoder):
    """An ``EncoderDecoder`` whose network, in evaluation mode, is the fused form of EMANet.

    The configuration, the state dict and training stay those of ``EncoderDecoder``. In evaluation
    mode no gradient flows. mmsegmentation's own network runs instead while a layer has a forward
    hook, and while PyTorch traces.

    Args:
        backbone, decode_head, neck: as in ``EncoderDecoder``. They must describe an EMANet.
        precision: of the fused network: "fp32", "bf16" or "fp16". By default autocast's, or else
            that of the weights.
        options: the other arguments of ``EncoderDecoder``.

    Raises:
        InputError: a field describes another network. The message names it.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        decode_head: Mapping[str, Any],
        neck: Mapping[str, Any] | None = None,
        *,
        precision: str | None = None,
        **options: Any,
    ) -> None:
        self._described = described_network(backbone, decode_head, neck)
        if precision is not None and precision not in DTYPES:
            names = ", ".join(DTYPES)
            raise InputError(f"model.precision is {precision!r}, expected one of: {names}")
        super().__init__(backbone=backbone, decode_head=decode_head, **options)
        self.precision = precision
        self._kept = _Kept()

    def train(self, mode: bool = True) -> "FusedEncoderDecoder":
        """Set the mode. The fused network is made anew when it is needed next."""
        self._kept.forget()
        return super().train(mode)

    def fused_network(self) -> Network:
        """The network that runs in evaluation mode. It is made anew after a weight has changed.

        On a GPU it is checked first; if it does not work there, the plain network is returned.

        Raises:
            InputError: the segmentor has other weights than an EMANet, or weights that are not
                finite.
        """
        dtype = self._dtype()
        tensors = list(self._tensors())
        epsilons = [m.eps for m in self.modules() if isinstance(m, nn.BatchNorm2d)]
        made_from = [dtype, *epsilons, *map(_state, tensors)]
        if self._kept.network is None or not self._kept.is_of(made_from, tensors):
            self._kept.forget()  # first, to have its memory for the new one
            self._kept.network = verified_fuse(self._emanet(), dtype)
            self._kept.made_from = made_from
            self._kept.tensors = [weakref.ref(tensor) for tensor in tensors]
        return self._kept.network

    def runs_fused(self) -> bool:
        """Whether the fused network runs now, and not mmsegmentation's own."""
        if self.training or torch.jit.is_tracing():
            return False
        if any(module.training for module in self.modules() if isinstance(module, MODES)):
            return False
        return not any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())

    @torch.no_grad()
    def _low_logits(self, images: Tensor) -> Tensor:
        """Logits of normalised images, of an eighth of their size and in their dtype."""
        return self.fused_network()(images).to(images.dtype)

    def labels_of(self, inputs: Sequence[Tensor], images: Sequence[Prepared]) -> list[Tensor]:
        """int64 labels [H, W] of each image; see ``prepared_labels``."""
        labels = prepared_labels(self.fused_network(), inputs, images, self._protocol())
        return [of_image.long() for of_image in labels]

    def _protocol(self) -> Protocol:
        """How ``test_cfg`` cuts images into windows.

        Raises:
            InputError: it has no usable values.
        """
        config = self.test_cfg or {}
        mode = config.get("mode", "whole")
        crop = stride = None
        try:
            if mode == "slide":
                crop, stride = tuple(config["crop_size"]), tuple(config["stride"])
            return Protocol(None, mode, crop, stride, self.align_corners)
        except KeyError as error:
            raise InputError(f"model.test_cfg has no {error.args[0]}") from None
        except ValueError as error:
            raise InputError(f"model.test_cfg: {error}") from None

    def _dtype(self) -> torch.dtype:
        weight = next(self.parameters())
        device = weight.device.type
        if self.precision is not None:
            return DTYPES[self.precision]
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return weight.dtype

    def _tensors(self) -> Iterator[Tensor]:
        for part in (self.backbone, self.decode_head):
            yield from itertools.chain(part.parameters(), part.buffers())

    def _emanet(self) -> Network:
        """The network as this package's EMANet. Both share their weights."""
        network = on_meta(EMANet, self._described[0], Protocol(None), self._described[1])
        del network.auxiliary_head
        state = {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name.startswith(WEIGHTS) and not name.startswith(LOSSES)
        }
        different = sorted(network.state_dict().keys() ^ state.keys())
        if different:
            raise InputError(
                f"FusedEMANet needs the weights of an EMANet, but {different[0]} is "
                + ("an additional one" if different[0] in state else "missing")
            )
        network.load_state_dict(state, assign=True)
        for name, module in network.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = self.get_submodule(name).eps
        return network.eval()


class _Kept:
    """The fused network. It belongs neither to the segmentor's modules nor to any copy of them."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.network: Network | None = None
        self.made_from: list[Any] = []
        # A tensor that was replaced may leave its address to the new one, so addresses do not tell.
        self.tensors: list[weakref.ref[Tensor]] = []

    def is_of(self, made_from: list[Any], tensors: Sequence[Tensor]) -> bool:
        """Whether the network was made from these tensors in this state."""
        same = len(self.tensors) == len(tensors) and self.made_from == made_from
        return same and all(
            before() is tensor for before, tensor in zip(self.tensors, tensors, strict=True)
        )

    def __reduce__(self) -> tuple:
        return type(self), ()


def _state(tensor: Tensor) -> tuple:
    """Differs after the tensor was changed in place, or got other memory."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device
