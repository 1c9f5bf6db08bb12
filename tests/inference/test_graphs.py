"""When a network is recorded and replayed, by stand-ins for the recorder and for the device."""

import pytest
import torch

from emanet_triton.inference import graphs
from emanet_triton.inference.graphs import CudaRecorder, GraphedNetwork

HAS_CUDA = torch.cuda.is_available()


class FakeRecorder:
    """Its replays double their input; the network itself triples its input."""

    def __init__(self, error=None) -> None:
        self.shapes, self.error = [], error

    def __call__(self, network, inputs):
        if self.error:
            raise self.error
        self.shapes.append(tuple(inputs.shape))
        return lambda inputs: 2 * inputs


def triple(inputs):
    return 3 * inputs


def factors(network, *widths):
    return [network(torch.ones(1, 3, 4, width)).max().item() for width in widths]


def test_a_shape_is_recorded_when_it_comes_again():
    recorder = FakeRecorder()
    network = GraphedNetwork(triple, recorder)
    assert factors(network, 5, 6, 5, 5, 6) == [3, 3, 2, 2, 2]
    assert recorder.shapes == [(1, 3, 4, 5), (1, 3, 4, 6)]


def test_there_is_an_end_to_recording(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    network = GraphedNetwork(triple, FakeRecorder())
    assert factors(network, 5, 6, 7, 7, 5, 6) == [3, 3, 3, 3, 2, 2]


FAILURES = {
    "memory": (torch.OutOfMemoryError("CUDA out of memory."), "no memory is left"),
    "memory-of-cuda": (RuntimeError("CUDA error: out of memory"), "no memory is left"),
    "illegal": (
        torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing\n..."),
        "CUDA error: operation not permitted when stream is capturing",
    ),
}


@pytest.mark.parametrize(("error", "reason"), FAILURES.values(), ids=FAILURES)
def test_the_network_runs_as_it_is_where_it_cannot_be_recorded(error, reason):
    network = GraphedNetwork(triple, FakeRecorder(error))
    with pytest.warns(UserWarning) as warned:
        assert factors(network, 5, 5, 5) == [3, 3, 3]
    assert [str(w.message) for w in warned] == [
        f"inputs 1x3x4x5 run without a CUDA graph, as it cannot be recorded: {reason}"
    ]


def test_a_recording_lets_other_threads_copy(cuda):
    network = GraphedNetwork(lambda inputs: cuda.launch("triple", 1e-6) and 3 * inputs)
    assert factors(network, 5, 5, 5) == [3, 3, 3]
    assert cuda.error_mode == "thread_local"
    assert cuda.log == ["triple"] * 3  # launched, and replayed twice


def test_after_a_recording_that_fails_the_network_runs_where_it_did(cuda):
    cuda.invalid = True
    network = GraphedNetwork(lambda inputs: cuda.launch("triple", 1e-6) and 3 * inputs)
    with pytest.warns(UserWarning, match="operation failed due to a previous error"):
        assert factors(network, 5, 5, 5) == [3, 3, 3]
    assert cuda.log == ["triple"] * 3
    assert cuda.streams == cuda.default_streams
    assert cuda.pools == []


def test_after_a_recording_that_fails_the_next_one_gets_other_memory(cuda, monkeypatch):
    used = []

    def graph(graph, pool, *arguments, **options):
        used.append(pool)
        return cuda.graph(graph, pool, *arguments, **options)

    monkeypatch.setattr(torch.cuda, "graph", graph)
    recorder = CudaRecorder()
    cuda.invalid = True
    with pytest.raises(RuntimeError, match="operation failed"):
        recorder(lambda inputs: inputs, torch.zeros(1))
    cuda.invalid = False
    recorder(lambda inputs: inputs, torch.zeros(1))
    recorder(lambda inputs: inputs, torch.zeros(1))
    assert used[0] != used[1] == used[2]


def test_a_network_is_recorded_on_its_own_device(monkeypatch):
    devices = []

    def record(call, device, pool):
        devices.append(device)
        return None, None

    monkeypatch.setattr(graphs, "record", record)
    CudaRecorder()(triple, torch.zeros(1, device="meta"))
    assert devices == [torch.device("meta")]


def test_a_shape_whose_first_run_fails_is_not_recorded_at_the_next():
    """Its kernels may not have been compiled."""
    runs = []

    def network(inputs):
        runs.append("run")
        if len(runs) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 3 * inputs

    recorder = FakeRecorder()
    graphed = GraphedNetwork(network, recorder)
    with pytest.raises(torch.OutOfMemoryError):
        factors(graphed, 5)
    assert factors(graphed, 5) == [3]
    assert recorder.shapes == []
    assert factors(graphed, 5) == [2]


@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")
def test_a_replay_computes_what_the_network_computes():
    layer = torch.nn.Conv2d(3, 4, 3, padding=1).cuda().eval()
    network = GraphedNetwork(layer)
    with torch.inference_mode():
        inputs = torch.randn(3, 2, 3, 8, 8, device="cuda")
        outputs = [network(x) for x in inputs]
        for x, output in zip(inputs, outputs, strict=True):
            torch.testing.assert_close(output, layer(x))
