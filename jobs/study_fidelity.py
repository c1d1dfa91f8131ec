"""What the published protocol says beside its own row: its other figures, the published table, what is not the same.

Comes in: the settings under ``protocol: paper``. Goes out: tables and sentences in the section "reference".

- ``tables/paper-reference.csv``: one row a published figure: setting, metric, published, ours, difference, low, high,
  within (does the published one lie in our interval), null.
- ``tables/paper-conditions.csv``: one row a condition of the study: condition, study, here, same.
- ``tables/paper-cuts.csv``: one row a setting and cut that the study tried: f1_macro, f1_micro, exact_match.
- ``tables/paper-labels.csv``: one row a setting and label: AUROC and average precision on per-image scaled scores, and
  for zero-shot the figures of raw score > 0 (positives, said, precision, recall, f1).
- ``tables/paper-domains.csv``: one row a setting and domain: positives, said, precision, recall, f1.
- ``tables/paper-heatmap-images.csv``: the test images that the study's draw of 15 chooses: id, labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analysis import fidelity, paper, run_record
from engine.labels import DOMAINS
from jobs import runs
from jobs.run_tables import write_table
from jobs.study_records import sentence_rows
from jobs.study_settings import FINE_TUNING, ZERO_SHOT, Material, Setting

SECTION = "reference"


def write_fidelity(material: Material, settings: Sequence[Setting], split_how: str, run: runs.Run) -> None:
    """Write the tables above; the run's metrics and distances of the protocol must be written already."""
    _own_figures(material, settings, run)
    rows = run_record.read_run(run.folder).results
    overall = rows[(rows["protocol"] == "paper") & rows["kind"].isin(["metric", "distance"]) & rows["label"].isna()]
    nulls = overall[overall["metric"] == "ratio_null"].set_index("setting")["value"].to_dict()
    ours = overall[["setting", "metric", "value", "low", "high", "null"]].copy()
    ours["null"] = [
        nulls.get(row.setting) if row.metric == "ratio" else row.null for row in overall.itertuples()
    ]  # fmt: skip
    comparison = fidelity.reference_comparison(ours)
    told = fidelity.conditions(_facts(material, settings, split_how, run))
    write_table(
        run,
        "paper-reference",
        comparison,
        title="The published table beside ours",
        text=f"Figures of {paper.SOURCE}, ours under the same protocol with their interval by patient, and the null. "
        "The conditions below say what was not the same.",
        section=SECTION,
        protocol="paper",
    )
    write_table(
        run,
        "paper-conditions",
        told,
        title="What is and what is not as in the study",
        text="Each condition of the published study and of this run.",
        section=SECTION,
        protocol="paper",
    )
    run.record_all(sentence_rows(SECTION, fidelity.fidelity_sentences(comparison, told)))


def _facts(material: Material, settings: Sequence[Setting], split_how: str, run: runs.Run) -> fidelity.RunFacts:
    dataset, encoder = material.dataset, material.encoder
    source = next((note for note in dataset.notes if note.startswith("labels come from ")), "")
    test = set(dataset.ids[material.rows("test")])
    pairs = dataset.annotations.pairs.drop_duplicates()
    machine = run.provenance.get("machine", {})
    counts = {name: int(count) for name, count in zip(dataset.label_names, dataset.labels.sum(axis=0), strict=True)}
    return fidelity.RunFacts(
        encoder=encoder.id,
        structure=encoder.description,
        precision=str(encoder.precision),
        schema=dataset.schema,
        images=len(dataset),
        groups=len(set(dataset.groups)),
        positives=counts,
        label_source=source.removeprefix("labels come from ").partition(";")[0] or "the data set's own",
        split_how=split_how,
        split={part: len(material.rows(part)) for part in ("train", "val", "test")},
        finetuned=any(setting.name == FINE_TUNING for setting in settings),
        annotated=int(pairs["sample_id"].isin(test).sum()) if len(pairs) else 0,
        machine=str(machine.get("processor") or machine.get("cpu") or "") if isinstance(machine, dict) else "",
    )


def _own_figures(material: Material, settings: Sequence[Setting], run: runs.Run) -> None:
    test, names = material.rows("test"), material.dataset.label_names
    truth = material.y[test]
    cuts, labels, domains = [], [], []
    for setting in settings:
        scores, decided = setting.prediction.scores[test], setting.prediction.decisions[test]
        sweep = paper.threshold_sweep(truth, scores)
        cuts.append(pd.DataFrame([{"setting": setting.name, "cut": cut, **found} for cut, found in sweep.items()]))
        areas, precisions = paper.scaled_ranking(truth, scores)
        columns = {"setting": setting.name, "label": list(names), "scaled_auroc": areas, "scaled_ap": precisions}
        of_labels = pd.DataFrame(columns)
        if setting.name == ZERO_SHOT:
            of_labels = of_labels.merge(paper.above_zero_figures(truth, scores, names), on="label")
        labels.append(of_labels)
        if set(names) & {label for members in DOMAINS.values() for label in members}:
            domains.append(paper.domain_figures(truth, decided, names).assign(setting=setting.name))
    chosen = paper.heatmap_positions(len(test))
    images = pd.DataFrame(
        {
            "id": material.dataset.ids[test[chosen]],
            "labels": ["; ".join(n for n, value in zip(names, truth[row], strict=True) if value) for row in chosen],
        }
    )
    tables = [
        ("paper-cuts", pd.concat(cuts), "The study's cuts", "Macro-F1, micro-F1 and exact match at every cut of the "
         "per-image scaled scores that the study tried; 0.50 is the row's own."),
        ("paper-labels", pd.concat(labels), "Label by label as the study takes them", "AUROC and average precision on "
         "per-image scaled scores; for zero-shot also the figures of raw score > 0."),
        ("paper-heatmap-images", images, "The study's draw of 15 images", "The test images that its seed chooses for "
         "heatmaps, from this run's test split."),
    ]  # fmt: skip
    if domains:
        text = "A domain is true where any of its labels is, and said where any of them is said."
        tables.insert(2, ("paper-domains", pd.concat(domains), "Domains", text))
    for name, frame, title, text in tables:
        frame = frame[["setting", *frame.columns.drop("setting")]] if "setting" in frame else frame
        write_table(run, name, frame, title=title, text=text, section=SECTION, protocol="paper")
