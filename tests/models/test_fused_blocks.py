"""Residual blocks of fused networks in pairs, as a GPU runs them."""

import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from device import DEVICE, HALF
from golden_data import relative_error
from small_networks import SMALL, TINY, VARIANTS, logits, small_model
from torch import nn

from emanet_triton import fuse
from emanet_triton.bench.walk import Recorder
from emanet_triton.kernels.conv.tiles import EXPAND_REDUCE_CHANNELS
from emanet_triton.models.fused import FusedBottleneck, FusedConv

CPU, GPU = torch.device("cpu"), torch.device("meta")
WIDE = replace(SMALL, blocks=(2, 2, 2, 1), base_channels=64)  # of which the kernel can run pairs


@pytest.fixture
def _in_pairs(monkeypatch):
    """Fused networks run their blocks in pairs, also on a CPU."""
    on_device = FusedBottleneck.runs_with
    monkeypatch.setattr(
        FusedBottleneck, "runs_with", lambda block, following, _: on_device(block, following, GPU)
    )


def images_of(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def blocks_of(fused):
    return [layer for layer in fused.backbone if isinstance(layer, FusedBottleneck)]


def channels_of(calls):
    return [(call["x"].shape[1], call["weights"][1].shape[0]) for call in calls]


def set_backend(fused, backend):
    for module in fused.modules():
        if isinstance(module, FusedConv):
            module.backend = backend


def pairs_of(fused, images):
    """The calls of the operator, and the logits."""
    with Recorder() as recorder:
        got = fused(images)
    return [call for call in recorder.calls.elements() if call.name == "expand_reduce"], got


def test_blocks_run_in_pairs_on_a_gpu_only():
    first, second = blocks_of(fuse(small_model(TINY)))[:2]
    assert first.runs_with(second, GPU)
    assert not first.runs_with(second, CPU)
    assert not first.runs_with(None, GPU)
    assert not first.runs_with(nn.Identity(), GPU)
    first, second = blocks_of(fuse(small_model(TINY), channels_last=False))[:2]
    assert not first.runs_with(second, GPU)


@pytest.mark.parametrize(
    ("backends", "width", "dtype", "in_pairs"),
    [
        (("auto", "auto"), 64, HALF, True),
        (("fastest", "fastest"), 64, HALF, True),
        (("fastest-known", "fastest-known"), 64, HALF, True),
        (("triton", "triton"), 64, HALF, True),
        (("triton", "triton"), 64, torch.float32, False),
        (("triton", "triton"), 16, HALF, False),
        (("cudnn", "cudnn"), 64, HALF, False),
        (("auto", "triton"), 64, HALF, False),
        (("auto", "fastest"), 64, HALF, False),
    ],
)
def test_a_pair_has_one_backend(backends, width, dtype, in_pairs):
    model = small_model(replace(SMALL, blocks=(2, 1, 1, 1), base_channels=width))
    first, second = blocks_of(fuse(model, dtype=dtype))[:2]
    first.conv3.backend, second.conv1.backend = backends
    assert first.runs_with(second, GPU) == in_pairs


@pytest.mark.usefixtures("_in_pairs")
@pytest.mark.parametrize("paired", [True, False], ids=["operator", "convolutions"])
@pytest.mark.parametrize("architecture", [SMALL, *VARIANTS.values()], ids=["small", *VARIANTS])
def test_pairs_compute_the_same_function(architecture, paired):
    model, images = small_model(architecture), images_of(2, 3, 49, 70)
    fused = fuse(model)
    set_backend(fused, "auto" if paired else "torch")
    pairs, got = pairs_of(fused, images)
    assert len(pairs) == (sum(architecture.blocks) - 1) * paired
    assert relative_error(got, logits(model, images)) <= 1e-5


@pytest.mark.usefixtures("_in_pairs")
def test_a_network_whose_pairs_run_by_triton():
    model, images = small_model(WIDE), images_of(1, 3, 33, 41)
    want = logits(model, images)
    fused = fuse(model.to(DEVICE), dtype=HALF)
    set_backend(fused, "torch")
    separate = fused(images.to(DEVICE)).cpu()
    for block, following in pairwise(blocks_of(fused)):
        channels = block.conv3.weight.shape[1], following.conv1.weight.shape[0]
        backend = "triton" if channels in EXPAND_REDUCE_CHANNELS else "auto"
        block.conv3.backend = following.conv1.backend = backend
    calls, got = pairs_of(fused, images.to(DEVICE))
    got = got.cpu()
    by_triton = channels_of(call for call in calls if call["backend"] == "triton")
    assert by_triton == list(EXPAND_REDUCE_CHANNELS)
    assert channels_of(call for call in calls if call["backend"] == "auto") == [(256, 512)]
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


@pytest.mark.usefixtures("_in_pairs")
def test_a_hook_sees_every_module():
    fused, images = fuse(small_model(TINY)), images_of(1, 3, 33, 41)
    seen = []
    for name, module in fused.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    pairs, _ = pairs_of(fused, images)
    assert pairs == []
    unused = {"backbone", "decode_head.bottleneck"}  # the first is a list of layers
    assert {name for name, _ in fused.named_modules()} - set(seen) <= unused


@pytest.mark.usefixtures("_in_pairs")
def test_a_watched_convolution_is_called():
    fused, images = fuse(small_model(TINY)), images_of(1, 3, 33, 41)
    want = fused(images)
    first, second = blocks_of(fused)[1:3]
    seen = []
    first.conv3.register_forward_hook(lambda *_: seen.append("conv3"))
    second.conv1.register_forward_pre_hook(lambda *_: seen.append("conv1"))
    pairs, got = pairs_of(fused, images)
    assert seen == ["conv3", "conv1"]
    assert len(pairs) == sum(TINY.blocks) - 2
    assert relative_error(got, want) <= 1e-6


@pytest.mark.usefixtures("_in_pairs")
def test_a_wrapped_block_runs_in_its_place():
    fused, images = fuse(small_model(TINY)), images_of(1, 3, 33, 41)
    want = fused(images)
    for i, layer in enumerate(fused.backbone):
        if isinstance(layer, FusedBottleneck):
            fused.backbone[i] = nn.Sequential(layer)
            assert relative_error(fused(images), want) <= 1e-6, i
            fused.backbone[i] = layer


@pytest.mark.usefixtures("_in_pairs")
@pytest.mark.parametrize("backend", ["auto", "torch"], ids=["operator", "convolutions"])
def test_what_a_layer_has_read_is_freed(backend):
    fused, images = fuse(small_model(TINY)), images_of(1, 3, 33, 41)
    set_backend(fused, backend)
    outputs, alive = [], []

    def note(module, inputs, output):
        alive.append([i for i, output in enumerate(outputs) if output() is not None])
        outputs.append(weakref.ref(output[0] if isinstance(output, tuple) else output))

    for layer in fused.backbone:
        layer.register_forward_hook(note)
    fused(images)
    assert alive == [[i - 1] if i else [] for i in range(len(fused.backbone))]
