"""Carrying rows out of a cache: a NumPy file, a Parquet table, one FAISS index, or a CSV of keys.

Comes in: an array of the cache and, if wanted, a sample table whose samples say which rows, in which order and under
which ids. Goes out: files that are there whole or not at all, written block by block, so memory stays constant (but
for FAISS, whose index is built in memory). Beside a NumPy file or an index lies a CSV with one line a row: the key and,
with a sample table, id, uri, group, view, split and text. The CSV appears last and goes first where both are replaced:
where it is there, it is that of the file beside it. A sample without a row is named, never filled in.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
import pyarrow.parquet as parquet

from engine.arrays.array_snapshot import ArraySnapshot
from engine.arrays.durable import make_folder, sync_folder, write_error
from engine.errors import CacheError, UsageError
from engine.faiss_loader import load_faiss
from engine.features import normalized
from engine.keys import KEY_BYTES
from engine.upkeep import usage
from engine.upkeep.usage import SampleTable

Format = Literal["npy", "parquet", "faiss", "csv"]
FORMATS = ("npy", "parquet", "faiss", "csv")
SAMPLE_COLUMNS = ("id", "uri", "group", "view", "split", "text")
BLOCK_BYTES = 16 << 20
MOST_BLOCK_ROWS = 1 << 14


@dataclass(frozen=True)
class Exported:
    """What was written.

    Parameters
    ----------
    rows : int
    files : list of Path
    missing : list of str
        Ids of samples that have such content but no row, or none such content.
    """

    rows: int
    files: list[Path]
    missing: list[str]


def format_of(out: Path, given: str | None) -> Format:
    """Return the format to write: the one given, else by the path; UsageError where neither says it."""
    name = given or out.suffix.lower().removeprefix(".")
    for known in FORMATS:
        if name == known:
            return known  # type: ignore[return-value]
    raise UsageError(
        f"{str(out)!r} does not say what to write; end it in .npy, .parquet, .faiss or .csv, or give --format"
    )


def export_rows(
    array: ArraySnapshot,
    out: Path,
    form: Format,
    *,
    table: SampleTable | None = None,
    normalize: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write an array's rows.

    Parameters
    ----------
    array : ArraySnapshot
    out : Path
    form : "npy", "parquet", "faiss" or "csv"
        npy: (rows, ...) as stored. parquet: columns key, the sample's, embedding (lists of float32). faiss: exact inner
        products of rows scaled to length one. csv: keys alone.
    table : SampleTable, optional
        One row a sample of its last scan, in its order; all rows of the array unless given.
    normalize : bool
        Scale rows to length one (npy: as float32).
    overwrite : bool
        Replace what is there.

    Raises
    ------
    UsageError
        A file is there or being written by another process, its CSV is that of another, or the format does not fit.
    CacheError
        A row is damaged, or the files cannot be written; what was there before stays.
    """
    if form in ("parquet", "faiss") and len(array.form.row_shape) != 1:
        raise UsageError(f"{array.form.kind} rows of shape {array.form.row_shape} do not fit {form}; write npy or csv")
    if normalize and array.form.dtype.kind != "f":
        raise UsageError(f"{array.form.kind} rows are no vectors, so they cannot be scaled to length one")
    beside = out.with_suffix(".csv")
    files = [out] if form in ("parquet", "csv") else [out, beside]
    there = [str(path) for path in files if path.exists()]
    if there and not overwrite:
        raise UsageError(f"{', '.join(there)} exists; give --overwrite to replace it, or another path")
    others = [path for path in (out.with_suffix(".npy"), out.with_suffix(".faiss")) if path != out and path.exists()]
    if others and beside in files:
        raise UsageError(f"{beside} would hold the keys of {out.name} and is that of {others[0]}; give another path")
    chosen = _Chosen.of(array, table)
    make_folder(out.parent)
    with _Replacements(files) as written:
        if form == "npy":
            _write_npy(written[0], chosen, normalize)
        elif form == "parquet":
            _write_parquet(written[0], chosen, normalize)
        elif form == "faiss":
            _write_faiss(written[0], chosen)
        if form != "parquet":
            _write_csv(written[-1], chosen)
    return Exported(len(chosen.rows), files, chosen.missing)


@dataclass(frozen=True)
class _Chosen:
    """Which rows are written, in order, with the samples that they are of."""

    array: ArraySnapshot
    rows: np.ndarray
    samples: pa.Table | None
    missing: list[str]

    @classmethod
    def of(cls, array: ArraySnapshot, table: SampleTable | None) -> _Chosen:
        if table is None:
            return cls(array, np.arange(len(array)), None, [])
        samples = table.table.filter(table.table["in_last_scan"])
        column = usage.COLUMN_OF_KIND[array.form.kind]
        has_key = pc.equal(pc.binary_length(samples[column]), KEY_BYTES)
        found = np.full(len(samples), -1, np.int64)
        found[np.asarray(has_key)] = array.find(usage.keys_in(samples[column]))
        missing = samples["id"].filter(pa.array(found < 0)).to_pylist()
        kept = samples.filter(pa.array(found >= 0)).select(SAMPLE_COLUMNS)
        return cls(array, found[found >= 0], kept, missing)

    def blocks(self, row_bytes: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield slices of the rows to write, and these rows' numbers."""
        step = max(1, min(MOST_BLOCK_ROWS, BLOCK_BYTES // max(row_bytes, 1)))
        for start in range(0, len(self.rows), step):
            yield slice(start, start + step), self.rows[start : start + step]

    def columns(self, some: slice) -> dict[str, pa.ChunkedArray | pa.Array]:
        """Return the keys of some rows as hexadecimal digits, and the columns of their samples."""
        keys = pa.array([key.tobytes().hex() for key in self.array.keys[self.rows[some]]], pa.string())
        if self.samples is None:
            return {"key": keys}
        part = self.samples.slice(some.start, some.stop - some.start)
        return {
            **{name: part[name] for name in ("id", "uri", "group", "view", "split")},
            "key": keys,
            "text": part["text"],
        }

    def names(self) -> list[str]:
        """Return the names of `columns`."""
        return list(self.columns(slice(0, 0)))


def _write_npy(file: IO[bytes], chosen: _Chosen, normalize: bool) -> None:
    form = chosen.array.form
    dtype = np.dtype("<f4") if normalize else form.dtype
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (len(chosen.rows), *form.row_shape),
    }
    np.lib.format.write_array_header_1_0(file, header)
    for _, rows in chosen.blocks(form.row_bytes):
        values = chosen.array.read(rows)
        file.write(np.ascontiguousarray(_scaled(values) if normalize else values).data)


def _write_parquet(file: IO[bytes], chosen: _Chosen, normalize: bool) -> None:
    dim = chosen.array.form.row_shape[0]
    fields = [(name, pa.large_string() if name != "key" else pa.string()) for name in chosen.names()]
    schema = pa.schema([*fields, ("embedding", pa.list_(pa.float32(), dim))])
    with parquet.ParquetWriter(file, schema) as writer:
        for some, rows in chosen.blocks(4 * dim):
            values = chosen.array.read(rows).astype(np.float32)
            flat = pa.array((_scaled(values) if normalize else values).reshape(-1))
            columns = {**chosen.columns(some), "embedding": pa.FixedSizeListArray.from_arrays(flat, dim)}
            writer.write_table(pa.table(columns, schema=schema))


def _write_faiss(file: IO[bytes], chosen: _Chosen) -> None:
    faiss = load_faiss()
    if faiss is None:
        raise CacheError("FAISS does not work here, so no index can be written; see `fluoro doctor`")
    index = faiss.IndexFlatIP(chosen.array.form.row_shape[0])
    for _, rows in chosen.blocks(chosen.array.form.row_bytes):
        index.add(np.ascontiguousarray(_scaled(chosen.array.read(rows))))
    faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def _write_csv(file: IO[bytes], chosen: _Chosen) -> None:
    schema = pa.schema([(name, pa.large_string() if name != "key" else pa.string()) for name in chosen.names()])
    with arrow_csv.CSVWriter(file, schema) as writer:
        for some, _ in chosen.blocks(KEY_BYTES):
            writer.write_table(pa.table(chosen.columns(some), schema=schema))


def _scaled(values: np.ndarray) -> np.ndarray:
    return normalized(values.astype(np.float32))


class _Replacements:
    """Files that are written beside those they replace, and take their places together once all are whole.

    Their names are fixed, so what a killed process has left is written over by the same call; a lock on each tells such
    a file from one that a living process writes.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> list[IO[bytes]]:
        try:
            for path in self._paths:
                self._files.append(_opened(_partial(path), path))
        except BaseException:
            self._drop()
            raise
        return self._files

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._place()
            elif isinstance(error, OSError):
                raise write_error(error, self._paths[0]) from error
        finally:
            self._drop()

    def _place(self) -> None:
        """Put the files in place, the last one last; it is removed before, so that no two are there that differ."""
        path = self._paths[-1]
        try:
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
            if len(self._paths) > 1:
                path.unlink(missing_ok=True)
                sync_folder(path.parent)
            for path in self._paths:
                os.replace(_partial(path), path)
                sync_folder(path.parent)
        except OSError as error:
            raise write_error(error, path) from error

    def _drop(self) -> None:
        for path, file in zip(self._paths, self._files, strict=False):
            if _is_at(_partial(path), file):
                _partial(path).unlink()
            # What could not be written stands in the file's buffer still, and must not be tried again.
            with suppress(OSError):
                file.close()


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _opened(partial: Path, path: Path) -> IO[bytes]:
    """Open a file for what is to come to a path; UsageError where a living process is writing it."""
    while True:
        try:
            file = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
        except OSError as error:
            raise write_error(error, path) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(partial, file):  # and not put in place since it was opened
                os.ftruncate(file.fileno(), 0)
                return file
        except BlockingIOError:
            file.close()
            raise UsageError(f"another process is writing {path}; wait for it, or give another path") from None
        except OSError as error:
            file.close()
            raise write_error(error, path) from error
        file.close()


def _is_at(path: Path, file: IO[bytes]) -> bool:
    """Tell whether an open file is the one of a name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
