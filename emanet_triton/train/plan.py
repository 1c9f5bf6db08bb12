"""From the command line to a training: everything is checked before it starts."""

import math
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from emanet_triton.cores import default_threads
from emanet_triton.data.dataset import Dataset, Sample
from emanet_triton.data.description import open_dataset
from emanet_triton.errors import InputError
from emanet_triton.eval.outputs import keep_out
from emanet_triton.files import require_folder
from emanet_triton.inference.build import require_compiler
from emanet_triton.models.chosen import choose, fetch_chosen, read_chosen
from emanet_triton.models.description import Description
from emanet_triton.models.entries import ZooEntry
from emanet_triton.models.loading import load_backbone, load_into
from emanet_triton.models.network import Network, logits_size
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.zoo import create_model, find_entry
from emanet_triton.train.augment import Augmentation
from emanet_triton.train.folder import refuse_training, require_state
from emanet_triton.train.group import Group
from emanet_triton.train.log import require_own_tables
from emanet_triton.train.options import NATIVE, NONE
from emanet_triton.train.recipe import Recipe
from emanet_triton.versions import versions


@dataclass(frozen=True)
class Plan:
    """All that a command line asks for, found and checked.

    Attributes:
        model: name of the network in the zoo.
        init: the checkpoint or model of the initial weights, ``NONE``, or ``None``.
        backbone: a file with initial weights of the backbone, or ``None``.
        recipe: how the network is trained.
        protocol: how it is validated.
        dataset: the data set.
        train, val: samples of the two splits; ``val`` is empty without a validation.
        device: of this process.
        threads: of PyTorch's operations on a CPU.
        workers: processes that make training samples.
        out: the folder for results.
        resume: go on with the training in ``out``.
        val_every, save_every, keep_every, log_every: iterations from one to the next.
        check: read all files first.
        tensorboard: write for TensorBoard, too.
        dry_run: only show samples and memory.
    """

    model: str
    init: str | None
    backbone: Path | None
    recipe: Recipe
    protocol: Protocol
    dataset: Dataset
    train: list[Sample]
    val: list[Sample]
    device: torch.device
    threads: int
    workers: int
    out: Path
    resume: bool
    val_every: int
    save_every: int
    keep_every: int
    log_every: int
    check: bool
    tensorboard: bool
    dry_run: bool

    @property
    def settings(self) -> dict[str, str]:
        """All that determines the weights, beside data and initial weights: texts by option."""
        recipe = asdict(self.recipe)
        chosen = {**recipe.pop("augmentation"), **recipe, "model": self.model}
        options = {f"--{name.replace('_', '-')}": str(value) for name, value in chosen.items()}
        return options | {"classes": ", ".join(each.name for each in self.dataset.classes)}

    @property
    def origin(self) -> str | None:
        """The initial weights that the options name, as checkpoints and states record them."""
        return self.init or (self.backbone.name if self.backbone else None)

    @property
    def trained(self) -> Description:
        """What the checkpoints say about themselves."""
        return Description(
            model=self.model,
            classes=tuple(each.name for each in self.dataset.classes),
            protocol=self.protocol,
            dataset=self.dataset.description,
            info={"init": str(self.origin), "recipe": asdict(self.recipe), "versions": versions()},
        )

    def network(self) -> Network:
        """The network with its initial weights on its device; new weights depend on the seed.

        Raises:
            InputError: the weights cannot be read or do not fit.
        """
        torch.manual_seed(self.recipe.seed)
        network = create_model(self.model, num_classes=len(self.dataset.classes))
        network.protocol = self.protocol
        if self.backbone and not self.resume:
            load_backbone(network, self.backbone)
        elif self.init not in (None, NONE) and not self.resume:
            load_into(network, read_chosen(self.init, self.model), new_classes=True)
        return network.to(self.device)


def make_plan(args: Namespace, device: torch.device, group: Group) -> Plan:
    """Find and check all that the options name, but the contents of the data set's files.

    Args:
        args: the options, as ``options.parse`` returns them.
        device: of this process.
        group: the processes that train together.

    Raises:
        InputError: something is missing or does not fit.
    """
    if args.compile:
        require_compiler(device)
    goes_on = args.resume and not args.dry_run
    if goes_on:
        require_state(args.out)
    model = _model(args)
    entry = find_entry(model)
    dataset, root = open_dataset(args.data, entry.dataset)
    if not goes_on:
        keep_out(dataset, root, {"--out": args.out})
    train = dataset.find_samples(root, args.train_split)
    val = [] if args.val_split == NONE else dataset.find_samples(root, args.val_split)
    scale = {None: entry.protocol.base_scale, NATIVE: None}.get(args.scale, args.scale)
    if args.init not in (None, NONE) and not (args.resume or args.dry_run):
        fetch_chosen(args.init, model)  # a download that fails leaves no folder behind
    require_folder(args.out)
    if not args.dry_run:
        if not args.resume:
            refuse_training(args.out)
        require_own_tables(args.out)
    return Plan(
        model=model,
        init=args.init,
        backbone=args.backbone,
        recipe=_recipe(args, group, entry, scale),
        protocol=replace(entry.protocol, base_scale=scale),
        dataset=dataset,
        train=train,
        val=val,
        device=device,
        threads=args.threads or default_threads(group.local_count),
        workers=args.workers,
        out=args.out,
        resume=args.resume,
        val_every=args.val_every,
        save_every=args.save_every,
        keep_every=args.keep_every,
        log_every=args.log_every,
        check=args.check,
        tensorboard=args.tensorboard,
        dry_run=args.dry_run,
    )


def _model(args: Namespace) -> str:
    """The network to train: that of the initial weights, or else ``--model``."""
    if args.init in (None, NONE):
        find_entry(args.model)
        return args.model
    return choose(args.init, args.model).name


def _recipe(
    args: Namespace, group: Group, entry: ZooEntry, scale: tuple[int, int] | None
) -> Recipe:
    """The recipe of the options.

    Raises:
        InputError: the ranks cannot share the batch, or a batch norm would see a single value.
    """
    crop = args.crop or entry.crop
    parts = group.count * args.accumulate
    if args.batch_size % parts:
        raise InputError(
            f"--batch-size {args.batch_size}: cannot be split into {parts} equal parts, for "
            f"{group.count} ranks and --accumulate {args.accumulate}"
        )
    images = args.batch_size // (args.accumulate if args.sync_bn else parts)
    stride = getattr(entry.architecture, "stride", entry.network.stride)
    if images * math.prod(logits_size(crop[0], crop[1], stride)) < 2:
        raise InputError(
            f"--crop {crop[0]}x{crop[1]}: gives one value a channel; expected a larger crop or "
            "more images"
        )
    augmentation = Augmentation(
        crop=crop,
        scale=scale,
        ratios=args.ratios,
        most_of_one_class=args.most_of_one_class,
        flip=args.flip,
        colors=args.colors,
    )
    return Recipe(
        augmentation=augmentation,
        iterations=args.iterations,
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        optimizer=args.optimizer,
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        power=args.power,
        min_lr=args.min_lr,
        warmup=args.warmup,
        auxiliary_weight=args.auxiliary_weight,
        dropout=args.dropout,
        class_balance=args.class_balance,
        precision=args.precision,
        ema=args.ema,
        sync_bn=args.sync_bn,
        compile=args.compile,
        checkpointing=args.checkpointing,
        seed=args.seed,
    )
