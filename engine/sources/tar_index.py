"""Where each member of a tar begins and how long it is, from the headers alone.

A way to read ranges of an uncompressed tar comes in; its members go out in their order. Payload is skipped, not read,
and nothing is ever unpacked. Understood are the forms in use: ustar, GNU (long names, large sizes, sparse files) and
pax. What is no plain file (a link, a device, a sparse file) stays a member, with what it is, so that an image that is
one of these becomes a listed failure instead of vanishing.

A header whose checksum is wrong or a member that reaches past the end of the tar is an error: what follows is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from engine.errors import DataError

BLOCK = 512
# Names and pax records are read into memory; nobody needs longer ones.
LARGEST_EXTENSION = 1 << 20
# Zeros after the end mark that are looked through for another tar (`cat a.tar b.tar > c.tar`).
LONGEST_GAP = 1 << 22
COMPRESSIONS = {
    b"\x1f\x8b": ("gzip", "gunzip -k"),
    b"BZh": ("bzip2", "bunzip2 -k"),
    b"\xfd7zXZ": ("xz", "unxz -k"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "unzstd"),
    b"PK\x03\x04": ("zip", "folder:zip://::file://"),
}
KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"S": "a sparse file",
}
PLAIN = (b"0", b"\0", b"7")
WITHOUT_PAYLOAD = (b"1", b"2", b"3", b"4", b"5", b"6", b"V")

ReadRange = Callable[[int, int], bytes]


class Member(NamedTuple):
    """One member: its name, where its content lies, and what it is where that is no plain file ("" for one)."""

    name: str
    offset: int
    size: int
    kind: str = ""


class Window:
    """Ranges of a file through one block that is read ahead: headers lie close together where members are small.

    Parameters
    ----------
    read : callable
        ``read(start, end) -> bytes``; fewer where the file ends.
    size : int
        Of the file.
    block : int
        Bytes that are read at least.
    """

    def __init__(self, read: ReadRange, size: int, block: int) -> None:
        self.size = size
        self._read, self._block = read, block
        self._start, self._held = 0, b""

    def at(self, offset: int, length: int) -> bytes:
        """Return the bytes at a place, fewer where the file ends."""
        begin = offset - self._start
        if begin < 0 or begin + length > len(self._held):
            self._held = self._read(offset, min(offset + max(length, self._block), self.size))
            self._start, begin = offset, 0
        return self._held[begin : begin + length]


def members_of(window: Window, place: str) -> Iterator[Member]:
    """Yield the members of a tar, directories left out.

    Parameters
    ----------
    place : str
        How messages name the tar.

    Raises
    ------
    DataError
        Compressed, no tar, cut off, or with a header that cannot be true.
    """
    pax: dict[str, str] = {}
    offset, long_name, ended = 0, "", False
    _check_begin(window, place)
    while offset + BLOCK <= window.size:
        header = window.at(offset, BLOCK)
        if header.count(0) == BLOCK:
            ended = True
            offset = _next_header(window, offset)
            continue
        _check_sum(header, offset, place)
        kind, size = header[156:157], _number(header[124:136], offset, place)
        if "size" in pax:
            size = int(pax["size"]) if pax["size"].isdecimal() and len(pax["size"]) < 20 else -1
        content = offset + BLOCK
        if kind == b"S":
            content = _after_sparse_map(window, header, content)
        end = content + (0 if kind in WITHOUT_PAYLOAD else size)
        name = pax.get("path") or long_name or _short_name(header)
        if size < 0 or end > window.size:
            raise DataError(
                f"{place}: the member {name!r} claims {size:,} bytes from byte {content:,} on, but the tar ends at "
                f"{window.size:,}: it is cut off or its header lies; copy it again, or leave it out of the pattern"
            )
        offset = content + -(-(end - content) // BLOCK) * BLOCK
        if kind in (b"x", b"X", b"L", b"K", b"g"):
            if size > LARGEST_EXTENSION:
                raise DataError(f"{place}: a name or record of {size:,} bytes at byte {content:,}; no such tar is read")
            if kind == b"L":
                long_name = _text(window.at(content, size).rstrip(b"\0"))
            elif kind in (b"x", b"X"):
                pax = _records(window.at(content, size), content, place)
            continue
        if kind not in (b"5", b"V"):
            yield Member(name, content, size, _kind(kind, name, pax))
        long_name, pax = "", {}
    if not ended and offset < window.size:
        raise DataError(f"{place}: the tar is cut off in the header at byte {offset:,}; copy it again")


def _check_begin(window: Window, place: str) -> None:
    begin = window.at(0, BLOCK)
    for magic, (name, command) in COMPRESSIONS.items():
        if begin.startswith(magic):
            raise DataError(
                f"{place}: is compressed ({name}); members of a compressed tar cannot be read one by one, and images "
                f"hardly shrink: unpack it first ({command} ...)"
            )
    if len(begin) < BLOCK:
        raise DataError(f"{place}: is no tar: it has {window.size} bytes, less than one header")


def _next_header(window: Window, offset: int) -> int:
    """Return where the next tar begins after an end mark, the file's size where nothing follows."""
    limit = min(offset + LONGEST_GAP, window.size)
    while offset < limit:
        zeros = window.at(offset, min(1 << 16, window.size - offset))
        used = len(zeros) - len(zeros.lstrip(b"\0"))
        if used < len(zeros):
            return offset + used // BLOCK * BLOCK
        offset += len(zeros)
    return window.size


def _check_sum(header: bytes, offset: int, place: str) -> None:
    told = header[148:156].strip(b" \0")
    # The field itself counts as eight spaces.
    if not told or not told.isdigit() or sum(header) - sum(header[148:156]) + 8 * 32 != _octal(told):
        raise DataError(
            f"{place}: no tar header at byte {offset:,} (its checksum is wrong): the file is "
            + ("damaged; copy it again, or leave it out of the pattern" if offset else "no tar, or damaged")
        )


def _octal(digits: bytes) -> int:
    try:
        return int(digits, 8)
    except ValueError:
        return -1


def _number(field: bytes, offset: int, place: str) -> int:
    """Return a header's number: octal digits, or base 256 where the first bit is set (GNU, above 8 GiB)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    value = _octal(digits) if digits else 0
    if value < 0:
        raise DataError(f"{place}: the header at byte {offset:,} has a size that is no number: {field!r}")
    return value


def _text(raw: bytes) -> str:
    # A name that is no UTF-8 stays distinguishable, and fit to be stored.
    return raw.decode("utf-8", "backslashreplace")


def _short_name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _records(raw: bytes, offset: int, place: str) -> dict[str, str]:
    """Return pax records, written ``LENGTH KEY=VALUE`` and a line feed, the length counting itself."""
    records = {}
    position = 0
    while position < len(raw) and raw[position]:
        length, space, _ = raw[position : position + 20].partition(b" ")
        end = position + int(length) if length.isdigit() else 0
        key, equals, value = raw[position + len(length) + 1 : end - 1].partition(b"=")
        if not (space and equals and position < end <= len(raw)):
            raise DataError(f"{place}: a pax record at byte {offset + position:,} cannot be read; copy the tar again")
        records[_text(key)] = _text(value)
        position = end
    return records


def _after_sparse_map(window: Window, header: bytes, content: int) -> int:
    """Return where the content of a GNU sparse file begins, after the further blocks of its map."""
    more = header[482]
    while more and content + BLOCK <= window.size:
        more = window.at(content, BLOCK)[504]
        content += BLOCK
    return content


def _kind(kind: bytes, name: str, pax: dict[str, str]) -> str:
    if kind not in PLAIN:
        return KINDS.get(kind, f"a member of the unknown type {kind!r}")
    if any(key.startswith("GNU.sparse.") for key in pax):
        return KINDS[b"S"]
    return "a file whose name leads out of the tar" if ".." in name.split("/") else ""
