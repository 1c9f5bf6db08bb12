"""The block's specification, held against the modules that the head is made of."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from emanet_triton import EMAttention
from emanet_triton.kernels.em import reference


@pytest.mark.parametrize("out_relu", [False, True])
def test_block_is_the_heads_sequence_of_modules(out_relu):
    torch.manual_seed(0)
    mid, attention = nn.Conv2d(12, 12, 1), EMAttention(12, 5).eval()
    out, norm = nn.Conv2d(12, 12, 1, bias=False), nn.BatchNorm2d(12).eval()
    for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
        t.data.uniform_(0.5, 2)
    feats = torch.randn(2, 12, 3, 7)
    act = nn.ReLU() if out_relu else nn.Identity()
    with torch.no_grad():
        want = F.relu(feats + act(norm(out(F.relu(attention(mid(feats)))))))
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        got, bases = reference.em_attention_block(
            feats.flatten(2),
            attention.bases,
            mid.weight[:, :, 0, 0],
            mid.bias,
            out.weight[:, :, 0, 0] * scale[:, None],
            norm.bias - norm.running_mean * scale,
            out_relu=out_relu,
        )
    torch.testing.assert_close(got.view_as(want), want, rtol=1e-4, atol=1e-5)
    x = mid(feats).flatten(2)
    _, want_bases = reference.em_attention(x, attention.bases)
    torch.testing.assert_close(bases, want_bases)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_block_in_half_precision_rounds_only_the_output(dtype):
    torch.manual_seed(0)
    shapes = [(2, 16, 40), (1, 16, 3), (16, 16), (16,), (16, 16), (16,)]
    arguments = [torch.randn(shape).to(dtype) for shape in shapes]
    got = reference.em_attention_block(*arguments)
    want = reference.em_attention_block(*(t.float() for t in arguments))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g, w.to(dtype), rtol=0, atol=0)


def test_no_gradient_flows_through_the_block():
    shapes = [(1, 4, 6), (1, 4, 2), (4, 4), (4,), (4, 4), (4,)]
    arguments = [torch.randn(shape, requires_grad=True) for shape in shapes]
    assert not any(t.requires_grad for t in reference.em_attention_block(*arguments))
