"""jobs/runs.py: run folders, their provenance, costs and the ways out where a folder exists."""

import json
import logging
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from engine.errors import UsageError
from engine.plan import Plan
from jobs.config import JobConfig
from jobs.known_runs import known_runs
from jobs.plain import plain
from jobs.runs import is_run, measured, open_run, run_id


class Config(JobConfig):
    seed: int = 0


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_run_leaves_config_provenance_and_results(tmp_path):
    with open_run("study", Config(seed=3), out=tmp_path / "run", command=["fluoro", "study"]) as run:
        assert (run.folder / "config.yaml").read_text() == "seed: 3\n"
        assert json.loads((run.folder / "provenance.json").read_text())["status"] == "running"
        run.record("metric", setting="probe", value=np.float32(0.5), low=float("nan"))
        run.note(encoders=[{"id": "tiny-fp32-0"}])
        with run.step("embed images") as step:
            step.items, step.reused = 100, 20
    first, cost = lines(tmp_path / "run")
    assert first == {"kind": "metric", "setting": "probe", "value": 0.5, "low": None}
    assert cost["kind"] == "cost" and cost["items"] == 100 and cost["reused"] == 20
    assert cost["rate"] > 0 and cost["peak_memory"] > 1_000_000
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["status"] == "done" and provenance["command"] == "fluoro study"
    assert provenance["encoders"] == [{"id": "tiny-fp32-0"}]
    assert provenance["versions"]["fluoroscope"] and provenance["machine"]["cores"] >= 1
    assert is_run(tmp_path / "run")


def test_a_failed_run_says_so_and_keeps_its_cost_lines(tmp_path):
    run = open_run("study", Config(), out=tmp_path / "run")
    with pytest.raises(ValueError), run, run.step("embed images"):
        raise ValueError("the disk is full")
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["status"] == "failed" and "the disk is full" in provenance["error"]
    assert lines(tmp_path / "run")[0]["step"] == "embed images"


def test_a_run_keeps_its_log_and_one_that_goes_on_adds_to_it(tmp_path):
    engine, other = logging.getLogger("engine.plan"), logging.getLogger("somebody.else")
    before = engine.getEffectiveLevel()
    logging.getLogger("engine").setLevel(logging.INFO)
    try:
        for moment in ("first", "second"):
            with open_run("study", Config(), out=tmp_path / "run", resume=moment == "second"):
                engine.info("said %s", moment)
                other.warning("not the project's")
            engine.info("after the run")
    finally:
        logging.getLogger("engine").setLevel(before)
    kept = (tmp_path / "run" / "run.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in kept] == ["INFO said first", "INFO said second"]


def test_a_log_that_cannot_be_written_does_not_stop_the_run(tmp_path, capsys):
    with open_run("study", Config(), out=tmp_path / "run") as run:
        (run.folder / "run.log").mkdir()
        logging.getLogger("engine.plan").warning("this line is lost")
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["status"] == "done"
    assert "IsADirectoryError" not in capsys.readouterr().err


def test_plans_are_kept_by_work_the_latest_of_each(tmp_path):
    with open_run("study", Config(), out=tmp_path / "run") as run:
        run.plan("one", "folder:x", ("image",), Plan(32, 2, compiled=False))
        run.plan("one", "folder:x", ("image",), Plan(4, 2, compiled=True, compiled_reason="long enough"))
    with open_run("study", Config(), out=tmp_path / "run", resume=True) as run:
        run.plan("two", "folder:x", ("image",), Plan(8, 2, compiled=False))
    kept = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert [(each["encoder"], each["batch_size"], each["compiled"]) for each in kept] == [
        ("one", 4, True), ("two", 8, False),
    ]  # fmt: skip
    (tmp_path / "run" / "config.yaml").write_text("model: m\ndataset: folder:x\n")
    assert known_runs(tmp_path).plans["one", "folder:x", "image"]["compiled_reason"] == "long enough"


def test_failures_are_listed(tmp_path):
    with open_run("embed", Config(), out=tmp_path / "run") as run:
        run.fail([{"id": "a", "uri": "a.png", "what": "image", "reason": "zero bytes, not an image"}])
        run.fail(pd.DataFrame([{"id": "b", "uri": "b.png", "what": "image", "reason": "cut off"}]))
    assert pd.read_csv(tmp_path / "run" / "failures.csv")["id"].tolist() == ["a", "b"]
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["failures"] == 2


def test_an_existing_run_is_refused_with_the_ways_out(tmp_path):
    open_run("study", Config(), out=tmp_path / "run").__exit__(None, None, None)
    with pytest.raises(UsageError, match=r"--resume .* --overwrite .* --out"):
        open_run("study", Config(), out=tmp_path / "run", resume=False)
    with pytest.raises(UsageError, match="give --overwrite"):
        open_run("probe", Config(), out=tmp_path / "run")


def test_wrong_usage_leaves_no_folder_in_the_way(tmp_path):
    def mistyped(after):
        with pytest.raises(UsageError), open_run("cam", Config(), out=tmp_path / "run") as run, run.step("open data"):
            after(run)
            raise UsageError("no sample 'x'")

    mistyped(lambda run: None)
    assert not (tmp_path / "run").exists()
    mistyped(lambda run: run.record("metric", value=1))
    assert (tmp_path / "run").exists()


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path):
    with open_run("study", Config(), out=tmp_path / "run") as run:
        run.path("figures/old.png").touch()
    with open_run("study", Config(), out=tmp_path / "run", overwrite=True):
        assert not (tmp_path / "run" / "figures").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "family.jpg").touch()
    for options in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(UsageError, match="not a run's record"):
            open_run("study", Config(), out=tmp_path / "photos", **options)
    assert (tmp_path / "photos" / "family.jpg").exists()


def test_resume_keeps_files_and_refuses_another_config(tmp_path):
    with open_run("study", Config(seed=1), out=tmp_path / "run") as run:
        run.path("heads/probe.npz").touch()
        run.record("metric", value=1)
    with pytest.raises(UsageError, match="other values of seed"):
        open_run("study", Config(seed=2), out=tmp_path / "run", resume=True)
    with pytest.raises(UsageError, match="was started by `fluoro study`, so `fluoro finetune` cannot go on with it"):
        open_run("finetune", Config(seed=1), out=tmp_path / "run", resume=True)
    assert len(lines(tmp_path / "run")) == 1  # what was there is there still
    with open_run("study", Config(seed=1), out=tmp_path / "run", resume=True) as run:
        assert (run.folder / "heads" / "probe.npz").exists() and lines(run.folder) == []
    assert "first_started" in json.loads((tmp_path / "run" / "provenance.json").read_text())


def test_an_empty_folder_may_be_used_and_a_file_not(tmp_path):
    (tmp_path / "empty").mkdir()
    open_run("study", Config(), out=tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        open_run("study", Config(), out=tmp_path / "file")


def test_new_runs_go_into_the_cache(tmp_path):
    run = open_run("probe", Config(), cache=tmp_path)
    assert run.folder.parent == tmp_path / "runs" and "-probe-" in run.folder.name
    assert run_id("model pack").split("-")[2:4] == ["model", "pack"]


def test_measured_sees_time_and_memory():
    with measured("allocate") as cost:
        block = np.ones(40_000_000, dtype=np.float64)
        time.sleep(0.6)
    assert cost.seconds >= 0.6
    assert cost.peak_memory > block.nbytes


def test_plain_says_everything_in_json_types(tmp_path):
    assert plain({"a": np.arange(3), "b": tmp_path, "c": np.float64("inf"), ("d", 1): np.bool_(True), "e": {1}}) == {
        "a": [0, 1, 2],
        "b": str(tmp_path),
        "c": None,
        "d 1": True,
        "e": [1],
    }
    assert plain(pd.DataFrame({"x": [1.0, float("nan")]})) == [{"x": 1.0}, {"x": None}]
    assert plain(np.zeros((200, 200), np.float32)) == {"shape": [200, 200], "dtype": "float32"}
