"""Fine-tuning of an image tower with a linear head, from the pixels or tokens that the cache holds.

In come an encoder, rows of pixels or tokens, labels and which rows train and choose; out go the tower's new weights
and the head. `recipe` holds every choice, `training` the loop, `checkpoints` what a killed one goes on from, `blending`
what can be made of finished ones; the other rooms are the loop's parts.
"""

from analysis.finetuning.checkpoints import Checkpoints
from analysis.finetuning.inputs import KeptResults
from analysis.finetuning.recipe import MONITORS, FinetuneConfig, study_recipe
from analysis.finetuning.result import FinetuneResult
from analysis.finetuning.starting import head_from_text
from analysis.finetuning.texts import Captions
from analysis.finetuning.training import finetune

__all__ = [
    "MONITORS",
    "Captions",
    "Checkpoints",
    "FinetuneConfig",
    "FinetuneResult",
    "KeptResults",
    "finetune",
    "head_from_text",
    "study_recipe",
]
