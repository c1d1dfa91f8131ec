"""Image files below one root: walking, reading, and recognising unchanged ones.

A root folder and relative paths come in; encoded bytes go out, or an `ImageError` with the reason. Links are followed
as the owner of the folder laid them, unless `follow_links` is off; a path that climbs out of the root with ``..`` is
never followed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.dataset import Fingerprint
from engine.errors import DataError, ImageError, UsageError
from engine.remote_files import is_url

IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".dcm", ".dicom")
)
LARGEST_FILE = 512 * 2**20
# So many uris are Python strings at a time while they are looked at in bulk; the column itself need not hold any.
BLOCK = 1 << 16


@dataclass(frozen=True)
class FileReader:
    """Reads image files below a root.

    Parameters
    ----------
    root : str
        Absolute path of a folder.
    max_bytes : int
        Larger files are refused before they are read.
    follow_links : bool
        Whether a symbolic link may lead out of the root.
    """

    root: str
    max_bytes: int = LARGEST_FILE
    follow_links: bool = True

    def path(self, uri: str) -> str:
        """Return the absolute path of a uri; ImageError for one without a file or that leaves the root."""
        if not uri:
            raise ImageError("this sample has no image")
        path = os.path.normpath(os.path.join(self.root, uri))
        if not _is_below(path, self.root):
            raise ImageError(f"{uri}: leads out of the root {self.root}; give a root that holds all images")
        if not self.follow_links and not _is_below(os.path.realpath(path), os.path.realpath(self.root)):
            raise ImageError(f"{uri}: a symbolic link leads out of the root {self.root} and follow_links is off")
        return path

    def read(self, uri: str) -> bytes:
        """Return the encoded file; ImageError with the uri and the reason where it cannot be had."""
        try:
            # Without O_NONBLOCK, opening a named pipe that lies among the images would wait for ever.
            descriptor = os.open(self.path(uri), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(file.fileno())
                self._check(uri, status)
                return file.read()
        except (OSError, ValueError) as error:
            raise ImageError(f"{uri}: {_reason(error)}") from error

    def fingerprint(self, uri: str) -> Fingerprint:
        """Return size, mtime, ctime and inode of a file; ImageError where it is absent."""
        try:
            status = os.stat(self.path(uri))
        except (OSError, ValueError) as error:
            raise ImageError(f"{uri}: {_reason(error)}") from error
        return Fingerprint(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def fingerprints(self, uris: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
        """Return the fingerprints of many files; one `os.stat` a file and little else.

        Parameters
        ----------
        uris : sequence of n str
            A list, an array or a pandas column.

        Returns
        -------
        found : ndarray of uint64, (n, 4)
            Size, mtime, ctime, inode (times before 1970 as two's complement); zeros where there is none.
        failures : dict of int to str
            The reason for each position where `fingerprint` would raise. An empty uri has neither.
        """
        found = np.zeros((len(uris), len(Fingerprint._fields)), np.uint64)
        failures: dict[int, str] = {}
        base = self.root.rstrip(os.sep) + os.sep
        look = os.stat
        for start in range(0, len(uris), BLOCK):
            rows: list[tuple[int, ...]] = []
            for position, uri in enumerate(np.asarray(uris[start : start + BLOCK], dtype=object), start):
                if not uri:
                    rows.append((0, 0, 0, 0))
                    continue
                try:
                    # A relative path without ".." stays below the root; all others, and links, get the full check.
                    plain = self.follow_links and uri[0] not in "/." and ".." not in uri
                    status = look(base + uri if plain else self.path(uri))
                    rows.append((status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
                except (OSError, ValueError) as error:
                    failures[position] = f"{uri}: {_reason(error)}"
                    rows.append((0, 0, 0, 0))
                except ImageError as error:
                    failures[position] = str(error)
                    rows.append((0, 0, 0, 0))
            found[start : start + len(rows)] = _words(rows)
        return found, failures

    def _check(self, uri: str, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{uri}: is not a file")
        if status.st_size == 0:
            raise ImageError(f"{uri}: the file is empty (0 bytes)")
        if status.st_size > self.max_bytes:
            raise ImageError(f"{uri}: the file has {status.st_size} bytes, more than max_bytes={self.max_bytes}")


def existing_folder(path: str | Path, schema: str) -> str:
    """Return the absolute path of a folder; UsageError naming what is there instead."""
    if is_url(str(path)):
        raise UsageError(f"{schema!r} needs a local folder; folder:, table: and tar: also read what fsspec opens")
    folder = os.path.abspath(os.path.expanduser(str(path)))
    if os.path.isdir(folder):
        return folder
    if os.path.exists(folder):
        raise UsageError(f"{schema!r} needs a folder, but {folder!r} is a file")
    raise UsageError(f"{schema!r}: no such folder {folder!r}; {_nearest_existing(folder)}")


def walk_files(root: str) -> list[str]:
    """Return all files below a folder, as relative paths with ``/``, sorted.

    One walk of `os.scandir`, which needs no further system call a file; hidden files and folders are left out. Linked
    folders are entered once, under their own name where they lie below the root, else under that of their first link.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    waiting, linked = [("", root)], list[tuple[str, str]]()
    while waiting or linked:
        if not waiting:
            # In the order of their names and not of the file system, so that every copy of a tree has the same samples.
            linked.sort(reverse=True)
            waiting.append(linked.pop())
        prefix, folder = waiting.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name == "__MACOSX":
                        continue
                    if not _is_folder(entry):
                        found.append(prefix + entry.name)
                    elif entry.is_symlink():
                        linked.append((f"{prefix}{entry.name}/", entry.path))
                    else:
                        waiting.append((f"{prefix}{entry.name}/", entry.path))
        except OSError as error:
            raise DataError(f"cannot list the folder {folder!r}: {_reason(error)}") from error
    found.sort()
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is a folder or leads to one; a link that leads nowhere, such as to itself, does not."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def suffix_of(name: str) -> str:
    """Return the lower-case suffix of a path with its dot, "" where it has none."""
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    """Tell whether a file's name says that it is an image."""
    return suffix_of(name) in IMAGE_SUFFIXES


def count_suffixes(names: Iterable[str], limit: int = 6) -> str:
    """Return how many files have which suffix, most frequent first, such as ``12 .txt, 3 without suffix``."""
    counts = Counter(suffix_of(name) or "without suffix" for name in names)
    shown = [f"{count} {suffix}" for suffix, count in counts.most_common(limit)]
    rest = sum(counts.values()) - sum(count for _, count in counts.most_common(limit))
    return ", ".join(shown) + (f", {rest} others" if rest else "")


def _words(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return whole numbers of up to 64 bits, signed or not, as uint64."""
    try:
        return np.array(rows, np.int64).view(np.uint64)
    except OverflowError:  # inode numbers of some network file systems use the highest bit
        return np.array([[value & (2**64 - 1) for value in row] for row in rows], np.uint64)


def _is_below(path: str, root: str) -> bool:
    return path.startswith(root.rstrip(os.sep) + os.sep)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "is not a file"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _nearest_existing(path: str) -> str:
    """Return what the first existing folder above a path holds, for a message."""
    from engine.tables import offer

    missing, parent = os.path.basename(path), os.path.dirname(path)
    while parent and not os.path.isdir(parent) and os.path.dirname(parent) != parent:
        missing, parent = os.path.basename(parent), os.path.dirname(parent)
    try:
        names = sorted(entry.name for entry in os.scandir(parent) if not entry.name.startswith("."))
    except OSError:
        return f"{parent!r} cannot be listed"
    return f"in {parent!r} {offer(missing, names, limit=8)}"
