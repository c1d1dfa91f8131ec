"""What a run left on disk, read back for reports and comparisons.

Comes in: a run folder as `jobs.study` writes it. Goes out: one `RunRecord` of tables and arrays. Nothing is computed
again, so that a report can be rebuilt from results alone, on another machine, years later.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from engine.errors import DataError, UsageError

RUNS_OF = "`fluoro study`, `zeroshot`, `probe` and `finetune`"
RESULT_COLUMNS = (
    "kind",
    "protocol",
    "setting",
    "baseline",
    "split",
    "metric",
    "label",
    "value",
    "low",
    "high",
    "n",
    "text",
    "section",
    "step",
    "seconds",
    "items",
    "rate",
    "bytes",
    "reused",
    "peak_memory",
    "source",
    "other",
    "p",
    "p_holm",
    "better",
    "family",
    "rank",
    "probabilities",
    "column",
    "subgroup",
    "groups",
    "compared",
    "best",
    "worst",
    "null",
    "null_low",
    "null_high",
    "note",
    "name",
    "title",
)


@dataclass(frozen=True)
class Scores:
    """Test scores of every setting, for curves.

    Parameters
    ----------
    ids : ndarray of str, (n,)
    truth : ndarray of int8, (n, L)
    settings : tuple of str, length S
    protocols : tuple of str, length S
    values : ndarray of float, (S, n, L)
        As they were scored: rounded, sure probabilities would be tied at 1, and ranked otherwise than in the run.
    decisions : ndarray of bool, (S, n, L)
    groups : ndarray of str, (n,), or None
        Patient of each sample; None in runs that did not keep it.
    """

    ids: np.ndarray
    truth: np.ndarray
    settings: tuple[str, ...]
    protocols: tuple[str, ...]
    values: np.ndarray
    decisions: np.ndarray
    groups: np.ndarray | None = None


@dataclass(frozen=True)
class RunRecord:
    """All that a report needs from one run folder; absent parts are empty, never made up."""

    folder: Path
    provenance: dict[str, Any]
    config_text: str
    results: pd.DataFrame
    scores: Scores | None
    embedding_map: pd.DataFrame
    distances: pd.DataFrame
    retrieval: list[dict[str, Any]]
    heatmaps: list[dict[str, Any]]
    failures: pd.DataFrame

    def rows(self, kind: str) -> pd.DataFrame:
        """Return the result rows of one kind, in the order in which they were written."""
        return self.results[self.results["kind"] == kind]

    def table(self, source: str) -> pd.DataFrame:
        """Return a table that the run announces, by its path as seen from the run folder.

        Raises
        ------
        DataError
            The file is missing, lies outside the run folder, or is no CSV.
        """
        path = self.folder / source
        if not path.resolve().is_relative_to(self.folder.resolve()) or not path.is_file():
            raise DataError(f"{self.folder}: the table {source!r} that results.jsonl names is not there; run it again")
        try:
            return pd.read_csv(path, keep_default_na=False, na_values=[""])
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a CSV ({error}); run the study again") from error

    @property
    def label_names(self) -> list[str]:
        """Labels in the data set's order."""
        return list(self.provenance.get("label_names", []))

    @property
    def protocols(self) -> list[str]:
        """Protocols that left metrics, in the order in which they ran."""
        return [str(value) for value in self.rows("metric")["protocol"].dropna().unique()]


def read_run(folder: str | Path) -> RunRecord:
    """Read a run folder.

    Raises
    ------
    UsageError
        If the folder is not a run: no ``results.jsonl`` or ``provenance.json``.
    DataError
        If a file in it cannot be parsed; the message names file and line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}; give the folder of a run, such as {RUNS_OF} write")
    for needed in ("results.jsonl", "provenance.json"):
        if not (folder / needed).is_file():
            raise UsageError(f"{folder} is not a finished run: it has no {needed}; give a folder that {RUNS_OF} wrote")
    return RunRecord(
        folder=folder,
        provenance=_read_json(folder / "provenance.json", {}),
        config_text=(folder / "config.yaml").read_text() if (folder / "config.yaml").is_file() else "",
        results=pd.DataFrame(list(_read_lines(folder / "results.jsonl")), columns=list(RESULT_COLUMNS)),
        scores=_read_scores(folder / "scores.npz"),
        embedding_map=_read_csv(folder / "embedding_map.csv"),
        distances=_read_csv(folder / "distances.csv"),
        retrieval=_read_json(folder / "retrieval.json", []),
        heatmaps=_read_json(folder / "heatmaps.json", []),
        failures=_read_csv(folder / "failures.csv"),
    )


def write_scores(path: Path, scores: Scores) -> None:
    """Write scores as a plain ``.npz`` without pickled objects."""
    arrays: dict[str, Any] = {
        "ids": scores.ids.astype(str),
        "truth": scores.truth.astype(np.int8),
        "settings": np.array(scores.settings, dtype=str),
        "protocols": np.array(scores.protocols, dtype=str),
        "values": scores.values,
        "decisions": scores.decisions.astype(bool),
    }
    if scores.groups is not None:
        arrays["groups"] = scores.groups.astype(str)
    np.savez_compressed(path, **arrays)


def _read_scores(path: Path) -> Scores | None:
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as stored:
        return Scores(
            ids=stored["ids"],
            truth=stored["truth"],
            settings=tuple(str(name) for name in stored["settings"]),
            protocols=tuple(str(name) for name in stored["protocols"]),
            values=stored["values"],
            decisions=stored["decisions"],
            groups=stored["groups"] if "groups" in stored.files else None,
        )


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error}); the run was cut off there, run the study again"
            ) from error


def _read_json(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error}); the run was cut off there, run the study again") from error


def _read_csv(path: Path) -> pd.DataFrame:
    if not path.is_file() or path.stat().st_size < 2:
        return pd.DataFrame()
    return pd.read_csv(path, dtype={"id": str}, keep_default_na=False, na_values=[""])
