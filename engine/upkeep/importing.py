"""Taking in embeddings that others made: NumPy files with a Parquet table beside each.

Comes in: a folder as clip-retrieval writes it (``img_emb/img_emb_0.npy``, ``text_emb/text_emb_0.npy``,
``metadata/metadata_0.parquet`` with image_path and caption), or with ``.npy`` and ``.parquet`` files side by side. Goes
out: rows of a keyed array. Keys are content, so each image is read and hashed, each caption hashed; a row whose image
cannot be read is left out and listed, as is one that holds NaN or does not fit float16. Files that do not belong
together, by number or by count, are an error before anything is stored: one empty file would shift all others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from engine.arrays.keyed_array import KeyedArray
from engine.decoding import default_threads, ordered_map
from engine.errors import DataError, ImageError, UsageError
from engine.keys import KEY_BYTES, key_of_bytes, key_of_text, short_hash
from engine.row_buffer import to_half
from engine.upkeep.imported_images import Images, ImagesBelow, ImagesInTars, open_images

FOLDERS = {"image": "img_emb", "text": "text_emb"}
METADATA_FOLDER = "metadata"
COLUMNS = {
    "image": ("image_path", "path", "image", "file", "filename", "uri", "key"),
    "text": ("caption", "text", "report"),
}
ROWS_AT_ONCE = 8192
MOST_LISTED = 10_000
Progress = Callable[[str, int, int], object]


class Pair(NamedTuple):
    """A file of embeddings and the table of its rows."""

    vectors: Path
    table: Path
    rows: int


@dataclass
class Imported:
    """What became of the rows.

    Parameters
    ----------
    rows : int
        Of all files.
    added : int
    there : int
        With a key that is stored already, or stands twice.
    left_out : int
        Without a row: see `failures`.
    failures : list of (id, reason)
        At most 10,000.
    """

    rows: int = 0
    added: int = 0
    there: int = 0
    left_out: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)

    def fail(self, name: str, reason: str) -> None:
        """Note a row that is left out."""
        self.left_out += 1
        if len(self.failures) < MOST_LISTED:
            self.failures.append((name, reason))


@dataclass(frozen=True)
class Source:
    """Embeddings of one kind in a folder.

    Parameters
    ----------
    kind : "image" or "text"
    pairs : list of Pair
    dim : int
    column : str
        Of the tables: paths of images, or captions.
    images : Images
        Gives the image that a row names.
    """

    kind: str
    pairs: list[Pair]
    dim: int
    column: str
    images: Images

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(pair.rows for pair in self.pairs)

    def blocks(self) -> Iterator[tuple[Pair, int, list[str], np.ndarray]]:
        """Yield file, first row, paths or captions, and vectors (b, dim) of blocks of rows."""
        for pair in self.pairs:
            vectors = np.load(pair.vectors, mmap_mode="r")
            start = 0
            with parquet.ParquetFile(pair.table) as table:
                for batch in table.iter_batches(ROWS_AT_ONCE, columns=[self.column]):
                    values = [_as_text(value) for value in batch.column(0).to_pylist()]
                    yield pair, start, values, np.asarray(vectors[start : start + len(values)])
                    start += len(values)

    def content(self, value: str) -> bytes | str:
        """Return an image's bytes or a caption; ImageError where there is none."""
        if self.kind == "text":
            if not value:
                raise ImageError("the caption is blank")
            return value
        if not value:
            raise ImageError("the path is blank")
        return self.images.read(value)

    def key(self, value: str) -> bytes | str:
        """Return the key of a path's image or of a caption, or why there is none."""
        try:
            content = self.content(value)
        except ImageError as error:
            return str(error)
        return key_of_text(content) if isinstance(content, str) else key_of_bytes(content)


def imported_id(name: str, description: Mapping[str, Any]) -> str:
    """Return the id of an encoder that others ran: ``imported-<name>-<12 digits over what was said of it>``."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60]
    if not readable:
        raise UsageError(f"the encoder's name {name!r} has no letter or digit; name the model that made the embeddings")
    return f"imported-{readable}-{short_hash(repr(sorted(description.items())))}"


def find_source(folder: Path, kind: str, *, column: str | None = None, root: str | Path | None = None) -> Source | None:
    """Look at the files of one kind; None where the folder has none of it.

    Parameters
    ----------
    folder : Path
    kind : "image" or "text"
    column : str, optional
        Of paths or captions; the usual names unless given.
    root : str or Path, optional
        Where the images are, see `engine.upkeep.imported_images.open_images`.

    Raises
    ------
    UsageError
        No such root.
    DataError
        Files without a partner, of unequal lengths or dimensions, unreadable, or without the column.
    """
    vectors = folder / FOLDERS[kind]
    tables = folder / METADATA_FOLDER
    if not vectors.is_dir():
        if any((folder / name).is_dir() for name in FOLDERS.values()):
            return None
        vectors = tables = folder
    files, beside = _numbered(vectors, ".npy"), _numbered(tables, ".parquet")
    if not files:
        return None
    lonely = sorted({*files} ^ {*beside})
    if lonely:
        one = files.get(lonely[0]) or beside[lonely[0]]
        raise DataError(
            f"{one} has no partner in {tables if lonely[0] in files else vectors}: every file of vectors needs the "
            "table of its rows, under the same number"
        )
    pairs: list[Pair] = []
    dims: dict[int, Path] = {}
    for number in sorted(files):
        shape, rows = _shape(files[number]), _rows(beside[number])
        if shape[0] != rows:
            raise DataError(
                f"{files[number]} has {shape[0]:,} rows, {beside[number]} has {rows:,}: they do not belong together, "
                "and all rows after would stand under other names; make that pair again, or move both files away"
            )
        dims.setdefault(shape[1], files[number])
        pairs.append(Pair(files[number], beside[number], rows))
    if len(dims) > 1:
        said = ", ".join(f"{path} has {dim} numbers a row" for dim, path in dims.items())
        raise DataError(f"the files are not of one model: {said}")
    named = _column(pairs[0].table, kind, column)
    images = open_images(root) if kind == "image" else ImagesBelow(None)
    source = Source(kind, pairs, next(iter(dims)), named, images)
    if isinstance(images, ImagesInTars):
        images.check_rows(values for _, _, values, _ in source.blocks())
    return source


def import_rows(
    source: Source, cache: Any, name: str, description: Mapping[str, Any], progress: Progress | None = None
) -> Imported:
    """Store the rows of a source under an encoder's id.

    Raises
    ------
    CacheError
        The id is taken by rows of another shape, or the cache cannot be written. What is stored stays.
    DataError
        Of the first rows none has an image that can be read.
    """
    done, array = Imported(), None
    for pair, start, values, vectors in source.blocks():
        done.rows += len(values)
        kept, keys = _with_keys(source, pair, start, values, done)
        half = np.empty((0, source.dim), np.float16)
        reasons: dict[int, str] = {}
        if kept:
            half, reasons = to_half(np.asarray(vectors[kept], np.float32))
        reasons |= {int(row): "the embedding is all zeros" for row in np.flatnonzero(~half.any(axis=1))}
        for row, reason in reasons.items():
            done.fail(_name(pair, start + kept[row], values[kept[row]]), reason)
        good = np.array([row for row in range(len(kept)) if row not in reasons], np.int64)
        if len(good):
            if array is None:
                array = KeyedArray.create(cache, source.kind, name, (source.dim,), description)
            added = array.append(keys[good], half[good])
            done.added += added
            done.there += len(good) - added
        elif array is None and len(values) and not kept:
            first = done.failures[0]
            raise DataError(
                f"of the first {len(values):,} rows of {pair.vectors} none can be taken in: {first[0]}: {first[1]}; "
                "say with --root where the images are (a folder, or 'tar:PATTERN' for those in tars), or with --column "
                "which other column names them"
            )
        if progress is not None:
            progress(f"import {source.kind} rows", done.rows, source.rows)
    if array is not None:
        array.finish()
    return done


def _with_keys(
    source: Source, pair: Pair, start: int, values: Sequence[str], done: Imported
) -> tuple[list[int], np.ndarray]:
    """Return which rows of a block have a key, and the keys, (m, 16) uint8."""
    threads = default_threads()
    kept, keys = [], []
    with closing(ordered_map(source.key, values, threads, ahead=8 * threads)) as found:
        for row, key in enumerate(found):
            if isinstance(key, bytes):
                kept.append(row)
                keys.append(key)
            else:
                done.fail(_name(pair, start + row, values[row]), key)
    return kept, np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def _name(pair: Pair, row: int, value: str) -> str:
    return f"row {row} of {pair.vectors.name} ({value[:80]})"


def _numbered(folder: Path, suffix: str) -> dict[int, Path]:
    """Return files by the number that their names end in; 0 for one without."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob(f"*{suffix}")):
        digits = re.search(r"(\d+)$", path.stem)
        number = int(digits[1]) if digits else 0
        if number in found:
            raise DataError(f"{found[number]} and {path} have the same number; leave one of them in {folder}")
        found[number] = path
    return found


def _shape(path: Path) -> tuple[int, int]:
    try:
        vectors = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); make it again, or move it and its table away") from error
    if vectors.ndim != 2 or vectors.dtype.kind != "f":
        raise DataError(f"{path} holds {vectors.dtype} {vectors.shape}, not one row of floating-point numbers a sample")
    return int(vectors.shape[0]), int(vectors.shape[1])


def _rows(path: Path) -> int:
    try:
        return int(parquet.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error}); make it again, or move it and its vectors away") from error


def _column(table: Path, kind: str, column: str | None) -> str:
    there = parquet.read_schema(table).names
    for name in [column] if column else COLUMNS[kind]:
        if name in there:
            return name
    wanted = repr(column) if column else " or ".join(COLUMNS[kind])
    what = "paths of images" if kind == "image" else "captions"
    raise DataError(f"{table} has no column {wanted} of {what}; it has {', '.join(there)}: name one with --column")


def _as_text(value: Any) -> str:
    return "" if value is None else str(value)
