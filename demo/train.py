"""Train the demonstration EMANet on synthetic street scenes.

    python demo/train.py > demo/train.log

It takes twenty minutes on one CPU core and replaces the weights that come with the package. The
same seed gives the same weights on the same machine and versions. The weights in the package are
older: they were trained when the classifiers (``conv_seg``) still began as PyTorch's do.
``--no-reconstruction`` trains the same network, from the same initial weights and on the same
batches, but without the reconstruction of the EM attention; it writes no weights. A trial of a few
seconds:

    python demo/train.py --steps 2 --scenes 2 --held-out 2 --out trial.pth

The last lines of the log show what the reconstruction contributes. They have the mIoU of the
trained network with the reconstruction set to zero, and set to its mean over images and pixels.
Later layers have learnt to expect the mean, so only the second figure shows what the differences
between pixels and images contribute.
"""

import argparse
import io
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from emanet_triton.command import Parser, answer, run, say
from emanet_triton.data.cityscapes import CLASSES, IGNORE, to_train_ids
from emanet_triton.data.scenes.generate import DEMO_COUNT, TRAIN_SEEDS, VAL_SEEDS, generate_scene
from emanet_triton.errors import InputError
from emanet_triton.eval.metric import Scores, confusion_matrix, scores
from emanet_triton.files import require_writable, write_output
from emanet_triton.inference.inputs import normalise
from emanet_triton.inference.segment import segment
from emanet_triton.models.emanet import EMANet
from emanet_triton.models.zoo import DEMO, ZOO

MODEL = ZOO[DEMO]
CHECKPOINT = Path(__file__).parents[1] / "emanet_triton/models/weights" / MODEL.file


@dataclass(frozen=True)
class Recipe:
    """mmseg's recipe on a small scale, with AdamW because it is faster."""

    seed: int = 0
    scenes: int = 1500
    steps: int = 1200
    warmup: int = 100
    batch_size: int = 8
    crop: tuple[int, int] = (192, 384)
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    power: float = 0.9
    auxiliary_weight: float = 0.4
    class_balance: float = 0.33  # class weight = (share of the pixels) ** -class_balance


def load_scenes(seeds: range) -> tuple[Tensor, Tensor]:
    """Images, uint8 RGB [N, H, W, 3], and train ids, uint8 [N, H, W]."""
    images, labels = [], []
    for seed in seeds:
        image, label_ids = generate_scene(seed)
        images.append(torch.from_numpy(image))
        labels.append(torch.from_numpy(to_train_ids(label_ids, "labelIds")))
    return torch.stack(images), torch.stack(labels)


def evaluate(model: EMANet, images: Tensor, labels: Tensor) -> Scores:
    model.eval()
    confusion = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64)
    for image, label in zip(images, labels, strict=True):
        confusion += confusion_matrix(label, segment(model, image))
    model.train()
    return scores(confusion)


@torch.no_grad()
def mean_reconstruction(model: EMANet, images: Tensor) -> Tensor:
    """The reconstruction of the EM attention, averaged over images and pixels: [1, C, 1, 1]."""
    head, means = model.eval().decode_head, []
    for image in images:
        *_, stage4 = model.backbone(normalise(image[None]).contiguous())
        recon = head.ema_module(head.ema_mid_conv(head.ema_in_conv(stage4)))
        means.append(recon.mean((0, 2, 3), keepdim=True))
    return torch.stack(means).mean(0)


def ablate(model: EMANet, images: Tensor, labels: Tensor) -> dict[str, float]:
    """mIoU of the same weights with the reconstruction set to zero, and to its mean."""
    fixed = {"zero": torch.zeros(1), "mean": mean_reconstruction(model, images)}
    figures = {}
    for name, model.decode_head.fixed_reconstruction in fixed.items():
        figures[f"mIoU_{name}_reconstruction"] = evaluate(model, images, labels).miou
    model.decode_head.fixed_reconstruction = None
    return figures


def class_weights(labels: Tensor, power: float) -> Tensor:
    counts = torch.bincount(labels.flatten(), minlength=IGNORE + 1)[: len(CLASSES)]
    counts.clamp_(min=1)  # a small training set may lack a class
    weights = (counts / counts.sum()) ** -power
    return weights / weights.mean()


def draw_batch(
    images: Tensor, labels: Tensor, recipe: Recipe, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Random crops, half of them mirrored."""
    height, width = recipe.crop
    crops = []
    for i in rng.integers(len(images), size=recipe.batch_size):
        top = rng.integers(images.shape[1] - height + 1)
        left = rng.integers(images.shape[2] - width + 1)
        window = (slice(top, top + height), slice(left, left + width))
        crop = images[i][window], labels[i][window]
        crops.append([part.flip(1) for part in crop] if rng.random() < 0.5 else crop)
    batch_images, batch_labels = (torch.stack(parts) for parts in zip(*crops, strict=True))
    return normalise(batch_images).contiguous(), batch_labels.long()


def loss_of(
    outputs: tuple[Tensor, Tensor],
    labels: Tensor,
    weight: Tensor,
    recipe: Recipe,
    rng: np.random.Generator,
) -> Tensor:
    """Cross-entropy of both heads at half resolution, on a random one of every 2x2 pixels."""
    row, column = rng.integers(2, size=2)
    labels = labels[:, row::2, column::2]
    main, auxiliary = (
        F.cross_entropy(
            F.interpolate(logits, labels.shape[1:], mode="bilinear"),
            labels,
            weight,
            ignore_index=IGNORE,
        )
        for logits in outputs
    )
    return main + recipe.auxiliary_weight * auxiliary


def train(recipe: Recipe, reconstruction: bool, num_held_out: int) -> tuple[EMANet, Tensor, Tensor]:
    """Train, and log to stdout. Returns the model, and the held-out images and labels."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    model = EMANet(MODEL.architecture, MODEL.protocol).to(memory_format=torch.channels_last)
    if not reconstruction:
        model.decode_head.fixed_reconstruction = torch.zeros(1)
    start = time.perf_counter()
    images, labels = load_scenes(TRAIN_SEEDS[: recipe.scenes])
    held_out = load_scenes(VAL_SEEDS[:num_held_out])
    say(f"scenes {len(images)} + {len(held_out[0])}  {time.perf_counter() - start:.0f} s")
    weight = class_weights(labels, recipe.class_balance)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        recipe.learning_rate,
        weight_decay=recipe.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / recipe.warmup) * (1 - step / recipe.steps) ** recipe.power,
    )
    model.train()
    start, total = time.perf_counter(), 0.0
    for step in range(1, recipe.steps + 1):
        batch, target = draw_batch(images, labels, recipe, rng)
        outputs = model(batch.contiguous(memory_format=torch.channels_last))
        loss = loss_of(outputs, target, weight, recipe, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        if step % 50 == 0:
            line = f"step {step:5d}  loss {total / 50:.4f}  lr {schedule.get_last_lr()[0]:.2e}"
            if step % 250 == 0 or step == recipe.steps:
                line += f"  held-out mIoU {evaluate(model, *held_out).miou:.2f}"
            say(f"{line}  {time.perf_counter() - start:.0f} s")
            total = 0.0
        schedule.step()
    return model, *held_out


def save(model: EMANet, recipe: Recipe, path: Path, figures: dict[str, float]) -> None:
    """Write the checkpoint in mmseg's format.

    Raises:
        InputError: the file cannot be written.
    """
    meta = {
        "CLASSES": [c.name for c in CLASSES],
        "PALETTE": [list(c.color) for c in CLASSES],
        "config": f"architecture = {asdict(MODEL.architecture)}\nrecipe = {asdict(recipe)}\n",
        "note": "synthetic demonstration, trained by demo/train.py; not an mmseg product",
        "seed": recipe.seed,
        "figures": figures,
    }
    weights = OrderedDict((key, value.contiguous()) for key, value in model.state_dict().items())
    content = io.BytesIO()
    torch.save({"meta": meta, "state_dict": weights}, content)
    write_output(path, content.getvalue())
    say(f"{path.name}: {path.stat().st_size} bytes")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def main() -> int:
    return answer(lambda: run_recipe(options()))


def options() -> argparse.Namespace:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument("--steps", type=positive, default=Recipe.steps)
    parser.add_argument("--scenes", type=positive, default=Recipe.scenes, help="training scenes")
    parser.add_argument("--held-out", type=positive, default=DEMO_COUNT, help="scenes to evaluate")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument(
        "--no-reconstruction", action="store_true", help="an ablation that writes no weights"
    )
    arguments = parser.parse_args()
    if not arguments.no_reconstruction:
        try:
            require_writable(arguments.out)
        except InputError as error:
            parser.error(f"--out {error}")
    return arguments


def run_recipe(arguments: argparse.Namespace) -> int:
    """Train and evaluate; returns the exit code."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.use_deterministic_algorithms(True)
    recipe = Recipe(arguments.seed, arguments.scenes, arguments.steps)
    say(f"{MODEL.architecture}\n{recipe}\ntorch {torch.__version__}, OpenCV {cv2.__version__}")
    model, images, labels = train(recipe, not arguments.no_reconstruction, arguments.held_out)
    result = evaluate(model, images, labels)
    for c, iou in zip(CLASSES, result.iou, strict=True):
        say(f"{c.name:14s} {iou:6.2f}")
    if arguments.no_reconstruction:
        say(f"mIoU {result.miou:.2f}, trained and evaluated without reconstruction")
        return 0
    ablation = ablate(model, images, labels)
    say(
        f"mIoU {result.miou:.2f}, and with the reconstruction set to zero "
        f"{ablation['mIoU_zero_reconstruction']:.2f}, to its mean "
        f"{ablation['mIoU_mean_reconstruction']:.2f}"
    )
    figures = {"mIoU": result.miou, **ablation}
    save(model, recipe, arguments.out, figures)
    return 0


if __name__ == "__main__":
    run(main)
