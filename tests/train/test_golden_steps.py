"""Three training steps of R50 against mmsegmentation 0.30.0, for both crops' settings."""

import json

import pytest
import torch
from golden_data import FOLDER, listed_keys, make_tensor, normalised, relative_error, vectors

from emanet_triton import create_model
from emanet_triton.train.augment import Augmentation
from emanet_triton.train.recipe import Recipe
from emanet_triton.train.samples import Batch
from emanet_triton.train.trainer import Trainer

STEPS = json.loads((FOLDER / "train.json").read_text())


def weights(name):
    """The weights with which mmsegmentation began."""
    state = {
        key: make_tensor(key, shape, STEPS[name]["seed"]) for key, shape, _ in listed_keys(name)
    }
    for key, value in state.items():
        if key.endswith("running_var"):
            value.fill_(1)
        elif key.endswith(("running_mean", "num_batches_tracked")):
            value.zero_()
        elif "conv_seg" in key:
            value *= 0.1
    state["decode_head.ema_out_conv.bn.weight"] /= 16
    return state


@pytest.mark.parametrize("name", STEPS)
def test_three_steps(name):
    golden, told = vectors(f"train_{name}"), STEPS[name]
    model = create_model(name)
    model.load_state_dict(weights(name))
    trainer = Trainer(model, Recipe(Augmentation(tuple(told["crop"]), None), dropout=0.0))
    for i, step in enumerate(told["steps"]):
        assert trainer.lr == pytest.approx(step["lr"], rel=1e-12)
        images, labels = (torch.from_numpy(golden[f"{key}_{i}"]) for key in ("images", "labels"))
        batch = Batch(images, labels, torch.tensor([labels.shape[1:]] * len(labels)))
        losses, accuracy = trainer.step([batch], with_accuracy=True)
        assert float(losses.total) == pytest.approx(step["loss"], rel=5e-6)
        assert float(losses.main) == pytest.approx(step["decode"], rel=5e-6)
        assert 0.4 * float(losses.auxiliary) == pytest.approx(step["aux"], rel=5e-6)
        assert float(accuracy) == pytest.approx(step["acc"], abs=0.05)
        bases = model.decode_head.ema_module.bases
        assert relative_error(bases, torch.from_numpy(golden[f"bases_{i}"])) < (5e-4 if i else 1e-5)
        if i == 0:
            norms = {
                key: p.grad.norm().item()
                for key, p in model.named_parameters()
                if p.grad is not None
            }
            assert {key: norms[key] for key in step["grad_norm"]} == pytest.approx(
                step["grad_norm"],
                rel=2e-3,  # ReLUs near 0; float64 differs from mmseg by 6e-4
            )
    states = {
        "stem_running_mean": model.backbone.stem[1].running_mean,
        "stem_running_var": model.backbone.stem[1].running_var,
        "conv_seg_weight": model.decode_head.conv_seg.weight.detach(),
    }
    for key, value in states.items():
        assert relative_error(value, torch.from_numpy(golden[key])) < 1e-4, key
    with torch.no_grad():
        logits = model.eval()(torch.cat([normalised(image) for image in golden["images_2"]]))
    assert relative_error(logits, torch.from_numpy(golden["logits_after"])) < 5e-3


def test_the_frozen_convolution_stays():
    name = next(iter(STEPS))
    golden = vectors(f"train_{name}")
    model = create_model("emanet_demo")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = Trainer(model, Recipe(Augmentation((64, 128), None)))
    images, labels = (torch.from_numpy(golden[f"{key}_0"]) for key in ("images", "labels"))
    trainer.step([Batch(images, labels, torch.tensor([[64, 128]] * 2))])
    same = {key for key, value in model.state_dict().items() if torch.equal(value, before[key])}
    assert same == {"decode_head.ema_mid_conv.conv.weight", "decode_head.ema_mid_conv.conv.bias"}
