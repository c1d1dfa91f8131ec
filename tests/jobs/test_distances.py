"""`fluoro distances`: all measures recorded with intervals and nulls, against a second model and texts, with maps."""

import json
import tracemalloc
import types

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.distances import label_separation
from analysis.space import rows
from engine.arrays.keyed_array import KeyedArray
from engine.errors import DataError, UsageError
from engine.features import StoredRows
from jobs import cli, distances, measuring
from jobs.config import SplitOptions
from jobs.study_settings import Material
from tests import models

PHANTOMS = "phantom:90?seed=5&size=64&enrich=0.15"


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distances")
    return {
        "dataset": PHANTOMS,
        "model": f"local-dir:{models.open_clip_pair(folder / 'model')}",
        "cache": folder / "cache",
        "device": "cpu",
        "split": SplitOptions(how="grouped", fractions=(0.5, 0.2, 0.3)),
        "replicates": 100,
        "permutations": 20,
        "batch_size": 32,
    }


@pytest.fixture(scope="module")
def measured(common, tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    other = models.open_clip_pair(folder / "other", seed=7)
    config = distances.Config(**common, on="all", against=f"local-dir:{other}", k=5)
    return distances.run(config, out=folder / "run")


def test_all_measures_are_recorded_and_nothing_is_silently_missing(measured):
    table = measured.measures
    assert set(table["name"]) >= {
        "inter", "intra", "ratio", "rms_same", "overlap_contrast", "separation", "silhouette", "davies_bouldin",
        "fisher_ratio", "knn_purity", "knn_overlap", "hubness", "antihubs", "alignment", "uniformity", "cka",
        "procrustes", "modality_gap",
    }  # fmt: skip
    assert not len(table[table["value"].isna() & (table["note"] == "")])
    lines = measuring.result_lines(measured.folder, "space")
    assert len(lines) == len(table) and set(lines["split"]) == {"all"}
    stored = pd.read_csv(measured.folder / "space.csv")
    np.testing.assert_allclose(stored["value"], table["value"], rtol=1e-5)


def test_embeddings_left_in_the_cache__give_the_same_numbers_and_are_never_all_in_memory(
    common, measured, tmp_path, monkeypatch
):
    kinds, kept = set(), measuring.prepare
    monkeypatch.setattr(measuring, "LARGE", 0)
    monkeypatch.setattr(
        measuring, "prepare", lambda *given, **how: (found := kept(*given, **how), kinds.add(type(found.features)))[0]
    )
    other = measured.measures["section"][measured.measures["section"].str.startswith(distances.LIKENESS)].iloc[0]
    config = distances.Config(**common, on="all", against=other.removeprefix(f"{distances.LIKENESS}: "), k=5)
    found = distances.run(config, out=tmp_path / "run")
    assert kinds == {StoredRows}
    for column in ("value", "low", "high", "null", "p"):
        np.testing.assert_allclose(found.measures[column], measured.measures[column], rtol=1e-5, atol=1e-6)


def test_distances_of_rows_in_the_cache__hold_few_of_them_at_once(tmp_path, monkeypatch):
    count, width = 4000, 512
    monkeypatch.setattr(rows, "BLOCK_ROWS", 256)
    generator = np.random.default_rng(0)
    array = KeyedArray.create(tmp_path, "image", "tiny-0123456789ab", (width,), {"id": "tiny-0123456789ab"})
    keys = np.arange(1, count + 1).astype("<u8")[:, None].repeat(2, axis=1).view(np.uint8)
    array.append(keys, generator.normal(size=(count, width)).astype(np.float16))
    stored = StoredRows(array, np.arange(count), np.arange(count), np.array([]))
    y, patients = generator.random((count, 2)) < 0.3, np.arange(count)
    given = {"label_names": ("a", "b"), "replicates": 2, "permutations": 2}
    expected = label_separation(stored[:].astype(np.float64), y, patients, **given)
    for source in (stored, stored.dask(256)):
        tracemalloc.start()
        found = label_separation(source, y, patients, **given)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < count * width * 2  # what all rows take as they are stored
        np.testing.assert_allclose([m.value for m in found], [m.value for m in expected], rtol=1e-9)


def test_no_figure_is_of_another_split_than_the_one_asked_for(measured, common, tmp_path):
    assert not len(measured.distances) and not len(measured.pairs) and not (measured.folder / "distances.csv").exists()
    assert next(iter(measured.tables())) == "Study's distances"
    tested = distances.run(distances.Config(**common, k=5), out=tmp_path / "run")
    assert list(tested.tables())[:2] == ["Class distances", "Nearest classes"] and len(tested.pairs)
    assert "distance" in (tested.folder / "results.jsonl").read_text()
    lines = [json.loads(line) for line in (measured.folder / "results.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"cost", "space"}


@pytest.mark.parametrize("on", ["test", "all"])
def test_parts_that_are_not_measured_need_not_be_there(common, tmp_path, monkeypatch, on):
    kept = distances.measuring.opening.split_data

    def without_val(dataset, split):
        split_of = kept(dataset, split)
        return split_of.take(np.flatnonzero((split_of.samples["split"] != "val").to_numpy()))

    expected = distances.run(distances.Config(**common, k=5, map="pca"), out=tmp_path / "whole")
    monkeypatch.setattr(distances.measuring.opening, "split_data", without_val)
    found = distances.run(distances.Config(**common, k=5, map="pca", on=on), out=tmp_path / "run")
    if on == "test":
        pd.testing.assert_frame_equal(found.measures, expected.measures)
    with pytest.raises(DataError, match="no embedded sample in val"):
        distances.run(distances.Config(**common, on="val"), out=tmp_path / "other")


def test_maps_are_pictures_with_their_places(measured):
    assert [path.name for path in measured.maps] == ["by-label.png", "by-split.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in measured.maps)
    places = pd.read_csv(measured.folder / "maps" / "places.csv")
    assert set(places["map"]) == {"pca", "tsne"} and len(places) == 4 * 90


def test_tables_show_value_null_and_note(measured):
    tables = measured.tables()
    assert any(title.startswith("Likeness of two spaces") for title in tables)
    shape = tables["Shape of the space"].set_index(["measure", "label"])
    assert " to " in shape.loc[("silhouette", ""), "value"] and " to " in shape.loc[("silhouette", ""), "null"]


def test_the_model_against_itself_and_too_many_neighbours_are_refused(common, tmp_path):
    with pytest.raises(UsageError, match="is the model itself"):
        distances.run(distances.Config(**common, against=common["model"], map="pca"), out=tmp_path / "a")
    with pytest.raises(UsageError, match="choose k up to"):
        distances.run(distances.Config(**common, k=500), out=tmp_path / "b")


def test_as_a_command(common, measured, tmp_path, capsys):
    arguments = [
        "distances", PHANTOMS, "--model", common["model"], "--cache", str(common["cache"]), "--split", "grouped",
        "--set", "split.fractions=[0.5, 0.2, 0.3]", "--replicates", "100", "--permutations", "10", "-k", "3",
        "--map", "pca", "--on", "all", "--out", str(tmp_path / "run"), "--quiet",
    ]  # fmt: skip
    assert cli.run(arguments) == 0
    text = capsys.readouterr().out
    assert "silhouette" in text and "by-label.png" in text and "modality_gap" in text


@pytest.mark.parametrize(("place", "expected"), [("cuda:1", "cuda:1"), ("cpu", "cpu"), ("mps", "cpu")])
def test_device_of_what_is_measured__is_its_encoder_s_where_that_is_a_gpu(place, expected):
    encoder = types.SimpleNamespace(device=torch.device(place))
    material = Material(None, encoder, None, None, None)
    assert material.device == expected
    config = types.SimpleNamespace(replicates=100, permutations=3, seed=0)
    assert distances._options(config, material)["device"] == expected
