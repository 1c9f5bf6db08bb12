"""Loading checkpoints into networks: strictly, all weights or none."""

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from emanet_triton.errors import InputError
from emanet_triton.models.checkpoint import Checkpoint, read_checkpoint
from emanet_triton.models.checkpoint_files.layouts import has_auxiliary_head, parts_of, project_of
from emanet_triton.models.checkpoint_files.refusals import shown
from emanet_triton.models.checkpoint_files.weights_in import AUXILIARY, COUNTER, PARTS

_LISTED = 8
_AUXILIARY = f"{AUXILIARY}."
_LOSS = ".loss_decode."  # in keys of the losses of mmseg's heads
_CLASSIFIERS = ("decode_head.conv_seg", f"{AUXILIARY}.conv_seg")
_BACKBONE = "backbone."
_STEM = f"{_BACKBONE}stem.0.weight"
_CLASSIFIER_OF_BACKBONES = ("fc.weight", "fc.bias")


def load_into(
    model: nn.Module,
    checkpoint: Checkpoint,
    share: bool = False,
    new_classes: bool = False,
    stacklevel: int = 2,
) -> None:
    """Copy a checkpoint's weights into a model, all or none, cast to the model's dtypes.

    Entries that may be missing:

    - Counters ``num_batches_tracked``, which no network uses, become 0.
    - The whole auxiliary head, which only training uses. With a warning the model keeps its own,
      or gets zeros if it is on the meta device. No warning is needed for the authors' EMANet, which
      never has one.

    Entries that belong to no part of the network, and entries of mmseg's losses, are left out with
    a warning if all others fit.

    Args:
        model: the weights are copied into its tensors.
        checkpoint: its file is read again if the checkpoint was released.
        share: put the checkpoint's own tensors into the model, in the dtypes of the file, instead
            of copies. The model may then be on the meta device, where it has no memory.
        new_classes: if the file is for another number of classes, the model keeps its own
            classifiers (``conv_seg`` of both heads), with a warning. All others must fit. The
            classifiers of a new model are random.
        stacklevel: of the warnings, as ``warnings.warn`` takes it; 2 is the caller's line.

    Raises:
        InputError: keys are missing, left over, or of another shape or kind of number; the
            message lists them. Or the weights belong to another project's networks than the model.
            Nothing is loaded.
        ValueError: without ``share``, the model is on the meta device or has a tensor that cannot
            be written; nothing is loaded. Or ``share`` and ``new_classes`` are both given.
    """
    if share and new_classes:
        raise ValueError("give either share=True or new_classes=True, not both")
    if not checkpoint.state_dict:
        checkpoint = read_checkpoint(checkpoint.path, checkpoint.sha256)
    _check_layout(model, checkpoint)
    ours = model.state_dict()
    theirs = checkpoint.state_dict
    stand_ins = _stand_ins(theirs, ours)
    kept = _own_classifiers(theirs, ours) if new_classes else {}
    old, new = (_classes(state) for state in (theirs, ours))
    theirs = {key: value for key, value in theirs.items() if key not in kept}
    needed = {key: value for key, value in ours.items() if key not in stand_ins | kept}
    extras = _extras(theirs, needed, {*PARTS, *parts_of(checkpoint.layout)})
    theirs = {key: value for key, value in theirs.items() if key not in extras}
    _check_fit(checkpoint.path, theirs, needed)
    if not share:
        _check_writable(ours)
    model.load_state_dict(theirs | stand_ins | kept, assign=share)
    if kept:
        names = dict.fromkeys(key.rpartition(".")[0] for key in kept)
        warnings.warn(
            f"{checkpoint.path}: is for {old} classes, the model for {new}; the model's "
            f"classifiers are random and must be trained: {' and '.join(names)}",
            stacklevel=stacklevel,
        )
    if extras:
        warnings.warn(
            f"{checkpoint.path}: leaves out {len(extras)} of its entries, which no network uses, "
            f"first {shown(next(iter(extras)))}",
            stacklevel=stacklevel,
        )
    lacks = any(key.startswith(_AUXILIARY) and not key.endswith(COUNTER) for key in stand_ins)
    if lacks and has_auxiliary_head(checkpoint.layout):
        warnings.warn(
            f"{checkpoint.path}: has no auxiliary head, which only training uses; none is loaded",
            stacklevel=stacklevel,
        )


def load_backbone(model: nn.Module, path: str | Path) -> None:
    """Copy the weights of a backbone file into ``model.backbone``, all or none.

    The keys are those of ``model.backbone``, with or without the prefix ``backbone.``, as in
    mmsegmentation's ``open-mmlab://resnet50_v1c``. Left out with a warning: in a file with the
    prefix all entries without it, otherwise the classifier ``fc``. Counters
    ``num_batches_tracked`` may be missing.

    Args:
        model: a network with a ``backbone``, not on the meta device.
        path: the file, as ``read_checkpoint`` reads it.

    Raises:
        InputError: the file cannot be read or is no file of this backbone; nothing is loaded.
        ValueError: a tensor of the model cannot be written; nothing is loaded.
    """
    backbone = model.get_submodule("backbone")
    ours = {f"{_BACKBONE}{key}": value for key, value in backbone.state_dict().items()}
    checkpoint = read_checkpoint(path)
    stored = checkpoint.state_dict
    if any(key.startswith(_BACKBONE) for key in stored):
        theirs = {key: value for key, value in stored.items() if key.startswith(_BACKBONE)}
    else:
        theirs = {
            f"{_BACKBONE}{key}": value
            for key, value in stored.items()
            if key not in _CLASSIFIER_OF_BACKBONES
        }
    counters = {
        key: torch.zeros_like(value)
        for key, value in ours.items()
        if key.endswith(COUNTER) and key not in theirs
    }
    needed = {key: value for key, value in ours.items() if key not in counters}
    _check_fit(checkpoint.path, theirs, needed, "backbone")
    _check_writable(ours)
    loaded = theirs | counters
    backbone.load_state_dict({key.removeprefix(_BACKBONE): value for key, value in loaded.items()})
    left = [key for key in stored if key not in theirs and f"{_BACKBONE}{key}" not in theirs]
    if left:
        warnings.warn(
            f"{checkpoint.path}: leaves out {len(left)} of its entries, which no backbone uses, "
            f"first {shown(left[0])}",
            stacklevel=2,
        )


def _classes(state: Mapping[str, Tensor]) -> int | None:
    """The number of classes of a state dict, if its classifier says it."""
    weight = state.get(f"{_CLASSIFIERS[0]}.weight")
    return weight.shape[0] if weight is not None and weight.dim() else None


def _own_classifiers(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's own classifiers, if those of the file differ in the number of classes alone."""
    old, new = _classes(theirs), _classes(ours)
    keys = [f"{name}.{part}" for name in _CLASSIFIERS for part in ("weight", "bias")]
    keys = [key for key in keys if key in ours and key in theirs]
    others = all(theirs[key].shape == (old, *ours[key].shape[1:]) for key in keys)
    return {key: ours[key] for key in keys} if old != new and others else {}


def _stand_ins(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values for the entries that the file lacks and may lack.

    They are 0 for counters. For the auxiliary head they are the model's own, or zeros if the model
    is on the meta device.
    """
    has_head = any(key.startswith(_AUXILIARY) and _LOSS not in key for key in theirs)
    lacking = {}
    for key, value in ours.items():
        counter = key.endswith(COUNTER)
        if key not in theirs and (counter or (key.startswith(_AUXILIARY) and not has_head)):
            fresh = counter or value.is_meta
            zeros = torch.zeros(value.shape, dtype=value.dtype, device="cpu")
            lacking[key] = zeros if fresh else value
    return lacking


def _extras(
    theirs: dict[str, Tensor], needed: dict[str, Tensor], parts: Collection[str]
) -> dict[str, Tensor]:
    """Entries of a training that belong to no network; none if the file lacks needed ones."""
    if not needed.keys() <= theirs.keys():
        return {}
    return {
        key: value
        for key, value in theirs.items()
        if key not in needed and (key.partition(".")[0] not in parts or _LOSS in key)
    }


def _check_layout(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Refuse weights of a network that computes something else with weights of the same shapes."""
    expected = getattr(getattr(model, "architecture", None), "layout", None)
    layout = checkpoint.layout
    if layout is not None and expected is not None and layout != expected:
        theirs, ours = project_of(layout), project_of(expected)
        raise InputError(
            f"{checkpoint.path}: is a checkpoint of {theirs}, but the model is one of {ours}: the "
            f"same weights give other results there; expected a model of {theirs} "
            "(--model NAME, or create_model(NAME, ...))"
        )


def _check_fit(
    path: Path, theirs: dict[str, Tensor], ours: dict[str, Tensor], what: str = "model"
) -> None:
    problems = {
        "missing from the file": [key for key in ours if key not in theirs],
        "left over in the file": [shown(key) for key in theirs if key not in ours],
        "of another shape or type": [
            f"{key}: {difference}"
            for key in ours
            if key in theirs and (difference := _difference(theirs[key], ours[key]))
        ],
    }
    if any(problems.values()):
        sections = [
            "\n  ".join([f"{title} ({len(lines)}):", *_cut(lines)])
            for title, lines in problems.items()
            if lines
        ]
        message = [f"{path}: does not fit the {what}", *sections, *_hints(theirs, ours)]
        raise InputError("\n".join(message))


def _check_writable(ours: dict[str, Tensor]) -> None:
    """Raise for a tensor that cannot be written, before any tensor is changed."""
    for key, value in ours.items():
        if value.is_meta:
            raise ValueError(
                "a model on the meta device has no memory for weights; give share=True"
            )
        if value.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{key} was made in inference mode and can be written there only; make the model "
                "outside torch.inference_mode"
            )
        if any(
            size > 1 and step == 0 for size, step in zip(value.shape, value.stride(), strict=True)
        ):
            raise ValueError(f"{key} is expanded: several of its elements share memory")


def _difference(theirs: Tensor, ours: Tensor) -> str | None:
    """Why one tensor cannot be copied into the other; ``None`` if it can."""
    if theirs.shape != ours.shape:
        return f"file {list(theirs.shape)}, model {list(ours.shape)}"
    if theirs.is_floating_point() != ours.is_floating_point() or theirs.is_complex():
        return f"file {theirs.dtype}, model {ours.dtype}".replace("torch.", "")
    return None


def _cut(lines: list[str]) -> list[str]:
    more = len(lines) - _LISTED
    return [*lines[:_LISTED], f"... and {more} more"] if more > 0 else lines


def _hints(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> list[str]:
    """Guess the reason of a mismatch: another architecture or another number of classes."""
    if _STEM in ours and _STEM not in theirs and f"{_BACKBONE}conv1.weight" in theirs:
        return [
            "The file's backbone begins with one convolution, as torchvision's ResNet; expected "
            "ResNetV1c, whose stem has three, as open-mmlab://resnet50_v1c."
        ]
    hints = []
    blocks, wanted = _blocks(theirs), _blocks(ours)
    if blocks != wanted:
        hints.append(
            f"The file's backbone has {blocks or 'no'} blocks, the model's {wanted}: "
            "the file is of another architecture."
        )
    classes, expected = (s.get("decode_head.conv_seg.weight") for s in (theirs, ours))
    if classes is not None and expected is not None and classes.shape[:1] != expected.shape[:1]:
        hints.append(
            f"The file is for {classes.shape[0] if classes.dim() else 'no'} classes, "
            f"the model for {expected.shape[0]}; create_model takes num_classes=, and the commands "
            "eval, predict and export take --data FILE.toml with the classes."
        )
    return hints


def _blocks(keys: Iterable[str]) -> str:
    """The number of blocks of each stage, for example ``"3-4-6-3"``."""
    matches = (re.match(r"backbone\.layer(\d+)\.(\d+)\.", key) for key in keys)
    blocks = Counter(stage for stage, _ in {match.groups() for match in matches if match})
    return "-".join(str(blocks[stage]) for stage in sorted(blocks))
