"""The processes of a torchrun, or the one process without it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process's place among the processes that share an evaluation.

    Attributes:
        rank: of this process, from 0.
        count: of processes.
        local_rank: of this process on its machine, which chooses its GPU.
        local_count: of processes on its machine, which share its cores.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes the result."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in the order of their ranks, on every rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a CPU tensor over all ranks, on every rank."""
        if self.count > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Join the other processes if torchrun started this one (over gloo: only counts are sent)."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Ranks()
        return
    dist.init_process_group("gloo")
    try:
        local = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        yield Ranks(dist.get_rank(), dist.get_world_size(), *local)
    finally:
        dist.destroy_process_group()
