"""Search indexes over the rows of a keyed array, which know what they cover.

Comes in: a cache, an encoder's id, "image" or "text", and a kind of index: ``exact``, ``ivf``, ``hnsw``, ``pq`` or a
FAISS factory string. Goes out: ``<cache>/indexes/<encoder>-<kind>-<how>.faiss`` with a JSON beside it that names
encoder, kind, metric, number of rows and the digest of their keys; and an `Index` that answers in scores and keys. The
metric is the cosine. `kinds` says what can be built, `building` builds, updates and loads, `searching` answers, by
`exact` matrix products (`products`) or by FAISS; `devices` finds out what the GPU is good for.
"""

from engine.index.building import build_index, has_index, load_index, update_index
from engine.index.description import IndexInfo
from engine.index.kinds import PLAIN_KINDS as KINDS
from engine.index.searching import FEW_ROWS, Index

__all__ = ["FEW_ROWS", "KINDS", "Index", "IndexInfo", "build_index", "has_index", "load_index", "update_index"]
