"""A stand-in for torch.cuda: a host that launches, a device that works, and graphs of launches."""

import contextlib
import itertools
from types import SimpleNamespace

import torch

REPLAY_SECONDS = 5e-6  # seconds that the host takes to launch a graph


class FakeCuda:
    """One device with one queue. Both clocks are in seconds.

    Attributes:
        log: names of the kernels that ran, in order.
        stream: the current stream.
        error_mode: of the last recording.
        invalid: whether the end of a recording raises, as CUDA's does after an illegal call.
        pools: memory pools in which PyTorch's allocator is recording.
    """

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.log: list[str] = []
        self.default_stream = self.stream = self.new_stream("default")
        self.recording: list | None = None
        self.error_mode = ""
        self.invalid = False
        self.pools: list = []
        self.handles = itertools.count(1)

    def launch(self, name: str, seconds: float, host_seconds: float = 0.0) -> str:
        """A kernel that takes ``seconds``, and whose launch takes the host ``host_seconds``."""
        self.host += host_seconds
        if self.recording is not None:
            self.recording.append((name, seconds))
            return name
        self.log.append(name)
        self.device = max(self.device, self.host) + seconds
        return name

    def new_stream(self, name: str = "side") -> SimpleNamespace:
        return SimpleNamespace(name=name, wait_stream=lambda other: None)

    @contextlib.contextmanager
    def on_stream(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def graph(self, graph, pool=None, capture_error_mode="global"):
        before, self.stream = self.stream, self.new_stream("recording")
        self.error_mode, self.recording = capture_error_mode, []
        self.pools.append(pool)
        try:
            yield
        finally:
            launches, self.recording = self.recording, None
            if self.invalid:  # the stream stays, and the allocator's pool, as in PyTorch
                raise RuntimeError("CUDA error: operation failed due to a previous error")
            self.end_pool(0, pool)
            graph.launches, self.stream = launches, before

    def end_pool(self, device: int, pool: object) -> None:
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)

    def new_graph(self) -> SimpleNamespace:
        graph = SimpleNamespace(launches=[])

        def replay() -> None:
            self.host += REPLAY_SECONDS
            for name, seconds in graph.launches:
                self.launch(name, seconds)

        graph.replay = replay
        return graph

    def new_event(self, enable_timing: bool = False) -> SimpleNamespace:
        event = SimpleNamespace(time=0.0)
        event.record = lambda: setattr(event, "time", max(self.device, self.host))
        event.synchronize = lambda: setattr(self, "host", max(self.device, self.host))
        event.elapsed_time = lambda end: 1e3 * (end.time - event.time)
        return event


def install(monkeypatch) -> FakeCuda:
    """Replace torch.cuda's streams, events and graphs by a new ``FakeCuda``."""
    fake = FakeCuda()
    for name, value in {
        "Stream": fake.new_stream,
        "current_stream": lambda: fake.stream,
        "set_stream": lambda stream: setattr(fake, "stream", stream),
        "stream": fake.on_stream,
        "CUDAGraph": fake.new_graph,
        "graph": fake.graph,
        "Event": fake.new_event,
        "current_device": lambda: 0,
        "graph_pool_handle": lambda: (0, next(fake.handles)),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_pool)
    return fake
