"""The answers of a search as a file: a table (.csv, .parquet), JSON, or a contact sheet of the images (.png).

A table has one row a hit, with the query beside it; JSON is what ``--json`` prints of the answers; the sheet has one
row a query, which stands at its left.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from analysis.contact_sheet import Cell, draw_sheet
from engine.arrays.durable import write_plainly
from engine.dataset import Dataset
from engine.errors import FluoroscopeError, ImageError, UsageError
from engine.sample_search import Hits
from jobs.plain import plain

if TYPE_CHECKING:
    from jobs.search import Answer
    from jobs.search_queries import Queries

FORMS = (".csv", ".parquet", ".json", ".png")
# A sheet is looked at: more rows than these do not fit an image that viewers open.
MOST_SHEET_ROWS, MOST_SHEET_COLUMNS = 60, 24


def form_of(path: Path) -> str:
    """Return a file's ending; UsageError where it is none that can be written."""
    if path.suffix.lower() not in FORMS:
        raise UsageError(f"{str(path)!r} does not say what to write; end it in {', '.join(FORMS)}")
    return path.suffix.lower()


def hit_records(dataset: Dataset, found: Hits) -> list[dict[str, Any]]:
    """Return one query's hits: rank, score, id, group, view, split, labels and text of each."""
    columns = dataset.samples[["id", "group", "view", "split", "text"]].iloc[found.samples].to_dict("records")
    positive = dataset.labels[found.samples] > 0
    return [
        {
            "rank": rank,
            "score": score,
            **{name: sample[name] for name in ("id", "group", "view", "split")},
            "labels": [dataset.label_names[number] for number in np.flatnonzero(labels)],
            "text": sample["text"],
        }
        for rank, (score, sample, labels) in enumerate(
            zip(found.scores.tolist(), columns, positive, strict=True), start=1
        )
    ]


def write(path: Path, answers: Sequence[Answer], hits: Sequence[Hits], queries: Queries, dataset: Dataset) -> None:
    """Write answers in the form that the file's name says.

    Raises
    ------
    UsageError
        An unknown ending, or more queries or hits than a sheet holds.
    """
    form, content = form_of(path), io.BytesIO()
    if form == ".json":
        content.write((json.dumps(plain(list(answers)), indent=1, ensure_ascii=False) + "\n").encode())
    elif form == ".png":
        sheet(answers, hits, queries, dataset).save(content, "PNG")
    elif form == ".csv":
        table = answer_rows(answers)
        table.assign(labels=table["labels"].map(";".join)).to_csv(content, index=False)
    else:
        answer_rows(answers).to_parquet(content, index=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_plainly(path, content.getvalue())


def answer_rows(answers: Sequence[Answer]) -> pd.DataFrame:
    """Return one row a hit: query (number), query_kind, query_value, then the hit's columns."""
    rows: list[dict[str, Any]] = []
    for number, answer in enumerate(answers):
        kind, value = next(iter(answer.query.items()))
        rows += [{"query": number, "query_kind": kind, "query_value": value, **hit} for hit in answer.hits]
    columns = ["query", "query_kind", "query_value", "rank", "score", "id", "group", "view", "split", "labels", "text"]
    return pd.DataFrame(rows, columns=columns)


def sheet(answers: Sequence[Answer], hits: Sequence[Hits], queries: Queries, dataset: Dataset) -> Image.Image:
    """Return the contact sheet of some answers; an image that cannot be read is told in its place."""
    widest = max((len(answer.hits) for answer in answers), default=0)
    if len(answers) > MOST_SHEET_ROWS or widest > MOST_SHEET_COLUMNS:
        raise UsageError(
            f"a sheet of {len(answers)} queries with {widest} hits is too large to look at; ask for at most "
            f"{MOST_SHEET_ROWS} queries with -k {MOST_SHEET_COLUMNS}, or write .parquet"
        )
    rows = []
    for answer, found, own in zip(answers, hits, queries.own.tolist(), strict=True):
        row = [_query_cell(answer.query, own, dataset)]
        for hit, position in zip(answer.hits, found.samples.tolist(), strict=True):
            labels = ", ".join(hit["labels"]) or str(hit["text"])
            row.append(_image_cell(position, dataset, [f"{hit['rank']}   {hit['score']:.3f}", str(hit["id"]), labels]))
        rows.append(row)
    return draw_sheet(rows)


def _decoded(content: bytes | np.ndarray) -> Image.Image:
    # Imported here: with it come the models' libraries, which tables do without.
    from engine import pixels

    return pixels.decode(content)


def _query_cell(query: dict[str, str], own: int, dataset: Dataset) -> Cell:
    kind, value = next(iter(query.items()))
    if kind == "id":
        labels = [name for name, has in zip(dataset.label_names, dataset.labels[own], strict=True) if has > 0]
        return _image_cell(own, dataset, ["query", value, ", ".join(labels)])
    if kind == "image":
        try:
            return Cell(_decoded(Path(value).read_bytes()), ["query", Path(value).name])
        except (OSError, FluoroscopeError) as error:
            return Cell(None, [value, str(error)])
    return Cell(None, [value if kind in ("text", "together") else f"{kind} {value}"])


def _image_cell(position: int, dataset: Dataset, caption: list[str]) -> Cell:
    uri = str(dataset.samples["uri"].iloc[position])
    if not uri:
        return Cell(None, [*caption, str(dataset.samples["text"].iloc[position])])
    try:
        return Cell(_decoded(dataset.reader.read(uri)), caption)
    except ImageError as error:
        return Cell(None, [*caption, str(error)])
