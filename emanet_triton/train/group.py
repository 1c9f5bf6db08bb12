"""The processes of a torchrun that train together, or the one process without it."""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from emanet_triton.errors import InputError
from emanet_triton.eval.torchrun import find_place

T = TypeVar("T")
_LOST = re.compile(r"gloo|NCCL|ProcessGroup|connection (closed|reset|refused)", re.IGNORECASE)


class SharedError(InputError):
    """An InputError that every process raises, so that only the first one has to print it."""


@dataclass(frozen=True)
class Group:
    """This process's place among the processes that train together.

    Attributes:
        rank: of this process, from 0.
        count: of processes.
        local_rank: of this process on its machine; it chooses the GPU.
        local_count: of processes on this machine; they share the cores.
        messages: carries texts between the processes' CPUs, so that no GPU waits; ``None`` before
            ``joined``.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    messages: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """`` on rank N`` for messages; empty if this process is alone."""
        return f" on rank {self.rank}" if self.count > 1 else ""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on every process; in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, own: str | None) -> None:
        """Raise on every process if one of them has a problem.

        Args:
            own: the problem of this process, or ``None``.

        Raises:
            SharedError: with the problem of the first process that has one.
        """
        if self.count > 1:
            having = torch.tensor(int(own is not None))
            dist.all_reduce(having, group=self.messages)
            if having:
                texts: list[str | None] = [None] * self.count
                dist.all_gather_object(texts, own, group=self.messages)
                own = next(text for text in texts if text is not None)
        if own is not None:
            raise SharedError(own)

    def together(self, action: Callable[[], T]) -> T:
        """Return what ``action`` returns, if it raises no InputError on any process.

        Raises:
            SharedError: it raised an InputError on this process or another one.
        """
        try:
            result = action()
        except SharedError:
            raise
        except InputError as error:
            self.agree(str(error))
            raise
        self.agree(None)
        return result

    def share_buffers(self, network: torch.nn.Module) -> None:
        """Give every process the first one's buffers, such as running statistics."""
        if self.count > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)


ALONE = Group()


def has_lost_others(error: BaseException) -> bool:
    """Whether an error says that another process has ended, or that its machine is gone."""
    return isinstance(error, dist.DistError) or _LOST.search(str(error)) is not None


def find_group() -> Group:
    """This process's place in the torchrun that started it.

    Raises:
        InputError: torchrun's environment variables are incomplete or contradict one another.
    """
    place = find_place()
    if place is None:
        return ALONE
    return Group(place.rank, place.count, place.local_rank, place.local_count)


@contextlib.contextmanager
def joined(group: Group, device: torch.device) -> Iterator[Group]:
    """Join the other processes: NCCL between GPUs, gloo between CPUs."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)  # also for threads that pin memory
    if group.count == 1:
        yield group
        return
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        messages = dist.new_group(backend="gloo")
        assert isinstance(messages, dist.ProcessGroup)  # this process belongs to it
        yield replace(group, messages=messages)
    finally:
        dist.destroy_process_group()
