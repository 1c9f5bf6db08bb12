"""What the options ``--ckpt``, ``--model`` and ``--data`` of a command line choose together."""

from dataclasses import dataclass
from pathlib import Path

from emanet_triton.data.dataset import Dataset
from emanet_triton.data.description import is_description, open_dataset
from emanet_triton.data.overlay import class_names
from emanet_triton.data.public import find_dataset
from emanet_triton.errors import InputError
from emanet_triton.files import exists
from emanet_triton.models.checkpoint import Checkpoint, read_checkpoint
from emanet_triton.models.description import description_in
from emanet_triton.models.emanet import Architecture
from emanet_triton.models.pins import check_pin
from emanet_triton.models.protocol import Protocol
from emanet_triton.models.zoo import (
    ZOO,
    check_model,
    fetch_published,
    find_entry,
    models_like,
    name_of,
    name_of_path,
    published_path,
    read_published,
)


@dataclass(frozen=True)
class Chosen:
    """A model, its classes and its protocol.

    Attributes:
        name: of the model in the zoo.
        dataset: whose classes the network predicts.
        protocol: how images are resized and cut into windows.
        root: of the data set; ``None`` without ``--data``.
    """

    name: str
    dataset: Dataset
    protocol: Protocol
    root: Path | None = None

    @property
    def num_classes(self) -> int:
        """The channels of the network's logits."""
        return len(self.dataset.classes)


def choose(
    ckpt: str, model: str | None = None, data: Path | None = None, dataset: str | None = None
) -> Chosen:
    """Find out what the options mean. A large file is read only if nothing else names its model.

    A file of emanet-triton train says its model, its protocol and its data set. For other
    files these are the zoo's.

    Args:
        ckpt: a checkpoint file or the name of a model.
        model: the name of the model as the user gave it, or ``None``.
        data: the root of the data set, or a file ``*.toml`` that describes another data set; or
            ``None``.
        dataset: the name of the public data set in the folder ``data``, if it is not the model's
            own.

    Raises:
        InputError: an option names nothing that can be used, or two options contradict each other.
    """
    described = open_dataset(data) if data is not None and is_description(data) else None
    if described and dataset:
        raise InputError(f"--dataset {dataset}: --data {data} describes its own data set")
    known = known_model(ckpt, model)
    description = description_in(Path(ckpt)) if exists(ckpt) else None
    if description is not None:
        name = description.model
        if name not in ZOO:
            raise InputError(
                f"{ckpt}: is of the model '{name}', which is unknown here; expected "
                + models_like(name)
            )
        if model not in (None, name):
            raise InputError(f"{ckpt}: is a checkpoint of {name}, not of --model {model}")
    elif known is not None:
        name = known
    else:
        if data and exists(ckpt) and not exists(data):
            raise InputError(f"--data {data}: there is no such folder")
        name = model_of_file(ckpt)
    entry = find_entry(name)
    own = (description and description.described()) or entry.dataset
    if description is not None and description.classes != class_names(own):
        raise InputError(
            f"{ckpt}: says that it has the classes of {own.name}, but its own are "
            + ", ".join(description.classes)
        )
    chosen, root = own if dataset is None else find_dataset(dataset), None
    # A file without a description may have other classes than the model that --model names.
    known_classes = description is not None or model is None or not exists(ckpt)
    if known_classes and len(chosen.classes) != len(own.classes):
        raise InputError(
            f"--dataset {dataset}: {chosen.name} has {len(chosen.classes)} classes, but {ckpt} has "
            f"{len(own.classes)}; expected a data set with the model's classes"
        )
    if described is not None:
        chosen, root = described
    elif data is not None:
        chosen, root = open_dataset(data, chosen)
    return Chosen(name, chosen, description.protocol if description else entry.protocol, root)


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
    path, there = Path(ckpt), exists(ckpt)
    if model is not None:
        find_entry(model)
    if ckpt in ZOO and not there:
        if model not in (None, ckpt):
            raise InputError(f"{ckpt} is not a checkpoint of --model {model}")
        return ckpt
    if not there and path.suffix == "":
        raise InputError(
            f"{ckpt}: no such file and no such model; expected a checkpoint file or "
            + models_like(ckpt)
        )
    if not there:
        return None
    if model is None:
        return name_of_path(path)
    check_model(path, model, option="--model ")
    return model


def model_of_file(ckpt: str) -> str:
    """The model whose published file this is, by its name or its hash.

    Raises:
        InputError: the file cannot be read, or is no published one.
    """
    checkpoint = read_checkpoint(Path(ckpt))
    name = name_of(checkpoint)
    if name is None:
        raise InputError(
            f"{ckpt}: neither its name nor its hash belongs to a published file; expected --model "
            f"with {_models_of(checkpoint)}"
        )
    return name


def _models_of(checkpoint: Checkpoint) -> str:
    """For messages: the models whose files are like this one, if few are."""
    layouts = {name: getattr(entry.architecture, "layout", None) for name, entry in ZOO.items()}
    names = [name for name, layout in layouts.items() if layout == checkpoint.layout]
    usual = checkpoint.layout in (None, Architecture.layout)
    return models_like(checkpoint.path.stem) if usual else f"one of: {', '.join(names)}"


def read_chosen(ckpt: str | None, name: str) -> Checkpoint:
    """The checkpoint of a model: the file ``ckpt``, or else the published one.

    Where nobody has published the hash of the model's file, a hash that is noted beside ``ckpt`` is
    checked.

    Raises:
        InputError: the file is missing, damaged, another one than its note says or, if published,
            not the right one.
    """
    if not (ckpt and exists(ckpt)):
        return read_published(name)
    checkpoint = read_checkpoint(Path(ckpt))
    if find_entry(name).sha256 is None:
        check_pin(checkpoint, note=False)
    return checkpoint


def chosen_path(ckpt: str | None, name: str) -> Path:
    """The file that ``read_chosen`` reads, also if it has not been downloaded yet."""
    return Path(ckpt) if ckpt and exists(ckpt) else published_path(name)


def fetch_chosen(ckpt: str, name: str) -> Path:
    """The file that ``read_chosen`` reads, downloaded if it is missing. It is not read.

    Raises:
        InputError: the file is missing and cannot be downloaded.
    """
    return Path(ckpt) if exists(ckpt) else fetch_published(name)
