"""The model zoo: ``list_models``, ``model_info`` and ``create_model``, and the published files."""

import difflib
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from emanet_triton.data.overlay import class_names
from emanet_triton.data.public import DATASETS
from emanet_triton.errors import InputError
from emanet_triton.files import exists
from emanet_triton.models.alteration import on_meta
from emanet_triton.models.checkpoint import Checkpoint, read_checkpoint
from emanet_triton.models.description import Description, description_in
from emanet_triton.models.download import download, hub_file
from emanet_triton.models.entries import OFFICIAL, SOURCES, ZOO, Published, Source, ZooEntry
from emanet_triton.models.loading import load_into
from emanet_triton.models.network import Network
from emanet_triton.models.pins import check_pin, pinned
from emanet_triton.models.protocol import Protocol


@dataclass(frozen=True)
class ModelInfo:
    """What is known about a model.

    Attributes:
        name: of the model.
        source: the project that published it, as ``list_models`` calls it; ``None``: none did.
        project: the project's name, page and licences.
        depth: layers of the ResNet, such as 50; ``None`` for another backbone.
        stride: pixels of the input per logit, in each direction.
        dataset: on which it was trained, as ``list_models`` calls it; ``None``: on another one.
        classes: the names of its classes, in the order of the logits' channels.
        protocol: of its published evaluation.
        published: the figures of its project; ``None`` if it published none.
        url: of its checkpoint file; ``None`` if the file has no address.
        path: where the file lies, or where it is to be saved; ``None`` without a file.
        sha256: hex digits with which the file's SHA-256 begins: those that its project published,
            or all 64 that were noted when the file was first opened here; ``None`` before.
    """

    name: str
    source: str | None
    project: Source | None
    depth: int | None
    stride: int
    dataset: str | None
    classes: tuple[str, ...]
    protocol: Protocol
    published: Published | None
    url: str | None
    path: Path | None
    sha256: str | None


def list_models(
    *, dataset: str | None = None, source: str | None = None, depth: int | None = None
) -> list[str]:
    """The names of the models, published ones first; all of them without arguments.

    Args:
        dataset: of these classes only: "cityscapes", "voc2012", "ade20k", "bdd100k" or
            "bdd100k-drivable".
        source: of this project only: "mmseg", "bdd100k", "sssegmentation", "official", "paddleseg"
            or "emanet_triton".
        depth: with a ResNet of so many layers only, such as 50 or 101.

    Raises:
        InputError: there is no such data set or project, or no network of this depth.
    """
    depths = {_depth(entry) for entry in ZOO.values()} - {None}
    _require("data set", dataset, DATASETS)
    _require("source", source, SOURCES)
    _require("depth", depth, sorted(filter(None, depths)))
    return [
        name
        for name, entry in ZOO.items()
        if (dataset is None or entry.dataset is DATASETS[dataset])
        and (source is None or entry.source == source)
        and (depth is None or _depth(entry) == depth)
    ]


def datasets_of(source: str) -> list[str]:
    """The data sets of a project's models, as ``list_models`` calls them."""
    return [key for key in DATASETS if list_models(source=source, dataset=key)]


def model_info(name: str) -> ModelInfo:
    """What is known about a model: its project, licences, file, protocol and published figures.

    Nothing is downloaded.

    Raises:
        InputError: the name is unknown, or the note of a file's hash is damaged.
    """
    entry = find_entry(name)
    path = published_path(name) if entry.file else None
    return ModelInfo(
        name=name,
        source=entry.source,
        project=SOURCES[entry.source] if entry.source else None,
        depth=_depth(entry),
        stride=on_meta(entry.network, entry.architecture, entry.protocol, 1).stride,
        dataset=next((key for key, d in DATASETS.items() if d is entry.dataset), None),
        classes=class_names(entry.dataset),
        protocol=entry.protocol,
        published=entry.published,
        url=entry.url,
        path=path,
        sha256=entry.sha256 or (pinned(path) if path else None),
    )


def _require(kind: str, value: object, known: Collection) -> None:
    if value is not None and value not in known:
        raise InputError(f"unknown {kind} '{value}'; expected one of: {', '.join(map(str, known))}")


def _depth(entry: ZooEntry) -> int | None:
    """The layers of a ResNet: three convolutions a block, the first convolution, the classifier."""
    blocks = getattr(entry.architecture, "blocks", None)
    return 3 * sum(blocks) + 2 if blocks else None


def create_model(
    name: str | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
) -> Network:
    """Build a model of the zoo, in evaluation mode, on the CPU and in float32.

    PyTorch's default device and default dtype have no effect on the model. A model made under
    ``torch.inference_mode`` still has ordinary tensors.

    Args:
        name: one of ``list_models()``. It may be left out if ``checkpoint`` names its model, as the
            files of emanet-triton train do.
        checkpoint: a checkpoint file to load. All weights must fit.
        pretrained: load the published checkpoint. It is downloaded once into torch's hub cache,
            and its hash is checked whenever it is opened.
        num_classes: channels of the logits, 1 to 255; by default the number of classes in a file
            of emanet-triton train, or else of the model's data set (19 for Cityscapes). If a
            number is given and a file has another one, the classifiers of the model (``conv_seg``
            of both heads) are not loaded, with a warning: they are random and must be trained.

    Returns:
        The model: an ``EMANet``, unless its entry in the zoo names another class.
        ``model.protocol`` is the protocol of its published evaluation, or of the training.
        ``model.description`` says its name and its classes, unless only their number is known.

    Raises:
        InputError: the name is unknown or missing, a file cannot be downloaded, is damaged, is not
            the published one or is of another model, or the weights do not fit.
        ValueError: ``checkpoint`` and ``pretrained`` are both given, or ``num_classes`` is no int
            or is out of range.
    """
    description = None if checkpoint is None else description_in(Path(checkpoint))
    if name is None:
        if description is None:
            raise InputError(
                f"{checkpoint or 'create_model'}: expected the name of {models_like()}; a file "
                "that names its model, as those of emanet-triton train do, needs none"
            )
        name = description.model
    entry = find_entry(name)
    if checkpoint is not None:
        check_model(checkpoint, name, description)
    if checkpoint is not None and pretrained:
        raise ValueError("give either checkpoint or pretrained=True, not both")
    classes = num_classes
    if classes is None:
        classes = len(description.classes if description else entry.dataset.classes)
    if type(classes) is not int or not 1 <= classes <= 255:
        raise ValueError(f"num_classes must be an int in 1 to 255, got {classes!r}")
    protocol = description.protocol if description and description.model == name else entry.protocol
    new_classes = num_classes is not None
    with torch.inference_mode(False):
        with torch.device("cpu"):
            model = entry.network(entry.architecture, protocol, classes).float()
        if pretrained:
            load_into(model, read_published(name), new_classes=new_classes, stacklevel=3)
        elif checkpoint is not None:
            loaded = read_checkpoint(checkpoint)
            load_into(model, loaded, new_classes=new_classes, stacklevel=3)
    dataset = entry.dataset if description is None else description.described() or entry.dataset
    if len(dataset.classes) == classes:
        about = Description(name, class_names(dataset), protocol, dataset.description, {})
        model.describe(about)
    return model.eval()


def check_model(
    path: str | Path, name: str, description: Description | None = None, option: str = ""
) -> None:
    """Refuse a checkpoint of another network than that of a model.

    A file's description says its model, or else its name, if a published file has it. If only the
    name says another model, and the networks are the same, a warning says so.

    Args:
        path: the file, which is not read.
        name: of the model, one of ``list_models()``.
        description: in the file, or ``None``.
        option: before the model's name in the message, such as "--model ".

    Raises:
        InputError: the file is of another network.
    """
    known = description.model if description else name_of_path(Path(path))
    if known in (None, name):
        return
    if known not in ZOO or ZOO[known].architecture != find_entry(name).architecture:
        raise InputError(f"{path}: is a checkpoint of {known}, not of {option}{name}")
    if description is None:
        warnings.warn(f"{path}: is named like the file of {known}, not of {name}", stacklevel=3)


def find_entry(name: str) -> ZooEntry:
    """The entry of a name.

    Raises:
        InputError: the name is unknown. The message gives similar names.
    """
    if name not in ZOO:
        raise InputError(f"unknown model '{name}'; expected {models_like(name)}")
    return ZOO[name]


def models_like(text: str = "") -> str:
    """For messages: names that begin with a text or resemble it, or the first; how to see all."""
    near = [name for name in ZOO if text and name.startswith(text)]
    near = near[:3] or difflib.get_close_matches(text, ZOO, n=3) or [next(iter(ZOO))]
    return f"a model such as {' or '.join(near)} (`emanet-triton eval --list` prints all)"


def published_path(name: str, folder: str | Path | None = None) -> Path:
    """The file of ``read_published``, also if it has not been downloaded yet.

    Raises:
        InputError: the name is unknown, or the model has no checkpoint in the zoo.
    """
    entry = find_entry(name)
    if entry.file is None:
        raise InputError(f"{name}: the zoo has no checkpoint of this model; expected a file")
    if entry.packaged is not None:
        return entry.packaged
    if folder is None:
        return hub_file(entry.file)
    path = Path(folder) / entry.file
    as_published = Path(folder, name, (entry.url or entry.file).rpartition("/")[2])
    return as_published if exists(as_published) and not exists(path) else path


def read_published(name: str, folder: str | Path | None = None) -> Checkpoint:
    """Read the published checkpoint of a model, with its hash checked.

    Where nobody has published a hash, the hash is noted when the file is first opened, and checked
    from then on.

    Args:
        name: one of ``list_models()``.
        folder: where its file lies; by default torch's hub cache, into which a missing file is
            downloaded. The demonstration's file is part of this package.

    Raises:
        InputError: the name is unknown, the model has no checkpoint in the zoo, or the file is
            missing, damaged, not the published one or another one than before.
    """
    expected = find_entry(name).sha256
    checkpoint = read_checkpoint(fetch_published(name, folder), expected)
    if expected is None:
        check_pin(checkpoint)
    return checkpoint


def fetch_published(name: str, folder: str | Path | None = None) -> Path:
    """The file of ``read_published``, downloaded if it is missing. It is not read.

    Raises:
        InputError: the name is unknown, the model has no checkpoint in the zoo, or the file is
            missing and cannot be downloaded.
    """
    entry = find_entry(name)
    path = published_path(name, folder)
    if entry.url is not None and folder is None:
        download(entry.url, path, entry.sha256, md5_url=entry.md5_url)
    elif not exists(path) and entry.source is not None:
        address = entry.url or SOURCES[entry.source].url
        raise InputError(f"{path}: no such file; expected the checkpoint of {name} from {address}")
    return path


def name_of(checkpoint: Checkpoint) -> str | None:
    """The model whose published file this is, or ``None``.

    The hash decides, or the name of the file, or the end of its path if it is that of the address,
    such as ``MODEL/model.pdparams``. A file of the authors' code needs no name, because the zoo has
    one model of theirs.
    """
    for name, entry in ZOO.items():
        if entry.sha256 is not None and checkpoint.sha256.startswith(entry.sha256):
            return name
    return name_of_path(checkpoint.path) or (
        OFFICIAL if checkpoint.layout == ZOO[OFFICIAL].architecture.layout else None
    )


def name_of_path(path: Path) -> str | None:
    """The model whose published file has this name, or this end of its address, or ``None``."""
    end = "/".join(path.absolute().parts[-2:])
    for name, entry in ZOO.items():
        if path.name == entry.file or (entry.url or "").endswith(f"/{end}"):
            return name
    return None
