"""The study's three claims, put to the run's own numbers.

Comes in: the settings of a protocol with their scores, on the test split. Goes out: three tables and sentences in the
section "claims".

- ``tables/claims-over-prediction-<protocol>.csv``: one row a setting, family of thresholds and label (empty: all
  together): said, true, ratio with low and high, excess with its interval, verdict.
- ``tables/claims-subsets-<protocol>.csv``: one row a subset (one finding, several findings), setting and metric: value,
  low, high, null, null_low, null_high, p, images, patients.
- ``tables/claims-differences-<protocol>.csv``: one row a claim, pair of settings and metric: difference, low, high, p,
  p_holm, better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analysis import baselines, claim_verdicts, claims, paper, threshold_families
from analysis.metrics import Prediction
from engine.labels import nothing_label
from jobs import runs
from jobs.probe_section import LINEAR_PROBE, is_probe
from jobs.run_tables import write_table
from jobs.study_records import sentence_rows
from jobs.study_settings import FINE_TUNING, ZERO_SHOT, Material, Setting

SECTION = "claims"


def write_claims(
    material: Material,
    settings: Sequence[Setting],
    protocol: str,
    run: runs.Run,
    replicates: int,
    permutations: int,
    seed: int,
) -> int:
    """Test the three claims; return how many test images there were."""
    test, train = material.rows("test"), material.rows("train")
    trivial = baselines.trivial_baselines(material.y[train], len(test), seed)
    _over_prediction(material, settings, trivial, protocol, run, replicates, seed)
    names = material.dataset.label_names
    predictions = {each.name: Prediction(each.prediction.scores[test], each.prediction.decisions[test])
                   for each in settings} | trivial  # fmt: skip
    probe = next((each.name for each in settings if is_probe(each.name)), LINEAR_PROBE)
    tables, differences, said = [], [], []
    for claim, subset, setting in (
        (claim_verdicts.CLAIM_2, claims.DISTINCT, FINE_TUNING),
        (claim_verdicts.CLAIM_3, claims.OVERLAPPING, probe),
    ):
        if setting not in predictions:
            said.append(f"{claim}: not tested, this run has no {setting.lower()}.")
            continue
        others = [each.name for each in settings if each.name != setting] + [baselines.PREVALENCE]
        found = claims.subset_scores(
            material.y[test],
            predictions,
            material.dataset.groups[test],
            [(setting, other) for other in others],
            label_names=names,
            subset=subset,
            nothing=nothing_label(names),
            baselines=tuple(trivial),
            replicates=replicates,
            permutations=permutations,
            seed=seed,
        )
        counts = {"images": found.images, "patients": found.patients}
        tables.append(found.table.assign(subset=subset, **counts))
        differences.append(found.differences.assign(claim=claim, subset=subset, **counts))
        said += claim_verdicts.subset_sentences(claim, found, setting, subset)
    if tables:
        write_table(
            run,
            f"claims-subsets-{protocol}",
            _leading(pd.concat(tables, ignore_index=True), ["subset", "images", "patients"]),
            title="Distinct and overlapping findings",
            text="Findings alone, on test images with one finding and with several: each setting and trivial baseline "
            "with its interval by patient, and what truth dealt to other patients of the subset gives (null).",
            section=SECTION,
            protocol=protocol,
        )
        write_table(
            run,
            f"claims-differences-{protocol}",
            _leading(pd.concat(differences, ignore_index=True), ["claim", "subset", "images", "patients"]),
            title="The claims' differences",
            text="Paired differences that claims 2 and 3 are about, with p-values corrected by Holm within each claim.",
            section=SECTION,
            protocol=protocol,
        )
    run.record_all(sentence_rows(SECTION, said, protocol))
    return len(test)


def _over_prediction(
    material: Material,
    settings: Sequence[Setting],
    trivial: Mapping[str, Prediction],
    protocol: str,
    run: runs.Run,
    replicates: int,
    seed: int,
) -> None:
    test = material.rows("test")
    decisions: dict[tuple[str, str], np.ndarray] = {}
    for setting in settings:
        scores = setting.prediction.scores
        for family in threshold_families.FAMILIES:
            cut = threshold_families.family_decisions(family, material.y, scores, material.split)
            decisions[setting.name, family] = cut[test]
        if protocol == "paper" and setting.name == ZERO_SHOT:
            decisions[setting.name, claim_verdicts.ABOVE_ZERO] = paper.decisions_above_zero(scores[test])
    decisions |= {(name, claim_verdicts.OWN): each.decisions for name, each in trivial.items()}
    table = claims.over_prediction(
        material.y[test],
        decisions,
        material.dataset.groups[test],
        label_names=material.dataset.label_names,
        replicates=replicates,
        seed=seed,
    )
    write_table(
        run,
        f"claims-over-prediction-{protocol}",
        table,
        title="Over-prediction",
        text="How often a label is said (rate; labels an image where no label is named), how often it is true, and "
        "their ratio with its interval by patient, under every family of thresholds; trivial baselines by their own "
        "rule.",
        section=SECTION,
        protocol=protocol,
    )
    counts = claims.over_prediction_counts(table)
    names = [each.name for each in settings if each.name != ZERO_SHOT]
    drawn = claim_verdicts.over_prediction_sentences(counts, ZERO_SHOT, names)
    run.record_all(sentence_rows(SECTION, drawn, protocol))


def _leading(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    present = [name for name in names if name in table]
    return table[[*present, *(name for name in table.columns if name not in present)]]
