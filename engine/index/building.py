"""Building indexes from the cache, bringing them up to date, and reading them back.

Comes in: a cache and an encoder's rows, read chunk by chunk: beside the index itself no more is held than one chunk and
the training sample (drawn at random from all rows, `TRAINING_BYTES` at most). Goes out: ``.faiss`` and ``.json`` in the
cache, each there whole or not at all. A kill between the two is noticed when the index is loaded, and the next build
mends it. An index that is behind its cache takes in the new rows only.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from engine.arrays.array_snapshot import ArraySnapshot
from engine.arrays.file_digest import file_digest
from engine.cache import Cache
from engine.errors import CacheError, UsageError
from engine.faiss_loader import load_faiss
from engine.features import normalized
from engine.index import kinds
from engine.index.description import IndexInfo, index_name, keys_digest
from engine.index.searching import FEW_ROWS, Index

log = logging.getLogger(__name__)

TRAINING_BYTES = 512 << 20
SCRATCH = "tmp/indexes"
# An index that has grown so many times since it was trained may have cells in the wrong places.
GROWN = 2


def build_index(
    cache: Cache, encoder_id: str, kind: str = "image", how: str = "exact", *, seed: int = 0, save: bool = True
) -> Index:
    """Build an index over all rows of an encoder, and write it.

    Parameters
    ----------
    cache : Cache
    encoder_id : str
    kind : "image" or "text"
    how : str
        "exact", "ivf", "hnsw", "pq" or a FAISS factory string.
    seed : int
        Of the random rows that it is trained on.
    save : bool
        Otherwise it lives in memory only; an exact one then costs nothing, the cache's own rows are searched.

    Raises
    ------
    UsageError
        An unknown kind of index, or one that cannot be made of so few rows or numbers.
    CacheError
        No such rows, or FAISS is needed and does not work.
    """
    kinds.check_kind(how)
    if kind not in ("image", "text"):
        raise UsageError(f"{kind!r} rows cannot be searched; choose image or text")
    array = cache.array(kind, encoder_id)
    faiss = load_faiss()
    if faiss is None and (how != "exact" or save):
        raise CacheError("FAISS does not work here, so an index cannot be kept; see `fluoro doctor`")
    keys = array.keys
    rows, dim = len(keys), array.form.row_shape[0]
    if how != "exact" and rows < FEW_ROWS:
        log.info("%s index of %d rows: below some %d exact search is faster and right", how, rows, FEW_ROWS)
    info = IndexInfo(encoder_id, kind, how, rows, keys_digest(keys), array.form.generation, dim)
    engine = None
    if how != "exact":
        engine, parameters = _trained(faiss, array, rows, how, seed)
        info = replace(info, parameters=parameters)
        _add(engine, array, 0, rows)
    if save:
        info = _save(cache, info, faiss, engine, array)
    return Index(info, keys, array, faiss, engine)


def update_index(
    cache: Cache, encoder_id: str, kind: str = "image", how: str = "exact", *, seed: int = 0
) -> tuple[Index, int]:
    """Bring an index up to date by adding the rows that it does not cover; build it where it is not there or damaged.

    Returns
    -------
    Index
    int
        Rows added; all where it was built.
    """
    if not has_index(cache, encoder_id, kind, how):
        index = build_index(cache, encoder_id, kind, how, seed=seed)
        return index, len(index)
    try:
        index = load_index(cache, encoder_id, kind, how)
    except CacheError as error:
        if "newer version" in str(error) or load_faiss() is None:
            raise
        log.warning("%s; it is built anew", error)
        index = build_index(cache, encoder_id, kind, how, seed=seed)
        return index, len(index)
    # The rows that the index was held against, and not those of another moment, which may have other numbers.
    array = index.array
    keys, before, faiss = array.keys, len(index), load_faiss()
    if len(keys) == before:
        return index, 0
    info = replace(index.info, rows=len(keys), keys_digest=keys_digest(keys))
    trained = info.parameters.get("trained_rows")
    if trained and len(keys) > GROWN * info.parameters.get("built_rows", len(keys)):
        log.info("the index %s was trained when it had half of its rows; --rebuild trains it anew", info.name)
    if index.engine is not None:
        _add(index.engine, array, before, len(keys))
    info = _save(cache, info, faiss, index.engine, array)
    return Index(info, keys, array, faiss, index.engine), len(keys) - before


def load_index(cache: Cache, encoder_id: str, kind: str = "image", how: str = "exact") -> Index:
    """Load an index that `build_index` wrote.

    Raises
    ------
    CacheError
        There is none (`has_index`), it is newer than this fluoroscope, or it does not belong to these rows (any more).
    """
    storage, name = cache.storage, index_name(encoder_id, kind, how)
    rebuild = f"build it (again): fluoro index --cache {cache.address} --encoder {encoder_id} --kind {kind} --how {how}"
    place = storage.place(f"{name}.faiss")
    if not storage.exists(f"{name}.json"):
        raise CacheError(f"no index {place}; {rebuild}")
    try:
        with storage.reading(f"{name}.json") as path:
            info = IndexInfo.read(path)
    except CacheError as error:
        raise CacheError(f"{error}; {rebuild}") from error
    faiss = load_faiss()
    if faiss is None and how != "exact":
        raise CacheError(f"the index {place} needs FAISS, which does not work here; see `fluoro doctor`")
    if (info.encoder, info.kind, info.how) != (encoder_id, kind, how):
        raise CacheError(f"the index {place} is of {info.kind} rows of another encoder, {info.encoder}; {rebuild}")
    array = cache.array(kind, encoder_id)
    keys = array.keys[: info.rows]
    if array.form.generation != info.generation or keys_digest(keys) != info.keys_digest:
        raise CacheError(f"the index {place} was built over other rows than the cache has; {rebuild}")
    engine = None
    with storage.reading(f"{name}.faiss") as path:
        version = storage.version(f"{name}.faiss")
        damage = info.damage_of(path)
        if not damage and how != "exact":
            engine = _read(faiss, path, place, rebuild)
        replaced = version != storage.version(f"{name}.faiss")
    if replaced:  # by another process, perhaps after its digest was taken and before it was read
        return load_index(cache, encoder_id, kind, how)
    if damage:
        raise CacheError(f"{damage}; {rebuild}")
    return Index(info, keys, array, faiss, engine)


def has_index(cache: Cache, encoder_id: str, kind: str = "image", how: str = "exact") -> bool:
    """Tell whether an index of this name is there."""
    return cache.storage.exists(f"{index_name(encoder_id, kind, how)}.json")


def _read(faiss: Any, path: Path, place: str, rebuild: str) -> Any:
    try:
        return faiss.read_index(str(path))
    except (OSError, RuntimeError) as error:
        raise CacheError(f"the index {place} cannot be read ({error}); {rebuild}") from error


def _trained(faiss: Any, array: ArraySnapshot, rows: int, how: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """Return an index without rows, trained where its kind wants it, and what it was made with."""
    dim = array.form.row_shape[0]
    factory = kinds.factory_string(how, rows, dim)
    engine = kinds.empty_index(faiss, how, factory, dim)
    parameters: dict[str, Any] = {"factory": factory, "built_rows": rows}
    cells = kinds.cells_of(faiss, engine)
    if cells is not None:
        parameters |= {"nlist": cells.nlist, "nprobe": kinds.cells_looked_into(cells.nlist)}
    if not engine.is_trained:
        wanted = kinds.MOST_TRAINING * max(cells.nlist if cells is not None else 0, kinds.CODE_BOOK)
        most = max(TRAINING_BYTES // (4 * dim), 1)
        sample = np.random.Generator(np.random.PCG64(seed)).permutation(rows)[: min(wanted, most)]
        parameters["trained_rows"] = len(sample)
        if kinds.POLYSEMOUS.search(factory):
            log.info("FAISS trains %s twice, the second time for a search that is not used here; %s does not",
                     factory, kinds.POLYSEMOUS.sub(r"\g<0>np", factory))  # fmt: skip
        try:
            with kinds.without_warnings(faiss, engine) as least:
                if len(sample) < least:
                    log.info("the %s index is trained on %s rows; its cells and codes are well placed from %s on",
                             how, f"{len(sample):,}", f"{least:,}")  # fmt: skip
                engine.train(np.ascontiguousarray(normalized(array.read(np.sort(sample)).astype(np.float32))))
        except RuntimeError as error:
            raise UsageError(
                f"an index of kind {how!r} cannot be trained on {len(sample):,} rows ({kinds.said_by(error)}); choose "
                "fewer cells or codes, or how=exact, which needs no training"
            ) from error
    return engine, parameters


def _add(engine: Any, array: ArraySnapshot, first: int, rows: int) -> None:
    for values in _vectors(array, first, rows):
        engine.add(values)


def _vectors(array: ArraySnapshot, first: int, rows: int) -> Iterator[np.ndarray]:
    """Yield rows first to rows - 1 scaled to length one, (m, dim) float32, a chunk at a time."""
    step = array.form.chunk_rows
    for start in range(first, rows, step):
        values = array.read(np.arange(start, min(start + step, rows)))
        yield np.ascontiguousarray(normalized(values.astype(np.float32)))


def _save(cache: Cache, info: IndexInfo, faiss: Any, engine: Any, array: ArraySnapshot) -> IndexInfo:
    """Write the index, then the JSON that makes it one; each whole or not at all."""
    storage = cache.storage
    name = index_name(info.encoder, info.kind, info.how)
    with storage.lock(f"locks/{name}.lock"):
        with storage.writing(f"{name}.faiss", SCRATCH) as temporary:
            # Not by its name: FAISS overlooks that the last few kilobytes did not fit onto the disk.
            with open(temporary, "wb") as file:
                if engine is None:
                    _write_flat(faiss, file, array, info.rows)
                else:
                    faiss.write_index(engine, faiss.PyCallbackIOWriter(file.write))
            info = replace(info, bytes=temporary.stat().st_size, file_digest=file_digest(temporary))
        storage.put([[(f"{name}.json", [info.document()])]], SCRATCH)
    return info


def _write_flat(faiss: Any, file: IO[bytes], array: ArraySnapshot, rows: int) -> None:
    """Write a flat inner-product index chunk by chunk, so that it never lies in memory whole.

    FAISS's own file of an empty one gives the head: 4 letters, dim (int32), rows (int64), then after 25 further bytes
    the number of float32 that follow (uint64).
    """
    dim, head = array.form.row_shape[0], io.BytesIO()
    faiss.write_index(faiss.IndexFlatIP(dim), faiss.PyCallbackIOWriter(head.write))
    content = bytearray(head.getvalue())
    if content[:4] != b"IxFI" or len(content) != 45 or any(content[8:16]) or any(content[37:45]):
        engine = faiss.IndexFlatIP(dim)  # another release's form, so FAISS writes it
        _add(engine, array, 0, rows)
        faiss.write_index(engine, faiss.PyCallbackIOWriter(file.write))
        return
    content[8:16] = rows.to_bytes(8, "little")
    content[37:45] = (rows * dim).to_bytes(8, "little")
    file.write(content)
    for values in _vectors(array, 0, rows):
        file.write(values.data)
