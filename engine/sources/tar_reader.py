"""Reading single members of tars: one positioned read each, from any number of threads.

A uri says where its content lies, ``SHARD:NAME@OFFSET+SIZE``, so a reader holds nothing for each member and is carried
to workers at no cost. ``SHARD:NAME@!WHY`` is a member that cannot be read. A tar that changed since it was opened is
noticed before anything is read from it, because the places are then those of other content.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine import remote_files
from engine.dataset import Fingerprint
from engine.errors import DataError, ImageError
from engine.remote_files import FileInfo, is_url
from engine.sources.files import LARGEST_FILE
from engine.sources.remote import fingerprint_of
from engine.sources.tar_index import Member, Window

# Headers of remote tars are read in blocks of this size: small members come along, large ones are skipped.
REMOTE_BLOCK = 1 << 20
LOCAL_BLOCK = 4 * 512
# For so long a remote tar is taken to be as it was when it was last asked about, in seconds.
TRUST = 30.0
_URI = re.compile(r"(?P<shard>[^:]*):(?P<name>.*)@(?:(?P<offset>\d{1,18})\+(?P<size>\d{1,18})|!(?P<why>.*))", re.DOTALL)


class Shard(NamedTuple):
    """One tar: its path or URL, and its fingerprint when it was opened."""

    path: str
    opened: Fingerprint


def uri_of(shard: str, member: Member) -> str:
    """Return the uri of a member of a shard."""
    place = f"!{member.kind}" if member.kind else f"{member.offset}+{member.size}"
    return f"{shard}:{member.name}@{place}"


def member_name(uri: str) -> str:
    """Return the name that a member has in its tar."""
    return uri[uri.index(":") + 1 : uri.rindex("@")]


@dataclass(frozen=True)
class TarReader:
    """Reads members of tars.

    Parameters
    ----------
    shards : mapping from a shard's name to it
    max_bytes : int
        Larger members are refused before they are read.
    """

    shards: Mapping[str, Shard]
    max_bytes: int = LARGEST_FILE

    def read(self, uri: str) -> bytes:
        """Return the content of a member; ImageError with the uri and the reason where it cannot be had."""
        shard, offset, size = self._place(uri)
        if size == 0:
            raise ImageError(f"{uri}: the file is empty (0 bytes)")
        if size > self.max_bytes:
            raise ImageError(f"{uri}: the file has {size} bytes, more than max_bytes={self.max_bytes}")
        try:
            content = _read_unchanged(shard, offset, offset + size)
        except (OSError, ImageError) as error:
            raise ImageError(f"{uri}: {getattr(error, 'strerror', None) or error}") from error
        if len(content) != size:
            raise ImageError(f"{uri}: the tar gave {len(content)} of {size} bytes")
        return content

    def fingerprint(self, uri: str) -> Fingerprint | None:
        """Return the fingerprint of the tar that a member lies in: where that changed, all its members may have."""
        shard, _, _ = self._place(uri)
        try:
            return _look(shard.path)
        except (OSError, ImageError) as error:
            raise ImageError(f"{uri}: {getattr(error, 'strerror', None) or error}") from error

    def fingerprints(self, uris: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
        """Return the fingerprints of many members, asking once a tar; see `FileReader.fingerprints`."""
        found = np.zeros((len(uris), len(Fingerprint._fields)), np.uint64)
        failures: dict[int, str] = {}
        rows: dict[str, np.ndarray] = {}
        for position, uri in enumerate(uris):
            if not uri:
                continue
            try:
                self._place(uri)
                name = uri.partition(":")[0]
                if name not in rows:
                    told = self.fingerprint(uri) or (0, 0, 0, 0)
                    rows[name] = np.array([value & (2**64 - 1) for value in told], np.uint64)
                found[position] = rows[name]
            except ImageError as error:
                failures[position] = str(error)
        return found, failures

    def _place(self, uri: str) -> tuple[Shard, int, int]:
        """Return the tar, offset and size that a uri says; ImageError where it says none."""
        if not uri:
            raise ImageError("this sample has no image")
        parts = _URI.fullmatch(uri)
        if parts is None or parts["shard"] not in self.shards:
            raise ImageError(f"{uri}: is no member of these tars, which are named SHARD:NAME@OFFSET+SIZE")
        if parts["why"] is not None:
            raise ImageError(f"{uri.rpartition('@')[0]}: is {parts['why']}; only plain files in a tar are read")
        return self.shards[parts["shard"]], int(parts["offset"]), int(parts["size"])


def open_shard(path: str) -> tuple[Shard, Window]:
    """Return a tar and the way to read its headers; DataError where it cannot be opened."""
    try:
        if is_url(path):
            told = remote_files.info(path)
            if told.size is None:
                raise ImageError("the server does not tell its size, so its members cannot be found by position")
            block, size = REMOTE_BLOCK, told.size
            opened = fingerprint_of(told) or Fingerprint(size, 0, 0, 0)
        else:
            opened = _look(path) or Fingerprint(0, 0, 0, 0)
            block, size = LOCAL_BLOCK, opened.size
    except (OSError, ImageError) as error:
        raise DataError(f"cannot open the tar {path!r}: {getattr(error, 'strerror', None) or error}") from error

    def read(start: int, end: int) -> bytes:
        try:
            return read_range(path, start, end)
        except (OSError, ImageError) as error:
            raise DataError(f"cannot read the tar {path!r}: {getattr(error, 'strerror', None) or error}") from error

    return Shard(path, opened), Window(read, size, block)


def read_range(path: str, start: int, end: int) -> bytes:
    """Return bytes [start, end) of a local file or a URL, fewer where it ends; one request."""
    if start >= end:
        return b""
    if is_url(path):
        content = remote_files.read(path, start=start, end=end)
        if len(content) > end - start:
            raise ImageError("the server sends whole files only, not parts; copy the tar here")
        return content
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, end - start, start)
    finally:
        os.close(descriptor)


def _read_unchanged(shard: Shard, start: int, end: int) -> bytes:
    """Return bytes of a tar; ImageError where it is not the one that was opened."""
    if is_url(shard.path):
        now = fingerprint_of(_remote_info(shard.path))
        if now is not None and shard.opened.mtime + shard.opened.inode and now != shard.opened:
            raise ImageError(_changed(shard.path))
        return read_range(shard.path, start, end)
    descriptor = os.open(shard.path, os.O_RDONLY)
    try:
        status = os.fstat(descriptor)
        if (status.st_size, status.st_mtime_ns) != (shard.opened.size, shard.opened.mtime):
            raise ImageError(_changed(shard.path))
        return os.pread(descriptor, end - start, start)
    finally:
        os.close(descriptor)


def _changed(path: str) -> str:
    return f"the tar {path} changed since it was opened; open the data set again"


def _look(path: str) -> Fingerprint | None:
    if is_url(path):
        return fingerprint_of(_remote_info(path))
    status = os.stat(path)
    return Fingerprint(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


_told: dict[str, tuple[float, FileInfo]] = {}


def _remote_info(path: str) -> FileInfo:
    """Return what a server tells of a tar, asked again after a while: each member would cost a question otherwise.

    What is told is then older than what is read, never newer, so a change in between is seen the next time.
    """
    asked, info = _told.get(path, (-TRUST, None))
    if info is None or time.monotonic() - asked > TRUST:
        asked, info = time.monotonic(), remote_files.info(path)
        _told[path] = asked, info
    return info


def forget_remote_tars() -> None:
    """Ask again about all remote tars: a data set is being opened."""
    _told.clear()
