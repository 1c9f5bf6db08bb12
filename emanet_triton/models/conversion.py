"""Writing a checkpoint's weights alone, as a safetensors file or as a file for mmsegmentation."""

import io
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emanet_triton.data.dataset import Dataset
from emanet_triton.errors import InputError
from emanet_triton.files import write_whole
from emanet_triton.kernels.out_of_memory import is_out_of_memory
from emanet_triton.models.checkpoint import (
    Checkpoint,
    layout_metadata,
    named_digits,
    read_checkpoint,
)
from emanet_triton.models.checkpoint_files.layouts import MMSEGMENTATION, project_of
from emanet_triton.models.checkpoint_files.refusals import shown
from emanet_triton.models.checkpoint_files.safetensors_file import write_safetensors
from emanet_triton.models.checkpoint_files.weights_in import COUNTER, PARTS
from emanet_triton.models.description import Description
from emanet_triton.models.loading import load_into
from emanet_triton.models.zoo import ZOO, create_model, name_of

SAFETENSORS, MMSEG = "safetensors", "mmseg"
SUFFIXES = {SAFETENSORS: ".safetensors", MMSEG: ".pth"}  # of the files of each kind
_COMPUTED_BY_MMSEG = (MMSEGMENTATION, "sssegmentation")  # layouts whose networks it can build
_STAGE = "layer1."  # in a file of a ResNet alone, whose names lack "backbone."
_VARIANCE = ".running_var"  # a batch norm has one, and a counter


def convert(
    source: str | Path,
    destination: str | Path,
    overwrite: bool = False,
    to: str | None = None,
) -> Checkpoint:
    """Write the weights of a checkpoint, and nothing else from it but its description.

    A safetensors file keeps the dtypes of the source. Its metadata name the source, its SHA-256 and
    its layout if this is not mmsegmentation's, and have the description of emanet-triton train if
    the source has one. The weights have this package's names.

    A file for mmsegmentation has the keys and dtypes of its networks: float32, and int64 for the
    counters of batch norms, which are 0 if the source lacks them. ``CLASSES`` and ``PALETTE`` in
    its ``meta`` are those of the description, or else of the published model that the source is.

    Args:
        source: a checkpoint, as ``read_checkpoint`` reads it.
        destination: the file to write.
        overwrite: replace an existing file.
        to: ``"safetensors"`` or ``"mmseg"``; by default the suffix of the destination decides,
            ``.safetensors`` or ``.pth``.

    Returns:
        The written file, read back.

    Raises:
        InputError: the source is not a usable checkpoint, is neither a segmentation network nor a
            backbone, or is no network for mmsegmentation; or the destination has another suffix, is
            the source, cannot be written, or exists and ``overwrite`` is false.
    """
    source, destination = Path(source), Path(destination)
    try:
        kind = _kind(destination, to)
        _check_destination(source, destination, overwrite)
        checkpoint = read_checkpoint(source)
        try:
            description = Description.of(checkpoint.meta)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        write = _safetensors if kind == SAFETENSORS else _mmseg
        data = write(checkpoint, description)
        checkpoint.release()  # frees half of the memory
        write_whole(destination, data)
    except OSError as error:
        raise InputError(f"{destination}: cannot be written ({error.strerror})") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"{source}: its weights do not fit into the memory twice") from error
    del data
    return read_checkpoint(destination)


def _kind(destination: Path, to: str | None) -> str:
    """The kind of file to write; its name must have the suffix of this kind."""
    for kind, suffix in SUFFIXES.items():
        if to in (None, kind) and destination.suffix == suffix:
            return kind
    expected = " or ".join(SUFFIXES.values()) if to is None else SUFFIXES[to]
    raise InputError(f"{destination}: the converted file's name must end in {expected}")


def _check_destination(source: Path, destination: Path, overwrite: bool) -> None:
    """Refuse a wrong destination before the source is read, which may take long."""
    if digits := named_digits(destination.name):
        raise InputError(
            f"{destination}: the name must not end like a published one, because {digits} would be "
            "the beginning of the file's SHA-256"
        )
    if not destination.exists():
        return
    if source.exists() and destination.samefile(source):
        raise InputError(f"{destination}: is the source itself; expected another file")
    if not overwrite:
        raise InputError(f"{destination}: exists already; it is replaced only on request (--force)")


def _safetensors(checkpoint: Checkpoint, description: Description | None) -> bytes:
    if description is None and not any(key.startswith(_STAGE) for key in checkpoint.state_dict):
        _check_parts(checkpoint, PARTS[:1])
    metadata = {
        "format": "pt",
        "source": shown(checkpoint.path.name),
        "source_sha256": checkpoint.sha256,
    }
    metadata |= description.metadata() if description else layout_metadata(checkpoint.layout)
    return write_safetensors(checkpoint.state_dict, metadata)


def _mmseg(checkpoint: Checkpoint, description: Description | None) -> bytes:
    """The bytes of a PyTorch file whose state dict mmsegmentation loads strictly."""
    name = description.model if description else name_of(checkpoint)
    _check_mmseg_computes(name, checkpoint)
    weights = _as_model_has_them(name, checkpoint) if name in ZOO else _with_counters(checkpoint)
    dataset = description.described() if description else None
    if dataset is None and name in ZOO:
        dataset = ZOO[name].dataset
    meta: dict[str, Any] = {
        "source": shown(checkpoint.path.name),
        "source_sha256": checkpoint.sha256,
    }
    meta |= description.metadata() if description else {}
    if dataset is not None and len(dataset.classes) == _classes_of(weights):
        meta |= _meta_of(dataset)
    state_dict = OrderedDict((key, _plain(value)) for key, value in weights.items())
    buffer = io.BytesIO()
    torch.save({"meta": meta, "state_dict": state_dict}, buffer)
    return buffer.getvalue()


def _check_mmseg_computes(name: str | None, checkpoint: Checkpoint) -> None:
    layout = checkpoint.layout
    if layout is None and name in ZOO:  # the file's description names the model
        layout = getattr(ZOO[name].architecture, "layout", MMSEGMENTATION)
    if layout not in (None, *_COMPUTED_BY_MMSEG):
        raise InputError(
            f"{checkpoint.path}: is of a network of {project_of(layout)}, which mmsegmentation "
            f"cannot build; expected one of {' or '.join(_COMPUTED_BY_MMSEG)}, or a safetensors "
            "file as destination"
        )


def _as_model_has_them(name: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights in the order of the model. A missing auxiliary head stays missing.

    Raises:
        InputError: they do not fit the model.
    """
    model = create_model(name, num_classes=_classes_of(checkpoint.state_dict)).to("meta")
    load_into(model, checkpoint, share=True)
    there = {key.partition(".")[0] for key in checkpoint.state_dict}
    return {k: value for k, value in model.state_dict().items() if k.partition(".")[0] in there}


def _with_counters(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of an unknown network, with the counters of its batch norms.

    Raises:
        InputError: it is no segmentation network.
    """
    _check_parts(checkpoint, PARTS[:2])
    weights: dict[str, Tensor] = {}
    for key, value in checkpoint.state_dict.items():
        weights[key] = value
        if key.endswith(_VARIANCE):
            weights.setdefault(key.removesuffix(_VARIANCE) + f".{COUNTER}", torch.tensor(0))
    return weights


def _check_parts(checkpoint: Checkpoint, parts: Sequence[str]) -> None:
    """Raise InputError if a part of a segmentation network is missing."""
    for part in parts:
        if not any(key.startswith(f"{part}.") for key in checkpoint.state_dict):
            raise InputError(
                f"{checkpoint.path}: has no {part}; expected the weights of a segmentation network"
            )


def _classes_of(weights: dict[str, Tensor]) -> int | None:
    bias = weights.get("decode_head.conv_seg.bias")
    return len(bias) if bias is not None and bias.dim() == 1 and 1 <= len(bias) <= 255 else None


def _meta_of(dataset: Dataset) -> dict[str, Any]:
    return {
        "CLASSES": tuple(each.name for each in dataset.classes),
        "PALETTE": [list(each.color) for each in dataset.classes],
    }


def _plain(value: Tensor) -> Tensor:
    """A tensor with memory of its own: ``torch.save`` writes all that a tensor's memory holds."""
    dtype = torch.float32 if value.is_floating_point() else torch.int64
    plain = torch.empty(value.shape, dtype=dtype)
    return plain.copy_(value.detach())
