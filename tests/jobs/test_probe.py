"""jobs/probe.py: a sweep by the command line, its tables, and heads that other verbs take."""

import json

import joblib
import numpy as np
import pandas as pd
import pytest

from analysis.heads import LinearHead
from engine.errors import UsageError
from engine.sources import open_dataset
from jobs import cli, probe, probe_section
from jobs.config import SplitOptions
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
    section = probe_section.ProbeSection(C=[0.01, 1.0, 100.0])
    out = tmp_path_factory.mktemp("swept") / "run"
    return probe.run(probe.Config(**common, **chosen, probe=section), out=out)


def test_a_sweep__writes_every_candidate_with_intervals(swept):
    table = pd.read_csv(swept.folder / "sweep.csv")
    assert table["candidate"].nunique() == 6 and set(table["metric"]) == {
        "log_loss",
        "auroc_macro",
        "map",
        "auroc",
        "ap",
    }
    overall = table[table["metric"] == "auroc_macro"]
    assert (overall["low"] <= overall["value"]).all() and (overall["value"] <= overall["high"]).all()
    losses = table[table["metric"] == "log_loss"].set_index("candidate")
    (chosen,) = losses.index[losses["chosen"]]
    assert losses["value"].idxmin() == chosen
    convergence = pd.read_csv(swept.folder / "convergence.csv")
    assert len(convergence) == 7 * 2 * 14 * 3 and convergence["converged"].all()
    lines = [json.loads(line) for line in (swept.folder / "results.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line["kind"] == "sweep"]) == len(table)
    assert next(iter(swept.tables().values()))["chosen"].tolist().count("*") == 1
    head = LinearHead.load(swept.head)
    of_head = f"C = {head.provenance['C']:g}"
    assert chosen in (of_head, of_head + ", balanced")


@pytest.mark.parametrize("kind", ["text-prior", "neighbours"])
def test_other_kinds__are_tested_and_saved(common, tmp_path, kind):
    done = probe.run(probe.Config(**common, kind=kind), out=tmp_path / "run")
    assert done.setting == f"Probe ({kind})"
    assert done.metrics[done.metrics["setting"] == done.setting]["value"].notna().any()
    if kind == "text-prior":
        assert LinearHead.load(done.head).provenance["recipe"] == "logistic regression drawn to text"
    else:
        loaded = joblib.load(done.head)
        assert np.isfinite(loaded.decision_function(np.ones((2, loaded.n_features_in_)))).all()


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


def test_the_papers_protocol__takes_no_other_probe(common, tmp_path):
    with pytest.raises(UsageError, match="the paper's protocol has one probe of its own; leave out folds, kind"):
        probe.run(probe.Config(**common, protocol="paper", kind="ridge", folds=3), out=tmp_path / "run")
    with pytest.raises(UsageError, match="folds of"):
        probe.run(probe.Config(**common, folds=500), out=tmp_path / "other")
