"""Plain zarr, xarray and dask open the cache's arrays as any other, and see whole rows only."""

from __future__ import annotations

import os
from pathlib import Path

import dask.array
import numpy as np
import pytest
import xarray
import zarr

from engine.arrays import array_format
from engine.arrays.array_format import METADATA
from engine.arrays.keyed_array import KeyedArray
from engine.arrays.row_check import row_checks

KINDS = {
    "image": ((12,), ("dim",)),
    "text": ((5,), ("dim",)),
    "pixels": ((4, 6, 3), ("y", "x", "channel")),
    "tokens": ((3, 4), ("token", "width")),
}
ROWS = 75


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """One array of each kind, in chunks of a few rows, written in odd portions."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_format, "CHUNK_BYTES", 16 * 24)
        patch.setattr(os, "fsync", lambda descriptor: None)
        for kind, (shape, _) in KINDS.items():
            array = KeyedArray.create(folder, kind, "enc", shape, {"model": "tiny"})
            for start in range(0, ROWS, 7):
                some = slice(start, min(start + 7, ROWS))
                array.append(keys()[some], values(kind)[some])
            array.finish()
    return folder


def keys() -> np.ndarray:
    return np.random.Generator(np.random.PCG64(1)).integers(0, 256, (ROWS, 16), np.uint8)


def values(kind: str) -> np.ndarray:
    dtype = "|u1" if kind == "pixels" else "<f2"
    return np.random.Generator(np.random.PCG64(2)).integers(0, 200, (ROWS, *KINDS[kind][0])).astype(dtype)


def expected(kind: str) -> dict[str, np.ndarray]:
    payload = array_format.PARTS[kind][0]
    return {payload: values(kind), "key": keys(), "check": row_checks(keys(), values(kind))}


@pytest.mark.parametrize("kind", KINDS)
def test_zarr_reads_all_and_any_rows(cache, kind):
    group = zarr.open_group(cache / "arrays.zarr", mode="r")[f"{kind}/enc"]
    assert set(group.array_keys()) == set(expected(kind))
    for name, truth in expected(kind).items():
        np.testing.assert_array_equal(group[name][:], truth)
        np.testing.assert_array_equal(group[name].oindex[[74, 3, 3, 40]], truth[[74, 3, 3, 40]])
    assert group.attrs["description"] == {"model": "tiny"}


def test_zarr_walks_the_whole_store(cache):
    root = zarr.open_group(cache / "arrays.zarr", mode="r")
    found = {path for path, node in root.members(max_depth=None) if isinstance(node, zarr.Array)}
    assert found == {f"{kind}/enc/{name}" for kind in KINDS for name in expected(kind)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [None, {}], ids=["eager", "by dask"])
def test_xarray_opens_a_group_as_a_dataset_with_named_dimensions(cache, kind, chunks):
    opened = xarray.open_zarr(cache / "arrays.zarr" / kind / "enc", consolidated=False, chunks=chunks)
    shape, names = KINDS[kind]
    assert dict(opened.sizes) == {"row": ROWS, "byte": 16, **dict(zip(names, shape, strict=True))}
    for name, truth in expected(kind).items():
        assert opened[name].dims[0] == "row"
        assert opened[name].dtype == truth.dtype
        np.testing.assert_array_equal(opened[name].values, truth)
        np.testing.assert_array_equal(opened[name].isel(row=slice(10, 70, 7)).values, truth[10:70:7])


@pytest.mark.parametrize("kind", KINDS)
def test_dask_computes_on_every_part_by_row_chunks(cache, kind):
    folder = cache / "arrays.zarr" / kind / "enc"
    chunk_rows = KeyedArray.open(cache, kind, "enc").form.chunk_rows
    for name, truth in expected(kind).items():
        lazy = dask.array.from_zarr(str(folder / name))
        assert lazy.chunks[0][0] == chunk_rows and len(lazy.chunks[0]) == -(-ROWS // chunk_rows)
        np.testing.assert_array_equal(lazy[::3].compute(), truth[::3])
        np.testing.assert_array_equal(lazy.max(axis=0).compute(), truth.max(axis=0))


def test_plain_readers_see_whole_rows_only_where_a_killed_writer_left_the_shapes_behind(cache, tmp_path):
    array = KeyedArray.create(tmp_path, "image", "enc", (12,), {"model": "tiny"})
    array.append(keys()[:20], values("image")[:20])
    before = {path: path.read_bytes() for path in array.folder.rglob(METADATA)}
    array.append(keys()[20:], values("image")[20:])
    for path, content in before.items():
        path.write_bytes(content)
    group = zarr.open_group(array.folder, mode="r")
    np.testing.assert_array_equal(group["embedding"][:], values("image")[:20])
    assert len(KeyedArray.open(tmp_path, "image", "enc")) == ROWS
