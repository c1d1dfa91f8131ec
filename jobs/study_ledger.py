"""What a study cost, step by step and setting by setting, what came from the cache, and what that saved.

Comes in: the cost lines that the run has recorded so far. Goes out: two tables and sentences in the section "cost".

- ``tables/cost-steps.csv``: one row a step: seconds, items, rate (items a second), bytes, peak_memory, from_cache
  (items), seconds_an_item, saved (seconds that the items from the cache would have taken).
- ``tables/cost-settings.csv``: one row a setting and protocol: own_seconds (training and scoring), images a second,
  embedding_seconds (what embedding all images takes), alone (both: what the setting costs whoever runs it alone),
  here (what it cost in this run), peak_memory.

How long an item takes is measured in this run where enough items were computed, else taken from the last run that did,
in the cache or beside this one; where no run did, nothing is said to be saved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from jobs import runs
from jobs.run_tables import write_table
from jobs.study_records import sentence_rows
from jobs.study_settings import Setting

SECTION = "cost"
EMBEDDING = "embed image and pixels"
# Fewer items than these say little about how long one takes.
LEAST_ITEMS = 8


def write_ledger(
    run: runs.Run, settings: Mapping[str, Sequence[Setting]], encoder_id: str, images: int, seeds: int, folder: Path
) -> None:
    """Write the tables above.

    Parameters
    ----------
    settings : mapping of protocol to settings
    encoder_id : str
        Of the parent.
    images : int
        That have an embedding.
    seeds : int
        How often each protocol was done.
    folder : Path
        Where the cache keeps the records of its runs.
    """
    lines = [line for line in read_lines(run.folder) if line.get("kind") == "cost"]
    known = {EMBEDDING: seconds_an_item(lines, EMBEDDING) or earlier_seconds(folder, run.folder, encoder_id)}
    steps = pd.DataFrame([_step(line, known.get(str(line["step"]))) for line in lines])
    write_table(
        run,
        "cost-steps",
        steps,
        title="Every step",
        text="Seconds, items a second, bytes written and peak memory of each step; what came from the cache, and the "
        "seconds that computing it again would have taken.",
        section=SECTION,
    )
    per_image = known[EMBEDDING]
    table = pd.DataFrame(_settings(settings, lines, per_image, images))
    write_table(
        run,
        "cost-settings",
        table,
        title="Every setting",
        text="What each setting took here, from cached embeddings, and what it takes alone: embedding all images comes "
        "first, for each setting and protocol anew.",
        section=SECTION,
    )
    run.record_all(sentence_rows(SECTION, ledger_sentences(steps, per_image, images, len(settings), seeds)))


def ledger_sentences(
    steps: pd.DataFrame, per_image: float | None, images: int, protocols: int, seeds: int
) -> list[str]:
    """Return what the cache saved: between runs, and within this one."""
    sentences = []
    saved = steps["saved"].dropna().sum() if "saved" in steps else 0.0
    reused = int(steps["from_cache"].fillna(0).sum())
    if reused and saved:
        sentences.append(f"{reused:,} items were in the cache already, which saved {saved:,.1f} s.")
    elif reused:
        sentences.append(f"{reused:,} items were in the cache already; no run says what they take.")
    # Zero-shot and the probe each read the embeddings of every image, for every protocol and seed.
    reads = 2 * protocols * seeds
    if per_image and reads > 1:
        sentences.append(
            f"Zero-shot and the probe read the embeddings of {images:,} images {reads} times (protocols and seeds); "
            f"computed once, that saved {(reads - 1) * images * per_image:,.0f} s of embedding."
        )
    return sentences


def seconds_an_item(lines: Sequence[Mapping[str, Any]], step: str) -> float | None:
    """Return how long an item of a step took among cost lines, None where too few were computed."""
    done = [line for line in lines if line.get("step") == step and (line.get("items") or 0) >= LEAST_ITEMS]
    return done[-1]["seconds"] / done[-1]["items"] if done else None


def earlier_seconds(folder: Path, own: Path, encoder_id: str) -> float | None:
    """Return how long an image took the same encoder in an earlier run that computed some; None without one."""
    records = [*sorted(folder.glob("*/provenance.json"), reverse=True), *own.parent.glob("*/provenance.json")]
    for record in records:
        if record.parent.resolve() == own.resolve():
            continue
        try:
            encoders = json.loads(record.read_text(encoding="utf-8")).get("encoders") or [{}]
        except (OSError, ValueError):
            continue
        if encoders[0].get("id") == encoder_id:
            found = seconds_an_item(read_lines(record.parent), EMBEDDING)
            if found is not None:
                return found
    return None


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """Return a run's result lines; [] where there are none, and without a last line that was cut off."""
    try:
        text = (folder / runs.RESULTS_FILE).read_text(encoding="utf-8")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _step(line: Mapping[str, Any], per_item: float | None) -> dict[str, Any]:
    reused = line.get("reused")
    row = {name: line.get(name) for name in ("step", "seconds", "items", "rate", "bytes", "peak_memory")}
    row |= {"from_cache": reused, "seconds_an_item": per_item}
    return row | {"saved": reused * per_item if reused and per_item else None}


def _settings(
    settings: Mapping[str, Sequence[Setting]], lines: Sequence[Mapping[str, Any]], per_image: float | None, images: int
) -> list[dict[str, Any]]:
    of_step = {str(line["step"]): line for line in lines}
    embedding = per_image * images if per_image else None
    rows = []
    for protocol, made in settings.items():
        for setting in made:
            line = of_step.get(f"{setting.name[:1].lower()}{setting.name[1:]} ({protocol})", {})
            rows.append(
                {
                    "setting": setting.name,
                    "protocol": protocol,
                    "own_seconds": setting.seconds,
                    "items": line.get("items"),
                    "rate": line.get("rate"),
                    "embedding_seconds": embedding,
                    "alone": setting.seconds + embedding if embedding else None,
                    "here": line.get("seconds"),
                    "peak_memory": line.get("peak_memory"),
                }
            )
    return rows
