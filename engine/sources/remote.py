"""Image files below a root that is not a local folder: the counterpart of `engine.sources.files` for what fsspec opens.

A URL such as ``s3://bucket/images`` and relative names come in; encoded bytes go out, or an `ImageError` with the
reason. A server that cannot be reached at all is no fault of an image and ends the job.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from engine import remote_files
from engine.dataset import Fingerprint
from engine.errors import ImageError
from engine.sources.files import LARGEST_FILE, FileReader, existing_folder
from engine.sources.schema import as_flag, as_integer

# Questions that are open at once while many files are looked at: each waits for the network.
QUESTIONS = 32


@dataclass(frozen=True)
class RemoteReader:
    """Reads image files below a URL; carries the URL alone, so that workers open it for themselves.

    Parameters
    ----------
    root : str
        URL of a folder.
    max_bytes : int
        Larger files are refused, before they are read where their size is told.
    """

    root: str
    max_bytes: int = LARGEST_FILE

    def read(self, uri: str) -> bytes:
        """Return the encoded file; ImageError with the uri and the reason where it cannot be had."""
        self._check(uri)
        try:
            content = remote_files.read(self.root, uri, most=self.max_bytes)
        except ImageError as error:
            raise ImageError(f"{uri}: {error}") from error
        if not content:
            raise ImageError(f"{uri}: the file is empty (0 bytes)")
        return content

    def fingerprint(self, uri: str) -> Fingerprint | None:
        """Return size, time and the file system's own mark (such as an ETag), or None where it tells neither."""
        self._check(uri)
        try:
            return fingerprint_of(remote_files.info(self.root, uri))
        except ImageError as error:
            raise ImageError(f"{uri}: {error}") from error

    def fingerprints(self, uris: Sequence[str]) -> tuple[np.ndarray, dict[int, str]]:
        """Return the fingerprints of many files, some asked for at a time; see `FileReader.fingerprints`."""

        def look(uri: str) -> Fingerprint | str | None:
            try:
                return self.fingerprint(uri) if uri else None
            except ImageError as error:
                return str(error)

        found = np.zeros((len(uris), len(Fingerprint._fields)), np.uint64)
        failures: dict[int, str] = {}
        with ThreadPoolExecutor(QUESTIONS, thread_name_prefix="look") as pool:
            for position, answer in enumerate(pool.map(look, uris)):
                if isinstance(answer, str):
                    failures[position] = answer
                elif answer is not None:
                    found[position] = answer
        return found, failures

    def _check(self, uri: str) -> None:
        if not uri:
            raise ImageError("this sample has no image")
        remote_files.check_name(uri, self.root)


def fingerprint_of(info: remote_files.FileInfo) -> Fingerprint | None:
    """Return what a file system tells of a file as a fingerprint: its mark stands for the inode, ctime is unknown."""
    if not info.mark and info.mtime <= 0:
        return None
    return Fingerprint(info.size or 0, max(info.mtime, 0), 0, info.mark)


def open_reader(
    folder: str, schema: str, max_bytes: int | str = LARGEST_FILE, follow_links: bool | str = True
) -> FileReader | RemoteReader:
    """Return the reader of a local folder or of a URL; UsageError where there is no such local folder."""
    folder = remote_files.local_path(folder)
    most, follow = as_integer("max_bytes", max_bytes, 1), as_flag("follow_links", follow_links)
    if remote_files.is_url(folder):
        remote_files.forget_filesystems()
        return RemoteReader(folder.rstrip("/") if "::" not in folder else folder, most)
    return FileReader(existing_folder(folder, schema), most, follow)
