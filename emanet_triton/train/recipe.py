"""The training recipe as one value; its defaults are mmsegmentation's published schedule."""

from dataclasses import dataclass

from emanet_triton.train.augment import Augmentation

OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Recipe:
    """All that determines the trained weights, beside the data and the initial weights.

    The defaults are those of mmsegmentation's ``schedule_80k`` and ``emanet_r50-d8``.

    Attributes:
        augmentation: how samples are drawn from images.
        iterations: of the optimizer.
        batch_size: images of one iteration, over all ranks.
        accumulate: parts into which a rank splits its images of an iteration, one after another.
        optimizer: ``"sgd"`` or ``"adamw"``.
        lr: learning rate of the first iteration, after the warm-up.
        momentum: of SGD.
        weight_decay: of every trained parameter.
        power, min_lr: the learning rate falls from ``lr`` to ``min_lr`` like
            (1 - iteration / iterations) ** power.
        warmup: iterations in which the learning rate rises linearly from nearly 0.
        auxiliary_weight: of the auxiliary head's loss.
        dropout: probability of Dropout2d before both classifiers.
        class_balance: the loss of a class is weighted by its share of the pixels to the power
            ``-class_balance``; 0 weights all classes equally.
        precision: ``"fp32"``; ``"bf16"`` or ``"fp16"`` by autocast, fp16 with a scaled loss.
        ema: decay of the averaged weights, which are then validated and saved; ``None`` without.
        sync_bn: batch norms take their statistics from the images of all ranks.
        compile: run the network through ``torch.compile``.
        checkpointing: keep the inputs of the backbone's blocks only, and compute the rest again
            in the backward pass.
        seed: of the order of the images, the augmentation, the dropout and new weights.
    """

    augmentation: Augmentation
    iterations: int = 80_000
    batch_size: int = 8
    accumulate: int = 1
    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    power: float = 0.9
    min_lr: float = 1e-4
    warmup: int = 0
    auxiliary_weight: float = 0.4
    dropout: float = 0.1
    class_balance: float = 0.0
    precision: str = "fp32"
    ema: float | None = None
    sync_bn: bool = True
    compile: bool = False
    checkpointing: bool = False
    seed: int = 0

    def lr_at(self, iteration: int) -> float:
        """The learning rate of an iteration, counted from 0 (mmcv ``PolyLrUpdaterHook``)."""
        left = (1 - iteration / self.iterations) ** self.power
        rise = min(1.0, (iteration + 1) / self.warmup) if self.warmup else 1.0
        return rise * ((self.lr - self.min_lr) * left + self.min_lr)
