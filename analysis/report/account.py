"""What the report says of the run itself: facts, time and size of each step, failures, where everything came from.

Comes in: provenance and cost rows. Goes out: tables and name-value pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis import figures, run_record
from analysis.report.blocks import Code, Details, Drawing, Facts, Heading, Section, Sentences
from analysis.report.tables import Cell, Row, Table, number, size


def facts(record: run_record.RunRecord) -> list[dict[str, str]]:
    """Return the figures at the head of the page: name and value of each."""
    provenance = record.provenance
    dataset, split = provenance.get("dataset", {}), provenance.get("split", {})
    counts = split.get("counts", {})
    facts = [
        ("samples", f"{dataset.get('n', 0):,}"),
        ("patients", f"{dataset.get('groups', 0):,}"),
        ("train / val / test", " / ".join(f"{counts.get(name, 0):,}" for name in ("train", "val", "test"))),
        ("labels", str(len(record.label_names))),
        ("imbalance", dataset.get("imbalance", "–")),
        ("failed samples", f"{len(record.failures):,}"),
        ("total time", f"{provenance.get('seconds', 0) / 60:.1f} min"),
    ]
    return [{"name": name, "value": value} for name, value in facts]


def cost_table(costs: pd.DataFrame) -> Table:
    """Return the steps with seconds, items, rate, what came from the cache, bytes and peak memory."""

    rows = []
    for row in costs.itertuples():
        rows.append(
            Row(
                [
                    Cell(str(row.step)),
                    Cell(number(row.seconds, 1), sort=row.seconds),
                    Cell(
                        "–" if pd.isna(row.items) else f"{int(row.items):,}",
                        sort=None if pd.isna(row.items) else row.items,
                    ),
                    Cell(
                        "–" if pd.isna(row.rate) else f"{row.rate:,.0f}", sort=None if pd.isna(row.rate) else row.rate
                    ),
                    Cell("–" if pd.isna(row.reused) else f"{int(row.reused):,}"),
                    Cell(size(np.nan if pd.isna(row.bytes) else row.bytes)),
                    Cell(size(np.nan if pd.isna(row.peak_memory) else row.peak_memory)),
                ]
            )
        )
    columns = ["step", "seconds", "items", "items a second", "from cache", "written", "peak memory"]
    return Table(
        columns,
        rows,
        "Peak memory is the process's highest resident size up to the end of the step.",
        "tables/cost.csv",
        costs.dropna(axis=1, how="all"),
    )


def cost_section(record: run_record.RunRecord) -> Section:
    """Return what each step took; in figures only where the run announces no ledger of its own."""
    costs = record.rows("cost")
    chart = Drawing(figures.cost_bars(costs)) if len(costs) else None
    ledger = (record.rows("table")["section"] == "cost").any()
    table = cost_table(costs) if len(costs) and not ledger else None
    return Section("cost", "Time and size", "Account", "", [chart, table])


def failure_table(failures: pd.DataFrame) -> Table | None:
    """Return the samples that failed; None where none did."""
    if failures.empty:
        return None
    columns = [column for column in ("id", "uri", "what", "reason") if column in failures]
    rows = [Row([Cell(str(value)) for value in line]) for line in failures[columns].itertuples(index=False)]
    return Table(columns, rows, f"{len(failures):,} samples failed.", "failures.csv", private=True, prose=True)


def provenance_section(record: run_record.RunRecord) -> Section:
    """Return where everything came from, and how to do it again."""
    provenance, failures = record.provenance, record.failures
    command = provenance.get("command", "")
    count = len(failures)
    none = "No sample failed."
    some = f"{count:,} {'sample' if count == 1 else 'samples'} failed; everything else is done."
    return Section(
        "provenance",
        "Provenance",
        "Account",
        "",
        [
            Facts(provenance_lines(provenance)),
            Heading("Samples that failed"),
            Sentences([some if count else none]),
            failure_table(failures),
            Heading("To repeat this run"),
            Code(command) if command else None,
            Details("Resolved configuration", [Code(record.config_text)] if record.config_text else []),
        ],
    )


def provenance_lines(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Return names and values of what the run came from: encoders, data, split, versions, machine, times."""

    def flat(value: Any) -> str:
        if isinstance(value, dict):
            return " · ".join(
                f"{key.replace('_', ' ')} {size(entry)}" if key.startswith("memory") else f"{key} {flat(entry)}"
                for key, entry in value.items()
                if not isinstance(entry, dict | list)
            )
        if isinstance(value, list):
            return "; ".join(flat(entry) for entry in value)
        return str(value)

    lines = [("encoders", "; ".join(str(encoder.get("id")) for encoder in provenance.get("encoders", [])))]
    for name in ("dataset", "split", "versions", "machine", "git_commit", "started", "finished"):
        if provenance.get(name):
            lines.append((name.replace("_", " "), flat(provenance[name])))
    return lines
