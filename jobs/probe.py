"""`fluoro probe`: fit a linear head for each label on cached embeddings, save the heads, and test them.

Comes in: a data set and a model. Goes out: a run folder with ``probe.npz`` (`analysis.heads.LinearHead`, which `fluoro
cam --head` takes) and result lines, and tables. Heads learn from train, strength and thresholds are chosen on val.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from jobs import measuring, study_scores, study_settings
from jobs.progress import Progress
from jobs.runs import open_run

HEAD_FILE = "probe.npz"


class Config(measuring.MeasureOptions):
    """What `fluoro probe` needs."""

    probe: study_settings.ProbeSection = Field(
        default_factory=study_settings.ProbeSection, description="heads of the sound protocol"
    )


def run(
    config: Config, *, out: Path | None = None, overwrite: bool = False, progress: Progress | None = None
) -> measuring.Measured:
    """Fit, save and test.

    Raises
    ------
    UsageError
        An output that exists.
    DataError
        No labels, or an empty split.
    """
    progress = progress or Progress()
    with open_run("probe", config, out=out, cache=config.cache, overwrite=overwrite) as record:
        material = measuring.prepare(config, record, progress)
        with record.step("linear probe") as step:
            setting = study_settings.linear_probe(material, config.probe, config.protocol, config.seed)
            step.items = len(material.rows("train"))
        fitted = setting.explained.head
        assert fitted is not None  # a probe has a head
        head = fitted.save(record.path(HEAD_FILE))
        with record.step("metrics") as step:
            step.items = study_scores.write_metrics(
                material, [setting], config.protocol, record, config.replicates, config.seed
            )
            study_scores.write_score_arrays(material, {config.protocol: [setting]}, record)
    return measuring.measured(record, setting.name, head=head)
