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
from pydantic import Field, field_validator

from analysis.finetuning import blending
from engine.errors import UsageError
from jobs import tuned_runs
from jobs.config import JobConfig, path_or_url
from jobs.finetune import MODEL_FOLDER
from jobs.progress import Progress
from jobs.runs import open_run


class Config(JobConfig):
    """What `fluoro finetune average` needs."""

    tuned: list[Path] = Field(min_length=2, description="run folders of fluoro finetune, of one parent and data set")
    how: Literal["uniform", "greedy"] = Field("greedy", description="all of them, or those that validation agrees to")
    by: str | None = Field(None, description="validation metric that chooses; the first run's own if empty")
    cache: Path | str | None = Field(None, description="folder of the embedding cache; the first run's own if empty")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")

    @field_validator("cache", mode="before")
    @classmethod
    def _url_or_path(cls, value: Any) -> Any:
        return path_or_url(value) if isinstance(value, str) else value


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

        with record.step("soups") as step:
            alone = []
            for number in range(len(runs)):
                alone.append(blend.validation(states[number], heads[number]))
                progress("runs scored", number + 1, len(runs))
            greedy = blending.greedy_soup(
                [blend.goodness(scores) for scores in alone],
                lambda members: blend.goodness(blend.validation(*mean(members))),
            )
            everything = list(range(len(runs)))
            found = {tuned.folder.name: [number] for number, tuned in enumerate(runs)}
            found |= {"uniform mean": everything, "greedy soup": greedy}
            rows = []
            for name, members in found.items():
                state, head = mean(members)
                val, test = blend.validation(state, head), blend.test(state, head)
                row = {"what": name, "members": len(members), **_named("val", val), **_named("test", test)}
                record.record("soup", **row)
                rows.append(row)
            step.items = len(rows)
        soups = pd.DataFrame(rows)
        soups.to_csv(record.path("soup.csv"), index=False)
        members = greedy if config.how == "greedy" else everything
        state, head = mean(members)
        names = tuple(runs[number].folder.name for number in members)
        card = {
            "made": "averaged",
            "how": config.how,
            "members": [runs[number].head.encoder_id for number in members],
            "chosen_by": blend.metric,
            "validation": blend.validation(state, head),
            "test": blend.test(state, head),
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


def _named(part: str, scores: dict[str, float]) -> dict[str, float]:
    return {f"{part}_{name}": value for name, value in scores.items()}
