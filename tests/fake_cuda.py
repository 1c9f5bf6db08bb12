"""A stand-in for torch.cuda: a host that launches, a device that works, and graphs of launches."""

import contextlib
import functools
import itertools
from types import SimpleNamespace

import torch

REPLAY_SECONDS = 5e-6  # seconds that the host takes to launch a graph


class FakeCuda:
    """Devices that share one queue. Both clocks are in seconds.

    Attributes:
        log: names of the kernels that ran, in order.
        current: number of the current device.
        streams: the current stream of each device.
        error_mode: of the last recording.
        invalid: whether the end of a recording raises, as CUDA's does after an illegal call.
        pools: memory pools in which PyTorch's allocator is recording.
    """

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.log: list[str] = []
        self.current = 0
        self.default_streams = [self.new_stream(index) for index in range(2)]
        self.streams = list(self.default_streams)
        self.recording: list | None = None
        self.recorded_stream: SimpleNamespace | None = None
        self.error_mode = ""
        self.invalid = False
        self.pools: list = []
        self.handles = itertools.count(1)

    @property
    def stream(self) -> SimpleNamespace:
        """The current stream of the current device."""
        return self.streams[self.current]

    def launch(
        self, name: str, seconds: float, host_seconds: float = 0.0, device: int | None = None
    ) -> str:
        """A kernel that takes ``seconds``, and whose launch takes the host ``host_seconds``.

        It goes to the current stream of ``device``, by default of the current device.
        """
        self.host += host_seconds
        stream = self.streams[self.current if device is None else device]
        if self.recording is not None and stream is self.recorded_stream:
            self.recording.append((name, seconds))
            return name
        self.log.append(name)
        self.device = max(self.device, self.host) + seconds
        return name

    def new_stream(self, device: int | None = None) -> SimpleNamespace:
        device = self.current if device is None else device
        return SimpleNamespace(device=device, wait_stream=lambda other: None)

    def set_stream(self, stream) -> None:
        """Make a stream its device's current one, and the device the current one, as PyTorch."""
        self.current = stream.device
        self.streams[self.current] = stream

    @contextlib.contextmanager
    def on_stream(self, stream):
        before, there = self.stream, self.streams[stream.device]
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(there)
            self.set_stream(before)

    @contextlib.contextmanager
    def on_device(self, device: torch.device):
        before, self.current = self.current, device.index or 0
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode="global"):
        before, there = self.stream, self.streams[stream.device]
        self.set_stream(stream)
        self.error_mode, self.recording, self.recorded_stream = capture_error_mode, [], stream
        self.pools.append(pool)
        try:
            yield
        finally:
            launches, self.recording = self.recording, None
            if self.invalid:  # the stream stays, and the allocator's pool, as in PyTorch
                raise RuntimeError("CUDA error: operation failed due to a previous error")
            self.end_pool(stream.device, pool)
            graph.launches = launches
            self.set_stream(there)
            self.set_stream(before)

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
    from emanet_triton.kernels import replay  # later than the environment that conftest sets

    fake = FakeCuda()
    for name, value in {
        "Stream": fake.new_stream,
        "current_stream": lambda: fake.stream,
        "set_stream": fake.set_stream,
        "stream": fake.on_stream,
        "device": fake.on_device,
        "CUDAGraph": fake.new_graph,
        "graph": fake.graph,
        "Event": fake.new_event,
        "current_device": lambda: fake.current,
        "graph_pool_handle": lambda: (0, next(fake.handles)),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_pool)
    monkeypatch.setattr(replay, "_recording_stream", functools.cache(fake.new_stream))
    return fake
