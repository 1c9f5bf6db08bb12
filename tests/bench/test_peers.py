"""Peers do what mmsegmentation does, and a CUDA graph can hold them."""

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from emanet_triton.bench.networks import architecture, make_protocol
from emanet_triton.bench.peers import full_size_logits, mmseg_network
from emanet_triton.bench.suites.model_problem import Problem, make_image
from emanet_triton.inference.reference import view_logits
from emanet_triton.inference.views import logits_grid
from emanet_triton.models.emanet import EMANet


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("size", [(40, 64), (41, 70)], ids=["one size", "resized"])
def test_full_size_logits_are_the_references(mode, size):
    protocol = make_protocol(mode, (40, 64), tiny=True)
    windows, *low = logits_grid(protocol, protocol.base_scale[::-1])
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2 * windows, 19, *low, generator=generator)
    inputs = torch.empty(2, 3, *protocol.base_scale[::-1])
    got = full_size_logits(logits, inputs.shape[2:], size, protocol)
    assert torch.equal(got, view_logits(lambda _: logits, inputs, size, protocol))


class OnOneDevice(TorchDispatchMode):
    """Refuses tensors of another device: a copy from the host cannot be captured."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        assert {t.device.type for t in tensors} <= {"meta"}, operator
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_a_resident_peer_copies_nothing_from_the_host(mode):
    protocol = make_protocol(mode, (40, 64), tiny=True)
    problem = Problem("r50", protocol, make_image((40, 64)), "cuda", resident=True, tiny=True)
    with torch.device("meta"):
        model = EMANet(architecture("r50", tiny=True), protocol).eval()
        inputs = torch.empty(1, 3, *protocol.base_scale[::-1])
    with OnOneDevice(), torch.inference_mode():
        labels = problem.labels_by(lambda x: mmseg_network(model, x))(inputs)
    assert labels.shape == (1, 40, 64)
