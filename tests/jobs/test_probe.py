"""jobs/probe.py: a sweep by the command line, its tables, and heads that other verbs take."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis import run_record
from analysis.heads import LinearHead
from analysis.probes.stored import StoredProbe, load_probe
from engine.cache import Cache
from engine.encoder import load_encoder
from engine.errors import DataError, UsageError
from engine.sources import open_dataset
from jobs import cli, opening, probe, probe_section
from jobs.config import SplitOptions, load_config
from tests import models

PHANTOMS = "phantom:120?seed=5&size=64&enrich=0.15"


@pytest.fixture(scope="module")
def common(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probing")
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
def swept(common, tmp_path_factory):
    chosen = {"folds": 3, "seeds": [0, 1], "class_weight": ["none", "balanced"]}
    section = probe_section.FamilySection(C=[0.01, 1.0, 100.0], features=["unit", "raw"])
    out = tmp_path_factory.mktemp("swept") / "run"
    return probe.run(probe.Config(**common, **chosen, probe=section), out=out)


def test_a_sweep__writes_every_candidate_with_intervals(swept):
    table = pd.read_csv(swept.folder / "sweep.csv")
    assert table["candidate"].nunique() == 12 and set(table["metric"]) == {
        "log_loss",
        "auroc_macro",
        "map",
        "auroc",
        "ap",
    }
    overall = table[table["metric"].isin(["auroc_macro", "log_loss"])]
    assert (overall["low"] <= overall["value"]).all() and (overall["value"] <= overall["high"]).all()
    losses = table[table["metric"] == "log_loss"].set_index("candidate")
    (chosen,) = losses.index[losses["chosen"]]
    assert losses["value"].idxmin() == chosen
    convergence = pd.read_csv(swept.folder / "convergence.csv")
    assert len(convergence) == 7 * 2 * 14 * 3 * 2 and convergence["converged"].all()
    lines = [json.loads(line) for line in (swept.folder / "results.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line["kind"] == "sweep"]) == len(table)
    assert next(iter(swept.tables().values()))["chosen"].tolist().count("*") == 1
    head = LinearHead.load(swept.head)
    of_head = f"C = {head.provenance['C']:g}"
    made = [of_head + more + kind for more in ("", ", balanced") for kind in ("", ", raw")]
    assert chosen in made and ("raw" in chosen) == (not head.normalised)
    said = next(iter(swept.lines()))
    trained = convergence[convergence["trained"]]
    worst = (trained["gap"] / trained["objective"]).max()
    assert said.startswith(f"convergence: all {len(convergence):,} problems") and f"worst gap {worst:.1e}" in said


def test_the_log_loss__has_the_interval_of_patients_drawn_again(swept, common):
    table = pd.read_csv(swept.folder / "sweep.csv")
    row = table[(table["metric"] == "log_loss") & table["chosen"]].iloc[0]
    shown = next(iter(swept.tables().values()))
    assert shown.loc[shown["chosen"] == "*", "log-loss"].item() == (
        f"{row['value']:.3f} ({row['low']:.3f}-{row['high']:.3f})"
    )
    assert row["low"] < row["value"] < row["high"] and row["n"] == table["n"].max()


def test_the_encoders_device__is_where_a_sweep_is_solved(common, tmp_path, monkeypatch):
    asked = []
    solve = probe.sweeping.sweep_on_validation

    def noted(*arrays, device, **options):
        asked.append(device)
        return solve(*arrays, device=device, **options)

    monkeypatch.setattr(probe.sweeping, "sweep_on_validation", noted)
    probe.run(probe.Config(**common), out=tmp_path / "run")
    assert asked == ["cpu"]


QUICK = {"k": [20, 5], "alpha": [1, 100], "beta": [1, 5.5], "hidden": [8], "epochs": [2, 4]}


@pytest.mark.parametrize(
    ("kind", "columns", "count"),
    [("text-prior", ["C"], 4), ("neighbours", ["k"], 2), ("tip-adapter", ["alpha", "beta"], 4),
     ("mlp", ["hidden", "epochs"], 2)],
)  # fmt: skip
def test_other_kinds__are_chosen_tested_and_saved(common, tmp_path, kind, columns, count):
    section = probe_section.FamilySection(**{name: QUICK[name] for name in columns if name in QUICK})
    done = probe.run(probe.Config(**common, kind=kind, probe=section), out=tmp_path / "run")
    assert done.setting == f"Probe ({kind})"
    assert done.metrics[done.metrics["setting"] == done.setting]["value"].notna().any()
    table = pd.read_csv(done.folder / "sweep.csv")
    losses = table[table["metric"] == ("map" if kind == "tip-adapter" else "log_loss")]
    assert len(losses) == count and losses[columns].notna().all(axis=None)
    best = losses["value"].idxmax() if kind == "tip-adapter" else losses["value"].idxmin()
    assert losses.loc[best, "chosen"]
    loaded = load_probe(done.head)
    if kind == "text-prior":
        assert loaded.provenance["recipe"] == "logistic regression drawn to text"
    else:
        assert isinstance(loaded, StoredProbe) and loaded.kind == kind
    # The file gives the scores that the run tested.
    dataset = opening.open_data(probe.Config(**common), common["split"])
    features = Cache(common["cache"]).features(dataset, loaded.encoder_id)
    test = (dataset.samples["split"] == "test").to_numpy()[features.rows]
    recorded = run_record.read_run(done.folder).scores.values[0]
    np.testing.assert_allclose(loaded.probabilities(features.values[test]), recorded, atol=1e-6)


def test_attention__pools_cached_tokens_and_computes_those_that_are_missing(common, tmp_path):
    assert not [name for kind, name in Cache(common["cache"]).arrays() if kind == "tokens"]
    values = {**common, "probe": {"epochs": [2, 5]}, "kind": "attention", "layer": 1}
    done = probe.run(load_config(probe.Config, values), out=tmp_path / "run")
    (name,) = [name for kind, name in Cache(common["cache"]).arrays() if kind == "tokens"]
    loaded = StoredProbe.load(done.head)
    assert name == f"{loaded.encoder_id}@1" and loaded.provenance["layer"] == 1
    assert pd.read_csv(done.folder / "sweep.csv")["epochs"].unique().tolist() == [2, 5]
    # What enters the tower's second block, caught there, scores as the run says.
    dataset = opening.open_data(probe.Config(**common), common["split"])
    encoder = load_encoder(common["model"], device="cpu")
    rows = np.flatnonzero(dataset.samples["split"] == "test")[:4]
    pixels = np.stack([encoder.preprocess(opening.read_image(dataset, int(row)))[0] for row in rows])
    caught = []
    encoder.model.visual.transformer.resblocks[1].register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    encoder.encode_pixels(pixels)
    tokens = caught[0].detach().numpy()
    record = run_record.read_run(done.folder).scores
    recorded = record.values[0][[list(record.ids).index(name) for name in dataset.ids[rows]]]
    np.testing.assert_allclose(loaded.probabilities(tokens), recorded, atol=5e-3)
    again = probe.run(load_config(probe.Config, values), out=tmp_path / "again")
    lines = [json.loads(line) for line in (again.folder / "results.jsonl").read_text().splitlines()]
    (step,) = [line for line in lines if line["kind"] == "cost" and line["step"] == "embed tokens@1"]
    assert step["reused"] == 120 and not step["items"]


def test_attention_on_a_tower_without_tokens__says_so(common, tmp_path):
    model = models.cnn(tmp_path / "cnn")
    with pytest.raises(UsageError, match="is a CNN and has no tokens"):
        probe.run(
            probe.Config(**{**common, "dataset": "phantom:20", "model": f"local-dir:{model}"}, kind="attention"),
            out=tmp_path / "run",
        )


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"kind": "mlp", "probe.C": [3]}, r"-C does nothing for --kind mlp: it is for logistic, text-prior; it takes "
         r"--features, --set probe\.hidden, --set probe\.epochs\. Leave it out, or take another --kind"),
        ({"kind": "ridge", "class_weight": ["balanced"]}, "--class-weight does nothing for --kind ridge"),
        ({"kind": "nearest-mean", "probe.k": [3]}, r"--set probe\.k does nothing for --kind nearest-mean"),
        ({"kind": "neighbours", "templates": "{label}"}, "--set templates does nothing for --kind neighbours"),
        ({"kind": "tip-adapter", "probe.features": ["raw"]}, "--features does nothing for --kind tip-adapter"),
        ({"layer": 2}, "--layer does nothing for --kind logistic: it is for attention"),
        ({"probe.hidden": [4]}, r"--set probe\.hidden does nothing for --kind logistic: it is for mlp"),
        ({"seeds": [1, 2, 3]}, r"seeds \[1, 2, 3\] deal out folds, and there are none; add --folds K"),
        ({"kind": "ridge", "select": "log_loss"}, "--select does nothing for --kind ridge on one feature set"),
    ],
)  # fmt: skip
def test_options_that_would_change_nothing__are_refused(common, values, problem):
    config = load_config(probe.Config, {**common, "cache": "/nowhere"}, values)
    with pytest.raises(UsageError, match=problem):
        probe.run(config)


def test_a_runs_own_config__runs_again(common, tmp_path):
    first = probe.run(probe.Config(**common, kind="nearest-mean"), out=tmp_path / "a")
    again = probe.run(load_config(probe.Config, first.folder / "config.yaml"), out=tmp_path / "b")
    assert (first.folder / "probe.npz").read_bytes() == (again.folder / "probe.npz").read_bytes()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A table of images with a split, whose test labels can be written anew under the same name."""
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(60):
        pixels = rng.integers(0, 256, (40, 40), np.uint8) // 2 + 90 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{number}.png")
        part = ("train", "train", "val", "test")[number // 3 % 4]
        labels = {"Bright": number % 2, "Rare": int(number % 7 == 0), "Third": int(rng.random() < 0.4)}
        rows.append({"image": f"{number}.png", "group": f"P{number // 3}", "split": part, **labels})
    table = pd.DataFrame(rows)
    model = models.open_clip_vit(root / "model")

    def write(flipped):
        changed, test = table.copy(), table["split"] == "test"
        names = ["Bright", "Rare", "Third"]
        if flipped:
            changed.loc[test, names] = 1 - changed.loc[test, names]
        changed.to_csv(root / "table.csv", index=False)

    return write, {
        "dataset": f"table:{root / 'table.csv'}", "data": {"labels": ["Bright", "Rare", "Third"]},
        "model": f"local-dir:{model}", "cache": root / "cache", "device": "cpu", "replicates": 100, "precision": "fp32",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "folds"),
    [("logistic", 0), ("logistic", 3), ("text-prior", 3), ("ridge", 0), ("neighbours", 3), ("tip-adapter", 0),
     ("mlp", 3), ("attention", 0)],
)  # fmt: skip
def test_test_labels__change_no_choice_of_a_run(labelled, tmp_path, kind, folds):
    write, common = labelled
    quick = {name: QUICK[name] for name in probe.candidates.PARAMETERS.get(kind, ())}
    runs = []
    for flipped in (False, True):
        write(flipped)
        config = load_config(probe.Config, {**common, "probe": quick, "kind": kind, "folds": folds})
        runs.append(probe.run(config, out=tmp_path / f"{flipped}").folder)
    before, after = (run_record.read_run(folder).scores for folder in runs)
    np.testing.assert_array_equal(before.truth, 1 - after.truth)  # the change is real
    for name in ("probe.npz", "sweep.csv"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes(), name
    np.testing.assert_array_equal(before.values, after.values)
    np.testing.assert_array_equal(before.decisions, after.decisions)  # the same scores cut at the same thresholds


def test_folds__need_no_validation_part_of_their_own(labelled, tmp_path):
    """With folds train and val are one: a table that calls all of both train gives the same probe."""
    write, common = labelled
    write(False)
    file = Path(common["dataset"].removeprefix("table:"))
    table = pd.read_csv(file)
    merged = file.with_name("merged.csv")
    table.assign(split=table["split"].replace("val", "train")).to_csv(merged, index=False)
    options = {**common, "folds": 3, "probe": {"C": [0.1, 10.0]}}
    apart = probe.run(load_config(probe.Config, options), out=tmp_path / "apart")
    alone = {**options, "dataset": f"table:{merged}"}
    together = probe.run(load_config(probe.Config, alone), out=tmp_path / "together")
    first, second = (run_record.read_run(run.folder).scores for run in (apart, together))
    np.testing.assert_array_equal(first.values, second.values)
    np.testing.assert_array_equal(first.decisions, second.decisions)
    assert (apart.folder / "sweep.csv").read_bytes() == (together.folder / "sweep.csv").read_bytes()
    with pytest.raises(DataError, match="no embedded sample in val"):
        probe.run(load_config(probe.Config, {**alone, "folds": 0}), out=tmp_path / "none")


def test_labels_without_a_positive_where_it_counts__are_named_first_and_none_left_is_an_error(
    labelled, tmp_path, caplog
):
    write, common = labelled
    write(False)
    table = pd.read_csv(common["dataset"].removeprefix("table:"))
    table.loc[table["split"] == "test", "Rare"] = 0
    table.loc[table["split"] == "val", "Third"] = 0
    table.to_csv(tmp_path / "table.csv", index=False)
    for name in table["image"]:
        (tmp_path / name).symlink_to(Path(common["dataset"].removeprefix("table:")).parent / name)
    values = {**common, "dataset": f"table:{tmp_path / 'table.csv'}"}
    done = probe.run(probe.Config(**values), out=tmp_path / "run")
    assert "Rare: no positive among the 15 test samples, so their test figures say nothing" in caplog.text
    assert "Third: no positive among the 15 samples that choose, so their thresholds" in caplog.text
    title, shown = next(iter(done.tables().items()))
    assert "cannot be judged" in title and shown["label"].tolist() == ["Rare", "Third"]
    assert shown["in test"].tolist() == [0, int(table.loc[table["split"] == "test", "Third"].sum())]
    for labels in (["Rare"], ["Rare", "Third"]):
        with pytest.raises(
            DataError, match=r"no label has a positive sample both.*Rare: \d of 15 that choose, 0 of 15 "
        ):
            probe.run(probe.Config(**{**values, "data": {"labels": labels}}), out=tmp_path / "-".join(labels))


def test_search_and_cam_and_study__name_the_kinds_that_have_weights(common, tmp_path, capsys):
    done = probe.run(probe.Config(**common, kind="neighbours"), out=tmp_path / "run")
    shared = [PHANTOMS, "--model", common["model"], "--cache", str(common["cache"]), "--device", "cpu", "-q"]
    sample = str(open_dataset(PHANTOMS).ids[0])
    assert cli.run(["cam", *shared, "--head", str(done.folder), "--label", "Edema", "--id", sample]) == 1
    problem = capsys.readouterr().err
    assert "kind 'neighbours', which has no weights" in problem and "ridge or nearest-mean" in problem
    assert cli.run(["search", *shared, "--head", str(done.head), "--label", "Edema"]) == 1
    assert "kind 'neighbours', which has no weights" in capsys.readouterr().err


def test_a_sweep_by_the_command_line__prints_candidates_and_a_head_that_cam_takes(common, tmp_path, capsys):
    arguments = ["probe", PHANTOMS, "--model", common["model"], "--cache", str(common["cache"]), "--split", "grouped",
                 "--replicates", "100", "--batch-size", "32", "--device", "cpu", "-q", "-C", "0.1", "-C", "10",
                 "--folds", "3", "--class-weight", "balanced", "--out", str(tmp_path / "run")]  # fmt: skip
    assert cli.run(arguments) == 0
    text = capsys.readouterr().out
    assert "Candidates on held-out rows" in text and "C = 10, balanced" in text and "sweep.csv" in text
    sample = open_dataset(PHANTOMS).ids[0]
    cam = ["cam", PHANTOMS, "--model", common["model"], "--cache", str(common["cache"]), "--device", "cpu", "-q",
           "--head", str(tmp_path / "run" / "probe.npz"), "--label", "Edema", "--id", str(sample),
           "--out", str(tmp_path / "cam")]  # fmt: skip
    status = cli.run(cam)
    assert status == 0, capsys.readouterr().err


def test_by__shows_the_metrics_of_each_subgroup_and_tests_the_gap(common, tmp_path):
    tested = common | {"split": SplitOptions(how="grouped", fractions=(0.2, 0.1, 0.7))}
    done = probe.run(probe.Config(**tested, by=["view", "projection"]), out=tmp_path / "run")
    shown = done.tables()["By view, with 95 % intervals by patient"]
    test = open_dataset(PHANTOMS).samples
    scores = np.load(done.folder / "scores.npz", allow_pickle=False)
    views = test.set_index("id").loc[scores["ids"], "view"]
    assert dict(zip(shown["view"], shown["images"], strict=True)) == views.value_counts().to_dict()
    assert "By projection, with 95 % intervals by patient" in done.tables()
    whole = pd.read_csv(done.folder / "tables" / "subgroups-all-sound.csv")
    assert set(whole["column"]) == {"view", "projection"} and {"ece", "ap", "auroc_micro"} <= set(whole["metric"])
    assert pd.read_csv(done.folder / "tables" / "subgroup-gaps-sound.csv")["p"].notna().any()
    with pytest.raises(UsageError, match="no sample column 'vew' for subgroups; nearest: view"):
        probe.run(probe.Config(**tested, by=["vew"]), out=tmp_path / "other")
    assert not (tmp_path / "other").exists()  # nothing was embedded first, and nothing is in the way of the next call
    with pytest.raises(
        UsageError, match=r"'id' has \d+ different values among the test samples; subgroups are at most"
    ):
        probe.run(probe.Config(**tested, by=["id"]), out=tmp_path / "third")


def test_the_papers_protocol__takes_no_other_probe(common, tmp_path):
    with pytest.raises(UsageError, match="the paper's protocol has one probe of its own; leave out folds, kind"):
        probe.run(probe.Config(**common, protocol="paper", kind="ridge", folds=3), out=tmp_path / "run")
    with pytest.raises(UsageError, match="folds of"):
        probe.run(probe.Config(**common, folds=500), out=tmp_path / "other")
