"""`fluoro distances`: all measures recorded with intervals and nulls, against a second model and texts, with maps."""

import types

import numpy as np
import pandas as pd
import pytest
import torch

from engine.errors import UsageError
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
