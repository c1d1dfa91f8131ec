"""`fluoro finetune` and `fluoro cam` from a data set of phantoms to files on disk, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis.heads import LinearHead
from engine.encoder import load_encoder
from engine.errors import DataError, ModelError, UsageError
from engine.sources import open_dataset
from jobs import cam, cli, finetune
from jobs.config import load_config
from tests import models

PHANTOMS = "phantom:48?seed=3&size=128&enrich=0.2"
SHORT = {"trainable": 1, "epochs": 2, "batch_size": 16, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def model(place: Path) -> str:
    return f"local-dir:{models.open_clip_vit(place / 'model', image_size=64)}"


def options(place: Path, model: str, **more: object) -> dict[str, object]:
    return {"dataset": PHANTOMS, "model": model, "device": "cpu", "cache": place / "cache", **more}


@pytest.fixture(scope="module")
def tuned(place: Path, model: str) -> tuple[Path, object]:
    config = load_config(finetune.Config, options(place, model, finetune=SHORT, replicates=100))
    return place / "tuned", finetune.run(config, out=place / "tuned")


# -- Fine-tuning -------------------------------------------------------------------------------------------------------


def test_finetune_leaves_a_model_that_the_cache_knows(place: Path, model: str, tuned: tuple[Path, object]) -> None:
    folder, result = tuned
    child = load_encoder(f"local-dir:{folder / 'model'}", device="cpu")
    parent = load_encoder(model, device="cpu")
    assert child.id != parent.id
    head = LinearHead.load(folder / "model" / "head.npz")
    assert head.encoder_id == child.id and head.label_names == open_dataset(PHANTOMS).label_names
    assert result.head == folder / "model" / "head.npz"
    history = pd.read_csv(folder / "history.csv")
    assert list(history["epoch"]) == [0, 1, 2], "epoch 0: the probe's head, before any step"
    metrics = result.metrics[(result.metrics["setting"] == "Fine-tuning") & result.metrics["label"].isna()]
    assert {"f1_macro", "lrap", "coverage_error"} <= set(metrics["metric"])
    card = (folder / "model" / "README.md").read_text()
    for said in (parent.id, "trainable: 1", "split:", PHANTOMS, "not for diagnosis"):
        assert said in card
    provenance = json.loads((folder / "provenance.json").read_text())
    assert [encoder["id"] for encoder in provenance["encoders"]] == [parent.id, child.id]
    costs = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in costs if line["kind"] == "cost"}
    assert steps["fine-tuning"]["items"] > 0


def test_finetune_again_reuses_the_cached_pixels(place: Path, model: str, tuned: tuple[Path, object]) -> None:
    config = load_config(
        finetune.Config, options(place, model, finetune={**SHORT, "epochs": 1}, start="random", replicates=100)
    )
    finetune.run(config, out=place / "again")
    lines = [json.loads(line) for line in (place / "again" / "results.jsonl").read_text().splitlines()]
    pixels = next(line for line in lines if line["kind"] == "cost" and line["step"].startswith("cache pixels"))
    assert not pixels["items"] and pixels["reused"] == 48
    assert list(pd.read_csv(place / "again" / "history.csv")["epoch"]) == [1]


@pytest.mark.parametrize("start", ["text", "head.npz"])
def test_finetune_starts_where_it_is_told(start: str, place: Path, model: str, tuned: tuple[Path, object]) -> None:
    encoder = load_encoder(model, device="cpu")
    names = open_dataset(PHANTOMS).label_names
    if start == "head.npz":
        start = str(LinearHead(np.zeros((14, 32)), np.full(14, -1.0), names, True, encoder.id).save(place / "zero.npz"))
    config = load_config(
        finetune.Config,
        options(place, model, finetune={**SHORT, "epochs": 1, "monitor": "bce"}, start=start, replicates=100),
    )
    out = place / f"start-{Path(start).stem}"
    finetune.run(config, out=out)
    first = pd.read_csv(out / "history.csv").iloc[0]
    assert first["epoch"] == 0
    if start.endswith("npz"):
        dataset = open_dataset(PHANTOMS)
        assert 0.2 < first["bce"] < 1 and len(dataset) == 48


def test_finetune_refuses_a_strangers_head(place: Path, model: str) -> None:
    names = open_dataset(PHANTOMS).label_names
    stranger = LinearHead(np.zeros((14, 32)), np.zeros(14), names, True, "another-fp32-0").save(place / "stranger.npz")
    config = load_config(finetune.Config, options(place, model, finetune=SHORT, start=str(stranger)))
    with pytest.raises(ModelError, match="another-fp32-0"):
        finetune.run(config, out=place / "refused")
    few = LinearHead(np.zeros((1, 32)), np.zeros(1), ("Edema",), True).save(place / "few.npz")
    config = load_config(finetune.Config, options(place, model, finetune=SHORT, start=str(few)))
    with pytest.raises(DataError, match="Edema"):
        finetune.run(config, out=place / "refused-too")


# -- Heatmaps ----------------------------------------------------------------------------------------------------------


def annotated_sample() -> tuple[str, str]:
    """Return a sample with a large heart and as few other findings as there are."""
    pairs = open_dataset(PHANTOMS).annotations.pairs
    counts = pairs["sample_id"].value_counts()
    with_heart = pairs.loc[pairs["label"] == "Cardiomegaly", "sample_id"]
    return min(with_heart, key=lambda sample: (counts[sample], sample)), "Cardiomegaly"


def test_cam_draws_every_setting_at_hand_and_scores_it(place: Path, model: str, tuned: tuple[Path, object]) -> None:
    sample, label = annotated_sample()
    encoder = load_encoder(model, device="cpu")
    rng = np.random.default_rng(0)
    head = LinearHead(rng.standard_normal((14, 32)), np.zeros(14), open_dataset(PHANTOMS).label_names, True, encoder.id)
    path = head.save(place / "probe.npz")
    config = load_config(
        cam.Config, options(place, model, ids=[sample], labels=[label], heads=[path], tuned=[tuned[0]])
    )
    result = cam.run(config, out=place / "cam")
    settings = ["Zero-shot", "Linear probe", "Fine-tuning", "Centre prior", "Location prior"]
    assert list(result.maps["setting"]) == settings
    scores = result.maps.set_index("setting")
    assert scores[["pointing_game", "energy", "best_iou"]].notna().all(axis=None)
    assert scores.loc["Centre prior", "pointing_game"] == 1, "a large heart holds the image's middle"
    assert json.loads((place / "cam" / "scores.json").read_text())[0]["setting"] == "Zero-shot"
    assert len(result.sheets) == 1 and len(list((place / "cam" / "maps").glob("*.png"))) == 3
    sheet = np.asarray(Image.open(result.sheets[0]))
    assert sheet.shape[1] > 4 * 360
    assert result.failures.empty and "Heatmaps" in result.tables()


def test_cam_under_the_papers_protocol_names_the_empty_map(place: Path, model: str) -> None:
    sample, label = annotated_sample()
    config = load_config(cam.Config, options(place, model, ids=[sample], labels=[label], protocol="paper"))
    row = cam.run(config, out=place / "cam-paper").maps.iloc[0]
    assert row["empty"] and "study's own layer" in row["note"] and row["layer"] == "transformer.resblocks.2.ls_1"
    assert row["pointing_game"] == 0


def test_cam_chooses_labels_where_none_is_named(place: Path, model: str) -> None:
    dataset = open_dataset(PHANTOMS)
    healthy = next(
        sample
        for sample, y in zip(dataset.ids, dataset.labels, strict=True)
        if y[dataset.label_position("No Finding")] and y.sum() == 1
    )
    config = load_config(cam.Config, options(place, model, ids=[annotated_sample()[0], healthy]))
    maps = cam.run(config, out=place / "cam-all").maps
    found = {
        sample: {name for name in dataset.label_names if dataset.annotations.has(sample, name)}
        for sample in (annotated_sample()[0], healthy)
    }
    assert set(maps.loc[maps["id"] == annotated_sample()[0], "label"]) == found[annotated_sample()[0]]
    of_healthy = maps[maps["id"] == healthy]
    assert list(of_healthy["label"]) == ["No Finding"] and of_healthy["pointing_game"].isna().all()


def test_cam_on_the_command_line(place: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    sample, label = annotated_sample()
    arguments = ["cam", PHANTOMS, "--model", model, "--device", "cpu", "--cache", str(place / "cache")]
    arguments += ["--id", sample, "--label", label, "--layer", "1", "--method", "layercam", "--json", "--quiet"]
    assert cli.run([*arguments, "--out", str(place / "cam-cli")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert Path(said["sheets"][0]).is_file()
    assert said["maps"][0]["layer"] == "transformer.resblocks.1.ln_1"


def test_cam_lists_what_it_cannot_read_and_goes_on(place: Path, model: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (80, 60), dtype=np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:500])
    table = pd.DataFrame({"image": ["bad.png", "good.png"], "edema": [1, 1], "patient": ["a", "b"]})
    table.to_csv(tmp_path / "table.csv", index=False)
    config = load_config(
        cam.Config,
        {
            **options(place, model, ids=["bad.png", "good.png"], labels=["edema"]),
            "dataset": f"table:{tmp_path / 'table.csv'}",
            "data": {"image": "image", "id": "image", "labels": ["edema"], "group": "patient"},
        },
    )
    result = cam.run(config, out=tmp_path / "out")
    assert list(result.failures["id"]) == ["bad.png"] and list(result.maps["id"]) == ["good.png"]


def test_cam_names_what_is_wrong(place: Path, model: str, tmp_path: Path) -> None:
    sample, label = annotated_sample()

    def run(**more: object) -> object:
        return cam.run(load_config(cam.Config, options(place, model, **more)), out=tmp_path / "out", overwrite=True)

    with pytest.raises(UsageError, match=r"--id, such as"):
        run(labels=[label])
    with pytest.raises(UsageError, match="no sample 'nobody'"):
        run(ids=["nobody"])
    with pytest.raises(UsageError, match="unknown label 'Cardio'"):
        run(ids=[sample], labels=["Cardio"])
    with pytest.raises(UsageError, match="no run of fluoro finetune"):
        run(ids=[sample], labels=[label], tuned=[tmp_path])
    few = LinearHead(np.zeros((1, 32)), np.zeros(1), ("Edema",), True).save(tmp_path / "few.npz")
    with pytest.raises(UsageError, match="no label 'Cardiomegaly'"):
        run(ids=[sample], labels=[label], heads=[few])
    with pytest.raises(UsageError, match="unknown heatmap method"):
        run(ids=[sample], labels=[label], method="cam")
