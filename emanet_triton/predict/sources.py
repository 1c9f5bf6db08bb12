"""What a command line names as sources: pictures, videos and webcams, each with a name."""

import io
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

from emanet_triton.data.picture import HEAD_BYTES, SUFFIXES, picture_kind
from emanet_triton.data.picture_files import files_below, files_like, is_pattern, pictures_among
from emanet_triton.errors import InputError
from emanet_triton.files import read_plain

VIDEO_SUFFIXES = tuple(
    ".avi .gif .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .webm .wmv".split()  # noqa: SIM905 (shorter)
)
KNOWN_SUFFIXES = (*SUFFIXES, *VIDEO_SUFFIXES)
_WEBCAM_DIGITS = 4  # of the number of a webcam at most


@dataclass(frozen=True)
class Source:
    """A picture, a video or a webcam.

    Attributes:
        path: the file, or the number of a webcam.
        name: relative to the output folder; the names of the results begin with it.
        is_video: whether it has frames.
    """

    path: Path | int
    name: PurePath
    is_video: bool = False

    def __str__(self) -> str:
        return f"webcam {self.path}" if isinstance(self.path, int) else str(self.path)


@dataclass
class Sources:
    """All sources of a command line.

    Attributes:
        found: without duplicates, in the order of the command line.
        folders: the folders that were searched.
        notes: lines for the user about files that were left out.
    """

    found: list[Source] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_sources(arguments: Iterable[str], out: Path | None = None) -> Sources:
    """Find everything that the arguments name.

    A folder is searched recursively for pictures; videos in it are left out. Hidden files and
    folders are left out, too, unless an argument names them. A pattern leaves out files in
    ``out`` if this folder lies below the pattern's.

    Args:
        arguments: paths, patterns, numbers of webcams, or ``-``.
        out: the folder for results.

    Raises:
        InputError: an argument names nothing that can be segmented, or two sources would have the
            same name.
    """
    sources = Sources()
    for argument in _with_list(arguments):
        sources.found += _found(argument, sources, out)
    sources.found = _named_apart(_without_duplicates(sources.found))
    return sources


def _with_list(arguments: Iterable[str]) -> Iterator[str]:
    """The arguments, with the lines of standard input in place of ``-``."""
    for argument in arguments:
        if argument != "-":
            yield argument
            continue
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # as names of files have it
        lines = [line.rstrip("\r\n") for line in sys.stdin or ()]
        if not any(lines):
            raise InputError("-: standard input is empty; expected a path in each line")
        yield from filter(None, lines)


def _found(argument: str, sources: Sources, out: Path | None) -> list[Source]:
    path = Path(argument)
    try:
        if path.is_dir():
            sources.folders.append(path)
            return _in_folder(path, sources.notes)
        if os.path.lexists(path):
            return [_file(path, PurePath(path.stem))]
        if is_pattern(argument):
            return _matches(argument, sources.notes, out)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{argument}: cannot be read ({error})") from None
    if argument.isdecimal() and len(argument) <= _WEBCAM_DIGITS:
        return [Source(int(argument), PurePath(f"webcam{int(argument)}"), is_video=True)]
    raise InputError(
        f"{argument}: there is no such file or folder; expected a picture, a folder, a pattern, a "
        "video or the number of a webcam"
    )


def _file(path: Path, name: PurePath) -> Source:
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return Source(path, name, is_video=True)
    if suffix in SUFFIXES:
        return Source(path, name)
    try:
        head = read_plain(Path(os.path.realpath(path)), HEAD_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if picture_kind(head) is None:
        raise InputError(
            f"{path}: neither a picture nor a video by its name or content; expected one of "
            + " ".join(sorted(KNOWN_SUFFIXES))
        )
    return Source(path, name)


def _in_folder(folder: Path, notes: list[str]) -> list[Source]:
    files = list(files_below(folder))
    pictures = pictures_among(files, folder)
    if videos := sum(path.suffix.lower() in VIDEO_SUFFIXES for path in files):
        notes.append(f"{folder}: leaves out {videos} of its files, videos; name each to segment it")
    return [Source(path, path.relative_to(folder).with_suffix("")) for path in pictures]


def _matches(pattern: str, notes: list[str], out: Path | None) -> list[Source]:
    """The files of a pattern; their names are relative to the part before the first wildcard.

    Files in ``out`` are left out if ``out`` lies below that part.
    """
    parts = PurePath(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if is_pattern(part))
    base = Path(*parts[:fixed])
    paths = [path for path in files_like(pattern) if path.suffix.lower() in KNOWN_SUFFIXES]
    elsewhere = ""
    if out is not None and _is_below(out, base) and not _is_below(base, out):
        kept = [path for path in paths if not _is_below(path, out)]
        if left_out := len(paths) - len(kept):
            notes.append(f"{pattern}: leaves out {left_out} of its files, which lie in {out}")
            elsewhere = f" outside {out}"
        paths = kept
    if not paths:
        raise InputError(f"{pattern}: the pattern matches no picture and no video{elsewhere}")
    return [_file(path, path.relative_to(base).with_suffix("")) for path in paths]


def _is_below(path: Path, folder: Path) -> bool:
    """Whether a path, with all links followed, is a folder or lies below it."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _without_duplicates(found: list[Source]) -> list[Source]:
    first: dict[object, Source] = {}
    for source in found:
        path = source.path
        first.setdefault(path if isinstance(path, int) else os.path.realpath(path), source)
    return list(first.values())


def _named_apart(found: list[Source]) -> list[Source]:
    """The sources with longer names where several would have the same.

    a.jpg and a.png keep their suffixes; files of the same name in several folders get the part of
    their paths in which they differ.
    """
    groups = defaultdict(list)
    for source in found:
        groups[source.name].append(source)
    longer = {id(s): _longer_name(s, group) for group in groups.values() for s in group}
    named = [replace(source, name=longer[id(source)]) for source in found]
    names: dict[PurePath, Source] = {}
    for source in named:
        if other := names.get(source.name):
            raise InputError(
                f"{other} and {source}: their results would have the same name, {source.name}; "
                "expected one run for each"
            )
        names[source.name] = source
    return named


def _longer_name(source: Source, group: list[Source]) -> PurePath:
    if len(group) == 1 or isinstance(source.path, int):
        return source.name
    paths = [
        Path(os.path.abspath(other.path))  # noqa: PTH100 (absolute() keeps "..")
        for other in group
        if isinstance(other.path, Path)
    ]
    if len({path.name for path in paths}) == len(paths):
        return source.name.with_name(source.path.name)
    common = os.path.commonpath([path.parent for path in paths])
    return PurePath(os.path.relpath(source.path, common))
