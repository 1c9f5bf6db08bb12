"""When a network is recorded and replayed; the recording itself needs a GPU."""

import pytest
import torch

from emanet_triton.eval import graphs
from emanet_triton.eval.graphs import GraphedNetwork

HAS_CUDA = torch.cuda.is_available()


class FakeRecorder:
    """Replays that double, where the network itself triples."""

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


def test_without_memory_for_a_graph_the_network_runs_as_it_is():
    network = GraphedNetwork(triple, FakeRecorder(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.warns(UserWarning, match="no memory is left for a CUDA graph of inputs 1x3x4x5"):
        assert factors(network, 5, 5, 5) == [3, 3, 3]


@pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")
def test_a_replay_computes_what_the_network_computes():
    layer = torch.nn.Conv2d(3, 4, 3, padding=1).cuda().eval()
    network = GraphedNetwork(layer)
    with torch.inference_mode():
        inputs = torch.randn(3, 2, 3, 8, 8, device="cuda")
        outputs = [network(x) for x in inputs]
        for x, output in zip(inputs, outputs, strict=True):
            torch.testing.assert_close(output, layer(x))
