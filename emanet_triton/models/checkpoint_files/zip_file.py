"""Reading the plain zip files that ``torch.save`` writes (PKWARE's APPNOTE 6.3.9).

Python's ``zipfile`` would copy the weights. It does not say where they lie in the file, and it
accepts zips whose entries have equal names or share bytes.
"""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from emanet_triton.models.checkpoint_files.refusals import DamagedError, UnsupportedError, shown

_END = struct.Struct("<4s4H2LH")  # the end of the central directory
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENTRIES = 100_000  # a training's checkpoint has some 2,000
_ENCRYPTED = 1  # in the flags
_NOT_PLAIN = "its zip entries are compressed or claim more bytes than it has"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a zip, as the central directory describes it.

    Attributes:
        part: range of its bytes in the zip; ``None`` if they are compressed or lie beyond the end.
        crc: CRC that its bytes should have.
    """

    part: range | None
    crc: int


def entries_of(data: memoryview) -> dict[str, Entry]:
    """The files of a zip by name, not yet verified.

    Raises:
        DamagedError: the zip is damaged, or is not as ``torch.save`` writes it.
    """
    begin, count = _directory(data)
    if count > _ENTRIES:
        raise DamagedError(f"its zip has more than {_ENTRIES} entries")
    entries: dict[str, Entry] = {}
    position = begin
    for _ in range(count):
        name, entry, position = _entry(data, position, begin)
        if name in entries:
            raise DamagedError(f"its zip holds {shown(name)} twice")
        entries[name] = entry
    return entries


def intact_parts(data: memoryview, entries: Mapping[str, Entry]) -> dict[str, range]:
    """Verify that no file of a zip is compressed or damaged.

    Returns:
        For each name the range of its bytes in ``data``. No two ranges overlap.

    Raises:
        DamagedError: a file is compressed, damaged or shares bytes with another file.
        UnsupportedError: the zip has no CRCs.
    """
    parts: dict[str, range] = {}
    for name, entry in entries.items():
        if entry.part is None:
            raise DamagedError(_NOT_PLAIN)
        parts[name] = entry.part
    end = 0
    for name, part in sorted(parts.items(), key=lambda item: item[1].start):
        if part.start - _LOCAL.size < end:
            raise DamagedError("its zip entries overlap")
        end = part.stop
        if zlib.crc32(data[part.start : part.stop]) != entries[name].crc:
            _refuse(name, entries[name].crc)
    return parts


def _refuse(name: str, crc: int) -> NoReturn:
    """Raise for an entry with a wrong CRC. PyTorch writes 0 if it does not compute CRCs."""
    if crc == 0:
        raise UnsupportedError(
            "was saved without CRCs, so nobody can see whether it is damaged: load it, and save it "
            "again after torch.serialization.set_crc32_options(True)"
        )
    raise DamagedError(f"wrong CRC of {shown(name)}")


def _directory(data: memoryview) -> tuple[int, int]:
    """First byte of the central directory, and its number of entries."""
    tail = bytes(data[-_END.size - 0xFFFF :])
    found = tail.rfind(b"PK\x05\x06", 0, len(tail) - _END.size + 4)
    if found < 0:
        raise DamagedError("its zip has no end")
    position = len(data) - len(tail) + found
    *_, count, size, begin, comment = _END.unpack_from(data, position)
    if position + _END.size + comment != len(data):
        raise DamagedError("its zip has no end")
    locator = position - _LOCATOR.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\x06\x07":
        _, _, position, _ = _LOCATOR.unpack_from(data, locator)
        if position + _END64.size > locator or data[position : position + 4] != b"PK\x06\x06":
            raise DamagedError("its zip has no end")
        *_, count, size, begin = _END64.unpack_from(data, position)
    if begin + size > position or count * _ENTRY.size > size:
        raise DamagedError("its zip has a damaged directory")
    return begin, count


def _entry(data: memoryview, position: int, directory: int) -> tuple[str, Entry, int]:
    """Name and content of an entry of the central directory, and where the next one begins."""
    if position + _ENTRY.size > len(data):
        raise DamagedError("its zip has a damaged directory")
    mark, _, _, flags, method, _, _, crc, packed, size, *rest = _ENTRY.unpack_from(data, position)
    name_size, extra_size, comment_size, _, _, _, begin = rest
    if mark != b"PK\x01\x02":
        raise DamagedError("its zip has a damaged directory")
    name_at = position + _ENTRY.size
    extra_at = name_at + name_size
    name = bytes(data[name_at:extra_at])
    extra = bytes(data[extra_at : extra_at + extra_size])
    size, packed, begin = _wide(extra, (size, packed, begin))
    start = _content(data, begin, name)
    plain = not flags & _ENCRYPTED and method == 0 and packed == size
    part = range(start, start + size) if plain and start + size <= directory else None
    end = extra_at + extra_size + comment_size
    return name.decode("utf-8", "replace"), Entry(part, crc), end


def _wide(extra: bytes, values: tuple[int, int, int]) -> list[int]:
    """Sizes and offset; the zip64 field ``extra`` has those that do not fit into 32 bits."""
    wide = b""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = extra[4 : 4 + size]
        extra = extra[4 + size :]
    result = []
    for value in values:
        if value == 0xFFFFFFFF:
            if len(wide) < 8:
                raise DamagedError("its zip has a damaged directory")
            value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
        result.append(value)
    return result


def _content(data: memoryview, begin: int, name: bytes) -> int:
    """First byte after an entry's local header, which must name the same file."""
    if begin + _LOCAL.size > len(data):
        raise DamagedError(_NOT_PLAIN)
    mark, *_, name_size, extra_size = _LOCAL.unpack_from(data, begin)
    name_at = begin + _LOCAL.size
    if mark != b"PK\x03\x04" or data[name_at : name_at + name_size] != name:
        raise DamagedError(f"the zip entry {shown(name.decode('utf-8', 'replace'))} is damaged")
    return name_at + name_size + extra_size
