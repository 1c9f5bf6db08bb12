"""EMANet's head through the operators: golden logits, training, compile, export, backends."""

import copy
from functools import cache

import golden_data
import pytest
import torch
from device import DEVICE
from em_cases import common_case
from torch import nn
from torch.nn.utils import parametrize

from emanet_triton.kernels.precision import cuda_fp32
from emanet_triton.models.head import EMAHead, EMAttention


@pytest.fixture
def _exact_products():
    """A GPU would round the other convolutions' products to TF32."""
    with cuda_fp32("ieee"):
        yield


@pytest.mark.usefixtures("_exact_products")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", golden_data.NAMES)
def test_golden_logits(name, backend):
    head = copy.deepcopy(golden_data.golden_model(name).decode_head).to(DEVICE)
    head.ema_module.backend = backend
    with torch.no_grad():
        logits = head(golden_stage4(name).to(DEVICE))
    want = torch.from_numpy(golden_data.vectors(name)["logits"])
    assert golden_data.relative_error(logits.cpu(), want) <= 1e-4


@cache
def golden_stage4(name: str) -> torch.Tensor:
    images = golden_data.normalised(golden_data.vectors(name)["image"])
    with torch.no_grad():
        return golden_data.golden_model(name).backbone(images)[-1]


def small_head(backend: str) -> EMAHead:
    torch.manual_seed(0)
    case = common_case()
    sizes = {"ema_channels": case.channels, "num_bases": case.bases, "channels": 8}
    head = EMAHead(24, **sizes, num_classes=4)
    head.ema_module.backend = backend
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return head.eval().to(DEVICE)


def hook(head):
    head.ema_mid_conv.register_forward_hook(lambda module, args, out: -out)


def hook_of_the_attention(head):
    head.ema_module.register_forward_hook(lambda module, args, out: -out)


class Doubled(EMAttention):
    def forward(self, feats):
        return 2 * super().forward(feats)


def subclass(head):
    head.ema_module.__class__ = Doubled


def no_attention(head):
    head.ema_module = nn.Identity()


def activation(head):
    head.ema_mid_conv.act = nn.ReLU()


def group_norm(head):
    head.ema_out_conv.bn = nn.GroupNorm(1, head.ema_out_conv.conv.out_channels).to(DEVICE)


def norm_in_training(head):
    head.ema_out_conv.bn.train()


def scaled_weight(head):
    class Scaled(nn.Module):
        def forward(self, weight):
            return 3 * weight

    parametrize.register_parametrization(head.ema_out_conv.conv, "weight", Scaled())


CHANGES = [
    hook, hook_of_the_attention, subclass, no_attention, activation, group_norm,
    norm_in_training, scaled_weight,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=[f.__name__ for f in CHANGES])
def test_a_changed_layer_counts_without_gradients(change):
    head = small_head("torch")
    x = torch.randn(2, 24, 9, 37, device=DEVICE)
    with torch.no_grad():
        before = head(x)
    change(head)
    with torch.no_grad():
        got = head(x)
    assert golden_data.relative_error(got.cpu(), before.cpu()) > 1e-3
    torch.testing.assert_close(got, head(x).detach())


def test_evaluation_mode_passes_gradients_where_they_are_wanted():
    head = small_head("auto")
    x = torch.randn(2, 24, 9, 37, device=DEVICE, requires_grad=True)
    head(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert head.ema_out_conv.conv.weight.grad.abs().sum() > 0


@pytest.mark.usefixtures("_exact_products")
def test_a_training_step_moves_the_bases_alike_on_both_backends():
    x = torch.randn(2, 24, 9, 37, device=DEVICE)
    moved = []
    for backend in ("triton", "torch"):
        head = small_head(backend).train()
        before = head.ema_module.bases.clone()
        head(x).sum().backward()
        moved.append(head.ema_module.bases)
        assert (moved[-1] - before).norm(dim=1).min() > 0.01
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_autocast(dtype):
    head = small_head("auto")
    x = torch.randn(2, 24, 9, 37, device=DEVICE)
    with torch.no_grad():
        want = head(x)
        with torch.autocast(DEVICE, dtype):
            mixed = head(x)
        half = head.to(dtype)(x.to(dtype))
    for got in (mixed, half):
        assert got.dtype == dtype
        assert golden_data.relative_error(got.cpu(), want.cpu()) <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_and_exports(backend):
    torch._dynamo.reset()
    head = small_head(backend)
    x = torch.randn(2, 24, 9, 37, device=DEVICE)
    auto = torch.export.Dim.AUTO
    with torch.no_grad():
        compiled = torch.compile(head, fullgraph=True, dynamic=True, backend="aot_eager")
        program = torch.export.export(head, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
        calls = [str(node.target) for node in program.graph.nodes]
        assert "emanet_triton.em_attention.default" in calls
        for other in (x, torch.randn(3, 24, 13, 29, device=DEVICE)):
            want = head(other)
            torch.testing.assert_close(compiled(other), want)
            torch.testing.assert_close(program.module()(other), want)


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_compiles_and_exports_while_gradients_are_on(training):
    torch._dynamo.reset()
    layer = EMAttention(48, 7, backend="triton").train(training).to(DEVICE)
    x = torch.randn(2, 48, 9, 37, device=DEVICE, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    before = layer.bases.clone()
    want = layer(x)
    layer.bases.copy_(before)
    torch.testing.assert_close(compiled(x), want)
    assert torch.equal(layer.bases, before) is not training
    program = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, got 'cuda'"):
        EMAttention(8, 3, backend="cuda")
