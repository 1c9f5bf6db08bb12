"""CUDA graphs: a network's launches, recorded for an input shape and replayed as one."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from emanet_triton.errors import first_line
from emanet_triton.kernels.out_of_memory import is_out_of_memory
from emanet_triton.kernels.replay import record

MOST_GRAPHS = 24  # the sizes of ms+flip for two sizes of image

Network = Callable[[Tensor], Tensor]
Recorder = Callable[[Network, Tensor], Network]


class GraphedNetwork:
    """A network that is recorded for every input shape that comes a second time.

    The first input of a shape runs launch by launch: kernels are compiled and algorithms chosen
    then, which a recording could not hold.

    Args:
        network: float [B, 3, H, W] on a GPU → a tensor; without waiting for the device.
        record: makes the replaying function of a network for inputs like the given one.
    """

    def __init__(self, network: Network, record: Recorder | None = None) -> None:
        self.network = network
        self._record = record or CudaRecorder()
        self._seen: set[torch.Size] = set()
        self._replays: dict[torch.Size, Network] = {}

    def __call__(self, inputs: Tensor) -> Tensor:
        """The network's output, which belongs to the caller."""
        shape = inputs.shape
        if shape in self._seen and shape not in self._replays:
            self._replays[shape] = self._recorded(inputs)
        if len(self._seen) < MOST_GRAPHS:
            self._seen.add(shape)
        return self._replays.get(shape, self.network)(inputs)

    def _recorded(self, inputs: Tensor) -> Network:
        try:
            return self._record(self.network, inputs)
        except Exception as error:  # whatever the driver raises for what cannot be recorded
            reason = first_line(error)
            if is_out_of_memory(error):
                torch.cuda.empty_cache()
                reason = "no memory is left"
        size = "x".join(map(str, inputs.shape))
        warnings.warn(
            f"inputs {size} run without a CUDA graph, as it cannot be recorded: {reason}",
            stacklevel=3,
        )
        return self.network


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory, since they never run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, network: Network, inputs: Tensor) -> Network:
        """Record ``network``, which has run on inputs of this shape, on a copy of ``inputs``.

        Raises:
            Exception: as ``record``; ``network`` can go on launch by launch.
        """
        held = inputs.clone(memory_format=torch.preserve_format)
        try:
            graph, output = record(lambda: network(held), self._pool)
        except BaseException:
            self._pool = torch.cuda.graph_pool_handle()  # the other one may be of no more use
            raise

        def replay(inputs: Tensor) -> Tensor:
            held.copy_(inputs)
            graph.replay()
            return output.clone()  # the next replay writes there again

        return replay
