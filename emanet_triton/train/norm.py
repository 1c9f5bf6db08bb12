"""Batch norms that take their statistics from the images of all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Sum.apply(*gradients)


class RanksBatchNorm2d(nn.BatchNorm2d):
    """``torch.nn.SyncBatchNorm`` for processes on CPUs, which PyTorch's own refuses.

    Statistics and gradients are those of one batch norm on the images of all ranks. Every rank
    needs equally many values of a channel.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        ranks = dist.get_world_size()
        with torch.autocast(x.device.type, enabled=False):
            values = x.float()
            mean = _Sum.apply(values.mean((0, 2, 3))) / ranks
            centred = values - mean[:, None, None]
            variance = _Sum.apply(centred.square().mean((0, 2, 3))) / ranks
            scale = self.weight * (variance + self.eps).rsqrt()
            out = centred * scale[:, None, None] + self.bias[:, None, None]
        if self.track_running_stats:
            count = values.numel() // values.shape[1] * ranks
            self._move(mean, variance * (count / max(count - 1, 1)))
        return out.to(x.dtype)

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor) -> None:
        assert self.momentum and self.running_mean is not None and self.running_var is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)


def synchronise(model: nn.Module, device: torch.device) -> None:
    """Replace all batch norms of a model on a device; names and tensors stay the same."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, _synchronised(child, device))


def _synchronised(norm: nn.BatchNorm2d, device: torch.device) -> nn.Module:
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    new = RanksBatchNorm2d(norm.num_features, norm.eps, norm.momentum)
    new.load_state_dict(norm.state_dict(), assign=True)
    return new.train(norm.training)
