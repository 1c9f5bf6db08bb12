"""What a file of this package says about its weights: model, classes, protocol, data set.

The training, the export and ``HubEMANet`` write it into the ``__metadata__`` of their safetensors
files, as one JSON text. ``convert`` also writes it into the ``meta`` of its PyTorch files.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emanet_triton.data.dataset import Dataset
from emanet_triton.data.description import dataset_from
from emanet_triton.errors import InputError, first_line
from emanet_triton.models.checkpoint import DESCRIPTION, read_metadata
from emanet_triton.models.protocol import Protocol

_SIZES = ("base_scale", "crop", "stride", "pad_size")  # pairs of numbers in a protocol, or None
# What files of earlier versions of this package lack.
_LATER = {"direct": False, "pad_size": None, "pad_step": None, "final_align_corners": None}


@dataclass(frozen=True)
class Description:
    """A description of weights.

    Attributes:
        model: its name in the zoo.
        classes: the names of its classes, in the order of the network's channels.
        protocol: for its evaluation; a training has validated it so.
        dataset: the description of the data set that has the classes (``Dataset.description``);
            ``None``: the model's own data set.
        info: more JSON values, such as the iteration and the mIoU.
    """

    model: str
    classes: tuple[str, ...]
    protocol: Protocol
    dataset: Mapping[str, Any] | None
    info: Mapping[str, Any]

    def metadata(self) -> dict[str, str]:
        """Texts for ``write_safetensors``, from which ``of`` makes this description again."""
        return {"format": "pt", DESCRIPTION: self.to_json()}

    def to_json(self, indent: int | None = None) -> str:
        """The text from which ``from_json`` makes this description again.

        Args:
            indent: spaces before each entry; without it the text is one line.
        """
        content = {
            "model": self.model,
            "classes": list(self.classes),
            "protocol": asdict(self.protocol),
            "dataset": self.dataset,
            "info": self.info,
        }
        return json.dumps(content, indent=indent)

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> "Description | None":
        """The description in the metadata of a checkpoint; ``None`` if they have none.

        Args:
            meta: ``Checkpoint.meta``, or what ``metadata`` returns.

        Raises:
            InputError: the description is broken. The message does not name the file.
        """
        return cls.from_json(meta[DESCRIPTION]) if DESCRIPTION in meta else None

    @classmethod
    def from_json(cls, text: str) -> "Description":
        """The description in a text of ``to_json``.

        Raises:
            InputError: the description is broken. The message does not name the file.
        """
        try:
            trained = _parsed(json.loads(text))
            dataset = trained.described()
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            missing = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
            raise InputError(
                f"its description of a model is broken ({missing}); expected one that this "
                "package wrote"
            ) from None
        if dataset is not None and trained.classes != tuple(c.name for c in dataset.classes):
            raise InputError(
                "its description of a model is broken (the data set has other classes); "
                "expected one that this package wrote"
            )
        return trained

    def described(self) -> Dataset | None:
        """The data set that ``dataset`` describes.

        Raises:
            InputError: the description is wrong.
        """
        return None if self.dataset is None else dataset_from(self.dataset)


def description_in(path: Path) -> Description | None:
    """The description in a safetensors file or in PyTorch's zip file, whose weights are not read.

    Returns:
        The description; ``None`` for any other file, also if it is damaged or missing.

    Raises:
        InputError: the description is broken.
    """
    try:
        return Description.of(read_metadata(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _parsed(content: object) -> Description:
    """The description in a JSON value; its data set is not looked at."""
    table = _typed(content, dict, "a table")
    classes = _typed(table["classes"], list, "a list of classes")
    if not 1 <= len(classes) <= 255:
        raise ValueError(f"expected 1 to 255 classes, got {len(classes)}")
    dataset = table["dataset"]
    return Description(
        model=_typed(table["model"], str, "the name of a model"),
        classes=tuple(_typed(name, str, "the name of a class") for name in classes),
        protocol=_protocol(_typed(table["protocol"], dict, "a protocol")),
        dataset=None if dataset is None else _typed(dataset, dict, "a data set"),
        info=_typed(table["info"], dict, "a table of figures"),
    )


def _typed(value: Any, kind: type, expected: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {expected}, got a {type(value).__name__}")
    return value


def _protocol(values: dict[str, Any]) -> Protocol:
    """The protocol that ``asdict`` has turned into JSON values, its numbers checked."""
    values = _LATER | values
    for key in _SIZES:
        if values[key] is not None:
            values[key] = _numbers(values[key], int)
            if len(values[key]) != 2:
                raise ValueError(f"expected two numbers as {key}")
    values["ratios"] = _numbers(values["ratios"], int, float)
    for key in ("align_corners", "direct"):
        _typed(values[key], bool, "true or false")
    if values["final_align_corners"] is not None:
        _typed(values["final_align_corners"], bool, "true, false or null")
    if type(values["pad_step"]) not in (int, type(None)):
        raise TypeError("expected a whole number as pad_step")
    return Protocol(**values)


def _numbers(values: object, *kinds: type) -> tuple:
    if not isinstance(values, list) or not all(type(value) in kinds for value in values):
        raise TypeError("expected a list of numbers")
    return tuple(values)
