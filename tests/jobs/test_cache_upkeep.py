"""`cache compact`, `rm` and `forget` as jobs: what they say, ask and clean in the records of runs."""

from __future__ import annotations

import datetime
import io
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from analysis.report import render_report
from analysis.run_record import read_run
from engine.arrays import array_format
from engine.cache import Cache
from engine.errors import CacheError, UsageError
from jobs import cache as cache_verbs
from jobs import cache_compact, cache_remove
from jobs.cache_remove import ForgetConfig, RmConfig
from jobs.cli import run
from jobs.figure_names import figure_stem
from jobs.plain import plain
from jobs.run_forgetting import Names, clean_runs
from tests.analysis.fake_run import write_fake_run
from tests.reliability import small_cache
from tests.reliability.small_cache import FIRST, SECOND


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(array_format, "CHUNK_BYTES", small_cache.CHUNK_BYTES)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    small_cache.fill(tmp_path / "cache", small_cache.write_dataset(tmp_path / "images", 8))
    return tmp_path / "cache"


# -- Verifying -------------------------------------------------------------------------------------------------------


def test_verify__on_the_command_line_lists_damage_as_json_with_status_1(cache, capsys):
    path = cache / "arrays.zarr" / "image" / FIRST / "check" / "c.0"
    assert run(["cache", "verify", "--cache", str(cache), "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["damage"] == []
    path.write_bytes(small_cache.flipped(path.read_bytes(), 3 * 8, 1))
    assert run(["cache", "verify", "--cache", str(cache), "--json", "-q"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["damage"] == [{"array": f"image/{FIRST}", "part": "embedding", "chunk": 0, "rows": "3",
                                "problem": "1 rows do not match their checks over key and payload"}]  # fmt: skip
    assert run(["cache", "verify", "--cache", str(cache), "-q"]) == 1
    assert "chunk 0, rows 3: 1 rows do not match" in capsys.readouterr().out


# -- Removing --------------------------------------------------------------------------------------------------------


def test_rm__names_bytes_asks_and_leaves_the_other_encoder(cache, monkeypatch):
    with pytest.raises(UsageError, match=rf"remove {FIRST}: 3 arrays with 23 rows and 1 indexes, .*add --yes"):
        cache_remove.rm(RmConfig(cache=cache, encoder=FIRST))
    shown = cache_remove.rm(RmConfig(cache=cache, encoder=FIRST, dry_run=True))
    assert shown.parts["part"].tolist() == [f"image/{FIRST}", f"text/{FIRST}", f"tokens/{FIRST}@1",
                                            f"indexes/{FIRST}-image-exact"]  # fmt: skip
    assert "nothing was changed" in next(shown.lines()) and len(Cache(cache).arrays()) == 7
    monkeypatch.setattr(sys, "stdin", _Terminal("n\n"))
    with pytest.raises(UsageError, match="nothing was changed"):
        cache_remove.rm(RmConfig(cache=cache, encoder=FIRST))
    monkeypatch.setattr(sys, "stdin", _Terminal("y\n"))
    done = cache_remove.rm(RmConfig(cache=cache, encoder=FIRST))
    assert done.bytes == shown.bytes > 0 and json.dumps(plain(done))
    assert Cache(cache).arrays() == [
        ("image", SECOND),
        ("pixels", "8-fake"),
        ("text", SECOND),
        ("tokens", SECOND + "@1"),
    ]
    assert [path.name for path in (cache / "indexes").glob("*.faiss")] == [f"{SECOND}-image-exact.faiss"]
    cache_remove.rm(RmConfig(cache=cache, encoder="8-fake", yes=True))
    with pytest.raises(UsageError, match=f"has nothing of '{FIRST}'; it has {SECOND}"):
        cache_remove.rm(RmConfig(cache=cache, encoder=FIRST, yes=True))


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# -- Compacting ------------------------------------------------------------------------------------------------------


def test_compact__says_what_would_go_and_drops_it_only_when_asked(cache, tmp_path):
    assert list(cache_compact.run(cache_compact.Config(cache=cache)).lines()) == [f"nothing to compact in {cache}"]
    encoder = small_cache.encoders()[0]
    shrunk = small_cache.reopened(tmp_path / "images").take([0, 1, 2, 4, 5, 6, 7])
    Cache(cache).embed(shrunk, encoder, ["image"])
    Cache(cache).text_features(["a prompt"], encoder)
    assert not len(cache_compact.run(cache_compact.Config(cache=cache, unused=True, dry_run=True)).arrays)
    gone = cache_compact.run(cache_compact.Config(cache=cache, removed=True, dry_run=True))
    assert gone.arrays["unused"].tolist() == [1] * 5 and "would be freed" in list(gone.lines())[-1]
    texts = cache_compact.run(cache_compact.Config(cache=cache, removed=True, texts=True, dry_run=True))
    assert next(texts.lines()) == "3 text rows of no data set would go: prompts may be among them"
    before = small_cache.rows_by_key(cache)
    done = cache_compact.run(cache_compact.Config(cache=cache, removed=True))
    assert done.arrays["unused"].tolist() == [1] * 5 and len(done.indexes) == 2
    after = small_cache.rows_by_key(cache)
    assert {name for name in before if before[name] != after[name]} == {name for name in before if name[0] != "text"}
    for path in (cache / "datasets").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="every row would count as unused"):
        cache_compact.run(cache_compact.Config(cache=cache, unused=True))


def test_compact__refuses_a_damaged_array(cache):
    path = cache / "arrays.zarr" / "image" / FIRST / "check" / "c.0"
    path.write_bytes(small_cache.flipped(path.read_bytes(), 3, 1))
    with pytest.raises(CacheError, match=rf"image/{FIRST} is damaged .*--repair"):
        cache_compact.run(cache_compact.Config(cache=cache))


# -- Forgetting ------------------------------------------------------------------------------------------------------


def write_run(folder: Path, schema: str) -> Path:
    """Write a run as studies, probes and heatmaps leave it: samples s0, s1 are patient p0, s2 is another one."""
    (folder / "maps").mkdir(parents=True)
    (folder / "thumbnails").mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"dataset": schema, "ids": ["s0", "s2"], "seed": 0}))
    provenance = {"status": "done", "command": "fluoro cam --id s0 --id s2", "dataset": {"schema": schema},
                  "encoders": [{"id": FIRST}]}  # fmt: skip
    (folder / "provenance.json").write_text(json.dumps(provenance))
    rows = [{"kind": "heatmap", "id": name, "label": "Odd", "value": 1.5} for name in ("s0", "s1", "s2")]
    rows.append({"kind": "metric", "metric": "f1", "value": 0.5, "n": 3})
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hits = [{"id": name, "thumbnail": f"thumbnails/{name}.jpg"} for name in ("s0", "s1", "s2")]
    queries = [{"query": {"text": "odd"}, "hits": hits}, {"query": {"id": "s0"}, "hits": hits[1:]}]
    (folder / "retrieval.json").write_text(json.dumps(queries))
    pd.DataFrame({"id": ["s0", "s2"], "x": ["s1", "1"], "uri": ["0000.png", "0002.png"]}).to_csv(
        folder / "embedding_map.csv", index=False
    )
    np.savez(folder / "scores.npz", ids=np.array(["s0", "s2", "s1"]), truth=np.eye(3, 2), settings=np.array(["a", "b"]),
             values=np.arange(12.0).reshape(2, 3, 2), decisions=np.ones((2, 3, 2)))  # fmt: skip
    for name in ("s0", "s1", "s2"):
        stem = figure_stem(name, "Odd")
        for path in (f"{stem}.png", f"maps/{stem}-zero-shot.png", f"thumbnails/{name}.jpg"):
            (folder / path).write_bytes(b"picture")
    np.savez(folder / "head.npz", weights=np.ones(3))
    (folder / "run.log").write_text("10:00 INFO 3 images\n10:01 WARNING 0000.png is short\n10:02 INFO done\n")
    return folder


def test_forget__takes_a_patient_out_of_the_records_of_runs_and_names_what_remains(tmp_path):
    run = write_run(tmp_path / "runs" / "one", "fake:fake")
    other = write_run(tmp_path / "runs" / "two", "fake:another")
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    names = Names(frozenset({"s0", "s1", "0000.png", "0001.png"}), frozenset({"p0"}), frozenset({"fake:fake"}))
    shown = clean_runs([tmp_path / "runs"], names, dry_run=True)
    assert (run / "thumbnails" / "s1.jpg").exists()
    done = clean_runs([tmp_path / "runs"], names)
    assert (done.records, len(done.figures)) == (shown.records, len(shown.figures))
    assert [json.loads(line).get("id") for line in (run / "results.jsonl").read_text().splitlines()] == ["s2", None]
    assert json.loads((run / "retrieval.json").read_text()) == [
        {"query": {"text": "odd"}, "hits": [{"id": "s2", "thumbnail": "thumbnails/s2.jpg"}]}
    ]
    assert pd.read_csv(run / "embedding_map.csv")["id"].tolist() == ["s2"]
    assert (run / "run.log").read_text() == "10:00 INFO 3 images\n10:02 INFO done\n"
    assert yaml.safe_load((run / "config.yaml").read_text())["ids"] == ["s2"]
    assert "s0" not in (run / "provenance.json").read_text() and "--id s2" in (run / "provenance.json").read_text()
    with np.load(run / "scores.npz") as scores:
        assert scores["ids"].tolist() == ["s2"] and scores["settings"].tolist() == ["a", "b"]
        np.testing.assert_array_equal(scores["values"], np.arange(12.0).reshape(2, 3, 2)[:, [1]])
    pictures = {path.name for path in run.rglob("*") if path.suffix in (".png", ".jpg")}
    stem = figure_stem("s2", "Odd")
    assert pictures == {f"{stem}.png", f"{stem}-zero-shot.png", "s2.jpg"}
    # Of another data set, so it is left as it is; but it holds a name that reads the same.
    assert len(done.remaining) == 3 and "two/embedding_map.csv still mentions them" in done.remaining[1]
    assert "head.npz may have been trained with them" in done.remaining[0]
    assert before == {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    assert clean_runs([tmp_path / "runs"], names).records == 0


def test_forget__goes_through_cache_and_runs_and_is_then_done(cache, tmp_path):
    run = write_run(cache / "runs" / "20260101-000000-cam-0000", "fake:fake")
    outside = write_run(tmp_path / "elsewhere", "fake:fake")
    asked = {"cache": cache, "dataset": "fake", "group": ["p0"], "runs": [outside]}
    with pytest.raises(UsageError, match=r"forget 2 samples, s0, s1, with .* rows\? .*add --yes, or --dry-run"):
        cache_remove.forget_samples(ForgetConfig(**asked))
    shown = cache_remove.forget_samples(ForgetConfig(**asked, dry_run=True))
    assert not shown.done and len(small_cache.rows_by_key(cache)["image", FIRST]) == 8
    done = cache_remove.forget_samples(ForgetConfig(**asked, yes=True))
    assert done.samples == ["s0", "s1"] and done.rows.equals(shown.rows) and len(done.indexes) == 2
    assert done.records == shown.records and len(done.figures) == 12 and json.dumps(plain(done))
    said = "\n".join(done.lines())
    assert "1 text rows stay, which s7 of fake have too" in said and "head.npz may have been trained" in said
    assert "the next `fluoro embed` adds them again" in said
    for folder in (run, outside):
        assert "s0" not in (folder / "results.jsonl").read_text()
    assert {
        name: len(rows) for name, rows in small_cache.rows_by_key(cache).items() if name[0] != "text"
    } == dict.fromkeys(
        [
            ("image", FIRST),
            ("image", SECOND),
            ("pixels", "8-fake"),
            ("tokens", FIRST + "@1"),
            ("tokens", SECOND + "@1"),
        ],
        6,
    )
    with pytest.raises(UsageError, match=r"no patient \(group\) 'p0'"):
        cache_remove.forget_samples(ForgetConfig(**asked, yes=True))
    with pytest.raises(ValueError, match="nobody to forget"):
        ForgetConfig(cache=cache, dataset="fake")


# -- Listing ---------------------------------------------------------------------------------------------------------


def test_ls__tells_when_each_array_was_last_used_and_which_is_damaged(cache):
    opened = datetime.datetime(2020, 1, 2, 3, 4).timestamp()
    for path in [*cache.rglob("*.used"), *(cache / "arrays.zarr").glob("*/*/key")]:
        os.utime(path, (opened, opened))
    assert set(listed(cache)["last use"]) == {"2020-01-02 03:04"}, "looking is no use"
    Cache(cache).array("image", FIRST)
    used = listed(cache).set_index("name").loc[FIRST].set_index("kind")["last use"]
    now = datetime.datetime.now().strftime("%Y-%m-%d")
    assert used["image"].startswith(now) and used["text"] == "2020-01-02 03:04"
    mark = next((cache / "locks" / "image").glob(f"{FIRST}.used"))
    recent = time.time() - 1800
    os.utime(mark, (recent, recent))
    Cache(cache).array("image", FIRST)
    assert mark.stat().st_mtime == pytest.approx(recent), "at most once an hour"
    path = cache / "arrays.zarr" / "text" / FIRST / "key" / "c.0.0"
    with small_cache.changed(path, path.read_bytes()[:-1]):
        assert "damaged: fluoro cache verify" in listed(cache)["model"].tolist()


def listed(cache: Path) -> pd.DataFrame:
    return cache_verbs.ls(cache_verbs.ListConfig(cache=cache)).arrays


def test_forget__in_a_study_builds_its_report_again_without_the_sample(tmp_path):
    run = write_fake_run(tmp_path / "runs" / "study", samples=12)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"source": "fake:fake"}}))
    provenance = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps({**provenance, "dataset": {"schema": "fake:fake"}}))
    before = read_run(run)
    shown = [case["id"] for case in before.heatmaps]
    page = render_report(run).read_text()
    assert shown and shown[0] in page
    done = clean_runs([run], Names(frozenset(shown[:1]), frozenset(), frozenset({"fake:fake"})))
    after = read_run(run)
    assert [case["id"] for case in after.heatmaps] == [name for name in shown if name != shown[0]]
    assert shown[0] not in after.embedding_map["id"].tolist() and len(after.results) == len(before.results)
    assert before.scores is not None and after.scores is not None
    assert after.scores.ids.tolist() == [name for name in before.scores.ids.tolist() if name != shown[0]]
    assert done.reports == [run / "report.html"] and done.reports[0].stat().st_size > 1000
    assert not any((run / case).exists() for case in done.figures) and done.figures
