"""`fluoro zeroshot`: score labels by prompts, without training, and hold the scores against labels and baselines.

Comes in: a data set, a model, prompt templates. Goes out: a run folder with result lines, and tables. Thresholds are
chosen on the validation split (``protocol: sound``), or relative to each image as the paper did (``protocol: paper``).
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from jobs import measuring, study_scores, study_settings
from jobs.progress import Progress
from jobs.runs import open_run


class Config(measuring.MeasureOptions):
    """What `fluoro zeroshot` needs."""

    zero_shot: study_settings.ZeroShotSection = Field(
        default_factory=study_settings.ZeroShotSection, description="prompts of the sound protocol"
    )


def run(
    config: Config, *, out: Path | None = None, overwrite: bool = False, progress: Progress | None = None
) -> measuring.Measured:
    """Score and test.

    Raises
    ------
    UsageError
        A template without {label}, an output that exists.
    DataError
        No labels, an empty split, or no label with a positive sample where the choice is made and tested.
    """
    progress = progress or Progress()
    with open_run("zeroshot", config, out=out, cache=config.cache, overwrite=overwrite) as record:
        material = measuring.prepare(config, record, progress)
        unjudged = measuring.check_positives(material, material.rows("val"))
        with record.step("zero-shot") as step:
            setting = study_settings.zero_shot(material, config.zero_shot, config.protocol)
            step.items = len(material.dataset)
        with record.step("metrics") as step:
            step.items = study_scores.write_metrics(
                material, [setting], config.protocol, record, config.replicates, config.seed
            )
            study_scores.write_score_arrays(material, {config.protocol: [setting]}, record)
    return measuring.measured(record, setting.name, unjudged=unjudged)
