"""What `fluoro cam sweep` and `fluoro cam check` share: one setting to explain, and where its findings lie.

Comes in: a config with data, model, and prompts or a head. Goes out: the data set with its split, the setting (zero-
shot, or a head that was saved for this model), and annotated findings of one split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from analysis import cam
from analysis.cam.methods import methods_for
from engine.cache import Cache
from engine.dataset import Dataset
from engine.encoder import Encoder
from engine.errors import DataError, UsageError
from jobs import heads, measuring, probe_section, study_settings
from jobs.heatmap_scoring import Finding
from jobs.study_heatmaps import choose_findings
from jobs.study_settings import Explained


class TrialOptions(measuring.MeasureOptions):
    """Fields shared by the verbs that try heatmap methods."""

    zero_shot: study_settings.ZeroShotSection = Field(
        default_factory=study_settings.ZeroShotSection, description="prompts of the setting that is explained"
    )
    head: Path | None = Field(
        None, description="head saved by fluoro probe, or its run, explained instead of the prompts"
    )
    labels: list[str] = Field(default_factory=list, description="labels to explain; all annotated ones if empty")
    methods: list[str] = Field(default_factory=list, description="methods to try; the tower's batched ones if empty")
    tolerance: float | None = Field(None, gt=0, description="of the pointing game, in original pixels")


def explained_setting(config: TrialOptions, encoder: Encoder, dataset: Dataset) -> Explained:
    """Return zero-shot with the config's prompts, or the head that it names.

    Raises
    ------
    ModelError
        A head of another encoder.
    """
    if config.head is not None:
        head = heads.open_head(config.head, encoder)
        return Explained(probe_section.LINEAR_PROBE, config.protocol, encoder, head.label_names, head=head)
    names = dataset.label_names
    text = study_settings.label_texts(config.zero_shot, config.protocol, names, encoder, Cache(config.cache))
    return Explained(study_settings.ZERO_SHOT, config.protocol, encoder, tuple(names), text=text)


def findings_of(
    config: TrialOptions, dataset: Dataset, setting: Explained, split: str, per_label: int | None
) -> list[Finding]:
    """Return annotated findings of one split, at most so many a label, that the setting can explain.

    Raises
    ------
    UsageError
        A label that the data set or the setting does not have.
    DataError
        No annotated finding in the split.
    """
    for label in config.labels:
        dataset.label_position(label)
        setting.target(label)
    rows = np.flatnonzero(dataset.samples["split"].to_numpy() == split)
    wanted = set(config.labels or setting.label_names)
    found = [each for each in choose_findings(dataset, rows, per_label, config.seed) if each.label in wanted]
    if not found:
        raise DataError(
            f"{dataset.called} has no annotated finding in its {split} split; heatmaps are tried on boxes or masks "
            "(boxes=FILE), and split by --split"
        )
    return found


def methods_to_try(config: TrialOptions, encoder: Encoder) -> list[str]:
    """Return the methods that were named, or all that the tower has batched and that depend on what is sought.

    Raises
    ------
    UsageError
        A method that the tower does not have.
    """
    fitting = methods_for(encoder.trunk)
    for name in config.methods:
        if name not in fitting:
            raise UsageError(f"this image tower has no heatmap method {name!r}; it has {', '.join(fitting)}")
    return config.methods or [name for name in fitting if cam.METHODS[name].batched and cam.METHODS[name].of_target]


def by_image(findings: Sequence[Finding]) -> dict[int, list[Finding]]:
    """Return the findings of each image, in order."""
    of_image: dict[int, list[Finding]] = {}
    for finding in findings:
        of_image.setdefault(finding.row, []).append(finding)
    return of_image
