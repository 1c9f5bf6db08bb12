"""What a training step keeps for the backward pass."""

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from emanet_triton import create_model
from emanet_triton.bench.suites.train_mem import MmsegAttention
from emanet_triton.bench.training_memory import saved_bytes
from emanet_triton.models.resnet import Bottleneck
from emanet_triton.train.loss import losses
from emanet_triton.train.memory import SavedTensors


@pytest.fixture(scope="module")
def r50():
    return create_model("emanet_r50-d8_512x1024_80k_cityscapes").train()


def test_each_storage_counts_once_and_parameters_never():
    layer = nn.Linear(10, 20)
    x = torch.randn(4, 10)
    with SavedTensors(layer) as saved:
        y = layer(x)  # keeps x; its weight is a parameter
        (y.exp() + x.sum()).exp()  # keeps both results of exp
    assert saved.bytes == 4 * 10 * 4 + 2 * 4 * 20 * 4


def test_the_count_does_not_depend_on_the_device_of_nothing():
    model = tiny_model().train()
    images = torch.randn(2, 3, 64, 64)
    with SavedTensors(model) as saved:
        logits, auxiliary = model(images)
        labels = torch.zeros(2, 64, 64, dtype=torch.int64)
        losses(logits, auxiliary, labels, align_corners=False, auxiliary_weight=0.4)
    assert saved.bytes == saved_bytes(model, (64, 64))


def test_no_more_than_mmsegmentations_operations(r50):
    ours = saved_bytes(r50, (512, 1024))
    attention = r50.decode_head.ema_module
    _, channels, bases = attention.bases.shape
    r50.decode_head.ema_module = MmsegAttention(channels, bases, attention.num_stages).train()
    mmseg = saved_bytes(r50, (512, 1024))
    r50.decode_head.ema_module = attention
    assert ours <= mmseg
    assert 4e9 < ours < 5.4e9 - 3 * 4 * sum(p.numel() for p in r50.parameters())


def test_checkpointing_and_bfloat16_keep_less(r50):
    full, half = (saved_bytes(r50, (256, 512), d) for d in ("fp32", "bf16"))
    blocks = [module for module in r50.modules() if isinstance(module, Bottleneck)]
    for block in blocks:
        block.checkpointing = True
    less, least = (saved_bytes(r50, (256, 512), d) for d in ("fp32", "bf16"))
    for block in blocks:
        block.checkpointing = False
    assert half < 0.6 * full
    assert less < 0.5 * full
    assert least < 0.7 * less  # the cast weights are kept, too


def test_the_attention_keeps_no_responsibilities():
    """Of the EM attention only what the convolution after it reads is kept."""
    head = create_model("emanet_demo").decode_head.train()
    head.dropout.p = 0
    kept = []
    x = torch.randn(1, 384, 6, 10, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        feats = head.ema_in_conv(x)
        before = len(kept)
        recon = head.ema_module(head.ema_mid_conv(feats))
    inside = {tuple(tensor.shape) for tensor in kept[before:]}
    assert not recon.requires_grad
    # Of the frozen convolution, until the reconstruction exists: its input, which is kept anyway.
    assert inside <= {tuple(feats.shape), tuple(head.ema_mid_conv.conv.weight.shape)}
    num_bases = head.ema_module.bases.shape[2]
    assert all(num_bases not in tensor.shape for tensor in kept[before:])
