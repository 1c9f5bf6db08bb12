"""The processes of a torchrun, or the one process without it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emanet_triton.errors import describe
from emanet_triton.eval.link import Link
from emanet_triton.eval.torchrun import find_place, is_inside_a_rank


@dataclass(frozen=True)
class Ranks:
    """This process's place among the processes that share an evaluation.

    No rank waits for ever: if another rank fails, dies or makes no progress, an ``InputError``
    names it.

    Attributes:
        rank: of this process, from 0.
        count: of processes.
        local_rank: number of this process on its machine; it chooses the GPU.
        local_count: number of processes on this machine; they share the cores.
        link: the connection to the other processes, if there are any.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    link: Link | None = None

    @property
    def first(self) -> bool:
        """Whether this process prints and writes the result."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in the order of their ranks, on every rank."""
        return self.link.exchange(value) if self.link else [value]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a CPU tensor of integers over all ranks, on every rank."""
        if not self.link:
            return tensor
        return torch.tensor(self.gather(tensor.tolist())).sum(0, dtype=tensor.dtype)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)

    def progress(self, text: str) -> None:
        """Tell the others that a step is finished; ``text`` tells people about the progress."""
        if self.link:
            self.link.progress(text)

    def require_others(self) -> None:
        """Raise ``InputError`` if another rank has failed, because its share is then missing."""
        if self.link:
            self.link.require_others()

    def fail(self, message: str) -> str:
        """Tell the other ranks why this rank ends.

        Returns:
            The text that this process must print: the message of the first rank that failed.
            Empty if another process on this machine prints it.
        """
        return self.link.fail(message) if self.link else message


@contextmanager
def ranks(say: Callable[[str], None]) -> Iterator[Ranks]:
    """Join the other processes, if torchrun started this one.

    A process that a rank of another program started runs alone, on the GPU of that rank. An
    example is a training that evaluates its checkpoint.

    Args:
        say: prints a line for the user.

    Raises:
        InputError: the others cannot be joined.
    """
    place = find_place()
    if place is None:
        yield Ranks()
        return
    if place.count == 1:
        yield Ranks(local_rank=place.local_rank)
        return
    if is_inside_a_rank():
        say(f"note: started inside rank {place.rank} of a torchrun, this evaluation runs alone")
        yield Ranks(local_rank=place.local_rank)
        return
    link = Link(place, say)
    try:
        yield Ranks(place.rank, place.count, place.local_rank, place.local_count, link)
    except Exception as error:
        link.fail(f"error on rank {place.rank}: {describe(error)}")
        raise
    finally:
        link.leave()
