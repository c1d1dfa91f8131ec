"""`fluoro compare`: runs side by side on the same samples; what differs is told, never guessed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as oracle

from analysis.run_record import Scores, write_scores
from engine.errors import DataError, UsageError
from jobs import cli, compare

LABELS = ("a", "b", "c")


def write_run(
    folder: Path,
    strengths: dict[str, float],
    rows: np.ndarray | None = None,
    labels: tuple[str, ...] = LABELS,
    **changes,
) -> Path:
    """A run folder with the scores of some settings of one world of 120 samples."""
    generator = np.random.default_rng(0)
    truth = generator.random((120, 3)) < 0.4
    noise = generator.normal(size=truth.shape)
    rows = np.arange(120) if rows is None else rows
    values = np.stack([noise + strength * truth for strength in strengths.values()])
    scores = {
        "ids": np.array([f"s{row:03d}" for row in rows]),
        "truth": truth[rows].astype(np.int8),
        "settings": tuple(strengths),
        "protocols": ("sound",) * len(strengths),
        "values": values[:, rows],
        "decisions": values[:, rows] > 0.7,
        "groups": np.array([f"p{row // 2}" for row in rows]),
    } | changes
    folder.mkdir()
    (folder / "results.jsonl").touch()
    (folder / "provenance.json").write_text(json.dumps({"label_names": list(labels)}))
    if scores["ids"] is not None:
        write_scores(folder / "scores.npz", Scores(**scores))
    return folder


def compared(*runs: Path, **options) -> compare.Compared:
    return compare.run(compare.Config(runs=list(runs), **({"replicates": 200} | options)))


def test_runs_are_compared_sample_by_sample_whatever_their_order(tmp_path):
    shuffled = np.random.default_rng(1).permutation(120)
    one = write_run(tmp_path / "one", {"Zero-shot": 0.5})
    two = write_run(tmp_path / "two", {"Linear probe": 2.0}, shuffled)
    result = compared(one, two, metrics=["map", "coverage_error"])
    assert result.samples == 120 and result.groups == 60
    row = result.differences.set_index("metric").loc["map"]
    assert (row["setting"], row["other"], row["better"]) == ("Zero-shot", "Linear probe", "Linear probe")
    truth, scores = np.load(one / "scores.npz")["truth"], np.load(one / "scores.npz")["values"][0]
    value = result.metrics.set_index(["setting", "metric", "label"]).loc[("Zero-shot", "map", None), "value"]
    np.testing.assert_allclose(value, oracle.average_precision_score(truth, scores, average="macro"), atol=1e-9)
    swapped = compared(two, one, metrics=["map"]).differences.iloc[0]
    assert swapped["difference"] == pytest.approx(-row["difference"])


def test_sure_probabilities_are_ranked_as_in_the_run(tmp_path):
    """0.99999999 is 1 in float32, and would be tied with what is surer."""
    chances = 1 - np.logspace(-2, -12, 120)[None, :, None].repeat(3, axis=2)
    truth = np.arange(120)[:, None].repeat(3, axis=1) >= 100
    run = write_run(tmp_path / "run", {"A": 0.5, "B": 1.0}, values=chances.repeat(2, axis=0), truth=truth.astype("i1"))
    found = compared(run, metrics=["map"]).metrics.set_index(["setting", "metric"])["value"]
    assert found["A", "map"] == found["B", "auroc_macro"] == 1.0


def test_runs_on_other_samples_are_refused_or_compared_on_the_common_ones(tmp_path):
    one = write_run(tmp_path / "one", {"A": 0.5}, np.arange(0, 100))
    two = write_run(tmp_path / "two", {"B": 2.0}, np.arange(20, 120))
    with pytest.raises(
        DataError, match=r"20 only in the first, 20 only in the second .*s000.*80 that both have with --common"
    ):
        compared(one, two)
    result = compared(one, two, common=True)
    assert result.samples == 80 and result.left_out == 40
    alone = compared(
        write_run(tmp_path / "three", {"A": 0.5}, np.arange(20, 100)),
        write_run(tmp_path / "four", {"B": 2.0}, np.arange(20, 100)),
    )
    assert result.differences.equals(alone.differences)
    with pytest.raises(DataError, match="no test sample in common"):
        compared(one, write_run(tmp_path / "five", {"B": 2.0}, np.arange(100, 120)), common=True)


def test_settings_of_one_name_are_told_apart_by_run_and_protocol(tmp_path):
    one = write_run(tmp_path / "one", {"Probe": 0.5})
    two = write_run(tmp_path / "two", {"Probe": 2.0})
    assert set(compared(one, two).metrics["setting"]) == {"one: Probe", "two: Probe"}
    study = write_run(tmp_path / "study", {"x": 0.5, "y": 1.0, "z": 1.5}, settings=("P", "P", "Q"),
                      protocols=("sound", "paper", "sound"))  # fmt: skip
    assert set(compared(study).metrics["setting"]) == {"P (sound)", "P (paper)", "Q (sound)"}
    assert set(compared(study, protocol="sound").metrics["setting"]) == {"P", "Q"}
    against = compared(study, against="Q (sound)", metrics=["lrap"]).differences
    assert against["other"].tolist() == ["Q (sound)"] * 2


def test_what_cannot_be_compared_is_told(tmp_path):
    one = write_run(tmp_path / "one", {"A": 0.5})
    with pytest.raises(UsageError, match="only 'A' to compare; give another run"):
        compared(one)
    with pytest.raises(UsageError, match="is given twice"):
        compared(one, one)
    with pytest.raises(UsageError, match=r"there is no folder .*nowhere; .*`fluoro study`, `zeroshot`, `probe`"):
        compared(one, tmp_path / "nowhere")
    with pytest.raises(UsageError, match="none kept no scores"):
        compared(one, write_run(tmp_path / "none", {"B": 1.0}, ids=None))
    apart = write_run(tmp_path / "apart", {"B": 1.0}, ids=None)
    (apart / "provenance.json").write_text(json.dumps({"verb": "distances", "label_names": list(LABELS)}))
    with pytest.raises(UsageError, match="apart is a run of `fluoro distances`, which scores no samples; give runs of"):
        compared(one, apart)
    with pytest.raises(UsageError, match=r"unknown metric 'f1'.*f1_macro"):
        compared(one, metrics=["f1"])
    with pytest.raises(UsageError, match="no setting of the protocol 'paper', only of sound"):
        compared(one, protocol="paper")
    with pytest.raises(DataError, match=r"score different labels \(c, d\)"):
        compared(one, write_run(tmp_path / "other", {"B": 1.0}, labels=("a", "b", "d")))
    wrong = np.load(one / "scores.npz")["truth"].copy()
    wrong[3, 1] ^= 1
    with pytest.raises(DataError, match="different truths for 1 of 120 samples, first s003 on 'b'"):
        compared(one, write_run(tmp_path / "wrong", {"B": 1.0}, truth=wrong))
    old = [write_run(tmp_path / name, {name: 1.0}, groups=None) for name in ("old", "older")]
    with pytest.raises(DataError, match="did not keep which patient"):
        compared(*old)
    assert compared(one, old[0]).groups == 60


def test_command_prints_both_tables_and_json(tmp_path, capsys):
    one, two = write_run(tmp_path / "one", {"A": 0.5}), write_run(tmp_path / "two", {"B": 2.0})
    assert cli.run(["compare", str(one), str(two), "--replicates", "100", "--metric", "map", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "mean AP" in text and "p_holm" in text and "120 samples of 60 patients" in text
    assert cli.run(["compare", str(one), str(two), "--replicates", "100", "--json", "--quiet"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {row["metric"] for row in printed["differences"]} == set(compare.METRICS)
    assert cli.run(["compare", str(one), str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.run(["compare", str(one), str(tmp_path / "empty")]) == 2
    assert "empty is not a finished run" in capsys.readouterr().err
