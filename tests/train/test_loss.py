"""The loss and the accuracy against their definitions."""

import pytest
import torch
from torch.nn import functional as F

from emanet_triton.data.dataset import IGNORE
from emanet_triton.train.loss import accuracy, losses, pixel_loss


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 4, 6, generator=generator, requires_grad=True)
    labels = torch.randint(5, (2, 32, 48), generator=generator)
    labels[:, :16] = IGNORE
    return logits, labels


@pytest.mark.parametrize("align_corners", [False, True])
def test_ignored_pixels_count_in_the_mean(problem, align_corners):
    logits, labels = problem
    resized = F.interpolate(logits, (32, 48), mode="bilinear", align_corners=align_corners)
    each = F.cross_entropy(resized, labels, ignore_index=IGNORE, reduction="none")
    assert (each[:, :16] == 0).all()
    got = pixel_loss(logits, labels, align_corners)
    assert got.item() == pytest.approx(each.mean().item(), rel=1e-6)


def test_class_weights(problem):
    logits, labels = problem
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5])
    resized = F.interpolate(logits, (32, 48), mode="bilinear")
    each = -resized.log_softmax(1).gather(1, labels.clamp(max=4)[:, None])[:, 0]
    want = (each * weights[labels.clamp(max=4)] * (labels != IGNORE)).mean()
    got = pixel_loss(logits, labels, False, weights)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


def test_half_precision_logits_are_counted_in_float32(problem):
    logits, labels = problem
    got = pixel_loss(logits.bfloat16(), labels, False)
    assert got.dtype == torch.float32
    assert got.item() == pixel_loss(logits.bfloat16().float(), labels, False).item()


def test_only_the_total_has_a_gradient(problem):
    logits, labels = problem
    auxiliary = (2 * logits.detach()).requires_grad_()
    found = losses(logits, auxiliary, labels, align_corners=False, auxiliary_weight=0.4)
    assert found.total.item() == pytest.approx((found.main + 0.4 * found.auxiliary).item())
    found.total.backward()
    main, extra = (
        torch.autograd.grad(pixel_loss(each, labels, False), each)[0]
        for each in (logits, auxiliary)
    )
    assert torch.allclose(logits.grad, main)
    assert torch.allclose(auxiliary.grad, 0.4 * extra)
    assert not (found.main.requires_grad or found.auxiliary.requires_grad)


def test_all_pixels_ignored():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    labels = torch.full((1, 16, 16), IGNORE)
    loss = pixel_loss(logits, labels, False)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()
    assert accuracy(logits, labels, False).isnan()


def test_accuracy_leaves_out_ignored_pixels():
    logits = torch.zeros(1, 2, 1, 1)
    logits[:, 1] = 1
    labels = torch.tensor([[[1, 1, 0, IGNORE]]])
    assert accuracy(logits, labels, False).item() == pytest.approx(200 / 3)
