"""The whole study on small phantoms and random towers: what it leaves must be true, and the same from either layout."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats
from sklearn.metrics import coverage_error, f1_score, label_ranking_average_precision_score

from analysis import cards, run_record
from analysis.heads import LinearHead
from analysis.metrics import LABEL_METRICS, OVERALL_METRICS
from analysis.report import plain, summary
from engine.errors import DataError, UsageError
from engine.phantom_files import write_phantoms
from engine.resources import resource
from engine.sources import open_dataset
from jobs import config as configs
from jobs import probe, study, study_analyses
from tests import models

SMALL = {
    "replicates": 100,
    "permutations": 20,
    "sensitivity": False,
    "showcase.images": 1,
    "showcase.neighbours": 3,
    "finetune.epochs": 1,
}


def run_study(
    source: str, model: Path, out: Path, cache: Path, base: str | None = None, **overrides: object
) -> study.Result:
    values = {"data.source": source, "model": f"local-dir:{model}", "cache": str(cache), **SMALL, **overrides}
    return study.run(configs.load_config(study.Config, base, options=values), out=out)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[study.Result, Path, Path]:
    folder = tmp_path_factory.mktemp("study")
    model = models.open_clip_vit(folder / "model")
    overrides = {
        "protocols": ["sound", "paper"],
        "heatmaps.per_label": 2,
        "heatmaps.panels": 2,
        "seeds": 3,
        "sensitivity": True,
    }
    result = run_study("phantom:90?seed=3&enrich=0.1&size=96", model, folder / "run", folder / "cache", **overrides)
    return result, model, folder


def test_study__leaves_a_report_and_says_what_it_did(small_run) -> None:
    result, _, _ = small_run
    assert result.report.is_file()
    assert result.failures == 0
    record = run_record.read_run(result.folder)
    assert record.protocols == ["sound", "paper"]
    settings = record.rows("metric")["setting"].unique()
    assert {"Zero-shot", "Linear probe", "Fine-tuning", "Prevalence ranking", "All positive"} <= set(settings)
    counts = record.provenance["split"]["counts"]
    assert sum(counts.values()) == record.provenance["dataset"]["n"] == 90
    assert len(record.provenance["encoders"]) == 3
    assert {"embed image and pixels", "fine-tuning (paper)", "heatmaps (sound)"} <= set(record.rows("cost")["step"])
    assert len(record.heatmaps) == 4
    assert record.retrieval


def test_study__metrics_are_those_of_its_scores(small_run) -> None:
    record = run_record.read_run(small_run[0].folder)
    scores = record.scores
    metrics = record.rows("metric")
    for place, (setting, protocol) in enumerate(zip(scores.settings, scores.protocols, strict=True)):
        rows = metrics[(metrics["setting"] == setting) & (metrics["protocol"] == protocol) & metrics["label"].isna()]
        found = rows.set_index("metric")["value"]
        truth, decided = scores.truth, scores.decisions[place]
        assert found["f1_macro"] == pytest.approx(f1_score(truth, decided, average="macro", zero_division=0))
        assert found["exact_match"] == pytest.approx((truth == decided).all(axis=1).mean())
        values = scores.values[place].astype(np.float64)
        assert found["lrap"] == pytest.approx(label_ranking_average_precision_score(truth, values), abs=1e-9)
        assert found["coverage_error"] == pytest.approx(coverage_error(truth, values), abs=1e-9)


def test_study__asks_of_thresholds_subgroups_the_space_and_the_split(small_run) -> None:
    record = run_record.read_run(small_run[0].folder)
    thresholds = record.rows("threshold")
    assert set(thresholds["family"]) == {"fixed", "minmax", "prevalence", "f1"}
    # The sound protocol cuts at the F1-optimal thresholds, so that family must give the metrics themselves.
    metrics = record.rows("metric")
    metrics = metrics[(metrics["protocol"] == "sound") & metrics["label"].isna() & (metrics["metric"] == "f1_macro")]
    own = thresholds[(thresholds["protocol"] == "sound") & (thresholds["family"] == "f1")]
    own = own[own["metric"] == "f1_macro"].set_index("setting")["value"]
    assert len(own) >= 2
    for setting, value in own.items():
        assert value == pytest.approx(float(metrics.set_index("setting").loc[setting, "value"]))
    # Subgroups of one column share out the test samples.
    part = record.rows("subgroup")
    part = part[(part["column"] == "findings") & (part["metric"] == "lrap") & (part["protocol"] == "sound")]
    assert set(part.groupby("setting")["n"].sum()) == {record.scores.truth.shape[0]}
    folder = small_run[0].folder
    whole = pd.read_csv(folder / "tables/subgroups-all-sound.csv")
    one = whole[
        (whole["column"] == "findings") & (whole["subgroup"] == "one finding") & (whole["setting"] == "Zero-shot")
    ]
    labels = record.label_names
    assert set(one.loc[one["label"].isna(), "metric"]) == set(OVERALL_METRICS)
    assert len(one[one["label"].notna()]) == len(LABEL_METRICS) * len(labels)
    # The positives of all subgroups of a column are those of the test split.
    positives = whole[(whole["metric"] == "positives") & (whole["setting"] == "Zero-shot")]
    counted = positives[positives["column"] == "findings"].groupby("label")["value"].sum()
    np.testing.assert_array_equal(counted[list(labels)], record.scores.truth.sum(axis=0))
    gaps = pd.read_csv(folder / "tables/subgroup-gaps-sound.csv")
    held = gaps[(gaps["column"] == "findings") & gaps["label"].isna()].set_index(["setting", "metric"])
    lrap = whole[(whole["metric"] == "lrap") & (whole["setting"] == "Zero-shot")].set_index(["column", "subgroup"])[
        "value"
    ]
    expected = lrap["findings", "one finding"] - lrap["findings", "several findings"]
    row = held.loc[("Zero-shot", "lrap")]
    assert row["gap"] == pytest.approx(expected, abs=1e-5) and row["low"] <= row["gap"] <= row["high"]
    told = record.rows("sentence")
    told = told.loc[told["section"] == "subgroups", "text"]
    assert told.str.contains("on images with one finding and .* on those with several findings").any()
    assert {"silhouette", "knn_purity", "separation"} <= set(record.rows("space")["metric"])
    split = record.rows("split")
    test = split[split["split"] == "test"].set_index("label")["value"]
    assert test.to_numpy() == pytest.approx(record.scores.truth.mean(axis=0))
    search = record.rows("retrieval").set_index("metric")
    recalls = [f"image to report, recall@{k}" for k in (1, 5, 10)]
    assert search.loc[recalls, "value"].between(0, 1).all() and search.loc[recalls, "null"].between(0, 1).all()
    asked = search[search.index.str.startswith("image to")].drop("image to image, mAP")
    assert (asked["low"] <= asked["value"] + 1e-9).all() and (asked["value"] <= asked["high"] + 1e-9).all()
    differences = record.rows("difference")
    assert (differences["p_holm"].dropna() >= differences["p"].dropna()).all()


def test_study__puts_the_claims_and_its_own_choices_to_the_test(small_run) -> None:
    folder = small_run[0].folder
    record = run_record.read_run(folder)
    truth, scores = record.scores.truth, record.scores
    said = pd.read_csv(folder / "tables/claims-over-prediction-paper.csv")
    assert set(said["family"]) == {"fixed", "minmax", "prevalence", "f1", "zero", "own"}
    place = [(a, b) for a, b in zip(scores.settings, scores.protocols, strict=True)].index(("Zero-shot", "paper"))
    raw = scores.values[place].astype(np.float64)
    spread = (raw - raw.min(axis=1, keepdims=True)) / (np.ptp(raw, axis=1, keepdims=True) + 1e-8)
    row = said[(said["setting"] == "Zero-shot") & (said["family"] == "minmax") & said["label"].isna()].iloc[0]
    assert row["ratio"] == pytest.approx((spread > 0.5).sum() / truth.sum(), rel=1e-5)
    row = said[(said["setting"] == "Zero-shot") & (said["family"] == "zero") & said["label"].isna()].iloc[0]
    assert row["ratio"] == pytest.approx((raw > 0).sum() / truth.sum(), rel=1e-5)
    # Each protocol has a setting's figures beside the best trivial baseline and a null, in the run's own numbers.
    figures = pd.read_csv(folder / "tables/figures-sound.csv").set_index(["setting", "metric"])
    metrics = record.rows("metric")
    own = metrics[(metrics["protocol"] == "sound") & metrics["label"].isna() & (metrics["metric"] == "lrap")]
    own = own.set_index("setting")
    trivial = own.loc[own["baseline"] == True, "value"]  # noqa: E712
    for setting in ("Zero-shot", "Linear probe", "Fine-tuning"):
        assert figures.loc[(setting, "lrap"), "value"] == pytest.approx(own.loc[setting, "value"], rel=1e-5)
        assert figures.loc[(setting, "lrap"), "baseline_value"] == pytest.approx(trivial.max(), rel=1e-5)
        assert own.loc[setting, ["null", "null_low", "null_high", "p"]].notna().all()
    # Seeds: this run is the first repeat, the others have other splits.
    each = pd.read_csv(folder / "tables/seeds-each-sound.csv")
    assert each["split"].nunique() == 3 and set(each["setting"]) == {"Zero-shot", "Linear probe", "Prevalence ranking"}
    first = each[(each["repeat"] == 0) & (each["metric"] == "lrap")].set_index("setting")["value"]
    assert first["Linear probe"] == pytest.approx(own.loc["Linear probe", "value"], rel=1e-5)
    spread_of = pd.read_csv(folder / "tables/seeds-sound.csv").set_index(["setting", "metric"])
    values = each[(each["setting"] == "Linear probe") & (each["metric"] == "lrap")]["value"]
    assert spread_of.loc[("Linear probe", "lrap"), "deviation"] == pytest.approx(values.std(), rel=1e-4)
    changed = pd.read_csv(folder / "tables/sensitivity-paper.csv")
    assert {"nothing", "thresholds", "prompts", "normalisation"} == set(changed["changed"])
    raw_dots = changed[(changed["changed"] == "nothing") & (changed["setting"] == "Zero-shot")]
    assert raw_dots.set_index("metric").loc["lrap", "value"] == pytest.approx(
        label_ranking_average_precision_score(truth, raw), abs=1e-5
    )
    page = small_run[0].report.read_text()
    assert "Claim 1, zero-shot over-predicts every label" in page and "Beside the published study" in page


def test_study__what_is_said_of_the_published_protocol_says_so_beside_the_other(small_run) -> None:
    record = run_record.read_run(small_run[0].folder)
    rows = record.rows("sentence")
    of = {name: set(rows.loc[rows["protocol"] == name, "text"]) for name in ("sound", "paper")}
    told = {"claims", "sensitivity", "seeds", "differences", "classification", "subgroups"}
    assert all(told <= set(rows.loc[rows["protocol"] == name, "section"]) for name in of)
    shown = [*summary.warnings(record), *summary.findings(record)]
    shown += [text for part in plain.plain_tables(record) for text in part["sentences"]]
    shown += [line[2:] for line in cards.model_card(record).splitlines() if line.startswith("- ")]
    assert not set(shown) & (of["paper"] - of["sound"])
    named = [text.removeprefix("protocol paper: ") for text in shown if text.startswith("protocol paper: ")]
    assert set(named) <= of["paper"] and sum(text.startswith("Claim 1") for text in named) == 2


def test_study__leaves_cards_and_a_ledger_of_its_own_numbers(small_run) -> None:
    folder = small_run[0].folder
    record = run_record.read_run(folder)
    drawn = open_dataset("phantom:90?seed=3&enrich=0.1&size=96")
    parts = pd.read_csv(folder / "tables/data-parts.csv").set_index("part")
    assert parts["images"].to_dict() == {"all": 90, **record.provenance["split"]["counts"]}
    findings = drawn.labels[:, :-1].sum(axis=1)
    assert parts.loc["all", "one_finding"] == (findings == 1).sum()
    assert parts.loc["all", "labels_an_image"] == pytest.approx(drawn.labels.sum(axis=1).mean(), rel=1e-5)
    texts = pd.read_csv(folder / "tables/data-texts.csv").set_index("part").loc["all"]
    lengths = [len(text.split()) for text in drawn.samples["text"]]
    assert (texts["words_longest"], texts["words_median"]) == (max(lengths), np.median(lengths))
    assert texts["different"] == drawn.samples["text"].nunique() and texts["tokens_longest"] >= texts["words_longest"]
    together = pd.read_csv(folder / "tables/data-cooccurrence.csv")
    for row in together.itertuples():
        one, two = (drawn.labels[:, drawn.label_position(name)] for name in (row.label, row.other))
        assert row.both == (one * two).sum()
        assert row.lift == pytest.approx(row.both * 90 / one.sum() / two.sum(), rel=1e-4)
    data_card, model_card = ((folder / name).read_text() for name in ("data-card.md", "model-card.md"))
    assert "90 images of" in data_card and "| No Finding |" in data_card and "Not for diagnosis" in data_card
    assert model_card.count("Not for diagnosis") == 2 and "## Protocol paper" in model_card
    # A pair that only looks alike is not said to have been seen in training.
    (leaks,) = record.rows("sentence").query("section == 'data'")["text"]
    assert "or images that this model hardly tells apart" in leaks
    assert f"- {leaks}" in data_card and f"- {leaks}" in model_card and "Seen in training" not in model_card
    metrics = record.rows("metric")
    row = metrics[(metrics["setting"] == "Linear probe") & (metrics["protocol"] == "sound") & metrics["label"].isna()]
    row = row.set_index("metric").loc["lrap"]
    assert f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})" in model_card
    cuts = pd.read_csv(folder / "tables/model-thresholds.csv")
    assert set(cuts["protocol"]) == {"sound"} and len(cuts) == 3 * len(record.label_names)
    steps = pd.read_csv(folder / "tables/cost-steps.csv").set_index("step")
    embedding = steps.loc["embed image and pixels"]
    settings = pd.read_csv(folder / "tables/cost-settings.csv").set_index(["protocol", "setting"])
    assert settings.loc[("sound", "Zero-shot"), "embedding_seconds"] == pytest.approx(embedding["seconds"], rel=1e-3)
    assert settings["alone"].to_numpy() == pytest.approx(
        settings["own_seconds"].to_numpy() + embedding["seconds"], rel=1e-3
    )


@pytest.mark.parametrize("items, right, k", [(20, 1, 5), (20, 4, 10), (7, 7, 1), (6, 3, 10)])
def test_chance_of_missing_is_the_hypergeometric_one(items: int, right: int, k: int) -> None:
    expected = stats.hypergeom(items, right, min(k, items)).pmf(0)
    assert study_analyses._miss(items, right, k) == pytest.approx(expected)


def test_study__no_finding_is_none_however_it_is_spelled(tmp_path: Path) -> None:
    nothing = "no_finding"
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    pathology = rng.random((60, 2)) < 0.4
    for row in range(60):
        values = rng.integers(0, 255, (32, 32)).astype(np.uint8)
        Image.fromarray(values).save(tmp_path / "images" / f"{row}.png")
    table = pd.DataFrame(pathology.astype(int), columns=["Edema", "Pneumonia"])
    table[nothing] = (~pathology.any(axis=1)).astype(int)
    table["image"] = [f"images/{row}.png" for row in range(60)]
    table.to_csv(tmp_path / "labels.csv", index=False)
    options = {"image": "image", "labels": ["Edema", "Pneumonia", nothing]}
    result = run_study(
        f"table:{tmp_path / 'labels.csv'}", models.cnn(tmp_path / "model"), tmp_path / "run", tmp_path / "cache",
        **{"data.options": options, "finetune.enabled": False, "split.fractions": [0.4, 0.3, 0.3]},
    )  # fmt: skip
    record = run_record.read_run(result.folder)
    counted = record.scores.truth[:, :2].sum(axis=1)
    kinds = record.rows("subgroup").query("column == 'findings'").groupby("subgroup")["n"].first()
    names = np.array(["no finding", "one finding", "several findings"])[counted]
    assert len(kinds) > 1 and kinds.to_dict() == pd.Series(names).value_counts().to_dict()
    assert {query["query"].get("text") for query in record.retrieval} <= {"Edema", "Pneumonia", None}


def test_study__an_unknown_subgroup_column_is_named(tmp_path: Path) -> None:
    model = models.open_clip_vit(tmp_path / "model")
    asked = {"subgroups.columns": ["seks"], "finetune.enabled": False, "heatmaps.enabled": False}
    with pytest.raises(UsageError, match="no sample column 'seks'"):
        run_study("phantom:90?seed=3&enrich=0.1&size=96", model, tmp_path / "run", tmp_path / "cache", **asked)


def test_study__reference_rows_stand_beside_the_published_protocol_only(small_run) -> None:
    folder = small_run[0].folder
    record = run_record.read_run(folder)
    beside = pd.read_csv(folder / "tables/paper-reference.csv").set_index(["setting", "metric"])
    own = record.rows("metric")
    own = own[(own["protocol"] == "paper") & own["label"].isna()].set_index(["setting", "metric"])["value"]
    assert beside.loc[("linear probe", "lrap"), "ours"] == pytest.approx(own["Linear probe", "lrap"], rel=1e-5)
    assert beside.loc[("zero-shot", "ratio"), ["ours", "low", "high", "null"]].notna().all()
    conditions = pd.read_csv(folder / "tables/paper-conditions.csv").set_index("condition")["same"]
    assert conditions[["model", "data", "labels", "split"]].eq("no").all() and conditions["fine-tuning"] == "yes"
    cuts = pd.read_csv(folder / "tables/paper-cuts.csv")
    assert len(cuts) == 3 * 15
    row = cuts[(cuts["setting"] == "Zero-shot") & (cuts["cut"] == 0.5)].iloc[0]
    assert row["f1_macro"] == pytest.approx(own["Zero-shot", "f1_macro"], rel=1e-5)
    reference = record.rows("reference").set_index(["setting", "metric"])["value"]
    assert reference["linear probe", "lrap"] == 0.741
    assert "published: linear probe" in small_run[0].report.read_text()


def test_study__published_heatmap_layer_is_empty_and_named(small_run) -> None:
    findings = pd.read_csv(small_run[0].folder / "tables/findings-paper.csv")
    maps = findings[~findings["baseline"]]
    assert maps["empty"].all()
    assert maps["note"].str.contains("empty").all()
    sound = pd.read_csv(small_run[0].folder / "tables/findings-sound.csv")
    assert not sound["empty"].all()


def test_study__a_second_run_computes_no_embedding_again(small_run) -> None:
    _, model, folder = small_run
    again = run_study("phantom:90?seed=3&enrich=0.1&size=96", model, folder / "again", folder / "cache",
                      **{"finetune.enabled": False, "heatmaps.enabled": False})  # fmt: skip
    costs = run_record.read_run(again.folder).rows("cost").set_index("step")
    assert costs.loc["embed image and pixels", "reused"] == 90
    assert not costs.loc["embed image and pixels", "items"] > 0
    first = run_record.read_run(small_run[0].folder).rows("metric")
    second = run_record.read_run(again.folder).rows("metric")
    key = ["setting", "metric", "label"]
    both = first[first["protocol"] == "sound"].merge(second, on=key, suffixes=("", "_again"))
    both = both[both["metric"] != "minutes"]
    assert len(both) > 500
    np.testing.assert_allclose(both["value"], both["value_again"])


def test_study__that_goes_on_leaves_what_an_undisturbed_one_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped behind all settings: its fine-tuned models and its tables are there already."""
    values = {
        "data.source": "phantom:60?seed=3&enrich=0.1&size=96", "cache": str(tmp_path / "cache"),
        "model": f"local-dir:{models.open_clip_vit(tmp_path / 'model')}", "protocols": ["sound", "paper"],
        "heatmaps.enabled": False, **SMALL,
    }  # fmt: skip
    config = configs.load_config(study.Config, options=values)
    whole = study.run(config, out=tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(study.study_showcase, "write_retrieval", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            study.run(config, out=tmp_path / "stopped")
    again = study.run(config, out=tmp_path / "stopped", resume=True)

    def numbers(result: study.Result) -> list[str]:
        lines = (result.folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
        return [
            line
            for line, row in zip(lines, map(json.loads, lines), strict=True)
            if row["kind"] != "cost" and row.get("metric") != "minutes" and row.get("section") != "cost"
        ]

    assert numbers(again) == numbers(whole)
    for name in ("distances.csv", "leaks.csv", "tables/figures-sound.csv", "tables/distances-paper.csv"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    np.testing.assert_array_equal(
        run_record.read_run(again.folder).scores.values, run_record.read_run(whole.folder).scores.values
    )


def test_study__every_finding_by_heads_that_never_saw_its_patient(tmp_path: Path) -> None:
    model = models.cnn(tmp_path / "model")
    overrides = {"heatmaps.folds": 2, "heatmaps.per_label": None, "finetune.trainable": "projection"}
    result = run_study("phantom:36?seed=9&enrich=0.2&size=96", model, tmp_path / "run", tmp_path / "cache", **overrides)
    findings = pd.read_csv(result.folder / "tables/findings-sound.csv")
    annotated = open_dataset("phantom:36?seed=9&enrich=0.2&size=96").annotations.pairs
    of_probe = findings[findings["setting"] == "Linear probe"]
    assert sorted(zip(of_probe["id"], of_probe["label"], strict=True)) == sorted(
        zip(annotated["sample_id"], annotated["label"], strict=True)
    )


def kaggle_copy(written: Path, folder: Path) -> Path:
    """Lay out what `write_phantoms` wrote as the Kaggle copy does."""
    dataset = open_dataset(f"iu-xray:{written}")
    images = folder / "images/images_normalized"
    images.mkdir(parents=True)
    projections, reports = [], {}
    for row in dataset.samples.itertuples():
        uid, name = row.group.removeprefix("CXR"), f"{row.id.removeprefix('CXR')}.dcm.png"
        (source,) = written.rglob(f"{row.id}.png")
        shutil.copy(source, images / name)
        projections.append({"uid": uid, "filename": name, "projection": "Frontal"})
        reports[uid] = {"uid": uid, "MeSH": "normal", "findings": row.text, "impression": ""}
    pd.DataFrame(projections).to_csv(folder / "indiana_projections.csv", index=False)
    pd.DataFrame(list(reports.values())).to_csv(folder / "indiana_reports.csv", index=False)
    return folder


def test_study__biomedclip_config_runs_unchanged_on_both_layouts(tmp_path: Path) -> None:
    official = tmp_path / "official"
    # Not the first report: Open-i calls its images CXR1_1_..., which Kaggle's names do not tell.
    phantoms = open_dataset("phantom:62?seed=4&enrich=0.1&size=64")
    write_phantoms(phantoms.take(phantoms.groups != phantoms.groups[0]), official)
    kaggle = kaggle_copy(official, tmp_path / "kaggle")
    model = models.biomedclip_like(tmp_path / "model")
    base = str(resource("configs/iu_xray_biomedclip.yaml"))
    tables = []
    for root in (official, kaggle):
        options = {"view": "frontal", "labels": str(official / "labels.csv")}
        overrides = {
            "data.root": str(root),
            "data.options": options,
            "finetune.enabled": False,
            "heatmaps.enabled": False,
            "sensitivity": True,
        }
        result = run_study("iu-xray:.", model, tmp_path / f"run-{root.name}", tmp_path / "cache", base, **overrides)
        record = run_record.read_run(result.folder)
        assert record.provenance["split"]["how"] == "study"
        rows = record.rows("metric")
        tables.append(rows[rows["metric"] != "minutes"].set_index(["protocol", "setting", "metric", "label"])["value"])
    pd.testing.assert_series_equal(tables[0].sort_index(), tables[1].sort_index(), rtol=1e-9)
    # The official reports carry three sources of labels; each one's agreement and consequence is told.
    folder = tmp_path / "run-official/tables"
    pairs = pd.read_csv(folder / "label-agreement.csv")[["source", "other"]].drop_duplicates()
    assert pairs.to_numpy().tolist() == [["file", "mesh"], ["file", "torchxrayvision"], ["mesh", "torchxrayvision"]]
    changed = pd.read_csv(folder / "sensitivity-sound.csv")
    assert {"torchxrayvision"} <= set(changed.loc[changed["changed"] == "labels", "choice"])
    conditions = pd.read_csv(folder / "paper-conditions.csv").set_index("condition")
    assert conditions.loc["labels", "here"].startswith("labels.csv; ")
    assert conditions.loc["fine-tuning", "here"] == "not run"


def test_study__lists_unreadable_images_and_goes_on(tmp_path: Path) -> None:
    written = tmp_path / "data"
    write_phantoms(open_dataset("phantom:40?seed=5&enrich=0.1&size=64"), written)
    broken = min((written / "images").glob("*.png"))
    broken.write_bytes(broken.read_bytes()[:200])
    model = models.open_clip_vit(tmp_path / "model")
    result = run_study(f"iu-xray:{written}", model, tmp_path / "run", tmp_path / "cache",
                       **{"finetune.enabled": False, "heatmaps.enabled": False, "split.how": "grouped"})  # fmt: skip
    assert result.failures >= 1
    failures = pd.read_csv(result.folder / "failures.csv")
    assert broken.stem in " ".join(failures["id"])
    assert json.loads((result.folder / "provenance.json").read_text())["dataset"]["n"] == 39
    assert "Samples that failed" in result.report.read_text()


def test_study__refuses_images_beyond_the_limit_of_pixels(tmp_path: Path) -> None:
    written = tmp_path / "data"
    write_phantoms(open_dataset("phantom:40?seed=5&enrich=0.1&size=64"), written)
    model = models.open_clip_vit(tmp_path / "model")
    with pytest.raises(DataError, match="no image of"):
        run_study(f"iu-xray:{written}", model, tmp_path / "run", tmp_path / "cache",
                  **{"split.how": "grouped", "max_pixels": 64 * 64 - 1})  # fmt: skip
    failures = pd.read_csv(tmp_path / "run/failures.csv")
    assert len(failures) >= 40
    assert failures["reason"].str.contains("64 x 64 pixels exceeds the limit").all()


def test_study__of_a_handful_of_images_says_what_it_cannot_measure(tmp_path: Path) -> None:
    model = models.open_clip_vit(tmp_path / "model")
    result = run_study(
        "phantom:14?seed=4&enrich=0.15&size=64", model, tmp_path / "run", tmp_path / "cache",
        **{"split.how": "grouped", "finetune.enabled": False, "heatmaps.enabled": False, "protocols": ["paper"]},
    )  # fmt: skip
    record = run_record.read_run(result.folder)
    said = " ".join(record.rows("sentence")["text"])
    assert len(record.scores.truth) <= 5
    assert "is not measured: " in said and "cannot be tested here" in said


def test_study__fine_tunes_again_for_every_seed_on_the_same_split(tmp_path: Path) -> None:
    model = models.open_clip_vit(tmp_path / "model")
    off = dict.fromkeys(("heatmaps.enabled", "subgroups.enabled", "space.enabled", "leaks.enabled"), False)
    result = run_study(
        "phantom:60?seed=3&enrich=0.1&size=64", model, tmp_path / "run", tmp_path / "cache",
        **{**off, "split.how": "grouped", "seeds": 2, "repeats.finetune": True, "repeats.splits": "same"},
    )  # fmt: skip
    each = pd.read_csv(result.folder / "tables/seeds-each-sound.csv")
    assert set(each["setting"]) == {"Zero-shot", "Linear probe", "Fine-tuning", "Prevalence ranking"}
    assert each["split"].nunique() == 1 and set(each["seed"]) == {0, 1}
    # Nothing of zero-shot and the sound probe is drawn; fine-tuning's batches are.
    spread = pd.read_csv(result.folder / "tables/seeds-sound.csv").set_index(["setting", "metric"])["deviation"]
    assert spread["Zero-shot", "lrap"] == spread["Linear probe", "lrap"] == 0
    # The repeats' towers are nobody's to ask again, so the cache holds the parent and the run's own child alone.
    cached = [path.name for path in (tmp_path / "cache/arrays.zarr/image").iterdir() if path.is_dir()]
    assert len(cached) == 2
    data_card = (result.folder / "data-card.md").read_text()
    assert "were not looked for" in data_card and "No image or text" not in data_card


def test_study__relative_source_without_root_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--set data\.root=FOLDER"):
        run_study("table:manifest.csv", tmp_path, tmp_path / "run", tmp_path / "cache")


def test_study__split_without_test_samples_is_refused(tmp_path: Path) -> None:
    model = models.open_clip_vit(tmp_path / "model")
    with pytest.raises(DataError, match="no samples in"):
        run_study("phantom:30?seed=1", model, tmp_path / "run", tmp_path / "cache",
                  **{"split.how": "grouped", "split.fractions": [0.8, 0.2, 0.0]})  # fmt: skip


@pytest.mark.parametrize("kind", ["text-prior", "ridge"])
def test_study__takes_another_linear_probe_and_says_which(tmp_path: Path, kind: str) -> None:
    model = models.open_clip_pair(tmp_path / "model")
    options = {
        "probe.kind": kind, "finetune.enabled": False, "heatmaps.per_label": 1, "heatmaps.panels": 1,
        "heatmaps.folds": 0, "space.enabled": False, "subgroups.enabled": False, "sensitivity": True, "seeds": 2,
    }  # fmt: skip
    done = run_study("phantom:80?seed=3&enrich=0.15&size=64", model, tmp_path / "run", tmp_path / "cache", **options)
    record, name = run_record.read_run(done.folder), f"Linear probe ({kind})"
    assert name in set(record.rows("metric")["setting"]) and "Linear probe" not in set(record.rows("metric")["setting"])
    assert name in (done.folder / "model-card.md").read_text() and name in done.report.read_text()
    made = pd.read_csv(done.folder / "tables" / "model-settings.csv").set_index("setting").loc[name]
    assert made["head"] == "heads/probe-sound.npz" and made["how"].startswith(kind)
    # The probe alone, which tests of its own hold against scikit-learn, learns the same from the same rows.
    head = LinearHead.load(done.folder / made["head"])
    shared = {"dataset": "phantom:80?seed=3&enrich=0.15&size=64", "model": f"local-dir:{model}", "precision": "fp32"}
    alone = probe.run(
        probe.Config(**shared, cache=tmp_path / "cache", kind=kind, replicates=100), out=tmp_path / "alone"
    )
    np.testing.assert_allclose(head.weight, LinearHead.load(alone.head).weight, rtol=1e-9, atol=1e-12)
    assert not record.rows("sentence")["text"].str.contains("has no linear probe").any()
    for table in ("sensitivity-sound", "seeds-sound"):
        assert name in set(pd.read_csv(done.folder / "tables" / f"{table}.csv")["setting"])
    assert set(pd.read_csv(done.folder / "tables" / "findings-sound.csv")["setting"]) >= {name}


def test_study__a_probe_without_weights_on_the_embedding_is_refused(tmp_path: Path) -> None:
    values = {"data.source": "phantom:80", "model": "phantom-clip", "probe.kind": "mlp"}
    problem = r"'mlp' has no weights on the embedding.*choose logistic, text-prior, ridge, nearest-mean.*--kind mlp"
    assert configs.load_config(study.Config, None, options={**values, "probe.kind": "ridge"}).probe.kind == "ridge"
    with pytest.raises(UsageError, match=problem):
        configs.load_config(study.Config, None, options=values)
    with pytest.raises(UsageError, match=r"probe\.kind"):
        configs.load_config(study.Config, None, options={**values, "probe.kind": "svm"})


LEAN = {
    "finetune.enabled": False, "heatmaps.enabled": False, "space.enabled": False, "subgroups.enabled": False,
    "leaks.enabled": False,
}  # fmt: skip


def test_study__test_labels_change_no_head_and_no_threshold(tmp_path: Path) -> None:
    model = models.open_clip_vit(tmp_path / "model")
    source, rng, rows = tmp_path / "table.csv", np.random.default_rng(0), []
    for number in range(60):
        pixels = rng.integers(0, 256, (40, 40), np.uint8) // 2 + 90 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{number}.png")
        part = ("train", "train", "val", "test")[number // 3 % 4]
        labels = {"Bright": number % 2, "Third": int(rng.random() < 0.4)}
        rows.append({"image": f"{number}.png", "group": f"P{number // 3}", "split": part, **labels})
    made = []
    for flipped in (False, True):
        table = pd.DataFrame(rows)
        test = table["split"] == "test"
        table.loc[test, ["Bright", "Third"]] = table.loc[test, ["Bright", "Third"]].sub(int(flipped)).abs()
        table.to_csv(source, index=False)
        options = {"data.options": {"labels": ["Bright", "Third"]}, **LEAN, "sensitivity": True, "seeds": 1}
        done = run_study(f"table:{source}", model, tmp_path / f"{flipped}", tmp_path / "cache", **options)
        made.append(done.folder)
    before, after = (run_record.read_run(folder).scores for folder in made)
    np.testing.assert_array_equal(before.truth, 1 - after.truth)
    for name in ("heads/probe-sound.npz", "tables/model-thresholds.csv"):
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes(), name
    np.testing.assert_array_equal(before.values, after.values)
    np.testing.assert_array_equal(before.decisions, after.decisions)


def test_study__takes_a_head_that_was_trained_before(tmp_path: Path) -> None:
    source, model = "phantom:80?seed=3&enrich=0.15&size=64", models.open_clip_vit(tmp_path / "model")
    shared = {"dataset": source, "model": f"local-dir:{model}", "precision": "fp32", "cache": tmp_path / "cache"}
    alone = probe.run(probe.Config(**shared, kind="ridge", replicates=100), out=tmp_path / "alone")
    head = LinearHead.load(alone.head)
    options = {"probe.head": str(tmp_path / "alone"), **LEAN, "sensitivity": True}
    done = run_study(source, model, tmp_path / "run", tmp_path / "cache", **options)
    record, name = run_record.read_run(done.folder), "Linear probe (trained before)"
    kept = LinearHead.load(done.folder / "heads" / "probe-sound.npz")
    np.testing.assert_array_equal(kept.weight, head.weight)
    scores = record.scores
    place = scores.settings.index(name)
    tested = run_record.read_run(alone.folder).scores
    np.testing.assert_array_equal(scores.ids, tested.ids)
    np.testing.assert_allclose(scores.values[place], tested.values[0], atol=1e-6)
    said = " ".join(record.rows("sentence")["text"])
    assert "trained before on the training samples of this very split" in said
    how = pd.read_csv(done.folder / "tables" / "model-settings.csv").set_index("setting").loc[name, "how"]
    assert how.startswith("trained before:") and "ridge" in how
    # Labels in another order, of another split: its figures may be too good, and the report says so.
    order = np.argsort(head.label_names)[::-1]
    other = LinearHead(head.weight[order], head.bias[order], tuple(head.label_names[row] for row in order),
                       head.normalised, head.encoder_id).save(tmp_path / "other.npz")  # fmt: skip
    done = run_study(
        source,
        model,
        tmp_path / "second",
        tmp_path / "cache",
        **{**options, "probe.head": str(other), "sensitivity": False},
    )
    record = run_record.read_run(done.folder)
    assert "the probe's figures are too good" in " ".join(record.rows("sentence")["text"])
    np.testing.assert_allclose(record.scores.values[place], scores.values[place], atol=1e-6)
    fewer = LinearHead(head.weight[:2], head.bias[:2], head.label_names[:2], True, head.encoder_id)
    with pytest.raises(DataError, match="does not know"):
        run_study(source, model, tmp_path / "third", tmp_path / "cache",
                  **{**options, "probe.head": str(fewer.save(tmp_path / "fewer.npz"))})  # fmt: skip


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"probe.kind": "ridge"}, "'head' is trained already, so 'kind' would change nothing"),
        ({"seeds": 2}, r"cannot be trained again for seeds with other splits \(take --set seeds=1"),
        ({"heatmaps.folds": 3}, r"heatmaps by folds \(take --set heatmaps.folds=0\)"),
        ({"protocols": ["paper"]}, "the published one trains a probe of its own"),
    ],
)
def test_study__a_head_that_would_have_to_be_trained_again_is_refused(
    tmp_path: Path, values: dict, problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        run_study("phantom:80", tmp_path, tmp_path / "run", tmp_path / "cache",
                  **{"probe.head": str(tmp_path / "probe.npz"), **values})  # fmt: skip
