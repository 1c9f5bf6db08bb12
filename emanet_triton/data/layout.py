"""Where the files of a data set lie: patterns such as ``images/{split}/{name}.png``, and lists."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from emanet_triton.data.dataset import FileProblem, Files, Found, Key
from emanet_triton.data.reading import read_regular
from emanet_triton.errors import first_line
from emanet_triton.files import is_folder

NAME, SPLIT = "{name}", "{split}"
_PLACEHOLDER = re.compile(r"(\{name\}|\{split\})")
_NAME_BYTES = 200  # of a sample's name, so that suffixes fit into the 255 bytes of a file's name


@dataclass(frozen=True)
class Layout:
    """The places of images and labels below the root of a data set.

    Attributes:
        images: the pattern of the images' paths. ``{name}`` stands for the name of a sample, which
            may span folders, and ``{split}`` for the name of a split.
        labels: the pattern of the labels' paths.
        lists: the files that list the names of a split, one a line, by the name of the split. If a
            split has no list, all files that match the patterns belong to it; but there is no such
            split if other splits have lists and no pattern has ``{split}``.
    """

    images: str
    labels: str
    lists: Mapping[str, str]

    def places(self) -> tuple[str, ...]:
        """The folders, relative to the root, that hold all images and labels, and the lists."""
        folders = (_folder(pattern) or "." for pattern in (self.images, self.labels))
        return tuple(dict.fromkeys([*folders, *self.lists.values()]))

    def find_files(self, root: Path, split: str) -> Found:
        """The images and labels of a split, see ``Dataset.find_files``.

        Hidden files and folders are left out. Links to folders are followed.
        """
        if split in self.lists:
            return self._listed(root, split)
        patterns = self.images, self.labels
        has_splits = [SPLIT in pattern for pattern in patterns]
        if any(has_splits) and not _is_visible(split):
            return {}, {}, [self._unknown(root, split)]
        if not any(has_splits) and self.lists:
            return {}, {}, [self._unknown(root, split)]
        images, labels = (dict(_matches(root, pattern, split)) for pattern in patterns)
        _separate(images, labels, *patterns)
        if has_splits == [True, False]:  # the other files belong to all splits
            labels = {name: path for name, path in labels.items() if name in images}
        if has_splits == [False, True]:
            images = {name: path for name, path in images.items() if name in labels}
        if any(has_splits) and not images and not labels:
            return {}, {}, [self._unknown(root, split)]
        found = zip(patterns, (images, labels), strict=True)
        problems = [
            f"no file matches {_filled(pattern, split)}" for pattern, files in found if not files
        ]
        return _by_key(images), _by_key(labels), problems

    def _listed(self, root: Path, split: str) -> Found:
        names, problems = _read_list(root / self.lists[split])
        images, labels = (
            {name: root / _filled(pattern, split, name) for name in names}
            for pattern in (self.images, self.labels)
        )
        place = root / self.lists[split]
        missing = [
            FileProblem(_key(name), f"{path} is missing; {place} names it in line {names[name]}")
            for name, path in images.items()
            if not os.path.isfile(path)  # noqa: PTH113 (unlike Path.is_file, never raises)
        ]
        there = {name: path for name, path in labels.items() if os.path.isfile(path)}  # noqa: PTH113
        return _by_key(images), _by_key(there), [*problems, *missing]

    def _unknown(self, root: Path, split: str) -> str:
        known = set(self.lists)
        for pattern in (self.images, self.labels):
            if SPLIT in pattern:
                known |= set(_splits(root, pattern))
        if known:
            return f"it has no split '{split}', it has: {', '.join(sorted(known))}"
        return f"it has no split '{split}': no file matches {self.images} and {self.labels}"


def is_inside(path: str) -> bool:
    """Whether a relative path stays inside its root and can be the path of a file."""
    parts = path.split("/")
    return "\0" not in path and not any(part in ("", ".", "..") for part in parts)


def _is_visible(split: str) -> bool:
    """Whether this can be the name of a visible folder."""
    return is_inside(split) and "/" not in split and not split.startswith(".")


def _filled(pattern: str, split: str, name: str = NAME) -> str:
    values = {NAME: name, SPLIT: split}
    return "".join(values.get(part, part) for part in _PLACEHOLDER.split(pattern))


def _folder(pattern: str, split: str | None = None) -> str:
    """The folder of a pattern below which all its files lie; empty for the root."""
    fixed = ""
    for part in _PLACEHOLDER.split(pattern):
        if part == NAME or (part == SPLIT and split is None):
            break
        fixed += split if part == SPLIT and split is not None else part
    return fixed.rpartition("/")[0]


def _expression(pattern: str, split: str | None) -> re.Pattern[str]:
    """Matches the paths of a pattern; a placeholder that comes again means the same again."""
    groups = {NAME: "(?P<name>[^/](?:.*[^/])?)", SPLIT: "(?P<split>[^/]+?)"}
    if split is not None:
        groups[SPLIT] = re.escape(split)
    parts = []
    for part in _PLACEHOLDER.split(pattern):
        parts.append(groups.get(part) or re.escape(part))
        if part in groups and groups[part].startswith("(?P<"):
            groups[part] = f"(?P={part.strip('{}')})"
    return re.compile("".join(parts), re.DOTALL)


def _matches(root: Path, pattern: str, split: str) -> Iterator[tuple[str, Path]]:
    """Name and path of all files that match a pattern."""
    expression = _expression(pattern, split)
    for path in _files(root, _folder(pattern, split)):
        if match := expression.fullmatch(path):
            yield match["name"], root / path


def _splits(root: Path, pattern: str) -> Iterator[str]:
    expression = _expression(pattern, None)
    for path in _files(root, _folder(pattern)):
        if match := expression.fullmatch(path):
            yield match["split"]


def _files(root: Path, folder: str) -> Iterator[str]:
    """The visible files in a folder and in the folders below it, relative to the root.

    Raises:
        OSError: a folder cannot be read.
    """
    above: frozenset[tuple[int, int]] = frozenset()  # a link may lead back to a folder above it
    left = [(folder, above)]
    while left:
        folder, above = left.pop()
        path = root / folder
        if not is_folder(path):
            continue
        status = path.stat()
        if (status.st_dev, status.st_ino) in above:
            continue
        above |= {(status.st_dev, status.st_ino)}
        with os.scandir(path) as entries:
            for entry in entries:
                inner = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    left.append((inner, above))
                else:
                    yield inner


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _separate(
    images: dict[str, Path], labels: dict[str, Path], image_pattern: str, label_pattern: str
) -> None:
    """Remove files that match both patterns from those of the less specific pattern.

    With the patterns ``{name}.png`` and ``{name}_mask.png``, ``a_mask.png`` is no image.
    """
    both = set(images.values()) & set(labels.values())
    wider = min((image_pattern, images), (label_pattern, labels), key=lambda each: len(each[0]))[1]
    for name in [name for name, path in wider.items() if path in both]:
        del wider[name]


def _by_key(files: Mapping[str, Path]) -> Files:
    return {_key(name): path for name, path in files.items()}


def _key(name: str) -> Key:
    """The name of a sample, made the name of a file, and its folder."""
    return _flat(name), name.rpartition("/")[0] or "."


def _flat(name: str) -> str:
    flat = name.replace("/", "_")
    stored = os.fsencode(flat)
    if len(stored) <= _NAME_BYTES:
        return flat
    short = stored[:_NAME_BYTES].decode(errors="ignore")  # whole characters
    return f"{short}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"


def _read_list(path: Path) -> tuple[dict[str, int], list[str]]:
    """The names in a list with the number of their line, and one line for each problem."""
    try:
        lines = read_regular(path).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        return {}, [f"{path} is not UTF-8; expected one name a line"]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        return {}, [f"{path} cannot be read ({reason}); expected one name a line"]
    names: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        name = line.removesuffix("\r")
        if not name:
            continue
        if not is_inside(name):
            problems.append(f"{path}, line {number}: '{name}' is no name below the root")
        elif name in names:
            problems.append(f"{path}, line {number}: '{name}' is in line {names[name]}, too")
        else:
            names[name] = number
    if not names and not problems:
        problems = [f"{path} is empty; expected one name a line"]
    return names, problems
