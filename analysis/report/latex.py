"""The settings' table in LaTeX, for a paper: booktabs, values with their intervals, baselines apart.

Comes in: a `RunRecord`. Goes out: one ``tables/settings-<protocol>.tex`` a protocol, to be read with ``\\input``; it
needs ``\\usepackage{booktabs}`` and no other package.
"""

from __future__ import annotations

import math

import pandas as pd

from analysis import run_record
from analysis.report.setting_tables import OVERALL_METRICS

ARROWS = {"up": r"$\uparrow$", "down": r"$\downarrow$"}
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def setting_tables(record: run_record.RunRecord) -> dict[str, str]:
    """Return the LaTeX of each protocol's table by its path in the run folder."""
    rows = record.rows("metric")
    rows = rows[rows["label"].isna()]
    found = {}
    for protocol in record.protocols:
        part = rows[rows["protocol"] == protocol]
        references = record.rows("reference") if protocol == "paper" else record.rows("reference").iloc[:0]
        found[f"tables/settings-{protocol}.tex"] = setting_table(part, references, record.provenance, protocol)
    return found


def setting_table(rows: pd.DataFrame, references: pd.DataFrame, provenance: dict, protocol: str) -> str:
    """Return one table: settings, trivial baselines and, where there are any, published figures.

    Parameters
    ----------
    rows, references : DataFrame
        Result rows of kinds "metric" (without label) and "reference".
    provenance : dict
    protocol : str
    """
    shown = [entry for entry in OVERALL_METRICS if entry[0] in set(rows["metric"])]
    head = ["setting", *(f"{title} {ARROWS[direction]}" for _, title, direction in shown)]
    trivial = rows["baseline"].eq(True)
    published = references.assign(setting="published: " + references["setting"].astype(str))
    groups = [part for part in (rows[~trivial], rows[trivial], published) if len(part)]
    lines = [
        f"% {_plain(provenance.get('title', ''))}; protocol {protocol}; test split; needs \\usepackage{{booktabs}}",
        r"\begin{tabular}{l" + "r" * len(shown) + "}",
        r"\toprule",
        " & ".join(head) + r" \\",
    ]
    for group in groups:
        lines.append(r"\midrule")
        for setting in dict.fromkeys(group["setting"]):
            part = group[group["setting"] == setting]
            values, bounds = zip(*(_cell(part[part["metric"] == metric]) for metric, _, _ in shown), strict=True)
            lines.append(" & ".join([escape(str(setting)), *values]) + r" \\")
            if any(bounds):
                lines.append(" & ".join(["", *bounds]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def escape(text: str) -> str:
    """Return text that LaTeX sets as it is."""
    return "".join(_SPECIAL.get(sign, sign) for sign in text)


def _cell(rows: pd.DataFrame) -> tuple[str, str]:
    """Return value and interval; a dash where there is none."""
    if rows.empty or not _finite(rows["value"].iloc[0]):
        return "--", ""
    row = rows.iloc[0]
    bounded = _finite(row["low"]) and _finite(row["high"])
    return f"{row['value']:.3f}", rf"{{\footnotesize {row['low']:.3f}--{row['high']:.3f}}}" if bounded else ""


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _plain(text: str) -> str:
    """Return text that stays in a comment."""
    return " ".join(str(text).split())
