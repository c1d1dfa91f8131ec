"""What the data of a study are: parts, views, texts, duplicates, which labels come together.

Comes in: the samples that have an embedding, with their split. Goes out: four tables in the section "data"; with the
prevalences and leaks of `jobs.study_analyses.write_split` they make the data card (`analysis.cards`).

- ``tables/data-parts.csv``: one row a part of the split (and all): images, patients, with_text, labels_an_image,
  one_finding, several_findings, and one column a view.
- ``tables/data-texts.csv``: one row a part: texts, different, empty, words (median, 90 %, longest), tokens (median,
  longest), truncated (texts longer than the text tower reads).
- ``tables/data-duplicates.csv``: one row a kind: identical images, identical texts; how many samples share theirs with
  another one, groups of them, across patients.
- ``tables/data-cooccurrence.csv``: one row a pair of labels that occur together: both, and how often that is of what
  independent labels would give (lift).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd

from analysis import claims, leaks
from engine.labels import nothing_label
from engine.splits import SPLITS
from jobs import runs
from jobs.run_tables import write_table
from jobs.study_settings import Material

SECTION = "data"


def write_data(material: Material, run: runs.Run) -> None:
    """Write the tables above."""
    dataset = material.dataset
    texts = [str(text) for text in dataset.samples["text"]]
    for name, frame, title, text in (
        ("data-parts", _parts(material), "Parts", "Images, patients and views of each part of the split, and how many "
         "labels and findings its images have."),
        ("data-texts", _texts(material, texts), "Texts", "Texts of each part: how many differ, how long they are, and "
         "how many the text tower cuts off."),
        ("data-duplicates", _duplicates(material, texts), "Duplicates", "Samples whose image or text is another one's "
         "too, letter for letter; texts without case, punctuation and spaces."),
        ("data-cooccurrence", _cooccurrence(material), "Labels that come together", "Images that have both labels, and "
         "how often that is of what labels independent of one another would give (lift)."),
    ):  # fmt: skip
        write_table(run, name, frame, title=title, text=text, section=SECTION)
    run.note(data_notes=list(dataset.notes))


def _of_parts(material: Material) -> dict[str, np.ndarray]:
    parts = {name: material.rows(name) for name in SPLITS}
    return {"all": np.arange(len(material.dataset))} | {name: rows for name, rows in parts.items() if len(rows)}


def _parts(material: Material) -> pd.DataFrame:
    samples, names = material.dataset.samples, material.dataset.label_names
    nothing = nothing_label(names)
    views = sorted({str(view) for view in samples["view"]} - {""})
    rows = []
    for part, places in _of_parts(material).items():
        y, of_part = material.y[places], samples.iloc[places]
        row: dict[str, Any] = {"part": part, "images": len(places), "patients": of_part["group"].nunique()}
        row["with_text"] = int((of_part["text"] != "").sum())
        row["labels_an_image"] = float(y.sum(axis=1).mean())
        for subset in claims.SUBSETS:
            row[subset.replace(" ", "_")] = int(claims.subset_rows(y, names, subset, nothing).sum())
        row |= {f"view_{view}": int((of_part["view"] == view).sum()) for view in views}
        rows.append(row)
    return pd.DataFrame(rows)


def _texts(material: Material, texts: list[str]) -> pd.DataFrame:
    if not any(texts):
        return pd.DataFrame()
    lengths = _token_counts(material, texts)
    rows = []
    for part, places in _of_parts(material).items():
        given = [texts[place] for place in places if texts[place]]
        words = np.array([len(text.split()) for text in given] or [0])
        tokens, cut = lengths.take(places)
        row: dict[str, Any] = {"part": part, "texts": len(given), "different": len(set(given))}
        row |= {"empty": len(places) - len(given), "words_median": float(np.median(words))}
        row |= {"words_90": float(np.quantile(words, 0.9)), "words_longest": int(words.max())}
        row |= {"tokens_median": float(np.median(tokens)), "tokens_longest": int(tokens.max()), "truncated": cut}
        rows.append(row)
    return pd.DataFrame(rows)


class _TokenCounts:
    """Tokens of each text as the text tower reads it; 0 where there is none."""

    def __init__(self, counts: np.ndarray, context: int) -> None:
        self.counts, self.context = counts, context

    def take(self, places: np.ndarray) -> tuple[np.ndarray, int]:
        found = self.counts[places]
        found = found[found > 0]
        # A text that fills the context was cut off there, or fits exactly.
        return (found if len(found) else np.zeros(1, dtype=np.int64)), int((found >= self.context).sum())


def _token_counts(material: Material, texts: list[str]) -> _TokenCounts:
    different = sorted(set(texts) - {""})
    words = material.encoder.tokenizer(different)
    counts = dict(zip(different, (np.asarray(words) != 0).sum(axis=1).tolist(), strict=True))
    return _TokenCounts(np.array([counts.get(text, 0) for text in texts], dtype=np.int64), int(words.shape[1]))


def _duplicates(material: Material, texts: list[str]) -> pd.DataFrame:
    keys = [key.tobytes() for key in material.keys]
    plain = [leaks.plain_text(text) for text in texts]
    rows = []
    for kind, values in (("identical images", keys), ("identical texts", plain)):
        frame = pd.DataFrame({"value": values, "group": material.dataset.groups})
        frame = frame[frame["value"].astype(bool)]
        shared = frame[frame["value"].duplicated(keep=False)]
        patients = shared.groupby("value")["group"].nunique()
        rows.append(
            {
                "kind": kind,
                "samples": len(frame),
                "sharing": len(shared),
                "groups": int(shared["value"].nunique()),
                "across_patients": int((patients > 1).sum()),
            }
        )
    return pd.DataFrame(rows)


def _cooccurrence(material: Material) -> pd.DataFrame:
    y, names = material.y.astype(np.int64), material.dataset.label_names
    both, counts = y.T @ y, y.sum(axis=0)
    rows = []
    for one, two in itertools.combinations(range(len(names)), 2):
        if both[one, two]:
            expected = counts[one] * counts[two] / len(y)
            row = {"label": names[one], "other": names[two], "both": int(both[one, two])}
            rows.append(row | {"expected": expected, "lift": both[one, two] / expected})
    frame = pd.DataFrame(rows)
    return frame.sort_values("both", ascending=False, kind="stable") if len(frame) else frame
