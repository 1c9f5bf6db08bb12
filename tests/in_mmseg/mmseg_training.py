"""Training with our ``EMAHead`` against training with mmsegmentation's."""

import copy

import pytest
import torch
import versions_of_mmseg as mm
from golden_data import relative_error
from mmseg.models.decode_heads import ema_head
from versions_of_mmseg import VERSION_1, build, config_of, metas_of, reference_of

from emanet_triton.mmseg import EMAHead
from emanet_triton.mmseg.head import EMAModule

SIZE = (64, 96)


@pytest.fixture(params=["EncoderDecoder", "FusedEMANet"])
def pair(request):
    """mmsegmentation's own segmentor and one with our head, both from seed 0."""
    config = config_of(type=request.param)
    return build(reference_of(config)).train(), build(config).train()


def losses_of(model):
    """The losses of a batch, with the same random dropout in each call."""
    torch.manual_seed(0)
    images, classes = torch.randn(2, 3, *SIZE), torch.randint(0, 19, (2, 1, *SIZE))
    classes[:, :, :5] = 255
    metas = metas_of(2, SIZE, SIZE)
    if not VERSION_1:
        return model(images, metas, gt_semantic_seg=classes)
    samples = [mm.SegDataSample(metainfo=meta) for meta in metas]
    for sample, gt in zip(samples, classes, strict=True):
        sample.gt_sem_seg = mm.PixelData(data=gt)
    return model(images, samples, mode="loss")


def step(model):
    """One step of SGD; returns the losses."""
    losses = losses_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    optimizer.zero_grad()
    sum(value for name, value in losses.items() if "loss" in name).backward()
    optimizer.step()
    return {name: value.detach() for name, value in losses.items()}


def test_an_unchanged_configuration_takes_our_head(pair):
    reference, model = pair
    assert type(reference.decode_head) is ema_head.EMAHead
    assert type(model.decode_head) is EMAHead and type(model.decode_head.ema_module) is EMAModule


def test_the_initial_weights_are_equal(pair):
    own, ours = (model.state_dict() for model in pair)
    assert list(own) == list(ours)
    for name, value in own.items():
        assert torch.equal(value, ours[name]), name


def test_losses_gradients_and_bases(pair):
    reference, model = pair
    start = model.decode_head.ema_module.bases.clone()
    want, got = step(reference), step(model)
    assert want.keys() == got.keys() and len(want) == 4
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
    own, ours = (m.decode_head.ema_module.bases for m in pair)
    assert relative_error(start, own) > 0.01
    assert relative_error(ours, own) < 1e-5
    for (name, own), ours in zip(reference.named_parameters(), model.parameters(), strict=True):
        assert (own.grad is None) == (ours.grad is None), name
        if own.grad is not None:
            assert relative_error(ours.grad, own.grad) < 1e-3, name


def test_evaluation_after_a_step_uses_the_new_weights(pair):
    reference, model = pair
    inputs = torch.randn(1, 3, *SIZE, generator=torch.manual_seed(0))
    before = mm.encoded(model.eval(), inputs)
    step(model.train())
    reference.load_state_dict(model.state_dict())
    got = mm.encoded(model.eval(), inputs)
    assert relative_error(got, mm.encoded(reference.eval(), inputs)) < 1e-4
    assert relative_error(before, got) > 0.01


def test_a_copy_of_the_head_keeps_its_operator(pair):
    head = copy.deepcopy(pair[1].decode_head)
    assert type(head.ema_module) is EMAModule
