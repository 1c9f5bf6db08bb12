"""One iteration of training: the network, its optimizer, and all state that changes."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from emanet_triton.inference.inputs import normalise
from emanet_triton.inference.predictor import HALF
from emanet_triton.models.network import Network
from emanet_triton.models.resnet import Bottleneck
from emanet_triton.train.group import ALONE, Group
from emanet_triton.train.loss import Losses, accuracy, losses
from emanet_triton.train.norm import synchronise
from emanet_triton.train.recipe import Recipe
from emanet_triton.train.samples import Batch


class Trainer:
    """Trains a network; equal batches and seeds give equal weights to the bit on a CPU.

    Args:
        network: the network to train, on its device.
        recipe: how it is trained.
        group: the processes that train together.
        class_weights: float [C] on the device, or ``None`` for equal weights.

    Attributes:
        iteration: the number of finished iterations.
        network: the trained network.
        averaged: the network with averaged weights, or ``None`` without ``Recipe.ema``.
    """

    def __init__(
        self,
        network: Network,
        recipe: Recipe,
        group: Group = ALONE,
        class_weights: Tensor | None = None,
    ) -> None:
        self.recipe, self.group = recipe, group
        self.device = next(network.parameters()).device
        self.network = network.train()
        # The types of older versions of PyTorch lack this argument.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.iteration = 0
        self._class_weights = class_weights
        for module in network.modules():
            if isinstance(module, nn.Dropout2d):
                module.p = recipe.dropout
            if isinstance(module, Bottleneck) and recipe.checkpointing:
                module.checkpointing = True
        if recipe.sync_bn and group.count > 1:
            synchronise(network, self.device)
        self._averaged = (
            AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema), use_buffers=True)
            if recipe.ema is not None
            else None
        )
        if recipe.compile:
            network.compile()
        self._model: nn.Module = network
        if group.count > 1:
            self._model = DistributedDataParallel(
                network,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
        self._optimizer = _optimizer(network, recipe)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")

    @property
    def averaged(self) -> Network | None:
        if self._averaged is None:
            return None
        assert isinstance(self._averaged.module, Network)
        return self._averaged.module

    @property
    def result(self) -> Network:
        """The network that is validated and saved: the averaged one, if there is one."""
        return self.averaged or self.network

    @property
    def lr(self) -> float:
        """The learning rate of the next iteration."""
        return self.recipe.lr_at(self.iteration)

    def step(self, batches: Sequence[Batch], with_accuracy: bool = False) -> tuple[Losses, Tensor]:
        """Run one iteration.

        Args:
            batches: ``Recipe.accumulate`` batches of this process.
            with_accuracy: also compute the accuracy, which takes time.

        Returns:
            The mean losses of this process, and its mean accuracy in percent, NaN without it.
        """
        torch.manual_seed(self._seed())  # of the dropout; so a resumed training draws the same
        self._optimizer.zero_grad()
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr
        found = []
        for number, batch in enumerate(batches, 1):
            with self._without_exchange() if number < len(batches) else contextlib.nullcontext():
                found.append(self._forward_backward(batch, len(batches), with_accuracy))
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._averaged is not None:
            self._averaged.update_parameters(self.network)
        self.iteration += 1
        *means, right = (torch.stack(values).mean() for values in zip(*found, strict=True))
        return Losses(*means), right

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A batch on the device: normalised images with 0 outside their sizes, int64 labels."""
        device, last = self.device, torch.channels_last
        images = normalise(batch.images.to(device, non_blocking=True), self.network)
        images = images.contiguous(memory_format=last)
        for image, (height, width) in zip(images, batch.sizes.tolist(), strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return images, batch.labels.to(device, non_blocking=True).long()

    def finite(self) -> Tensor:
        """0 if all weights and statistics of this process are finite, else NaN: float32 []."""
        parts = [value.isfinite().all() for value in self.network.state_dict().values()]
        return torch.where(torch.stack(parts).all(), 0.0, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """All that later iterations depend on, beside the recipe and the data."""
        return {
            "iteration": self.iteration,
            "network": self.network.state_dict(),
            "averaged": self._averaged.state_dict() if self._averaged is not None else None,
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of a trainer with the same recipe and architecture."""
        self.iteration = state["iteration"]
        self.network.load_state_dict(state["network"])
        if self._averaged is not None:
            self._averaged.load_state_dict(state["averaged"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def _forward_backward(
        self, batch: Batch, parts: int, with_accuracy: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The losses and the accuracy of a batch; its gradient is added to the others."""
        images, labels = self.inputs(batch)
        half = HALF.get(self.recipe.precision)
        with torch.autocast(self.device.type, half, enabled=half is not None):
            logits, auxiliary = self._model(images)
        align = self.network.protocol.align_corners
        found = losses(
            logits,
            auxiliary,
            labels,
            align_corners=align,
            auxiliary_weight=self.recipe.auxiliary_weight,
            class_weights=self._class_weights,
        )
        self._scaler.scale(found.total / parts).backward()
        right = accuracy(logits, labels, align) if with_accuracy else found.main * torch.nan
        return found.total.detach(), found.main, found.auxiliary, right

    def _without_exchange(self) -> contextlib.AbstractContextManager:
        """Keep the gradients of this process for the next batch, which sends their sum."""
        model = self._model
        if isinstance(model, DistributedDataParallel):
            return model.no_sync()
        return contextlib.nullcontext()

    def _seed(self) -> int:
        parts = [self.recipe.seed, self.iteration, self.group.rank]
        return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _optimizer(network: Network, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD as in mmseg's schedule, or AdamW. Frozen parameters are left out."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
