"""`fluoro cam sweep` and `fluoro cam check` on phantoms with a tiny model, and a choice laid into a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from analysis import cam, localization
from engine.cache import Cache
from engine.encoder import load_encoder
from engine.errors import DataError, UsageError
from engine.sources import open_dataset
from jobs import cam as cam_job
from jobs import cam_check, cam_sweep, cli, heatmap_choice
from jobs.config import load_config
from jobs.opening import read_image, split_data
from tests import models

PHANTOMS = "phantom:60?seed=3&size=128&enrich=0.2"
ASKED = {
    "labels": ["Cardiomegaly", "Lung Opacity"],
    "zero_shot": {"templates": ["{label}"]},
    "split": {"how": "grouped", "fractions": [0.4, 0.3, 0.3]},
    "replicates": 100,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def model(place: Path) -> str:
    return f"local-dir:{models.open_clip_vit(place / 'model', image_size=64)}"


def options(place: Path, model: str, **more: object) -> dict[str, object]:
    return {
        "dataset": PHANTOMS,
        "model": model,
        "device": "cpu",
        "precision": "fp32",
        "cache": place / "cache",
        **ASKED,
        **more,
    }


@pytest.fixture(scope="module")
def swept(place: Path, model: str) -> cam_sweep.Result:
    asked = options(place, model, methods=["gradcam", "hirescam", "grad-eclip"], layers=[0, 1], per_label=3)
    return cam_sweep.run(load_config(cam_sweep.Config, asked), out=place / "swept")


def test_sweep_chooses_the_best_of_what_it_tried_on_validation(swept: cam_sweep.Result) -> None:
    tried = swept.tried
    assert list(zip(tried["method"], tried["layer"], strict=True)) == [
        ("gradcam", 0),
        ("gradcam", 1),
        ("hirescam", 0),
        ("hirescam", 1),
        ("grad-eclip", "default"),
    ]
    best = tried.iloc[int((tried["pointing_game"] + tried["energy"]).argmax())]
    assert (swept.choice["method"], swept.choice["layer"]) == (best["method"], best["layer"])
    assert json.loads((swept.folder / "choice.json").read_text()) == swept.choice
    assert "validation findings" in swept.choice["reason"]
    assert (tried["energy_low"] <= tried["energy"]).all() and (tried["energy"] <= tried["energy_high"]).all()


def test_sweep_scores_validation_as_scoring_by_hand_does(swept: cam_sweep.Result, place: Path, model: str) -> None:
    dataset = split_data(open_dataset(PHANTOMS), load_config(cam_sweep.Config, options(place, model)).split)
    encoder = load_encoder(model, device="cpu")
    split = dataset.samples["split"].to_numpy()
    pairs = dataset.annotations.pairs
    energies, n = [], 0
    for label in ASKED["labels"]:
        text = Cache(place / "cache").text_features([label.lower()], encoder)[0]
        rows = [dataset.position(sample) for sample in pairs.loc[pairs["label"] == label, "sample_id"]]
        rows = [row for row in rows if split[row] == "val"]
        if len(rows) > 3:
            pytest.skip("more findings than are asked for: which are drawn is the sweep's own")
        for row in rows:
            pixels, geometry = encoder.preprocess(read_image(dataset, row))
            heat = cam.Explainer(encoder, 1, "hirescam").heatmaps(pixels, [cam.TextTarget(text, label)])[0]
            region = dataset.annotations.region(dataset.ids[row], label, *geometry.original)
            energies.append(localization.energy_inside(heat.on_original(geometry), region))
            n += 1
    row = swept.tried[(swept.tried["method"] == "hirescam") & (swept.tried["layer"] == 1)].iloc[0]
    assert row["n"] == n and row["energy"] == pytest.approx(np.mean(energies), rel=1e-4)


def test_sweep_tests_only_its_choice_beside_all_nulls(swept: cam_sweep.Result) -> None:
    settings = set(swept.test["setting"])
    assert settings == {
        "Zero-shot",
        "Centre prior",
        "Location prior",
        "Random weights",
        "Random label (Zero-shot)",
        "Mean map of others (Zero-shot)",
    }
    findings = pd.read_csv(swept.folder / "tables/findings.csv")
    dataset = split_data(
        open_dataset(PHANTOMS), load_config(cam_sweep.Config, {"dataset": PHANTOMS, "model": "x", **ASKED}).split
    )
    split = dict(zip(dataset.ids, dataset.samples["split"], strict=True))
    assert {split[sample] for sample in findings["id"]} == {"test"}
    assert set(pd.read_csv(swept.folder / "tables/verdicts.csv")["label"]) == {"all", *ASKED["labels"]}


def test_choice_is_taken_by_its_model_and_refused_for_another(
    swept: cam_sweep.Result, place: Path, model: str, tmp_path: Path
) -> None:
    encoder = load_encoder(model, device="cpu")
    assert heatmap_choice.choose(encoder) == heatmap_choice.FALLBACK
    taken = heatmap_choice.choose(encoder, choice=swept.folder)
    assert (taken.method, taken.layer) == (swept.choice["method"], swept.choice["layer"])
    own = Path(str(encoder.files.folder)) / heatmap_choice.MODEL_FILE
    own.write_text(json.dumps({**swept.choice, "method": "layercam", "layer": 0}))
    try:
        assert heatmap_choice.choose(encoder)[:2] == ("layercam", 0)
        assert heatmap_choice.choose(encoder, method="gradcam")[:2] == ("gradcam", "default")
        assert heatmap_choice.choose(encoder, layer=1)[:2] == ("layercam", 1)
        assert load_encoder(model, device="cpu").id == encoder.id, "a choice changes no embedding"
    finally:
        own.unlink()
    stranger = tmp_path / "choice.json"
    stranger.write_text(json.dumps({**swept.choice, "encoder": "another"}))
    with pytest.raises(DataError, match="chosen for 'another'"):
        heatmap_choice.choose(encoder, choice=stranger)
    stranger.write_text("{}")
    with pytest.raises(DataError, match="no choice of a sweep"):
        heatmap_choice.choose(encoder, choice=stranger)
    with pytest.raises(UsageError, match="no choice of a sweep at"):
        heatmap_choice.choose(encoder, choice=tmp_path / "nowhere")


def test_shipped_model_has_a_choice_of_its_own() -> None:
    choice = heatmap_choice.choose(load_encoder("phantom-clip", device="cpu"))
    assert choice.method in cam.METHODS and "validation findings" in choice.reason


BAD = {
    "unknown label": ({"labels": ["Oedema"]}, UsageError, "Edema"),
    "unknown method": ({"methods": ["gradcan"]}, UsageError, "no heatmap method 'gradcan'"),
    "no annotations": ({"labels": ["No Finding"]}, DataError, "no annotated finding in its val split"),
}


@pytest.mark.parametrize("case", BAD)
def test_sweep_says_what_is_wrong(case: str, place: Path, model: str, tmp_path: Path) -> None:
    changed, error, message = BAD[case]
    config = load_config(cam_sweep.Config, options(place, model, **changed))
    with pytest.raises(error, match=message):
        cam_sweep.run(config, out=tmp_path / "run")


def test_check_has_one_table_a_method(place: Path, model: str) -> None:
    asked = options(place, model, methods=["gradcam", "legrad"], per_label=1)
    found = cam_check.run(load_config(cam_check.Config, asked), out=place / "checked")
    assert list(found.methods) == ["gradcam", "legrad"]
    for method, table in found.methods.items():
        values = table.set_index(["stage", "figure"])["value"]
        assert values[("intact", "energy inside")] >= 0
        stages = [stage for stage in dict.fromkeys(table["stage"]) if stage.startswith("shuffled")]
        assert stages[0].endswith("projection") and stages[-1].endswith("stem")
        for figure in ("road", "deletion", "insertion"):
            apart = values[(f"{method} - order by lot", figure)]
            assert apart == pytest.approx(values[(method, figure)] - values[("order by lot", figure)], abs=1e-6)
        assert np.isfinite(values[("probe on permuted labels", "similarity")])
        assert (place / "checked" / f"tables/check-{method}.csv").is_file()


@pytest.mark.parametrize("verb", ["sweep", "check"])
def test_verbs_stand_beside_the_one_that_they_extend(verb: str) -> None:
    done = CliRunner().invoke(cli.fluoro, ["cam", verb, "--help"])
    assert done.exit_code == 0 and "annotated" in done.output and f"cam {verb}" in done.output


def test_cam_takes_the_choice_of_a_sweep(swept: cam_sweep.Result, place: Path, model: str) -> None:
    dataset = open_dataset(PHANTOMS)
    sample = dataset.annotations.sample_ids("Cardiomegaly")[0]
    asked = {"dataset": PHANTOMS, "model": model, "device": "cpu", "cache": place / "cache", "ids": [sample]}
    asked |= {"labels": ["Cardiomegaly"], "precision": "fp32"}

    def drawn(out: str, **more: object) -> pd.DataFrame:
        maps = cam_job.run(load_config(cam_job.Config, {**asked, **more}), out=place / out).maps
        return maps[~maps["baseline"]]

    module = swept.tried.set_index(["method", "layer"]).loc[(swept.choice["method"], swept.choice["layer"]), "module"]
    chosen = drawn("chosen", choice=swept.folder)
    assert set(chosen["method"]) == {swept.choice["method"]} and set(chosen["layer"]) == {module}
    assert set(drawn("told", choice=swept.folder, method="layercam", layer=0)["method"]) == {"layercam"}
    assert set(drawn("own")["method"]) == {"gradcam"}
