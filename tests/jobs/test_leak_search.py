"""Which index a leak check asks, and what `study` finds with it: the pairs of a plain table of cosines."""

from __future__ import annotations

import itertools
import types

import numpy as np
import pandas as pd
import pytest

from analysis import leaks
from engine.arrays.keyed_array import KeyedArray
from engine.errors import CacheError
from engine.index import build_index, products
from jobs import leak_search, study_analyses
from jobs.study_settings import Material
from tests.engine.test_index import ENCODER, filled, keys_of, values_of

ROWS = 120
SPLIT = np.array(["train", "val", "test"], dtype=object)[np.arange(ROWS) % 3]


@pytest.fixture
def slow(monkeypatch):
    """Exact search would take an hour here."""
    monkeypatch.setattr(products, "exact_seconds", lambda *shape: 3600.0)


def told(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "jobs.leak_search"]


def test_auto__is_exact_where_that_is_fast_and_else_the_index_that_was_built(tmp_path, monkeypatch, caplog):
    cache = filled(tmp_path, ROWS)
    build_index(cache, ENCODER, how="ivf")
    with caplog.at_level("INFO", logger="jobs"):
        assert leak_search.leak_index(cache, ENCODER, "auto", (ROWS, 24)).info.how == "exact"
        assert not told(caplog)
        monkeypatch.setattr(products, "exact_seconds", lambda *shape: 3600.0)
        assert leak_search.leak_index(cache, ENCODER, "auto", (ROWS, 24)).info.how == "ivf"
        build_index(cache, ENCODER, how="hnsw")
        assert leak_search.leak_index(cache, ENCODER, "auto", (ROWS, 24)).info.how == "hnsw"
    assert ["the ivf index is asked instead" in text for text in told(caplog)] == [True, False]


def test_auto__goes_without_an_index_that_is_not_there_or_behind_and_says_what_to_do(tmp_path, slow, caplog):
    cache = filled(tmp_path, ROWS)
    with caplog.at_level("INFO", logger="jobs"):
        assert leak_search.leak_index(cache, ENCODER, "auto", (ROWS, 24)).info.how == "exact"
        assert "`fluoro index --how ivf` makes it faster" in caplog.text
        build_index(cache, ENCODER, how="hnsw")
        more = range(ROWS, ROWS + 5)
        KeyedArray.open(tmp_path, "image", ENCODER).append(keys_of(more), values_of(more))
        assert leak_search.leak_index(cache, ENCODER, "auto", (ROWS + 5, 24)).info.how == "exact"
    assert "`fluoro index --how hnsw` brings its index up to date" in caplog.text
    with pytest.raises(CacheError, match="behind its cache by 5 rows"):
        leak_search.leak_index(cache, ENCODER, "hnsw", (ROWS + 5, 24))


@pytest.mark.parametrize("how", ["exact", "hnsw"])
def test_a_study__looks_for_leaks_through_the_index(tmp_path, monkeypatch, how):
    cache = filled(tmp_path, ROWS)
    if how == "hnsw":
        monkeypatch.setattr(products, "exact_seconds", lambda *shape: 3600.0)
        build_index(cache, ENCODER, how=how)
    monkeypatch.setattr(leaks, "_alike", lambda *given: pytest.fail("every pair was multiplied out"))
    values = values_of(range(ROWS)).astype(np.float32)
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    cosines = unit @ unit.T
    pairs = [(a, b) for a, b in itertools.combinations(range(ROWS), 2) if SPLIT[a] != SPLIT[b]]
    threshold = float(np.sort([cosines[pair] for pair in pairs])[-4]) - 1e-4
    expected = {frozenset((f"s{a}", f"s{b}")) for a, b in pairs if cosines[a, b] >= threshold}
    ids = np.array([f"s{number}" for number in range(ROWS)], dtype=object)
    dataset = types.SimpleNamespace(
        ids=ids, groups=ids, labels=np.ones((ROWS, 1), dtype=np.int8), label_names=("a",),
        samples=pd.DataFrame({"split": SPLIT, "text": [f"report {number}" for number in range(ROWS)]}),
    )  # fmt: skip
    material = Material(dataset, types.SimpleNamespace(id=ENCODER), values, keys_of(range(ROWS)), cache)
    said: list[dict] = []
    run = types.SimpleNamespace(path=lambda name: tmp_path / name, record_all=said.extend)
    study_analyses.write_split(material, study_analyses.LeakSection(threshold=threshold), run)
    found = pd.read_csv(tmp_path / "leaks.csv")
    assert set(found["kind"]) == {"near-duplicate image"}
    assert {frozenset(pair) for pair in zip(found["id"], found["other_id"], strict=True)} == expected
    text = next(line["text"] for line in said if line["kind"] == "sentence")
    assert ("with the hnsw index, which may miss some" in text) is (how == "hnsw")
