"""Data sets that a TOML file describes; ``docs/datasets.md`` explains the file."""

import difflib
import os
import posixpath
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from emanet_triton.data.cityscapes import CITYSCAPES
from emanet_triton.data.dataset import IGNORE, Class, Color, Dataset
from emanet_triton.data.labelled import LARGEST_ID, Ids, labelled_pictures
from emanet_triton.data.layout import NAME, Layout, is_inside
from emanet_triton.data.reading import read_regular, refusing
from emanet_triton.data.voc import voc_color
from emanet_triton.errors import InputError, one_line

SUFFIX = ".toml"
_KEYS = ("name", "root", "images", "labels", "ignored", "classes", "splits")
_CLASS_KEYS = ("name", "color", "ids")
_MOST_CLASSES = 255  # a label has 8 bits, and one value is IGNORE
_MOST_BYTES = 2**20  # of a file
_MOST_DOTS = 2000  # tomllib needs a gigabyte for a key such as a.a.a... of 20,000 parts
_EXAMPLE = "'images/{split}/{name}.png'"


@dataclass(frozen=True)
class _DescribedClass(Class):
    """A scored class, and the ids that it has in label files; the first one is saved."""

    ids: tuple[int, ...]


def is_description(data: str | Path) -> bool:
    """Whether this is the name of a file that describes a data set."""
    return Path(data).suffix == SUFFIX


def open_dataset(data: str | Path, default: Dataset = CITYSCAPES) -> tuple[Dataset, Path]:
    """A data set and its root folder.

    Args:
        data: a file ``*.toml`` that describes the data set, or the root folder of ``default``.
        default: the data set if ``data`` is a folder.

    Returns:
        The data set, and its root folder, which may be missing: ``Dataset.find`` says so.

    Raises:
        InputError: the file cannot be read or does not describe a data set, or ``data`` is another
            file.
    """
    path = Path(data)
    if not is_description(path):
        if os.path.isfile(path):  # noqa: PTH113 (unlike Path.is_file, never raises)
            raise InputError(
                f"{path}: is a file; expected the root folder of {default.name}, or a file "
                f"*{SUFFIX} that describes a data set"
            )
        return default, path
    content = _content(path)
    try:
        dataset = dataset_from(content, path.stem)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return dataset, path.parent / os.path.expanduser(content.get("root", "."))  # noqa: PTH111 (never raises)


def dataset_from(description: Mapping[str, Any], name: str = "data set") -> Dataset:
    """The data set that a description means.

    Args:
        description: the content of a file, as JSON values. The ``root`` is no part of the data set
            and is left out.
        name: of the data set if the description has none.

    Returns:
        The data set. Its ``description`` is complete: it has the defaults, too.

    Raises:
        InputError: a key or a value is wrong. The message does not name the file.
    """
    _check_keys(description, _KEYS, ("images", "labels", "classes"))
    root = description.get("root", ".")
    if not isinstance(root, str) or "\0" in root:
        _refuse("root", "the path of a folder", root)
    name = _name("name", description.get("name", name))
    images, labels = (_pattern(key, description[key]) for key in ("images", "labels"))
    if images == labels:
        raise InputError(f"images and labels have the same pattern, '{images}'")
    classes = _classes(description["classes"])
    ignored = _ids("ignored", description.get("ignored", [IGNORE]))
    _check_once(classes, ignored)
    lists = _lists(description.get("splits", {}))
    layout = Layout(images, labels, lists)
    return labelled_pictures(
        name,
        classes,
        layout.places(),
        layout.find_files,
        Ids(tuple(each.ids for each in classes), ignored),
        description={
            "name": name,
            "images": images,
            "labels": labels,
            "ignored": list(ignored),
            "classes": [
                {"name": each.name, "color": list(each.color), "ids": list(each.ids)}
                for each in classes
            ],
            "splits": lists,
        },
    )


def _content(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        InputError: it cannot be read.
    """
    with refusing(path, "TOML"):
        data = read_regular(path)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"it has {len(data)} bytes, at most {_MOST_BYTES} are read")
        if data.count(b".") > _MOST_DOTS:
            raise ValueError(f"it has more than {_MOST_DOTS} dots")
        try:
            return tomllib.loads(data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"it is not UTF-8: byte {error.start + 1} is wrong") from None
        except RecursionError:
            raise ValueError("it is nested too deeply") from None


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], needed: Iterable[str]) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            meant = f" (did you mean '{near[0]}'?)" if near else ""
            raise InputError(
                f"unknown key '{one_line(str(key))}'{meant}; expected some of: {', '.join(known)}"
            )
    missing = [f"'{key}'" for key in needed if key not in table]
    if missing:
        keys = "key" if len(missing) == 1 else "keys"
        raise InputError(f"the {keys} {' and '.join(missing)} must be given")


def _refuse(key: str, expected: str, value: object) -> NoReturn:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        text = "a number of thousands of digits"
    shown = one_line(text if len(text) <= 100 else text[:100] + "...")
    raise InputError(f"{key}: expected {expected}, got {shown}")


def _name(key: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip() or one_line(value) != value:
        _refuse(key, "a name", value)
    return value


def _pattern(key: str, value: object) -> str:
    if not isinstance(value, str) or NAME not in value:
        _refuse(key, f"a pattern with {NAME} such as {_EXAMPLE}", value)
    return _inside(key, value, f"a pattern below the root such as {_EXAMPLE}")


def _inside(key: str, value: object, expected: str) -> str:
    """A relative path in its shortest form."""
    if not isinstance(value, str) or not value or ".." in value.split("/"):
        _refuse(key, expected, value)
    path = posixpath.normpath(value)
    if not is_inside(path):
        _refuse(key, expected, value)
    return path


def _classes(value: object) -> tuple[_DescribedClass, ...]:
    if not isinstance(value, list) or not value:
        _refuse("classes", "a list of classes", value)
    if len(value) > _MOST_CLASSES:
        raise InputError(f"classes: expected at most {_MOST_CLASSES}, got {len(value)}")
    classes = tuple(_class(index, each) for index, each in enumerate(value))
    for first, second in pairwise(sorted(each.name for each in classes)):
        if first == second:
            raise InputError(f"classes: two have the name '{first}'")
    return classes


def _class(index: int, value: object) -> _DescribedClass:
    where = f"class {index + 1}"
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        _refuse(where, "a name, or a table with name, color and ids", value)
    try:
        _check_keys(value, _CLASS_KEYS, ("name",))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    name = _name(f"{where}: name", value["name"])
    ids = _ids(f"class '{name}': ids", value.get("ids", [index]))
    if not ids:
        _refuse(f"class '{name}': ids", "at least one id", value["ids"])
    return _DescribedClass(name, _color(name, value.get("color", list(voc_color(index)))), ids)


def _color(name: str, value: object) -> Color:
    key, expected = f"class '{name}': color", "[red, green, blue], each 0 to 255"
    if not isinstance(value, list) or len(value) != 3:
        _refuse(key, expected, value)
    if not all(type(each) is int and 0 <= each < 2**8 for each in value):
        _refuse(key, expected, value)
    red, green, blue = value
    return red, green, blue


def _ids(key: str, value: object) -> tuple[int, ...]:
    expected = f"a list of whole numbers, each 0 to {LARGEST_ID}"
    if not isinstance(value, list):
        _refuse(key, expected, value)
    for each in value:
        if type(each) is not int or not 0 <= each <= LARGEST_ID:
            _refuse(key, expected, value)
    return tuple(dict.fromkeys(value))


def _check_once(classes: tuple[_DescribedClass, ...], ignored: tuple[int, ...]) -> None:
    """Refuse an id that has two meanings."""
    owners = dict.fromkeys(ignored, "ignored")
    for each in classes:
        for number in each.ids:
            if number in owners:
                raise InputError(
                    f"the id {number} is in {owners[number]} and in class '{each.name}'; expected "
                    "each id once"
                )
            owners[number] = f"class '{each.name}'"


def _lists(value: object) -> dict[str, str]:
    if not isinstance(value, Mapping):
        _refuse("splits", "a table from a split to the file that lists its names", value)
    expected = "the path of a list below the root such as 'lists/train.txt'"
    return {
        _name("splits", split): _inside(f"splits: {split}", path, expected)
        for split, path in value.items()
    }
