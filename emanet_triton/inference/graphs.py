"""CUDA graphs: the kernel launches of a network, recorded per input shape, replayed as one."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from emanet_triton.errors import first_line
from emanet_triton.kernels.out_of_memory import is_out_of_memory
from emanet_triton.kernels.replay import record

MOST_GRAPHS = 24  # enough for ms+flip of two sizes of image

Network = Callable[[Tensor], Tensor]
Recorder = Callable[[Network, Tensor], Network]


class GraphedNetwork:
    """A network that is recorded when an input shape comes for the second time.

    The first input of a shape runs launch by launch. Kernels are compiled and algorithms chosen
    then; a recording cannot do this. A recording keeps the backends and the addresses of weights
    that it was made with: do not change the network afterwards, and call it from one thread.

    Args:
        network: float [B, 3, H, W] on a GPU → a tensor. It must not wait for the device.
        record: takes a network and inputs; returns a function that replays the network on inputs
            of the same shape.
    """

    def __init__(self, network: Network, record: Recorder | None = None) -> None:
        self.network = network
        self._record = record or CudaRecorder()
        self._seen: set[torch.Size] = set()
        self._replays: dict[torch.Size, Network] = {}

    def __call__(self, inputs: Tensor) -> Tensor:
        """The network's output. The caller may keep it and change it."""
        shape = inputs.shape
        if shape in self._seen and shape not in self._replays:
            self._replays[shape] = self._recorded(inputs)
        output = self._replays.get(shape, self.network)(inputs)
        if len(self._seen) < MOST_GRAPHS:  # only now: memory may have run out before
            self._seen.add(shape)
        return output

    def _recorded(self, inputs: Tensor) -> Network:
        try:
            return self._record(self.network, inputs)
        except Exception as error:  # whatever the driver raises where it cannot record
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
    """Records CUDA graphs. They never run at once, so they share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, network: Network, inputs: Tensor) -> Network:
        """Record ``network``, which has already run on inputs of this shape.

        Raises:
            Exception: the recording failed. ``network`` still runs launch by launch.
        """
        held = inputs.clone(memory_format=torch.preserve_format)
        try:
            graph, output = record(lambda: network(held), inputs.device, self._pool)
        except BaseException:
            self._pool = torch.cuda.graph_pool_handle()  # the old pool may be unusable
            raise

        def replay(inputs: Tensor) -> Tensor:
            held.copy_(inputs)
            graph.replay()
            return output.clone()  # because the next replay overwrites it

        return replay
