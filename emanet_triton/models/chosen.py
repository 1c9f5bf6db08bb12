"""What the options ``--ckpt`` and ``--model`` of a command line choose: a model and its weights."""

import os
from pathlib import Path

from emanet_triton.errors import InputError
from emanet_triton.models.checkpoint import Checkpoint, read_checkpoint
from emanet_triton.models.zoo import (
    ZOO,
    find_entry,
    list_models,
    name_of,
    published_path,
    read_published,
)


def known_model(ckpt: str, model: str | None) -> str | None:
    """The model that ``--ckpt`` belongs to, found without reading a file.

    Args:
        ckpt: a checkpoint file or the name of a model.
        model: the name of the model as the user gave it, or ``None``.

    Returns:
        The name of the model, or ``None`` if only the file's content can say it.

    Raises:
        InputError: there is no such model, or ``ckpt`` and ``model`` name different ones.
    """
    path, exists = Path(ckpt), _exists(ckpt)
    if model is not None:
        find_entry(model)
    if ckpt in ZOO and not exists:
        if model not in (None, ckpt):
            raise InputError(f"--ckpt {ckpt} is not a checkpoint of --model {model}")
        return ckpt
    if not exists and path.suffix == "":
        raise InputError(
            f"{ckpt}: no such file and no such model; expected a checkpoint file or one of: "
            + ", ".join(list_models())
        )
    known = model or next((n for n, entry in ZOO.items() if entry.file == path.name), None)
    return known if exists else None


def model_of_file(ckpt: str) -> str:
    """The model whose published file this is, by its name or its hash.

    Raises:
        InputError: the file cannot be read, or is no published one.
    """
    name = name_of(read_checkpoint(Path(ckpt)))
    if name is None:
        raise InputError(
            f"{ckpt}: neither its name nor its hash belongs to a published file; expected --model "
            "with one of: " + ", ".join(list_models())
        )
    return name


def read_chosen(ckpt: str | None, name: str) -> Checkpoint:
    """The checkpoint of a model: the file ``ckpt``, or else the published one.

    Raises:
        InputError: the file is missing, damaged or, if published, not the right one.
    """
    if ckpt and _exists(ckpt):
        return read_checkpoint(Path(ckpt))
    return read_published(name)


def chosen_path(ckpt: str | None, name: str) -> Path:
    """The file that ``read_chosen`` reads, also if it has not been downloaded yet."""
    return Path(ckpt) if ckpt and _exists(ckpt) else published_path(name)


def _exists(path: str) -> bool:
    return os.path.exists(path)  # noqa: PTH110 (unlike Path.exists, never raises)
