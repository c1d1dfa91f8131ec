"""``datasets/<name>.parquet``: which key each sample's image has, so that unchanged files need not be read again.

Comes in: a data set and what the table knows. Goes out: the key of each image, from the table where size, mtime, ctime
and inode are as they were (as git's index does it), from the content elsewhere. A file that was touched within a
moment of the scan that read it may have changed again under the same time stamps, so such an entry is not trusted but
read again; ``rehash`` trusts none.

The table holds one row a sample (id, uri, key, file fingerprint, group, view, split, labels, text ...). Rows of samples
that the last scan did not hold (a subset was embedded) are kept, with ``in_last_scan`` false. It only saves time: a
lost or unreadable one is made again.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet

from engine.dataset import Dataset, Fingerprint
from engine.durable import make_folder, sync_folder, write_error
from engine.errors import ImageError
from engine.keys import KEY_BYTES, key_of_text
from engine.lock import record_lock

log = logging.getLogger(__name__)

FINGERPRINT = ("size", "mtime", "ctime", "inode")
# Time stamps come from a clock that ticks every few milliseconds, on some file systems every one or two seconds.
MOMENT = 50_000_000
COARSE_MOMENT = 2_000_000_000


@dataclass
class Scan:
    """What is known of the images of one data set.

    Parameters
    ----------
    started : int
        Nanoseconds since the epoch at which the looking began.
    keys : ndarray of uint8, (n, 16)
        Zeros where the key is not known (yet), or the sample has no image.
    known : ndarray of bool, (n,)
    fingerprints : ndarray of uint64, (n, 4)
        Size, mtime, ctime, inode; zeros where there is none.
    scanned : ndarray of int64, (n,)
        When the content behind each key was read, nanoseconds; 0 where it was not.
    failures : dict of int to str
        Why the image at a position cannot even be looked at.
    """

    started: int
    keys: np.ndarray
    known: np.ndarray
    fingerprints: np.ndarray
    scanned: np.ndarray
    failures: dict[int, str] = field(default_factory=dict)

    def learn(self, position: int, key: bytes, fingerprint: Fingerprint | None, read_at: int) -> None:
        """Note the key of an image whose content was read at a time, and its fingerprint from just before."""
        self.keys[position] = np.frombuffer(key, np.uint8)
        self.known[position] = True
        self.scanned[position] = read_at
        if fingerprint is not None:
            self.fingerprints[position] = _words(fingerprint)


def _words(fingerprint: Fingerprint) -> tuple[int, ...]:
    """Return a fingerprint as unsigned 64-bit numbers; times before 1970 are negative."""
    return tuple(value & (2**64 - 1) for value in fingerprint)


def scan_dataset(dataset: Dataset, table: pd.DataFrame, *, rehash: bool = False) -> Scan:
    """Look at each image without reading it and take the keys of unchanged ones from the table.

    Parameters
    ----------
    dataset : Dataset
    table : DataFrame
        From `load_table`.
    rehash : bool
        Trust no entry, so that all content is read.
    """
    count = len(dataset)
    scan = Scan(
        time.time_ns(),
        np.zeros((count, KEY_BYTES), np.uint8),
        np.zeros(count, bool),
        np.zeros((count, len(FINGERPRINT)), np.uint64),
        np.zeros(count, np.int64),
    )
    positions, found = [], []
    for position, uri in enumerate(dataset.samples["uri"]):
        if not uri:
            continue
        try:
            fingerprint = dataset.reader.fingerprint(uri)
        except ImageError as error:
            scan.failures[position] = str(error)
            continue
        if fingerprint is not None:
            positions.append(position)
            found.append(_words(fingerprint))
    if found:
        scan.fingerprints[positions] = np.array(found, np.uint64)
    with_one = np.zeros(count, bool)
    with_one[positions] = True
    if not rehash and len(table):
        _recognise(scan, dataset, table, with_one)
    return scan


def _recognise(scan: Scan, dataset: Dataset, table: pd.DataFrame, with_one: np.ndarray) -> None:
    first = table.drop_duplicates("uri", keep="last").set_index("uri")
    entries = first.index.get_indexer(dataset.samples["uri"])
    candidates = np.flatnonzero(with_one & (entries >= 0))
    entries = entries[candidates]
    recorded = first[list(FINGERPRINT)].to_numpy(np.uint64)[entries]
    scanned = first["scanned"].to_numpy(np.int64)[entries]
    times = recorded[:, 1:3].astype(np.int64)
    moment = np.where(times % 1_000_000_000 == 0, COARSE_MOMENT, MOMENT)
    settled = (times + moment < scanned[:, None]).all(axis=1)
    has_key = np.fromiter((len(key) == KEY_BYTES for key in first["key"]), bool, len(first))[entries]
    same = (recorded == scan.fingerprints[candidates]).all(axis=1) & settled & has_key
    positions = candidates[same]
    keys = b"".join(first["key"].iloc[entries[same]])
    scan.keys[positions] = np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)
    scan.scanned[positions] = scanned[same]
    scan.known[positions] = True


def load_table(path: Path) -> pd.DataFrame:
    """Return a sample table, empty where there is none or it cannot be read (then files are read again)."""
    if not path.exists():
        return _empty()
    try:
        table = pd.read_parquet(path)
        for column in ("id", "uri", "key", "scanned", *FINGERPRINT):
            table[column]
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        log.warning("the sample table %s cannot be used (%s); its files are read again", path, error)
        return _empty()
    return table


def save_table(path: Path, dataset: Dataset, scan: Scan, lock: Path, scratch: Path) -> None:
    """Write what a scan knows, keeping rows of the same source that it did not hold; whole or not at all."""
    samples = dataset.samples
    columns: dict[str, object] = {
        "id": samples["id"],
        "uri": samples["uri"],
        "key": [bytes(key) if known else b"" for key, known in zip(scan.keys, scan.known, strict=True)],
        "text_key": [key_of_text(text) if text else b"" for text in samples["text"]],
        "scanned": scan.scanned,
        "in_last_scan": True,
    }
    columns |= {name: scan.fingerprints[:, number] for number, name in enumerate(FINGERPRINT)}
    columns |= {name: samples[name] for name in ("group", "view", "split", "text")}
    names = np.asarray(dataset.label_names, object)
    columns["labels"] = [list(names[row > 0]) for row in dataset.labels]
    fresh = pd.DataFrame(columns)
    make_folder(path.parent)
    make_folder(scratch)
    with record_lock(lock):
        kept = _kept(path, dataset, fresh)
        table = pa.Table.from_pandas(pd.concat([fresh, kept]) if len(kept) else fresh, preserve_index=False)
        table = table.replace_schema_metadata(
            {**(table.schema.metadata or {}), b"fluoroscope.schema": dataset.schema.encode()}
        )
        temporary = scratch / f"{path.name}.partial"
        try:
            parquet.write_table(table, temporary)
            temporary.replace(path)
            sync_folder(path.parent)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise write_error(error, path) from error


def _kept(path: Path, dataset: Dataset, fresh: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of an earlier table of the same source whose samples are not in the present scan."""
    table = load_table(path)
    if not len(table) or _schema_of(path) != dataset.schema:
        return _empty()
    kept = table[~table["id"].isin(fresh["id"])]
    return kept.assign(in_last_scan=False)


def _schema_of(path: Path) -> str:
    metadata = parquet.read_schema(path).metadata or {}
    return metadata.get(b"fluoroscope.schema", b"").decode()


def _empty() -> pd.DataFrame:
    return pd.DataFrame(columns=["id", "uri", "key", "scanned", *FINGERPRINT])
