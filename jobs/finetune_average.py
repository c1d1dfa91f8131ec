"""`fluoro finetune average`: the mean of several fine-tuned children of one parent (model soups, ICML 2022).

Comes in: finished runs of `fluoro finetune` on the same data, with other seeds or recipes. Goes out: a run folder with
``soup.csv`` (each run, their uniform mean and the greedy soup, on validation and test) and ``model/``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import Field

from analysis.finetuning import blending
from engine.errors import UsageError
from jobs import tuned_runs
from jobs.finetune import MODEL_FOLDER
from jobs.progress import Progress
from jobs.runs import open_run


class Config(tuned_runs.BlendOptions):
    """What `fluoro finetune average` needs."""

    tuned: list[Path] = Field(min_length=2, description="run folders of fluoro finetune, of one parent and data set")
    how: Literal["uniform", "greedy"] = Field("greedy", description="all of them, or those that validation agrees to")


@dataclass(frozen=True)
class Result:
    """Where the run lies, the table of what was scored, and which runs are in the model."""

    folder: Path
    soups: pd.DataFrame
    members: tuple[str, ...]

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return each run beside the means."""
        return {"Fine-tuned runs and their means": self.soups}

    def lines(self) -> Iterator[str]:
        """Return what the model is made of and where it lies."""
        yield f"mean of: {', '.join(self.members)}"
        yield f"model: {self.folder / MODEL_FOLDER}"


def run(
    config: Config, *, out: Path | None = None, overwrite: bool = False, progress: Progress | None = None
) -> Result:
    """Average runs, score every one and the means, and save the mean that was asked for.

    Raises
    ------
    UsageError
        A folder that is no finished run, runs on other data or splits, an output that exists.
    ModelError
        Runs of different parents, labels or kinds of heads.
    """
    progress = progress or Progress()
    runs = [tuned_runs.open_tuned(folder) for folder in config.tuned]
    _check_same_data(runs)
    cache = tuned_runs.cache_of(runs[0], config.cache)
    with open_run("finetune average", config, out=out, cache=cache, overwrite=overwrite) as record:
        blend = tuned_runs.prepare(runs[0], config.by, cache, config.device, record, progress)
        states = [tuned_runs.child_state(tuned, blend.material.encoder) for tuned in runs]
        heads = [tuned.head for tuned in runs]

        def mean(members: Sequence[int]) -> tuple[dict[str, Any], Any]:
            chosen = [states[number] for number in members], [heads[number] for number in members]
            return blending.mean_weights(chosen[0]), blending.mean_head(chosen[1])

        # By members: a greedy soup asks for some means before they are tabled, and may end as one of the runs.
        validated: dict[tuple[int, ...], dict[str, float]] = {}

        def validation(members: Sequence[int]) -> dict[str, float]:
            if tuple(members) not in validated:
                validated[tuple(members)] = blend.validation(*mean(members))
            return validated[tuple(members)]

        with record.step("soups") as step:
            for number in range(len(runs)):
                validation([number])
                progress("runs scored", number + 1, len(runs))
            greedy = blending.greedy_soup(
                [blend.goodness(validation([number])) for number in range(len(runs))],
                lambda members: blend.goodness(validation(members)),
            )
            everything = list(range(len(runs)))
            soups_of = {"uniform mean": everything, "greedy soup": greedy}
            found = {tuned.folder.name: [number] for number, tuned in enumerate(runs)} | soups_of
            scored = {
                name: blend.scored(*mean(members), validation=validation(members)) for name, members in found.items()
            }
            rows = [{"what": name, "members": len(found[name]), **each.row()} for name, each in scored.items()]
            record.record_all([{"kind": "soup", **row} for row in rows])
            step.items = len(rows)
        soups = pd.DataFrame(rows)
        soups.to_csv(record.path("soup.csv"), index=False)
        asked = "greedy soup" if config.how == "greedy" else "uniform mean"
        members = soups_of[asked]
        state, head = mean(members)
        names = tuple(runs[number].folder.name for number in members)
        card = {
            "made": "averaged",
            "how": config.how,
            "members": [runs[number].head.encoder_id for number in members],
            "chosen_by": blend.metric,
            "validation": scored[asked].validation,
            "test": scored[asked].test,
        }
        kind = f"The mean of {len(members)} fine-tuned image towers of one parent ({config.how} soup), by fluoroscope"
        tuned_runs.save(blend, state, head, record.path(MODEL_FOLDER), kind, card)
    return Result(record.folder, soups, names)


def _check_same_data(runs: Sequence[tuned_runs.TunedRun]) -> None:
    """Refuse runs whose validation samples may have trained another one."""
    first = runs[0]
    for tuned in runs[1:]:
        for name in ("dataset", "data", "split", "model"):
            if getattr(tuned.config, name) != getattr(first.config, name):
                raise UsageError(
                    f"{tuned.folder} and {first.folder} were run with different {name}; only runs on the same data, "
                    "split and model can be averaged, or validation samples of one may have trained another"
                )
    if len({tuned.folder.resolve() for tuned in runs}) != len(runs):
        raise UsageError("a run is named twice; name different ones")
