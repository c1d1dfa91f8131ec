"""Upkeep survives a kill at any file operation, and a reader beside it: compaction, repair, removal, export and import,
forgetting in the cache and in the records of runs."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest

from analysis import report
from engine.arrays import array_format, durable, folder_swap
from engine.arrays.array_verify import verify_array
from engine.arrays.keyed_array import KeyedArray
from engine.cache import Cache
from engine.dataset import Dataset
from engine.errors import CacheError, UsageError
from engine.keys import key_of_text
from engine.upkeep import importing
from engine.upkeep.compact import compact_array, compact_cache
from engine.upkeep.export import export_rows
from engine.upkeep.forget import forget, plan_forgetting
from engine.upkeep.removal import parts_of, remove_parts
from engine.upkeep.repair import repair_cache
from engine.upkeep.usage import sample_tables
from engine.upkeep.verify import verify_cache
from jobs.cache_remove import ForgetConfig, forget_samples
from tests.engine.test_keyed_array import keys_of, rows_of
from tests.jobs.test_cache_transfer import write_folder
from tests.jobs.test_cache_upkeep import write_run
from tests.reliability import small_cache
from tests.reliability.killing import FORK, OPERATIONS, Payloads, killed_at, reader_beside
from tests.reliability.small_cache import rows_by_key

QUICK, FULL = 9, pytest.param(1, marks=pytest.mark.slow)
# Commits are killed at every step by test_kill.
OF_COMMITS = pytest.param(4, marks=pytest.mark.slow)


class Whole(NamedTuple):
    """An undamaged cache, which tests copy; its data set, and a smaller one of the same source."""

    cache: Path
    dataset: Dataset
    fewer: Dataset


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Iterator[Whole]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_format, "CHUNK_BYTES", small_cache.CHUNK_BYTES)
        patch.setattr(os, "fsync", lambda descriptor: None)
        folder = tmp_path_factory.mktemp("upkeep")
        dataset = small_cache.write_dataset(folder / "images")
        # Few arrays: they are worked on one after the other, and each is killed at every one of its steps.
        small_cache.fill(folder / "cache", dataset, small_cache.encoders()[:1], ["image", "text"])
        fewer = dataset.take(np.r_[0:9, 12:20])
        yield Whole(folder / "cache", dataset, fewer)


def copied(cache: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(cache, folder))


def forget_table(cache: Path, dataset: Dataset) -> None:
    """Let the sample table name fewer samples, as where a data set has shrunk and its table was made anew."""
    for path in (cache / "datasets").iterdir():
        path.unlink()
    Cache(cache).embed(dataset, small_cache.encoders()[0], ["image", "text"], batch_size=8, threads=1)


def kill_everywhere(
    start: Path,
    operation: Callable[[Path], Any],
    check: Callable[[Path, bool], None],
    every: int,
    expected: Payloads,
    unreadable: frozenset[bytes] = frozenset(),
    counted: Sequence[str] = OPERATIONS,
) -> int:
    """Kill an operation at every nth step on copies of a cache, and complete it; return the number of steps.

    Parameters
    ----------
    start : Path
        The cache as it is before the operation.
    check : callable(cache, complete)
        Holds what is left after a kill, and after the operation was run again, against what must be.
    expected, unreadable, counted
        Of the reader beside, and what is a step; see `killing`.
    """
    step = 0
    while True:
        cache = copied(start, start.with_name("killed"))
        with reader_beside(cache, expected, unreadable):
            killed = killed_at(step, partial(operation, cache), counted)
        if killed:
            check(cache, False)
            operation(cache)
        check(cache, True)
        assert not [path for path in (cache / "tmp").rglob("*") if path.is_file()], "nothing is left lying about"
        if not killed:
            return step
        step += every


@pytest.mark.parametrize("every", [QUICK, FULL])
def test_compaction_killed_anywhere_leaves_every_row_that_is_in_use(whole, tmp_path, every):
    everything = rows_by_key(whole.cache)
    used = {
        "key": {key.tobytes() for key in Cache(whole.cache).image_keys(whole.fewer)},
        "text_key": {key.tobytes() for key in Cache(whole.cache).text_keys(whole.fewer)},
    }

    shrunk = copied(whole.cache, tmp_path / "shrunk")
    forget_table(shrunk, whole.fewer)

    def check(cache: Path, complete: bool) -> None:
        # An index over rows that have got other numbers is not used; it goes at the end.
        damage = [item for item in verify_cache(cache).damage if complete or not item.array.startswith("indexes/")]
        assert damage == []
        for name, rows in rows_by_key(cache).items():
            wanted = used["text_key" if name[0] == "text" else "key"]
            left = {key: row for key, row in everything[name].items() if key in wanted}
            assert left.items() <= rows.items() <= everything[name].items()
            assert not complete or rows == left

    steps = kill_everywhere(shrunk, partial(compact_cache, unused=True, texts=True), check, every, everything)
    assert steps > 50, steps


@pytest.mark.parametrize("every", [QUICK, FULL])
def test_repair_killed_anywhere_keeps_every_undamaged_row(whole, tmp_path, every):
    everything = rows_by_key(whole.cache)
    damaged = copied(whole.cache, tmp_path / "damaged")
    unreadable = set()
    for kind, part, at, row in (("image", "embedding/c.0.0", 5 * 24 + 1, 5), ("text", "check/c.0", 3 * 8, 3)):
        array = Cache(whole.cache).array(kind, small_cache.FIRST)
        path = damaged / "arrays.zarr" / kind / small_cache.FIRST / part
        path.write_bytes(small_cache.flipped(path.read_bytes(), at, 0x10))
        unreadable.add(array.keys[row].tobytes())
    left = {name: {key: row for key, row in rows.items() if key not in unreadable} for name, rows in everything.items()}

    def check(cache: Path, complete: bool) -> None:
        if complete:
            assert verify_cache(cache).damage == [] and rows_by_key(cache) == left

    steps = kill_everywhere(damaged, repair_cache, check, every, everything, frozenset(unreadable))
    assert steps > 40, steps


def test_a_swap_without_the_systems_exchange_is_finished_by_the_next_one(whole, tmp_path, monkeypatch):
    """Two renames leave a moment at which the array is nowhere; whoever takes the lock next puts it in place."""
    monkeypatch.setattr(folder_swap, "_exchanged", lambda one, two: False)
    shrunk = copied(whole.cache, tmp_path / "shrunk")
    forget_table(shrunk, whole.fewer)
    done = copied(shrunk, tmp_path / "done")
    compact_cache(done, unused=True)
    nowhere = 0
    for step in range(100):
        cache = copied(shrunk, tmp_path / "killed")
        if not killed_at(step, partial(compact_cache, cache, unused=True), counted=["rename"]):
            break
        lost = ("image", small_cache.FIRST) not in Cache(cache).arrays()
        nowhere += lost
        if lost and nowhere == 1:  # a job that comes first does not begin anew either
            array = KeyedArray.create(cache, "image", small_cache.FIRST, (12,), {})
            assert len(array) == len(whole.fewer)
        compact_cache(cache, unused=True)
        assert rows_by_key(cache) == rows_by_key(done)
    assert nowhere >= 1


@pytest.mark.parametrize("every", [QUICK, FULL])
def test_removal_of_an_encoder_killed_anywhere_goes_on_and_leaves_the_others(whole, tmp_path, every):
    both = copied(whole.cache, tmp_path / "both")
    small_cache.fill(both, whole.dataset, small_cache.encoders()[1:], ["image", "tokens@1"])
    everything = rows_by_key(both)
    others = {name: rows for name, rows in everything.items() if name[1] == small_cache.FIRST}
    assert len(everything) == 4 and len(others) == 2

    def remove(cache: Path) -> None:
        with suppress(UsageError):  # nothing of that name is left
            remove_parts(cache, parts_of(cache, small_cache.SECOND))

    def check(cache: Path, complete: bool) -> None:
        rows = rows_by_key(cache)
        assert others.items() <= rows.items() <= everything.items()
        if complete:
            assert rows == others and verify_cache(cache).damage == []
            assert not list((cache / "indexes").glob(f"{small_cache.SECOND}*"))

    assert kill_everywhere(both, remove, check, every, everything) > 20


def rows_of_export(folder: Path) -> dict[bytes, bytes] | None:
    """Return the payload by key of what was exported, as a stranger reads it; None where no keys are there (yet)."""
    if (folder / "rows.parquet").exists():
        table = pq.read_table(folder / "rows.parquet").to_pydict()
        values = [np.array(row, np.float16).tobytes() for row in table["embedding"]]
        return {bytes.fromhex(key): value for key, value in zip(table["key"], values, strict=True)}
    vectors = np.load(folder / "rows.npy")
    if not (folder / "rows.csv").exists():
        return None
    keys = [line.strip('"') for line in (folder / "rows.csv").read_text().splitlines()[1:]]
    return {bytes.fromhex(key): row.tobytes() for key, row in zip(keys, vectors, strict=True)}


@pytest.mark.parametrize("form", ["npy", "parquet"])
def test_an_export_killed_anywhere_leaves_no_pair_of_files_that_do_not_belong_together(whole, tmp_path, form):
    everything = rows_by_key(whole.cache)
    new = everything["image", small_cache.FIRST]
    start = copied(whole.cache, tmp_path / "start")
    out = Path("exports") / f"rows.{form}"

    def export(cache: Path) -> None:
        array = KeyedArray.open(cache, "image", small_cache.FIRST)
        export_rows(array.snapshot(), cache / out, form, overwrite=True)

    KeyedArray.create(tmp_path / "older", "image", small_cache.FIRST, (12,), {}).append(
        keys_of([1, 2, 3]), rows_of([4, 5, 6])
    )
    export(tmp_path / "older")
    shutil.copytree(tmp_path / "older" / "exports", start / "exports")
    old = rows_of_export(start / "exports")
    assert old == {
        key.tobytes(): row.tobytes() for key, row in zip(keys_of([1, 2, 3]), rows_of([4, 5, 6]), strict=True)
    }

    def check(cache: Path, complete: bool) -> None:
        found = rows_of_export(cache / "exports")
        assert found == new if complete else found in (old, new, None)
        if complete:
            assert sorted(os.listdir(cache / "exports")) == sorted(os.listdir(start / "exports"))

    # Also before what is written is synced, with nothing of it or all of it in the file.
    steps = kill_everywhere(start, export, check, 1, everything, counted=[*OPERATIONS, "ftruncate", "fsync"])
    assert steps >= (9 if form == "npy" else 4), steps


@pytest.mark.parametrize("every", [QUICK, OF_COMMITS])
def test_an_import_killed_anywhere_is_completed_by_the_same_call(whole, tmp_path, every, monkeypatch):
    monkeypatch.setattr(importing, "ROWS_AT_ONCE", 6)
    images = whole.cache.parent / "images"
    vectors = write_folder(tmp_path / "theirs", images)
    name = "imported-theirs-0123456789ab"
    keys = {"image": [key.tobytes() for key in Cache(whole.cache).image_keys(whole.dataset)],
            "text": [key_of_text(f"caption {number}") for number in range(7)]}  # fmt: skip
    theirs = {
        (kind, name): {key: row.tobytes() for key, row in zip(keys[kind], vectors * factor, strict=False)}
        for kind, factor in (("image", 1), ("text", 2))
    }
    before = rows_by_key(whole.cache)

    def take_in(cache: Path) -> None:
        for kind in ("image", "text"):
            source = importing.find_source(tmp_path / "theirs", kind, root=images)
            importing.import_rows(source, cache, name, {"name": "theirs"})

    def check(cache: Path, complete: bool) -> None:
        rows = rows_by_key(cache)
        assert before.items() <= rows.items() and verify_cache(cache).damage == []
        for each, wanted in theirs.items():
            assert rows.get(each, {}).items() <= wanted.items()
        assert not complete or rows == before | theirs

    assert kill_everywhere(whole.cache, take_in, check, every, before | theirs) > 60


@pytest.mark.parametrize("every", [QUICK, FULL])
def test_forgetting_a_patient_killed_anywhere_is_completed_by_the_same_call(whole, tmp_path, every):
    everything = rows_by_key(whole.cache)
    keys = Cache(whole.cache).image_keys(whole.dataset), Cache(whole.cache).text_keys(whole.dataset)
    # Patient p0 has samples 0 and 1; the text of sample 0 is that of 7 and 14 too.
    gone = {keys[0][0].tobytes(), keys[0][1].tobytes(), keys[1][1].tobytes()}
    left = {name: {key: row for key, row in rows.items() if key not in gone} for name, rows in everything.items()}

    def forget_p0(cache: Path) -> None:
        try:
            plan = plan_forgetting(cache, "fake", groups=["p0"])
        except UsageError as error:
            assert "no patient" in str(error), "only where all is done"
            return
        forget(cache, plan)

    def check(cache: Path, complete: bool) -> None:
        rows = rows_by_key(cache)
        for name, kept in left.items():
            assert kept.items() <= rows[name].items() <= everything[name].items()
        if complete:
            assert rows == left and verify_cache(cache).damage == []
            assert not list((cache / "indexes").glob("*"))
            assert sample_tables(cache)[0].table["group"].to_pylist().count("p0") == 0
            patients_rows = [everything[name][key] for name in everything for key in gone & everything[name].keys()]
            files = [path.read_bytes() for path in (cache / "arrays.zarr").rglob("c.*")]
            assert len(patients_rows) == 3 and not any(row in file for row in patients_rows for file in files)

    assert kill_everywhere(whole.cache, forget_p0, check, every, everything) > 40


@pytest.mark.parametrize("every", [QUICK, FULL])
def test_forgetting_a_patient_in_the_records_of_runs_killed_anywhere_is_completed_by_the_same_call(
    whole, tmp_path, every, monkeypatch
):
    def build_report(folder: Path) -> None:
        (folder / "report.html").write_text(f"{(folder / 'results.jsonl').read_text()}")

    monkeypatch.setattr(report, "render_report", build_report)
    start = copied(whole.cache, tmp_path / "start")
    build_report(write_run(start / "runs" / "20260101-000000-study-0000", "fake:fake"))
    write_run(start / "runs" / "20260101-000000-cam-0001", "fake:fake")  # a run without a report
    everything = rows_by_key(whole.cache)

    def forget_p0(cache: Path) -> None:
        with suppress(UsageError):  # all is done
            forget_samples(ForgetConfig(cache=cache, dataset="fake", group=["p0"], yes=True))

    def records(cache: Path) -> dict[str, bytes]:
        paths = [path for path in (cache / "runs").rglob("*") if path.is_file()]
        return {str(path.relative_to(cache)): path.read_bytes() for path in paths}

    undisturbed = copied(start, tmp_path / "undisturbed")
    forget_p0(undisturbed)
    before, after = records(start), records(undisturbed)
    lines = after["runs/20260101-000000-study-0000/report.html"]
    assert lines.count(b"\n") == 2 and b'"s2"' in lines and b'"s0"' not in lines and set(after) < set(before)

    def check(cache: Path, complete: bool) -> None:
        found = records(cache)
        assert not complete or (found == after and rows_by_key(cache) == rows_by_key(undisturbed))
        for name in after:  # each as it was or as it is to be, a report in between may be missing or half-built
            assert name.endswith("report.html") or found[name] in (before[name], after[name]), name

    assert kill_everywhere(start, forget_p0, check, every, everything) > 80


def test_forgetting_keeps_and_names_what_others_have_too(whole, tmp_path):
    cache = copied(whole.cache, tmp_path / "cache")
    # Another data set has the image of sample 0.
    twin = small_cache.write_dataset(tmp_path / "images", 1, name="twin")
    Cache(cache).embed(twin, small_cache.encoders()[0], ["image"], batch_size=8)
    plan = plan_forgetting(cache, "fake:fake", groups=["p0"])
    assert plan.samples == ["s0", "s1"] and list(plan.rows.items()) == [
        (("image", small_cache.FIRST), 1),
        (("text", small_cache.FIRST), 1),
    ]
    assert sorted(plan.shared) == [
        "1 image rows stay, which s0 of twin have too",
        "1 text rows stay, which s0 of twin have too",
        "1 text rows stay, which s7, s14 of fake have too",
    ]
    with pytest.raises(UsageError, match=r"no patient .*'p99' in fake; nearest: p9"):
        plan_forgetting(cache, "fake", groups=["p99"])
    with pytest.raises(UsageError, match=r"no sample table of the data set 'other'; it has those of fake .*twin"):
        plan_forgetting(cache, "other", groups=["p0"])


def _append(cache: Path, numbers: range) -> None:
    array = KeyedArray.open(cache, "image", "enc")
    for start in range(0, len(numbers), 5):
        some = np.array(numbers[start : start + 5])
        array.append(keys_of(some), rows_of(some))


def test_compaction_beside_writers_and_a_reader_loses_no_row_that_they_add(tmp_path, monkeypatch):
    monkeypatch.setattr(array_format, "CHUNK_BYTES", small_cache.CHUNK_BYTES)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    KeyedArray.create(tmp_path, "image", "enc", (12,), {})
    numbers = np.arange(600)
    expected = {key.tobytes(): row.tobytes() for key, row in zip(keys_of(numbers), rows_of(numbers), strict=True)}
    wanted = keys_of(numbers[::2])
    writers = [FORK.Process(target=_append, args=(tmp_path, part)) for part in (range(300), range(200, 600))]
    compactions = 0
    with reader_beside(tmp_path, {("image", "enc"): expected}):
        for writer in writers:
            writer.start()
        while any(writer.is_alive() for writer in writers):
            compactions += compact_array(tmp_path, "image", "enc", wanted) is not None
            assert verify_array(tmp_path, "image", "enc")[1] == [], "what writers are at is no damage"
    assert [writer.exitcode for writer in writers] == [0, 0] and compactions > 3
    compact_array(tmp_path, "image", "enc", wanted)
    assert rows_by_key(tmp_path)["image", "enc"] == {key.tobytes(): expected[key.tobytes()] for key in wanted}
    assert verify_cache(tmp_path).damage == []


def test_compaction_on_a_full_disk_says_so_and_leaves_everything_as_it_was(whole, tmp_path, monkeypatch):
    cache = copied(whole.cache, tmp_path / "cache")
    forget_table(cache, whole.fewer)
    before = rows_by_key(cache)
    written = 0

    def fill_up(file: Any, buffer: memoryview) -> None:
        nonlocal written
        written += 1
        if written > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(buffer)

    monkeypatch.setattr(durable, "_write_all", fill_up)
    with pytest.raises(CacheError, match="no space left while writing"):
        compact_cache(cache, unused=True)
    monkeypatch.undo()
    assert rows_by_key(cache) == before and verify_cache(cache).damage == []
    assert not [path for path in (cache / "tmp").rglob("*") if path.is_file()], "the space is free again"
