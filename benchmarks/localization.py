"""Do heatmaps find what is there? Method and layer chosen on validation phantoms, the choice tested on other ones.

    python benchmarks/localization.py [--count 1600] [--per-label 20] [--write]

Runs `fluoro cam sweep` on enriched phantoms of a seed that neither phantom-clip's training nor any data set of the
tests draws from, split by patient into train (location priors), val (chooses) and test. Prints what was tried, and for
each label the choice minus the centre prior and minus the label's own location prior on test, in pointing game and
energy inside, with intervals that resample patients. Not for speed: no peer does the same. `--write` stores the
figures in benchmarks/results/localization.json, and the choice in the model's folder, where it becomes the default.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import pandas as pd
from comparing import write_record

from jobs import cam_sweep
from jobs.config import SplitOptions
from jobs.heatmap_choice import MODEL_FILE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "localization.json"
ASKED = (
    "Lung Opacity",
    "Atelectasis",
    "Consolidation",
    "Pneumonia",
    "Lung Lesion",
    "Pneumothorax",
    "Pleural Effusion",
    "Fracture",
    "Support Devices",
)
"""Labels whose findings are local enough for a map to be asked where they are."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="phantom-clip")
    parser.add_argument("--count", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=2021)
    parser.add_argument("--enrich", type=float, default=0.12)
    parser.add_argument("--per-label", type=int, default=20)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--method", action="append", default=[])
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = cam_sweep.Config(
            dataset=f"phantom:{chosen.count}?seed={chosen.seed}&enrich={chosen.enrich}",
            model=chosen.model,
            cache=Path(folder) / "cache",
            split=SplitOptions(how="grouped", fractions=(0.2, 0.3, 0.5)),
            zero_shot={"templates": ["{label}"]},
            methods=chosen.method,
            per_label=chosen.per_label,
            replicates=chosen.replicates,
        )
        found = cam_sweep.run(config, out=Path(folder) / "sweep")
    table = cam_sweep.verdicts(found.differences)
    with pd.option_context("display.width", 250, "display.max_columns", None, "display.max_rows", None):
        sys.stdout.write(found.tried.drop(columns=["note"]).round(3).to_string(index=False) + "\n\n")
        sys.stdout.write(table.to_string(index=False) + "\n\n")
        overall = found.test[found.test["label"].isna()]
        sys.stdout.write(
            overall.pivot_table(index="setting", columns="metric", values="value", sort=False).round(3).to_string()
        )
    asked = table[table["label"].isin(ASKED)].set_index("label")
    counts = {null: int((asked[f"above {null}"] == "yes").sum()) for null in ("centre prior", "location prior")}
    sys.stdout.write(f"\n\nchosen: {found.choice}\nof {len(asked)} local labels above: {counts}\n")
    if chosen.write:
        figures = {
            "choice": found.choice,
            "above_in_pointing_game_and_energy": {"of": len(asked), **counts},
            "validation": json.loads(found.tried.round(4).to_json(orient="records")),
            "test": json.loads(found.test[found.test["label"].isna()].round(4).to_json(orient="records")),
            "verdicts": json.loads(table.to_json(orient="records")),
        }
        write_record(RESULTS, vars(chosen), figures)
        choice = json.dumps(found.choice, indent=1) + "\n"
        (ROOT / "configs" / "phantom-clip" / MODEL_FILE).write_text(choice, encoding="utf-8")


if __name__ == "__main__":
    main()
