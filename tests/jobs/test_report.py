"""`fluoro report`: of one run, of several, refused folders."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from analysis.run_record import read_run
from engine.errors import UsageError
from jobs import compare, report
from jobs.cli import run as command_line
from tests.analysis.fake_run import write_fake_run


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of the same test samples; the second with other config values and without one setting's signal."""
    import dataclasses

    import numpy as np

    from analysis.run_record import write_scores

    place = tmp_path_factory.mktemp("runs")
    folders = write_fake_run(place / "first"), write_fake_run(place / "second")
    for folder in folders:
        scores = read_run(folder).scores
        write_scores(folder / "scores.npz", dataclasses.replace(scores, groups=scores.ids))
    scores = read_run(folders[1]).scores
    noise = np.random.default_rng(5).normal(size=scores.values.shape)
    write_scores(folders[1] / "scores.npz", dataclasses.replace(scores, values=noise, decisions=noise > 0))
    (folders[1] / "config.yaml").write_text("model: another\nprobe:\n  C: [1.0]\n")
    return folders


def test_one_run__is_rebuilt_from_its_results_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_fake_run(tmp_path / "run")
    assert command_line(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    first = (folder / "report.html").read_bytes()
    assert command_line(["report", str(folder), "--out", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere/report.html").read_bytes() == first
    assert (tmp_path / "elsewhere/report.md").is_file() and (tmp_path / "elsewhere/tables/settings-sound.csv").is_file()


def test_several_runs__stand_side_by_side_with_paired_differences(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    page = report.run(report.Config(runs=list(two_runs), replicates=4000), out=tmp_path / "both").report
    text = page.read_text()
    assert "first: Fine-tuning" in text and "second: Zero-shot" in text
    assert "probe.C" in text and "phantom-clip" in text and "another" in text
    found = compare.run(compare.Config(runs=list(two_runs), replicates=4000)).differences
    written = pd.read_csv(page.parent / "tables/differences-all.csv")
    assert len(written) == len(found) and written["value"].tolist() == pytest.approx(found["difference"].tolist())
    better = found[found["better"] != ""]
    assert len(better) and f"{len(better)} of {len(found)} paired differences stand" in text
    for row in better.head(3).itertuples():
        assert f"{row.better} is better by" in text
    metrics = pd.read_csv(page.parent / "tables/settings-sound.csv")
    source = read_run(two_runs[1]).rows("metric")
    expected = source[(source["setting"] == "Linear probe") & (source["metric"] == "lrap")]["value"].iloc[0]
    shown = metrics[(metrics["setting"] == "second: Linear probe") & (metrics["metric"] == "lrap")]["value"].iloc[0]
    assert shown == pytest.approx(expected)


def test_runs_of_other_samples__are_shown_and_not_compared(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_fake_run(tmp_path / "third", samples=40)
    text = report.run(report.Config(runs=[two_runs[0], other]), out=tmp_path / "both").report.read_text()
    assert "No paired differences:" in text and "different samples" in text and "No differences were computed." in text
    assert "third: Fine-tuning" in text and str(tmp_path) not in text


def test_runs_are_called_by_their_names_however_they_are_given(
    two_runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = [Path(shutil.copytree(folder, tmp_path / folder.name / "run")) for folder in two_runs]
    page = report.run(report.Config(runs=same, replicates=100, shareable=True), out=tmp_path / "both").report
    named = set(pd.read_csv(page.parent / "tables/differences-all.csv")["setting"])
    assert {name.partition(": ")[0] for name in named} == {"run (1)", "run (2)"}
    assert str(tmp_path) not in page.read_text()
    other = write_fake_run(tmp_path / "third", samples=40)
    monkeypatch.chdir(two_runs[0])
    text = report.run(report.Config(runs=[Path("."), other]), out=tmp_path / "here").report.read_text()
    assert "No paired differences: first (" in text and "(such as " in text and "both have with --common.</" in text


def test_shareable_comparison__has_no_paths(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    provenance = json.loads((two_runs[0] / "provenance.json").read_text())
    provenance["dataset"]["schema"] = "folder:/home/somebody/images"
    (two_runs[0] / "provenance.json").write_text(json.dumps(provenance))
    config = report.Config(runs=list(two_runs), replicates=200, shareable=True)
    text = report.run(config, out=tmp_path / "both").report.read_text()
    assert "/home" not in text and "folder:…" in text


def test_folders_that_hold_something_else__are_left_alone(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    before = (two_runs[0] / "results.jsonl").read_bytes()
    with pytest.raises(UsageError, match="run's own folder"):
        report.run(report.Config(runs=list(two_runs)), out=two_runs[0])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="thesis"):
        report.run(report.Config(runs=list(two_runs)), out=tmp_path / "mine")
    assert (two_runs[0] / "results.jsonl").read_bytes() == before


def test_no_run__is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command_line(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert command_line(["report"]) == 2
