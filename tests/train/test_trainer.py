"""One iteration: learning rate, averaged weights, accumulation, checkpointing, precisions."""

import copy
import functools

import pytest
import torch
from tiny_models import tiny_model

from emanet_triton.train.augment import Augmentation
from emanet_triton.train.recipe import Recipe
from emanet_triton.train.samples import Batch
from emanet_triton.train.trainer import Trainer

HOW = Augmentation(crop=(32, 64), scale=None)


def batch(seed=0, count=2, size=(32, 64)):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 32, 64, 3), generator=generator).byte()
    labels = torch.randint(19, (count, 32, 64), generator=generator).byte()
    return Batch(images, labels, torch.tensor([size] * count))


def trained(steps=2, parts=1, **recipe):
    """The trainer after some iterations of the tiny network."""
    trainer = Trainer(tiny_model(), Recipe(HOW, **({"iterations": 10} | recipe)))
    for step in range(steps):
        trainer.step([batch(parts * step + part) for part in range(parts)])
    return trainer


def difference(one, other):
    """The largest difference of the weights, as a share of what training changed."""
    ours, theirs = one.network.state_dict(), other.network.state_dict()
    start = tiny_model().state_dict()
    return max(
        float((ours[key] - theirs[key]).norm() / (ours[key] - start[key]).norm())
        for key in ours
        if "ema_mid_conv" not in key and "tracked" not in key
    )


def test_the_published_schedule():
    recipe = Recipe(HOW)
    assert recipe.lr_at(0) == 0.01
    assert recipe.lr_at(40_000) == pytest.approx((0.01 - 1e-4) * 0.5**0.9 + 1e-4)
    assert recipe.lr_at(80_000) == pytest.approx(1e-4)
    assert (recipe.iterations, recipe.batch_size) == (80_000, 8)
    assert (recipe.momentum, recipe.weight_decay, recipe.auxiliary_weight) == (0.9, 5e-4, 0.4)


def test_a_warm_up_rises_to_the_schedule():
    recipe = Recipe(HOW, warmup=10)
    plain = Recipe(HOW)
    assert recipe.lr_at(0) == pytest.approx(0.1 * plain.lr_at(0))
    assert recipe.lr_at(9) == plain.lr_at(9)
    assert recipe.lr_at(100) == plain.lr_at(100)


def test_equal_trainings_are_equal_to_the_bit():
    one, other = trained().network.state_dict(), trained().network.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    third = trained(seed=1).network.state_dict()  # another dropout
    assert not torch.equal(one["backbone.stem.0.weight"], third["backbone.stem.0.weight"])


def test_going_on_from_a_state_is_not_stopping():
    through = trained(3, ema=0.9)
    stopped = trained(2, ema=0.9)
    state = copy.deepcopy(stopped.state_dict())
    resumed = Trainer(tiny_model(), stopped.recipe)
    resumed.load_state_dict(state)
    resumed.step([batch(2)])
    for ours, theirs in (
        (resumed.network, through.network),
        (resumed.averaged, through.averaged),
    ):
        ours, theirs = ours.state_dict(), theirs.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_accumulated_gradients_are_the_mean_of_the_parts():
    recipe = Recipe(HOW, accumulate=2, dropout=0.0, iterations=10)
    trainer = Trainer(tiny_model(), recipe)
    trainer.step([batch(0), batch(1)])
    gradients = {key: p.grad for key, p in trainer.network.named_parameters() if p.grad is not None}
    wanted = {key: torch.zeros_like(value) for key, value in gradients.items()}
    alone = Trainer(tiny_model(), Recipe(HOW, dropout=0.0, iterations=10, lr=1e-30, min_lr=1e-30))
    bases = alone.network.decode_head.ema_module.bases
    for seed in range(2):
        alone.step([batch(seed)])
        for key, parameter in alone.network.named_parameters():
            if parameter.grad is not None:
                wanted[key] += parameter.grad / 2
    assert torch.allclose(bases, trainer.network.decode_head.ema_module.bases)
    for key, value in wanted.items():
        assert torch.allclose(gradients[key], value, rtol=1e-4, atol=1e-6), key


def test_averaged_weights():
    trainer = Trainer(tiny_model(), Recipe(HOW, iterations=10, ema=0.75))
    start = copy.deepcopy(trainer.network.state_dict())
    trainer.step([batch(0)])
    first = copy.deepcopy(trainer.network.state_dict())
    trainer.step([batch(1)])
    second, averaged = trainer.network.state_dict(), trainer.averaged.state_dict()
    assert averaged.keys() == start.keys()
    key = "backbone.stem.0.weight"
    assert torch.allclose(averaged[key], 0.75 * first[key] + 0.25 * second[key], atol=1e-7)
    assert trainer.result is trainer.averaged


def test_checkpointing_changes_no_bit():
    plain, saving = trained(), trained(checkpointing=True)
    ours, theirs = saving.network.state_dict(), plain.network.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)  # and no statistic twice


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_has_nearly_the_same_losses_and_float32_weights(precision):
    half, full = (
        Trainer(tiny_model(), Recipe(HOW, iterations=10, dropout=0.0, precision=each))
        for each in (precision, "fp32")
    )
    ours, theirs = half.step([batch()])[0], full.step([batch()])[0]
    assert 0 < abs(float(ours.total / theirs.total) - 1) < 0.02
    dtypes = {value.dtype for value in half.network.state_dict().values()}
    assert dtypes == {torch.float32, torch.int64}


def test_the_scaled_loss_skips_an_overflow():
    trainer = Trainer(tiny_model(), Recipe(HOW, iterations=10, precision="fp16"))
    trainer._scaler._init_scale = 2.0**120
    before = copy.deepcopy(dict(trainer.network.named_parameters()))
    trainer.step([batch()])
    after = dict(trainer.network.named_parameters())
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert trainer._scaler.get_scale() < 2.0**120


def test_pixels_outside_the_image_are_zero_after_normalisation():
    trainer = Trainer(tiny_model(), Recipe(HOW))
    images, labels = trainer.inputs(batch(size=(20, 30)))
    assert (images[:, :, 20:] == 0).all()
    assert (images[:, :, :, 30:] == 0).all()
    assert (images[:, :, :20, :30] != 0).any()
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_weights_have_no_optimizer_state(optimizer):
    trainer = trained(1, optimizer=optimizer)
    parameters = [p for p in trainer.network.parameters() if p.requires_grad]
    state = trainer.state_dict()["optimizer"]
    assert len(state["param_groups"][0]["params"]) == len(parameters)
    assert len(list(trainer.network.parameters())) - len(parameters) == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled(monkeypatch, checkpointing):
    # Without the code of a compiler, which takes a minute to write.
    eager = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    compiled = trained(2, compile=True, checkpointing=checkpointing, dropout=0.0)
    plain = trained(2, dropout=0.0)
    assert difference(compiled, plain) < 1e-2
    key = "backbone.layer4.0.bn1.num_batches_tracked"
    assert compiled.network.state_dict()[key] == 2
    assert compiled.network.state_dict().keys() == plain.network.state_dict().keys()
