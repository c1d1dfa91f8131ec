"""What a shareable report leaves out: images, texts, sample ids, patients and paths.

Comes in: a `RunRecord`. Goes out: the same record without them, and a check of the finished texts that fails rather
than let an identifier pass. Counts, metrics, curves and the map's points stay: they are sums over patients, or places
without a name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import yaml

from analysis import run_record
from engine.errors import DataError

PRIVATE_COLUMNS = frozenset(
    {"id", "ids", "sample", "sample_id", "other_id", "uri", "path", "file", "image", "group", "other_group", "patient"}
    | {"patient_id", "study_id", "text", "report", "row", "query"}
)
LEFT_OUT = "…"
_PATH = re.compile(r"(?:(?<=[\s:='\"(,;])|^)(?:~|\.{1,2}|[A-Za-z]:)?[/\\][^\s'\"),;]*")
_NAMED = re.compile(r"^(?=.*\d)(?=.*[^\W\d_]).{5,}$", re.S)


def without_patients(record: run_record.RunRecord) -> run_record.RunRecord:
    """Return the record without what shows or names single samples and where they lie."""
    points = record.embedding_map
    if len(points):
        points = points.assign(id=pd.factorize(points["id"])[0].astype(str))
    scores = record.scores
    if scores is not None:
        scores = dataclasses.replace(scores, ids=np.arange(len(scores.ids)).astype(str), groups=None)
    return dataclasses.replace(
        record,
        provenance=_without_paths(record.provenance),
        config_text=_config(record.config_text),
        scores=scores,
        embedding_map=points,
        retrieval=[],
        heatmaps=[],
        failures=record.failures[[name for name in ("what",) if name in record.failures]],
    )


def shared_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table without the columns that name samples."""
    return frame[[column for column in frame.columns if str(column) not in PRIVATE_COLUMNS]]


def is_private(frame: pd.DataFrame) -> bool:
    """Tell whether a table has a line for single samples."""
    return any(str(column) in PRIVATE_COLUMNS for column in frame.columns)


def check(record: run_record.RunRecord, texts: Sequence[str]) -> None:
    """Refuse texts that name a sample or patient of the run.

    Identifiers of five characters or more with a letter and a digit are looked for; shorter ones cannot be told from
    figures and words.

    Raises
    ------
    DataError
        One was found; the message says which.
    """
    names = {name for name in _identifiers(record) if _NAMED.match(name)}
    words: set[str] = set()
    for text in texts:
        words.update(re.findall(r"[^\s\"'<>,;()\[\]{}=]+", text))
    found = sorted(names & words)
    if not found and len(names) <= 5000:
        whole = "\n".join(texts)
        found = sorted(name for name in names if name in whole)
    if found:
        raise DataError(
            f"a shareable report of {record.folder} would still name {found[0]!r}, so it is not written; leave the "
            "table or title that says it out of the run, or share the figures alone (tables/*.csv)"
        )


def _identifiers(record: run_record.RunRecord) -> Iterator[str]:
    if record.scores is not None:
        yield from map(str, record.scores.ids)
        if record.scores.groups is not None:
            yield from map(str, record.scores.groups)
    for frame in (record.embedding_map, record.failures):
        for column in ("id", "uri"):
            if column in frame:
                yield from frame[column].dropna().astype(str)
    for case in record.heatmaps:
        yield str(case.get("id", ""))
    for query in record.retrieval:
        yield str(query.get("query", {}).get("id", ""))
        for hit in query.get("hits", []):
            yield str(hit.get("id", ""))


def _without_paths(value: Any, key: str = "") -> Any:
    """Return provenance or config values with paths replaced; names of models on a hub stay."""
    if isinstance(value, dict):
        return {name: _without_paths(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_paths(entry, key) for entry in value]
    if not isinstance(value, str) or key in ("title", "subtitle"):
        return value
    if key in ("root", "cache", "out", "run", "schema", "source", "labels", "boxes") and re.search(r"[/\\]", value):
        kind, mark, _ = value.partition(":")
        return f"{kind}:{LEFT_OUT}" if mark and kind.replace("-", "").isalpha() and len(kind) > 1 else LEFT_OUT
    if key == "command":
        return " ".join(_word(word) for word in value.split(" "))
    return _PATH.sub(LEFT_OUT, value)


def _word(word: str) -> str:
    """Return a word of a command; the value of an option that leads somewhere is left out."""
    name, mark, value = word.rpartition("=")
    if not re.search(r"[/\\]", value) or value.startswith("hf-hub:"):
        return word
    if value.endswith("fluoro"):
        return "fluoro"
    return f"{name}{mark}{LEFT_OUT}"


def _config(text: str) -> str:
    if not text:
        return ""
    values = yaml.safe_load(text)
    return yaml.safe_dump(_without_paths(values), sort_keys=False, allow_unicode=True)
