"""`fluoro finetune wise`: along the line from a parent to its fine-tuned child, each point scored (WiSE-FT, CVPR 2022).

Comes in: a finished run of `fluoro finetune`. Goes out: a run folder with ``curve.csv`` (share of the child, metrics on
validation and test) and ``model/``, the point that validation chooses, as a model with head and card.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic import Field, field_validator

from analysis.finetuning import blending
from engine.errors import UsageError
from jobs import tuned_runs
from jobs.finetune import HEAD_FILE, MODEL_FOLDER
from jobs.progress import Progress
from jobs.runs import open_run

SHARES = tuple(number / 10 for number in range(11))


class Config(tuned_runs.BlendOptions):
    """What `fluoro finetune wise` needs."""

    tuned: Path = Field(description="run folder of fluoro finetune")
    share: list[float] = Field(list(SHARES), min_length=1, description="shares of the child: 0 the parent, 1 the child")

    @field_validator("share")
    @classmethod
    def _within(cls, value: list[float]) -> list[float]:
        if not all(0 <= share <= 1 for share in value) or len(set(value)) != len(value):
            raise ValueError(f"shares of the child lie between 0 and 1 and differ, not {value}")
        return sorted(value)


@dataclass(frozen=True)
class Result:
    """Where the run lies, the curve, and the share that was chosen."""

    folder: Path
    curve: pd.DataFrame
    chosen: float

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the curve."""
        return {"From parent (share 0) to child (share 1)": self.curve}

    def lines(self) -> Iterator[str]:
        """Return what was chosen and where it lies."""
        yield f"chosen on validation: share {self.chosen:g}"
        yield f"model: {self.folder / MODEL_FOLDER}"


def run(
    config: Config, *, out: Path | None = None, overwrite: bool = False, progress: Progress | None = None
) -> Result:
    """Score the points between parent and child, and save the one that validation chooses.

    Raises
    ------
    UsageError
        No finished run; a head that started at random, so that the parent has none; an output that exists.
    """
    progress = progress or Progress()
    tuned = tuned_runs.open_tuned(config.tuned)
    if tuned.start is None:
        raise UsageError(
            f"{config.tuned}: its head started at random, so there is no parent's head to go back to; fine-tune with "
            "--start probe or text"
        )
    cache = tuned_runs.cache_of(tuned, config.cache)
    with open_run("finetune wise", config, out=out, cache=cache, overwrite=overwrite) as record:
        blend = tuned_runs.prepare(tuned, config.by, cache, config.device, record, progress)
        parent = {name: value.cpu() for name, value in blend.material.encoder.model.state_dict().items()}
        child = tuned_runs.child_state(tuned, blend.material.encoder)
        rows, best = [], None
        with record.step("curve") as step:
            for number, share in enumerate(config.share):
                state = blending.mean_weights([parent, child], [1 - share, share])
                head = blending.mean_head([tuned.start, tuned.head], [1 - share, share])
                scored = blend.scored(state, head)
                row = {"share": share, **scored.row()}
                record.record("interpolation", **row)
                rows.append(row)
                if best is None or blend.goodness(scored.validation) > best[0]:
                    best = (blend.goodness(scored.validation), share, scored)
                progress("points from parent to child", number + 1, len(config.share))
            step.items = len(rows)
        assert best is not None
        _, share, scored = best
        curve = pd.DataFrame(rows).assign(chosen=[row["share"] == share for row in rows])
        curve.to_csv(record.path("curve.csv"), index=False)
        card = {
            "made": "interpolated",
            "objective": tuned.head.provenance.get("card", {}).get("objective", "unknown"),
            "share_of_child": share,
            "child": tuned.head.encoder_id,
            "chosen_by": blend.metric,
            "validation": scored.validation,
            "test": scored.test,
        }
        state = blending.mean_weights([parent, child], [1 - share, share])
        head = blending.mean_head([tuned.start, tuned.head], [1 - share, share])
        kind = f"An image tower {share:g} of the way from its parent to its fine-tuned child (WiSE-FT), by fluoroscope"
        tuned_runs.save(blend, state, head, record.path(MODEL_FOLDER), kind, card)
        record.note(head=str(Path(MODEL_FOLDER) / HEAD_FILE))
    return Result(record.folder, curve, share)
