"""Kinds of index by plain names and by FAISS factory strings.

Comes in: ``exact``, ``ivf``, ``hnsw``, ``pq`` or a factory string such as ``IVF1024,PQ64np`` (FAISS wiki, "The index
factory"). Goes out: an empty FAISS index for inner products, and how it is searched. Plain names choose their numbers
by the size of the collection; a factory string is taken as it stands. FAISS gives product quantizers a second training,
for a "polysemous" search that is not used here and that takes minutes where the rest takes seconds; the suffix ``np``
leaves it out (``IVF1024,PQ64np``), and plain names do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engine.errors import UsageError

PLAIN_KINDS = ("exact", "ivf", "hnsw", "pq")
HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 32, 200, 128
# At least so many rows train a cell or a codebook entry (FAISS's own rule), and more than these bring nothing.
LEAST_TRAINING, MOST_TRAINING = 39, 256
CODE_BOOK = 256
# These keep rows less than exactly, so what they find is ranked again by the rows themselves.
LOSSY = re.compile(r"PQ|SQ|RQ|LSQ|LSH|ITQ|PCA|ZnLattice|RaBitQ|Refine")
# A product quantizer with FAISS's second training.
POLYSEMOUS = re.compile(r"(?<![A-Za-z])PQ\d+(x\d+)?(?=,|$)")
SPELLED = re.compile(r"[A-Za-z0-9_,()]+")


def check_kind(how: str) -> str:
    """Return a kind's name; UsageError where it can be neither a plain name nor a factory string."""
    if how in PLAIN_KINDS or (SPELLED.fullmatch(how) and how[:1].isupper()):
        return how
    raise UsageError(
        f"unknown kind of index {how!r}; known: {', '.join(PLAIN_KINDS)}, or a FAISS factory string such as "
        "IVF1024,PQ64np or HNSW32"
    )


def factory_string(how: str, rows: int, dim: int) -> str:
    """Return the FAISS factory string of a kind for a collection of so many rows."""
    # Four times the usual square root, so that many small cells can be looked into: text queries lie far from images.
    cells = max(1, min(round(4 * math.sqrt(rows)), rows // LEAST_TRAINING))
    if how == "ivf":
        return f"IVF{cells},Flat"
    if how == "hnsw":
        return f"HNSW{HNSW_LINKS}"
    if how == "pq":
        parts = next(parts for parts in range(max(dim // 4, 1), 0, -1) if dim % parts == 0)
        return f"IVF{cells},PQ{parts}np" if rows >= CODE_BOOK else "Flat"
    return "Flat" if how == "exact" else how


def empty_index(faiss: Any, how: str, factory: str, dim: int) -> Any:
    """Return an empty FAISS index of a factory string; UsageError where FAISS does not know it or it does not fit."""
    try:
        engine = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UsageError(
            f"FAISS cannot make an index of kind {how!r} over rows of {dim} numbers ({said_by(error)}); plain kinds: "
            f"{', '.join(PLAIN_KINDS)}; factory strings: IVF1024,PQ64np, HNSW32 ..."
        ) from error
    if how == "hnsw":
        engine.hnsw.efConstruction = HNSW_BUILD
    return engine


def cells_of(faiss: Any, engine: Any) -> Any | None:
    """Return the part of an index that has cells (an IVF), None where none has."""
    try:
        return faiss.extract_index_ivf(engine)
    except RuntimeError:
        return None


@contextmanager
def without_warnings(faiss: Any, engine: Any) -> Iterator[int]:
    """Keep FAISS from writing a line for every clustering of few rows; yields the rows that it would be content with.

    0 where nothing is clustered. Quantizers that refine each other (RQ, LSQ) still write theirs.
    """
    chain = engine.chain if isinstance(engine, faiss.IndexPreTransform) else None
    rotations = [] if chain is None else [faiss.downcast_VectorTransform(chain.at(at)) for at in range(chain.size())]
    inner = engine if chain is None else faiss.downcast_index(engine.index)
    clusterings, centroids = [], [0]
    if hasattr(inner, "cp") and hasattr(inner, "nlist"):
        clusterings.append(inner.cp)
        centroids.append(inner.nlist)
    quantizers = [inner.pq] if hasattr(inner, "pq") else []
    turned = [each for each in rotations if isinstance(each, faiss.OPQMatrix) and each.pq is None]
    for each in turned:
        each.pq = faiss.ProductQuantizer(each.d_out, each.M, 8)
        quantizers.append(each.pq)
    for quantizer in quantizers:
        clusterings.append(quantizer.cp)
        centroids.append(quantizer.ksub)
    for clustering in clusterings:
        clustering.min_points_per_centroid = 1
    try:
        yield LEAST_TRAINING * max(centroids)
    finally:
        # A rotation only borrows the quantizer that it is trained with.
        for each in turned:
            each.pq = None


def cells_looked_into(cells: int) -> int:
    """Return how many of an IVF's cells a search looks into (nprobe)."""
    return min(cells, max(8, cells // 16))


def is_lossy(how: str, factory: str) -> bool:
    """Tell whether an index keeps less than the rows themselves."""
    return how != "exact" and LOSSY.search(factory) is not None


def said_by(error: Exception) -> str:
    """Return FAISS's own sentence without the place in its source."""
    text = str(error).strip()
    said = text.partition("failed: ")[2].strip() or text.rpartition(": ")[2].strip()
    # Some of its errors name a C++ function and nothing else.
    return said if said and "::" not in said and "std" not in said else "it is not known to FAISS"
