"""Forgetting samples in the records of runs: lines, table rows, scores and figures that are theirs.

Comes in: folders of runs and the ids of samples (and patients). Goes out: the same folders without what is recorded of
them, and a list of what remains because it cannot be taken apart: heads and towers trained with them, means they are
part of, files that are no record. A record is theirs where it stands under a name such as "id" or "uri", so numbers
that happen to equal an id are left alone. Files are replaced whole or not at all. What is under way lies in a folder of
the run, by which the same call goes on after a kill: it removes what was left, and builds the report that was there.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from engine.arrays.durable import make_folder, sync_folder, write_plainly, write_whole
from engine.errors import FluoroscopeError
from jobs.figure_names import figure_stem
from jobs.runs import CONFIG_FILE, PROVENANCE_FILE, is_run

log = logging.getLogger(__name__)

SAMPLE_NAMES = ("id", "ids", "sample", "samples", "uri")
GROUP_NAMES = ("group", "groups", "patient")
REPORT = "report.html"
SCRATCH = ".forgetting"
FORGOTTEN = "(forgotten)"
GONE = object()
# Arrays of a study's scores.npz, and which of their axes counts samples.
SCORE_AXES = {"ids": 0, "truth": 0, "values": 1, "decisions": 1}
LATER_SCORE_AXES = {"groups": 0}  # runs of older versions lack them
# Shorter ids turn up in any text by chance.
LEAST_LENGTH = 5
TRAINED = (".npz", ".safetensors", ".pt", ".joblib")
TEXTS = (".json", ".jsonl", ".csv", ".yaml", ".txt", ".log", ".html", ".md")


@dataclass
class Cleaned:
    """What was done to runs.

    Parameters
    ----------
    records : int
        Lines, rows and entries that were taken out.
    figures : list of Path
        That were deleted.
    reports : list of Path
        That were built again without them.
    remaining : list of str
        What still holds something of them, and what to do about it.
    """

    records: int = 0
    figures: list[Path] = field(default_factory=list)
    reports: list[Path] = field(default_factory=list)
    remaining: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Names:
    """Whom to forget: ids and uris of samples, patients, and the schema of their data set."""

    samples: frozenset[str]
    groups: frozenset[str]
    schemas: frozenset[str]

    def own(self, name: str, value: Any) -> bool:
        """Tell whether a value under a name is one of theirs."""
        if not isinstance(value, str):
            return False
        return (name in SAMPLE_NAMES and value in self.samples) or (name in GROUP_NAMES and value in self.groups)


def clean_runs(roots: Sequence[Path], names: Names, *, dry_run: bool = False) -> Cleaned:
    """Take samples out of all runs in some folders (or that are runs themselves)."""
    done = Cleaned()
    for root in roots:
        folders = [root] if is_run(root) else sorted(path.parent for path in root.glob(f"*/{PROVENANCE_FILE}"))
        for folder in folders:
            _Run(folder, names, dry_run, done).clean()
    return done


class _Run:
    """One run folder that is being cleaned."""

    def __init__(self, folder: Path, names: Names, dry_run: bool, done: Cleaned) -> None:
        self._folder, self._names, self._dry_run, self._done = folder, names, dry_run, done
        self._telling = [name for name in names.samples if len(name) >= LEAST_LENGTH]
        self._taken: list[dict[str, Any]] = []
        self._used: set[str] = set()

    def clean(self) -> None:
        if not self._is_of_their_data():
            self._name_the_rest()
            return
        before = self._done.records
        report, scratch = self._folder / REPORT, self._folder / SCRATCH
        files = sorted(path for path in self._folder.rglob("*") if path.is_file() and scratch not in path.parents)
        cleaned = [(path, content) for path in files if (content := self._without(path)) is not None]
        had_report = (report.is_file() and self._done.records > before) or (scratch / REPORT).is_file()
        if not self._dry_run:
            make_folder(scratch)
            if had_report:
                # First: after a kill none is better than one that shows them; the next call knows that there was one.
                write_plainly(scratch / REPORT, b"")
                report.unlink(missing_ok=True)
        self._delete_figures()  # before the records, which still say after a kill which ones
        if not self._dry_run:
            self._replace(cleaned, scratch)
        if had_report:
            self._build_report(report)
        if not self._dry_run:
            shutil.rmtree(scratch)
        self._name_the_rest()

    def _replace(self, cleaned: Sequence[tuple[Path, bytes]], scratch: Path) -> None:
        """Put files in the places of those with their records, also for after a power cut."""
        for path, content in cleaned:
            write_whole(path, [content], scratch)
        for folder in sorted({path.parent for path, _ in cleaned}):
            sync_folder(folder)

    def _without(self, path: Path) -> bytes | None:
        """Return a file's content without them, None where it is not about them."""
        readers: dict[str, Callable[[Path], bytes | None]] = {
            ".jsonl": self._lines,
            ".json": self._document,
            ".csv": self._table,
            ".yaml": self._config,
            ".npz": self._scores,
            ".log": self._log,
        }
        before = self._done.records
        try:
            content = readers[path.suffix](path) if path.suffix in readers else None
        except (OSError, ValueError, yaml.YAMLError, pd.errors.ParserError) as error:
            self._done.remaining.append(f"{path} cannot be read ({error}); look into it, and delete it if need be")
            return None
        return content if self._done.records > before else None

    def _lines(self, path: Path) -> bytes:
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            pruned = self._pruned(json.loads(line))
            self._done.records += pruned is GONE
            if pruned is not GONE:
                self._used.update(filter(_is_picture, _texts(pruned)))
                kept.append(json.dumps(pruned, ensure_ascii=False) + "\n")
        return "".join(kept).encode()

    def _log(self, path: Path) -> bytes:
        """Return a run's log without the lines that have one of their names in them."""
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if not any(name in line for name in self._telling)]
        self._done.records += len(lines) - len(kept)
        return "".join(kept).encode()

    def _document(self, path: Path) -> bytes:
        value = json.loads(path.read_text(encoding="utf-8"))
        pruned = self._settings(value) if path.name == PROVENANCE_FILE else self._pruned(value)
        if pruned is GONE:
            self._done.records += 1
            pruned = {}
        self._used.update(filter(_is_picture, _texts(pruned)))
        return (json.dumps(pruned, ensure_ascii=False, indent=1) + "\n").encode()

    def _config(self, path: Path) -> bytes:
        pruned = self._settings(yaml.safe_load(path.read_text(encoding="utf-8")))
        return yaml.safe_dump(pruned, sort_keys=False, allow_unicode=True, width=100).encode()

    def _settings(self, value: Any) -> Any:
        """Return what a run was asked for, with a mark where it was asked for them."""
        if not isinstance(value, dict):
            return value
        shown = {name: self._pruned(item, str(name)) for name, item in value.items()}
        words = str(shown.get("command", "")).split()
        own = [word in self._names.samples | self._names.groups for word in words]
        if any(own):
            shown["command"] = " ".join(FORGOTTEN if mine else word for word, mine in zip(words, own, strict=True))
        self._done.records += sum(own) + sum(item is GONE for item in shown.values())
        return {name: FORGOTTEN if item is GONE else item for name, item in shown.items()}

    def _table(self, path: Path) -> bytes | None:
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        except pd.errors.EmptyDataError:
            return None
        own = np.zeros(len(table), bool)
        for column in table.columns:
            own |= np.array([self._names.own(column, value) for value in table[column]], bool)
        self._taken += [{str(name): value for name, value in row.items()} for row in table[own].to_dict("records")]
        self._done.records += int(own.sum())
        return table[~own].to_csv(index=False).encode()

    def _scores(self, path: Path) -> bytes | None:
        """Return a study's scores without theirs; other archives hold no samples."""
        with np.load(path) as archive:
            if not set(SCORE_AXES) <= set(archive.files):
                return None
            arrays = {name: archive[name] for name in archive.files}
        own = np.isin(arrays["ids"], list(self._names.samples))
        self._done.records += int(own.sum())
        axes = SCORE_AXES | {name: axis for name, axis in LATER_SCORE_AXES.items() if name in arrays}
        arrays |= {name: np.compress(~own, arrays[name], axis=axis) for name, axis in axes.items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()

    def _pruned(self, value: Any, name: str = "") -> Any:
        """Return JSON values without what is theirs; GONE where the value itself is."""
        if isinstance(value, dict):
            inner = {key: self._pruned(item, str(key)) for key, item in value.items()}
            gone = [key for key, item in inner.items() if item is GONE]
            if any(not isinstance(value[key], dict) for key in gone):
                self._taken.append(value)  # about them, with all that is in it
            elif gone:  # an answer to a question about them: what else is in it is about others
                self._taken.append({key: item for key, item in value.items() if isinstance(item, str)})
            return GONE if gone else inner
        if isinstance(value, list):
            kept = [self._pruned(item, name) for item in value]
            self._done.records += sum(item is GONE for item in kept)
            return [item for item in kept if item is not GONE]
        return GONE if self._names.own(name, value) else value

    def _delete_figures(self) -> None:
        """Delete the pictures that the records name, and those that are called by sample and label."""
        named = {text for record in self._taken for text in _texts(record) if _is_picture(text)}
        found = {self._folder / text for text in named - self._used}
        for record in self._taken:
            if isinstance(record.get("id"), str) and isinstance(record.get("label"), str):
                stem = figure_stem(record["id"], record["label"])
                found |= {*self._folder.glob(f"{stem}.png"), *self._folder.glob(f"maps/{stem}-*.png")}
        for path in sorted(found):
            if path.is_file() and path.resolve().is_relative_to(self._folder.resolve()):
                self._done.figures.append(path)
                if not self._dry_run:
                    path.unlink()

    def _build_report(self, report: Path) -> None:
        if self._dry_run:
            self._done.reports.append(report)
            return
        try:
            from analysis.report import render_report

            render_report(self._folder)
            self._done.reports.append(report)
        except (FluoroscopeError, OSError) as error:
            self._done.remaining.append(f"{report} was deleted, and cannot be built without them: {error}")

    def _name_the_rest(self) -> None:
        """Name what was trained with them, and files that still mention them."""
        if self._is_of_their_data():
            heads = [path for path in self._folder.rglob("*") if path.suffix in TRAINED and path.name != "scores.npz"]
            if heads:
                names = ", ".join(str(path.relative_to(self._folder)) for path in sorted(heads)[:5])
                self._done.remaining.append(
                    f"{self._folder}: {names} may have been trained with them; train again, or delete the run"
                )
        if self._dry_run:
            return
        for path in sorted(self._folder.rglob("*")):
            if path.suffix in TEXTS and path.is_file():
                text = path.read_text(encoding="utf-8", errors="replace")
                if any(name in text for name in self._telling):
                    self._done.remaining.append(f"{path} still mentions them; look into it, and delete it if need be")

    def _is_of_their_data(self) -> bool:
        """Tell whether the run was about their data set; ids of another one may read the same."""
        try:
            config = yaml.safe_load((self._folder / CONFIG_FILE).read_text(encoding="utf-8"))
            provenance = json.loads((self._folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return True
        return not self._names.schemas.isdisjoint([*_texts(config), *_texts(provenance)])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _is_picture(text: str) -> bool:
    return text.endswith((".png", ".jpg", ".jpeg", ".webp")) and not text.startswith("/") and ".." not in text
