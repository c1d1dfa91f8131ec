"""`fluoro distances`: how far classes lie apart in embedding space, how wide they are, and what chance would give.

Comes in: a data set and a model. Goes out: inter, intra and their ratio on the test split with intervals by patient,
beside the ratio under permuted labels, and the distance of every pair of classes. ``protocol: paper`` takes embeddings
as they are, ``sound`` brings them to length one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from jobs import measuring, study_scores, study_settings
from jobs.progress import Progress
from jobs.runs import open_run

SETTING = "Frozen encoder"
PAIRS_FILE = "distances.csv"


class Config(measuring.MeasureOptions):
    """What `fluoro distances` needs."""


@dataclass(frozen=True)
class Result:
    """Where the run lies, and its numbers.

    Parameters
    ----------
    folder : Path
    distances : DataFrame
        Rows inter, intra, ratio, ratio_null: metric, value, low, high.
    pairs : DataFrame
        label_a, label_b, distance of their centroids.
    failures : DataFrame
    """

    folder: Path
    distances: pd.DataFrame
    pairs: pd.DataFrame
    failures: pd.DataFrame

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the figures, and each class's nearest one."""
        return {"Class distances on the test split": self.distances, "Nearest classes": nearest_classes(self.pairs)}

    def lines(self) -> Iterator[str]:
        """Return where things lie."""
        yield f"run: {self.folder}"


def run(
    config: Config, *, out: Path | None = None, overwrite: bool = False, progress: Progress | None = None
) -> Result:
    """Measure.

    Raises
    ------
    UsageError
        An output that exists.
    DataError
        No labels, or an empty split.
    """
    progress = progress or Progress()
    with open_run("distances", config, out=out, cache=config.cache, overwrite=overwrite) as record:
        material = measuring.prepare(config, record, progress)
        setting = _bare_setting(material, config.protocol)
        with record.step("distances") as step:
            study_scores.write_distances(material, [setting], config.protocol, record, config.replicates, config.seed)
            step.items = len(material.rows("test"))
    numbers = measuring.result_lines(record.folder, "distance")[["metric", "value", "low", "high"]]
    pairs = pd.read_csv(record.folder / PAIRS_FILE)[["label_a", "label_b", "distance"]]
    failures = pd.DataFrame(record.failures, columns=["id", "uri", "what", "reason"])
    return Result(record.folder, numbers, pairs, failures)


def nearest_classes(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return each class with the one whose centroid is nearest: columns label, nearest, distance."""
    others = pairs[pairs["label_a"] != pairs["label_b"]]
    if not len(others):
        return pd.DataFrame(columns=["label", "nearest", "distance"])
    found = others.loc[others.groupby("label_a", sort=False)["distance"].idxmin()]
    return found.set_axis(["label", "nearest", "distance"], axis=1).reset_index(drop=True)


def _bare_setting(material: study_settings.Material, protocol: str) -> study_settings.Setting:
    """Return the embeddings as a setting without predictions, which distances do not look at."""
    names = material.dataset.label_names
    nothing = np.zeros((len(material.dataset), len(names)))
    prediction = study_settings.Prediction(nothing, nothing.astype(bool))
    explained = study_settings.Explained(SETTING, protocol, material.encoder, names)
    return study_settings.Setting(explained, material.features, prediction, None, 0.0)
