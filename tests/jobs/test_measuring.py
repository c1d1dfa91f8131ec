"""jobs/zeroshot.py, probe.py and distances.py: standalone verbs over cached embeddings, with the study's numbers."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis.heads import LinearHead
from engine import precision
from engine.cache import Cache
from engine.encoder import load_encoder
from engine.errors import CacheError, DataError, UsageError
from engine.keys import short_hash
from engine.sources import open_dataset
from jobs import cli, compare, distances, measuring, opening, probe, report, search, zeroshot
from jobs.config import SplitOptions
from tests import models

PHANTOMS = "phantom:160?seed=5&size=64&enrich=0.15"


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    """One small model and one cache for all verbs, so that images are embedded once."""
    folder = tmp_path_factory.mktemp("measuring")
    model = models.open_clip_pair(folder / "model")
    return {
        "dataset": PHANTOMS,
        "model": f"local-dir:{model}",
        "cache": folder / "cache",
        "device": "cpu",
        "split": SplitOptions(how="grouped", fractions=(0.5, 0.25, 0.25)),
        "replicates": 100,
        "batch_size": 32,
    }


@pytest.fixture(scope="module")
def probed(common, tmp_path_factory):
    out = tmp_path_factory.mktemp("probed") / "run"
    return probe.run(probe.Config(**common), out=out)


def test_probe_saves_a_head_that_scores_as_its_table_says(common, probed):
    from engine.cache import Cache
    from jobs.opening import open_data

    head = LinearHead.load(probed.head)
    dataset = open_data(probe.Config(**common), common["split"])
    features = Cache(common["cache"]).features(dataset, head.encoder_id)
    test = (dataset.samples["split"] == "test").to_numpy()
    scores = head.probabilities(features.values[test])
    from sklearn.metrics import label_ranking_average_precision_score

    table = probed.metrics.set_index(["setting", "metric", "label"])["value"]
    expected = label_ranking_average_precision_score(dataset.labels[test], scores)
    assert table["Linear probe", "lrap", None] == pytest.approx(expected, abs=1e-9)


def test_probe_stands_beside_the_trivial_baselines(probed):
    table = measuring.overall_table(probed.metrics)
    assert table["setting"].tolist() == [
        "Linear probe", "Random scores", "Prevalence ranking", "All positive", "Most frequent set",
    ]  # fmt: skip
    assert table["LRAP"].str.match(r"^0\.\d{3} \(0\.\d{3}-[01]\.\d{3}\)$").all()


def test_a_run_says_what_it_was_made_of(probed):
    provenance = json.loads((probed.folder / "provenance.json").read_text())
    assert provenance["status"] == "done" and provenance["verb"] == "probe"
    assert provenance["encoders"][0]["id"].startswith("model-fp32-") or provenance["encoders"][0]["id"]
    assert sum(provenance["split"]["counts"].values()) == 160
    costs = measuring.result_lines(probed.folder, "cost").set_index("step")
    assert costs.loc["embed images", "items"] + costs.loc["embed images", "reused"] == 160


def test_zeroshot_reuses_what_the_probe_embedded(common, probed, tmp_path):
    result = zeroshot.run(zeroshot.Config(**common), out=tmp_path / "run")
    costs = measuring.result_lines(result.folder, "cost").set_index("step")
    assert pd.isna(costs.loc["embed images", "items"]) and costs.loc["embed images", "reused"] == 160
    labels = measuring.label_table(result.metrics, "Zero-shot")
    assert len(labels) == 14 and labels["positives"].sum() > 0


@pytest.fixture
def texts_move(monkeypatch):
    """A processor fast in bf16, and a model whose images bear it and whose texts do not; says what was compared."""
    compared = []

    def moved(encoder, reference, samples):
        compared.append(set(samples))
        return "they moved" if "text" in samples else ""

    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "moved_by", moved)
    return compared


def test_a_report_of_a_verbs_run_knows_its_imbalance_and_its_split(common, probed, tmp_path):
    provenance = json.loads((probed.folder / "provenance.json").read_text())
    dataset = opening.split_data(open_dataset(common["dataset"]), common["split"])
    counts = [count for count in dataset.labels.sum(axis=0) if count]
    text = (
        report.run(report.Config(runs=[probed.folder]), out=tmp_path / "report").report.with_suffix(".md").read_text()
    )
    assert f"where the most frequent label is to the rarest as {max(counts) / min(counts):.0f} : 1?" in text
    parts = "\n".join(f"{row.id}\t{row.split}" for row in dataset.samples.itertuples())
    assert provenance["split"]["digest"] == short_hash(parts)


def test_verbs_have_the_towers_compared_that_they_use(common, texts_move, tmp_path):
    """Whoever embeds prompts too must not get a precision that only images were tried in."""
    own = {**common, "cache": tmp_path / "cache", "dataset": "phantom:40?seed=5&size=64&enrich=0.15"}
    cache, images = Cache(own["cache"]), open_dataset(own["dataset"])
    cache.embed(images, load_encoder(common["model"], device="cpu", precision="bf16"))
    bf16 = distances.run(distances.Config(**own, texts=False, k=3), out=tmp_path / "distances")
    assert encoder_of(bf16.folder)["description"]["precision"] == "bf16" and not texts_move
    found = zeroshot.run(zeroshot.Config(**own), out=tmp_path / "zeroshot")
    assert encoder_of(found.folder)["description"]["precision"] == "fp32" and texts_move == [{"text"}]
    (plan,) = json.loads((found.folder / "plan.json").read_text())
    assert plan["encoder"] == encoder_of(found.folder)["id"] and plan["compiled"] is False


def test_search_by_text_does_not_take_a_text_tower_that_was_never_compared(common, texts_move, tmp_path):
    images = open_dataset("phantom:12?seed=5&size=64")
    low = load_encoder(common["model"], device="cpu", precision="bf16")
    Cache(tmp_path).embed(images, low)
    asked = {name: common[name] for name in ("model", "device")} | {"cache": tmp_path, "dataset": images.schema}
    found = search.run(search.Config(**asked, id=[str(images.ids[0])]))
    assert found.encoder == low.id and not texts_move
    with pytest.raises(CacheError, match=rf"no image rows of .*-fp32-.*it has those of {low.id}"):
        search.run(search.Config(**asked, text=["a nodule"]))
    assert texts_move == [{"text"}]


def encoder_of(folder):
    return json.loads((folder / "provenance.json").read_text())["encoders"][0]


def test_runs_of_verbs_can_be_compared(common, probed, tmp_path):
    other = zeroshot.run(zeroshot.Config(**common), out=tmp_path / "run")
    result = compare.run(compare.Config(runs=[other.folder, probed.folder], metrics=["map"], replicates=100))
    row = result.differences.iloc[0]
    values = [run.metrics.set_index(["setting", "metric", "label"])["value"] for run in (other, probed)]
    expected = values[0]["Zero-shot", "map", None] - values[1]["Linear probe", "map", None]
    assert row["difference"] == pytest.approx(expected, abs=1e-9) and row["other"] == "Linear probe"


def test_the_papers_zero_shot_is_another_one(common, probed, tmp_path):
    sound = zeroshot.run(zeroshot.Config(**common), out=tmp_path / "sound")
    paper = zeroshot.run(zeroshot.Config(**common, protocol="paper"), out=tmp_path / "paper")
    values = [
        result.metrics.set_index(["setting", "metric", "label"])["value"]["Zero-shot", "f1_macro", None]
        for result in (sound, paper)
    ]
    assert values[0] != values[1]


def test_distances_agree_with_the_definition(common, probed, tmp_path):
    from engine.cache import Cache
    from jobs.opening import open_data

    result = distances.run(distances.Config(**common, protocol="paper"), out=tmp_path / "run")
    encoder_id = LinearHead.load(probed.head).encoder_id
    dataset = open_data(probe.Config(**common), common["split"])
    test = (dataset.samples["split"] == "test").to_numpy()
    values = Cache(common["cache"]).features(dataset, encoder_id).values[test].astype(np.float64)
    first = dataset.labels[test].argmax(axis=1)
    centroids = {label: values[first == label].mean(axis=0) for label in np.unique(first)}
    intra = np.mean([np.linalg.norm(values[first == k] - c, axis=1).mean() for k, c in centroids.items()])
    pairs = [np.linalg.norm(a - b) for i, a in centroids.items() for j, b in centroids.items() if i < j]
    found = result.distances.set_index("metric")["value"]
    assert found["intra"] == pytest.approx(intra, rel=1e-6)
    assert found["inter"] == pytest.approx(np.mean(pairs), rel=1e-6)
    assert set(result.tables()["Nearest classes"]["label"]) == {dataset.label_names[label] for label in centroids}


def test_as_commands_with_json(common, probed, tmp_path, capsys):
    arguments = [
        "probe", PHANTOMS, "--model", common["model"], "--cache", str(common["cache"]), "--split", "grouped",
        "--set", "split.fractions=[0.5, 0.25, 0.25]", "--replicates", "100", "--batch-size", "32",
        "--out", str(tmp_path / "run"), "--quiet",
    ]  # fmt: skip
    assert cli.run([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["head"] == str(tmp_path / "run" / "probe.npz")
    assert {row["metric"] for row in printed["metrics"]} >= {"lrap", "f1_macro", "auroc"}
    assert cli.run(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.run([*arguments, "--overwrite"]) == 0
    text = capsys.readouterr().out
    assert "Prevalence ranking" in text and "Pleural Effusion" in text and "probe.npz" in text


def test_what_cannot_be_measured_is_told(common, tmp_path):
    (tmp_path / "table.csv").write_text("id,text\na,normal\nb,edema\n")
    without = {**common, "dataset": f"table:{tmp_path}/table.csv?id=id&text=text"}
    with pytest.raises((DataError, UsageError), match="label"):
        probe.run(probe.Config(**without), out=tmp_path / "a")
    with pytest.raises((DataError, UsageError), match="split"):
        probe.run(probe.Config(**{**common, "split": SplitOptions(how="given")}), out=tmp_path / "b")


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory):
    """A table of images whose labels have one value only: everywhere, in training, in test."""
    root = tmp_path_factory.mktemp("lopsided")
    rows = []
    for number in range(24):
        pixels = np.random.Generator(np.random.PCG64(number)).integers(0, 256, (40, 40), np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
        part = ("train", "train", "val", "test")[number // 2 % 4]
        labels = {"Mixed": number % 2, "Never": 0, "Always": 1, "Trained": part != "test", "Tested": part == "test"}
        rows.append({"image": f"{number}.png", "group": f"P{number // 2}", "split": part}
                    | {name: int(value) for name, value in labels.items()})  # fmt: skip
    pd.DataFrame(rows).to_csv(root / "table.csv", index=False)
    return {
        "dataset": f"table:{root / 'table.csv'}", "model": f"local-dir:{models.open_clip_pair(root / 'model')}",
        "cache": root / "cache", "device": "cpu", "replicates": 100,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["logistic", "ridge"])
def test_labels_of_one_value__are_named_and_have_their_prior(lopsided, tmp_path, kind, caplog):
    names = ["Mixed", "Never", "Always", "Trained", "Tested"]
    done = probe.run(probe.Config(**lopsided, data={"labels": names}, kind=kind), out=tmp_path / "run")
    assert "their prior: Never, Always, Trained, Tested" in caplog.text
    said = list(done.lines())
    assert "no AUROC or AP for labels without a positive test sample: Never, Trained" in said
    assert "no AUROC for labels without a negative test sample: Always, Tested" in said
    head = LinearHead.load(done.head)
    # The prior of 12 training samples, half a sample added to either side: log(0.5 / 12.5) where none is positive.
    expected = np.log([0.5 / 12.5, 12.5 / 0.5, 12.5 / 0.5, 0.5 / 12.5])
    if kind == "logistic":
        np.testing.assert_allclose(head.bias[1:], expected, atol=1e-9)
    assert not head.weight[1:].any() and head.weight[0].any()


def test_labels_that_the_data_do_not_have_or_that_none_has__are_named(lopsided, tmp_path):
    for verb in (probe, zeroshot, distances):
        with pytest.raises(DataError, match="has no column 'Mixd'; nearest: Mixed"):
            verb.run(verb.Config(**lopsided, data={"labels": ["Mixd"]}), out=tmp_path / verb.__name__)
    for labels, problem in (
        (["Always", "Mixed"], "all 6 samples that have a class are of 'Always', and 2 classes are needed"),
        (["Always"], "none of the labels Always has two positive and two negative patients"),
    ):
        with pytest.raises(DataError, match=problem):
            distances.run(distances.Config(**lopsided, data={"labels": labels}, k=2), out=tmp_path / f"{len(labels)}")
    for verb in (probe, zeroshot):
        with pytest.raises(DataError, match=r"no label has a positive sample both.*Never: 0 of 6 that choose, 0 of 6"):
            verb.run(verb.Config(**lopsided, data={"labels": ["Never"]}), out=tmp_path / f"never-{verb.__name__}")
