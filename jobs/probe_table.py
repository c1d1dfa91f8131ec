"""A sweep of probes as a tidy table: one row a candidate, metric and label, with intervals by patient.

Comes in: a sweep and the rows that it held out. Goes out: the table, its lines in the run's record, ``sweep.csv`` and
``convergence.csv``, and the short form that is printed.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.bootstrap import bootstrap_metrics, clustered_bootstrap
from analysis.metrics import Prediction
from analysis.probes import candidates, sweeping
from jobs.metric_tables import with_interval
from jobs.runs import Run
from jobs.study_records import number
from jobs.study_settings import Material

SWEEP_FILE, CONVERGENCE_FILE = "sweep.csv", "convergence.csv"
SWEPT = ("auroc_macro", "map", "auroc", "ap")
OWN_COLUMNS = ("candidate", "class_weight", "C", "features", *candidates.GRID)


def sweep_table(
    material: Material, found: sweeping.Sweep, held: np.ndarray, replicates: int, seed: int
) -> pd.DataFrame:
    """Return one row a candidate, metric and label: value, low, high, n and what the candidate is."""
    predictions = {}
    for candidate, logits, ranked in zip(found.candidates, found.logits, found.levelled, strict=True):
        predictions[candidate.name] = Prediction(ranked, logits > 0)
    truth, groups = material.y[held], material.dataset.groups[held]
    table = bootstrap_metrics(
        truth, predictions, groups, label_names=material.dataset.label_names, replicates=replicates, seed=seed
    ).table()
    table = table[table["metric"].isin(SWEPT)].rename(columns={"setting": "candidate"})
    losses = _losses(truth, found, groups, replicates, seed)
    table = pd.concat([losses, table.drop(columns="replicates")], ignore_index=True)
    place = {candidate.name: number for number, candidate in enumerate(found.candidates)}
    order = table["candidate"].map(place)
    own = pd.DataFrame([_of(candidate) for candidate in found.candidates]).iloc[order].reset_index(drop=True)
    table[own.columns] = own
    table["chosen"] = order == found.chosen
    counts = np.array([_problems(found, candidate) for candidate in found.candidates])
    table["problems"], table["converged"] = counts[order, 0], counts[order, 1]
    table = table.iloc[np.argsort(order, kind="stable")].reset_index(drop=True)
    first = [name for name in OWN_COLUMNS if name in table]
    return table[[*first, "metric", "label", "value", "low", "high", "n", "chosen", "problems", "converged"]]


def _losses(truth: np.ndarray, found: sweeping.Sweep, groups: np.ndarray, replicates: int, seed: int) -> pd.DataFrame:
    """Return the log-loss of each candidate, averaged over samples and labels, with its interval."""
    of_sample = np.stack([(np.logaddexp(0.0, each) - truth * each).mean(axis=1) for each in found.logits], axis=1)
    drawn = clustered_bootstrap(of_sample, groups, replicates=replicates, seed=seed)
    rows = [
        {"candidate": candidate.name, "metric": "log_loss", "label": None, "value": score["log_loss"], "low": low,
         "high": high, "n": len(truth)}
        for candidate, score, low, high in zip(found.candidates, found.scores, drawn.low, drawn.high, strict=True)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _of(candidate: candidates.Candidate) -> dict[str, object]:
    return {
        "class_weight": candidate.class_weight,
        "C": candidate.C,
        "features": candidate.features,
        **dict(candidate.parameters),
    }


def _problems(found: sweeping.Sweep, candidate: candidates.Candidate) -> tuple[int, int]:
    """Return how many convex problems a candidate is, and how many of them are solved."""
    fits = found.fits.get(candidate.features)
    if fits is None or candidate.C is None:
        return 0, 0
    mine = fits.converged[:, fits.class_weights.index(candidate.class_weight), :, fits.c_grid.index(candidate.C)]
    return mine.size, int(mine.sum())


def write_sweep(record: Run, table: pd.DataFrame, found: sweeping.Sweep) -> None:
    """Write the sweep as result lines and as tables."""
    values = [name for name in table if name in ("C", *candidates.GRID, "value", "low", "high")]
    record.record_all(
        [
            {
                "kind": "sweep",
                "probe": found.kind,
                **{name: row[name] for name in ("candidate", "class_weight", "features", "metric", "n", "chosen")},
                "label": row["label"] if isinstance(row["label"], str) else None,
                **{name: number(row[name]) for name in values},
            }
            for row in table.to_dict("records")
        ]
    )
    table.to_csv(record.path(SWEEP_FILE), index=False, float_format="%.6g")
    if found.fits:
        found.convergence().to_csv(record.path(CONVERGENCE_FILE), index=False, float_format="%.6g")


def candidate_table(sweep: pd.DataFrame) -> pd.DataFrame:
    """Return one row a candidate, as it is printed; empty where nothing was swept."""
    rows = []
    overall = sweep[sweep["label"].isna()] if len(sweep) else sweep
    for place, part in overall.groupby("candidate", sort=False) if len(overall) else []:
        by_metric = part.set_index("metric")
        first = part.iloc[0]
        solved = {"problems": int(first["problems"]), "converged": int(first["converged"])} if first["problems"] else {}
        rows.append(
            {
                "candidate": place,
                "log-loss": with_interval(by_metric, "log_loss"),
                "mean AUROC": with_interval(by_metric, "auroc_macro"),
                "mean AP": with_interval(by_metric, "map"),
                **solved,
                "chosen": "*" if first["chosen"] else "",
            }
        )
    return pd.DataFrame(rows)
