"""What the cache saved is told from what was measured, and from nothing else."""

import json
from pathlib import Path

import pandas as pd
import pytest

from jobs import study_ledger

STEP = study_ledger.EMBEDDING


def line(step: str = STEP, seconds: float = 10.0, items: int | None = 100, **more: object) -> dict:
    return {"kind": "cost", "step": step, "seconds": seconds, "items": items, **more}


def write_run(folder: Path, encoder: str, lines: list[dict], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "provenance.json").write_text(json.dumps({"encoders": [{"id": encoder}]}))
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines) + tail)
    return folder


def test_seconds__are_of_the_run_itself_where_it_computed_enough():
    assert study_ledger.seconds_an_item([line(items=4), line(seconds=20.0)], STEP) == 0.2
    assert study_ledger.seconds_an_item([line(items=4), line(items=None), line("other")], STEP) is None


def test_earlier_runs__of_the_same_encoder_tell_what_an_image_takes(tmp_path):
    own = write_run(tmp_path / "elsewhere/own", "a", [line(items=None, reused=100)])
    runs = tmp_path / "runs"
    write_run(runs / "1", "a", [line(seconds=30.0)], tail='{"kind": "cost", "st')
    write_run(runs / "2", "b", [line(seconds=99.0)])
    write_run(runs / "3", "a", [line(items=2)])
    (runs / "4").mkdir()
    (runs / "4/provenance.json").write_text("no json")
    assert study_ledger.earlier_seconds(runs, own, "a") == pytest.approx(0.3)
    assert study_ledger.earlier_seconds(runs, own, "c") is None
    write_run(tmp_path / "elsewhere/beside", "c", [line(seconds=5.0)])
    assert study_ledger.earlier_seconds(runs, own, "c") == pytest.approx(0.05)


def test_sentences__say_nothing_that_was_not_measured():
    steps = pd.DataFrame([{"from_cache": 100, "saved": 30.0}, {"from_cache": None, "saved": None}])
    said = study_ledger.ledger_sentences(steps, 0.3, 100, protocols=2, seeds=3)
    assert "saved 30.0 s" in said[0] and "12 times" in said[1] and f"saved {11 * 30:,} s" in said[1]
    unknown = study_ledger.ledger_sentences(steps.assign(saved=None), None, 100, protocols=1, seeds=1)
    assert unknown == ["100 items were in the cache already; no run says what they take."]
    assert study_ledger.ledger_sentences(steps.assign(from_cache=None, saved=None), None, 9, 1, 1) == []
