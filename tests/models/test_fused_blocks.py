"""Residual blocks of fused networks in pairs, as a GPU runs them."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from device import DEVICE, HALF
from golden_data import relative_error
from small_networks import SMALL, TINY, VARIANTS, logits, small_model

from emanet_triton import fuse
from emanet_triton.bench.walk import Recorder
from emanet_triton.kernels.conv.tiles import EXPAND_REDUCE_CHANNELS
from emanet_triton.models import emanet
from emanet_triton.models.fused import FusedBottleneck, backbone_steps, run_blocks

CPU, GPU = torch.device("cpu"), torch.device("meta")
WIDE = replace(SMALL, blocks=(2, 2, 2, 1), base_channels=64)  # of which the kernel can run pairs


@pytest.fixture
def _in_pairs(monkeypatch):
    """Fused networks run their blocks in pairs, also on a CPU."""
    monkeypatch.setattr(emanet, "backbone_steps", lambda layers, _: backbone_steps(layers, GPU))


def images_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def blocks_of(fused):
    return [layer for layer in fused.backbone if isinstance(layer, FusedBottleneck)]


def channels_of(calls):
    return [(call["x"].shape[1], call["weights"][1].shape[0]) for call in calls]


def test_a_gpu_runs_all_blocks_as_one_step_and_a_cpu_layer_by_layer():
    layers = fuse(small_model(TINY)).backbone
    assert backbone_steps(layers, CPU) == list(layers)
    *before, last = backbone_steps(layers, GPU)
    assert before == list(layers)[:4]  # the stem and the pooling
    assert (last.func, last.args) == (run_blocks, (list(layers)[4:],))
    nchw = fuse(small_model(TINY), channels_last=False).backbone
    assert backbone_steps(nchw, GPU) == list(nchw)


@pytest.mark.usefixtures("_in_pairs")
@pytest.mark.parametrize("paired", [True, False], ids=["operator", "convolutions"])
@pytest.mark.parametrize("architecture", [SMALL, *VARIANTS.values()], ids=["small", *VARIANTS])
def test_pairs_compute_the_same_function(architecture, paired):
    model, images = small_model(architecture), images_of(2, 3, 49, 70)
    fused = fuse(model)
    for block in blocks_of(fused):
        block.paired = paired
    with Recorder() as recorder:
        got = fused(images)
    pairs = [call for call in recorder.calls.elements() if call.name == "expand_reduce"]
    assert len(pairs) == (sum(architecture.blocks) - 1) * paired
    assert relative_error(got, logits(model, images)) <= 1e-5


@pytest.mark.usefixtures("_in_pairs")
def test_a_network_whose_pairs_run_by_triton():
    model, images = small_model(WIDE), images_of(1, 3, 33, 41)
    want = logits(model, images)
    fused = fuse(model.to(DEVICE), dtype=HALF)
    for block in blocks_of(fused):
        block.backend = "separate"
    separate = fused(images.to(DEVICE)).cpu()
    for block, following in pairwise(blocks_of(fused)):
        channels = block.conv3.weight.shape[1], following.conv1.weight.shape[0]
        block.backend = "triton" if channels in EXPAND_REDUCE_CHANNELS else "separate"
    with Recorder() as recorder:
        got = fused(images.to(DEVICE)).cpu()
    calls = [call for call in recorder.calls if call.name == "expand_reduce"]
    by_triton = channels_of(call for call in calls if call["backend"] == "triton")
    assert by_triton == list(EXPAND_REDUCE_CHANNELS)
    assert channels_of(call for call in calls if call["backend"] == "separate") == [(256, 512)]
    assert relative_error(got, want) <= 1.1 * relative_error(separate, want)


@pytest.mark.usefixtures("_in_pairs")
def test_a_network_of_pairs_can_be_compiled_and_exported():
    fused, images = fuse(small_model(TINY)), images_of(2, 3, 49, 70)
    want = fused(images)
    torch.compiler.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), want)
    program = torch.export.export(fused, (images,))
    assert torch.equal(program.module()(images), want)
    graphs = [part.graph for part in program.graph_module.modules() if hasattr(part, "graph")]
    targets = [node.target for graph in graphs for node in graph.nodes]
    pairs = targets.count(torch.ops.emanet_triton.expand_reduce.default)
    assert pairs == sum(TINY.blocks) - 1
