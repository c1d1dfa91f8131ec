"""``datasets/<name>.parquet``: which key each sample's image has, so that unchanged files need not be read again.

The table holds one row a sample (id, uri, key, file fingerprint, group, view, split, labels, text ...). Rows of samples
that the last scan did not hold (a subset was embedded) are kept, with ``in_last_scan`` false. It only saves time: a
lost or damaged one (it carries a digest of itself) is made again. What is read and written stays in Arrow's columns,
never one object a sample.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from engine.arrays.file_digest import SEAL_METADATA, seal_is_whole, seal_parquet
from engine.arrays.storage import Storage
from engine.dataset import Dataset
from engine.keys import KEY_BYTES, key_of_text
from engine.sample_scan import FINGERPRINT, Scan, in_blocks, names_of

log = logging.getLogger(__name__)

SCHEMA_NOTE = b"fluoroscope.schema"
TEXT = pa.large_string()
Versioned = tuple[tuple[int, ...] | None, pa.Table]
# Columns that say the same in many rows; of the others, dictionaries and least and greatest values only cost time.
FEW_VALUES = ["view", "split", "text", "labels.list.element"]
# A key that is not known is an empty one.
COLUMNS = pa.schema(
    [
        ("id", TEXT),
        ("uri", TEXT),
        ("key", pa.binary()),
        ("text_key", pa.binary()),
        ("scanned", pa.int64()),
        ("in_last_scan", pa.bool_()),
        *((name, pa.uint64()) for name in FINGERPRINT),
        ("group", TEXT),
        ("view", TEXT),
        ("split", TEXT),
        ("text", TEXT),
        ("labels", pa.list_(TEXT)),
    ]
)


def load_table(path: Path) -> pa.Table:
    """Return a sample table, empty where there is none or it cannot be read (then files are read again)."""
    if not path.exists():
        return COLUMNS.empty_table()
    try:
        if seal_is_whole(path) is False:
            raise ValueError("its bytes are not those that were written")
        table = read_parquet(path, COLUMNS.names)
        notes = {name: value for name, value in (table.schema.metadata or {}).items() if name not in SEAL_METADATA}
        return table.select(COLUMNS.names).cast(COLUMNS.with_metadata(notes))
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        log.warning("the sample table %s cannot be used (%s); its files are read again", path, error)
        return COLUMNS.empty_table()


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a Parquet file's columns from one opening of it.

    Beside a writer who puts another file in its place, `pyarrow.parquet.read_table` reads one's end and the other's
    columns.
    """
    with pa.OSFile(str(path)) as file:
        return parquet.ParquetFile(file).read(columns=columns)


def save_table(storage: Storage, name: str, dataset: Dataset, scan: Scan) -> None:
    """Write what a scan knows, keeping rows of the same source that it did not hold; whole or not at all.

    Nothing is written where the table says so already, so that a complete cache may be read-only.
    """
    fresh = _table_of(dataset, scan)
    version, earlier = _load_version(storage, name)
    if earlier.equals(fresh, check_metadata=True):
        return
    with storage.lock(f"locks/datasets/{name}.lock"):
        _, earlier = _load_version(storage, name, (version, earlier))
        put_table(storage, name, _with_kept(earlier, fresh))


def put_table(storage: Storage, name: str, table: pa.Table) -> None:
    """Write a sample table in place of the one that may be there; the caller holds its lock."""
    notes = {**(table.schema.metadata or {}), **SEAL_METADATA}
    with storage.writing(table_name(name), "tmp/datasets") as temporary:
        parquet.write_table(
            table.replace_schema_metadata(notes), temporary, use_dictionary=FEW_VALUES, write_statistics=False
        )
        seal_parquet(temporary)


def table_name(name: str) -> str:
    """Return where the table of a data set lies in a cache."""
    return f"datasets/{name}.parquet"


def load_from(storage: Storage, name: str) -> pa.Table:
    """Return the sample table of a data set, see `load_table`."""
    return _load_version(storage, name)[1]


def _load_version(storage: Storage, name: str, known: Versioned | None = None) -> Versioned:
    """Return a table and what tells its file from any other that takes its place; the known one if it is still it."""
    with storage.reading(table_name(name)) as path:
        # A table is written as a new file and put in place by rename.
        status = path.stat() if path.exists() else None
        version = (status.st_ino, status.st_size, status.st_mtime_ns) if status else None
        return known if known and known[0] == version else (version, load_table(path))


def _table_of(dataset: Dataset, scan: Scan) -> pa.Table:
    """Return the table of one scan."""
    columns = {
        "id": names_of(dataset, "id"),
        "uri": names_of(dataset, "uri"),
        "key": _packed(scan.keys, scan.known),
        "text_key": _packed(*text_keys(dataset)),
        "scanned": scan.scanned,
        "in_last_scan": np.ones(len(dataset), bool),
        **{name: scan.fingerprints[:, number] for number, name in enumerate(FINGERPRINT)},
        **{name: names_of(dataset, name) for name in ("group", "view", "split", "text")},
        "labels": _label_lists(dataset),
    }
    return pa.table(columns, schema=COLUMNS.with_metadata({SCHEMA_NOTE: dataset.schema.encode()}))


def text_keys(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys of a data set's texts, (n, 16) uint8, zeros where there is none, and which are there."""
    keys = np.zeros((len(dataset), KEY_BYTES), np.uint8)
    there = np.zeros(len(dataset), bool)
    texts = names_of(dataset, "text")
    if not pc.any(pc.not_equal(texts, "")).as_py():
        return keys, there
    for start, some in in_blocks(texts):
        positions = [start + place for place, text in enumerate(some) if text]
        found = b"".join(key_of_text(text) for text in some if text)
        keys[positions] = np.frombuffer(found, np.uint8).reshape(-1, KEY_BYTES)
        there[positions] = True
    return keys, there


def _packed(keys: np.ndarray, there: np.ndarray) -> pa.Array:
    """Return keys as a binary column, empty where there is none."""
    offsets = np.zeros(len(keys) + 1, np.int32)
    np.cumsum(np.where(there, KEY_BYTES, 0), out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(keys[there]))]
    return pa.BinaryArray.from_buffers(pa.binary(), len(keys), buffers)


def _label_lists(dataset: Dataset) -> pa.Array:
    """Return the names of each sample's positive labels."""
    rows, columns = np.nonzero(dataset.labels > 0)
    offsets = np.zeros(len(dataset) + 1, np.int32)
    np.cumsum(np.bincount(rows, minlength=len(dataset)), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(dataset.label_names, TEXT).take(pa.array(columns)))


def _with_kept(earlier: pa.Table, fresh: pa.Table) -> pa.Table:
    """Return a scan's table with the rows of an earlier one of the same source whose samples it does not hold."""
    source = (earlier.schema.metadata or {}).get(SCHEMA_NOTE)
    if not len(earlier) or source != fresh.schema.metadata[SCHEMA_NOTE]:
        return fresh
    kept = earlier.filter(pc.invert(pc.is_in(earlier["id"], value_set=fresh["id"])))
    number = kept.schema.get_field_index("in_last_scan")
    kept = kept.set_column(number, COLUMNS.field("in_last_scan"), pa.array(np.zeros(len(kept), bool)))
    return pa.concat_tables([fresh, kept.replace_schema_metadata(fresh.schema.metadata)])
