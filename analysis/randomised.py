"""Encoders whose image tower has forgotten what it learnt, wholly or from the top down.

In comes an encoder; out go copies in which weights are shuffled: each tensor keeps its values and loses their order, so
scales stay those of a trained network while nothing that was learnt remains. (Adebayo et al., Sanity Checks for
Saliency Maps, NeurIPS 2018, draw weights anew from the initial distribution, which a trained tower no longer tells.)
The encoder that came in is left as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from engine.trunks import describe_trunk

if TYPE_CHECKING:
    from engine.encoder import Encoder

BEHIND_THE_BLOCKS = {"proj", "ln_post", "norm", "fc_norm", "head", "fc", "attn_pool", "attnpool", "head_drop", "pool"}
"""What open_clip's and timm's towers call the parts after their last block, and nothing else by."""


def random_weights(encoder: Encoder, seed: int) -> Encoder:
    """Return a copy of an encoder whose whole image tower is shuffled."""
    return _shuffled(encoder, [name for name, _ in encoder.model.visual.named_parameters()], seed)


def cascade(encoder: Encoder, seed: int) -> Iterator[tuple[str, Encoder]]:
    """Give copies of an encoder, shuffled from the output down to the input, one part more each time.

    Yields
    ------
    (str, Encoder)
        What was shuffled last ("projection", "block 11", ..., "stem"), and the encoder with all of that shuffled.
    """
    visual = encoder.model.visual
    owner = {
        id(parameter): number for number, block in enumerate(encoder.trunk.blocks) for parameter in block.parameters()
    }
    behind, stem = [], []
    blocks: list[list[str]] = [[] for _ in encoder.trunk.blocks]
    for name, parameter in visual.named_parameters():
        number = owner.get(id(parameter))
        if number is not None:
            blocks[number].append(name)
        elif BEHIND_THE_BLOCKS & set(name.removeprefix("trunk.").split(".")[:2]):
            behind.append(name)
        else:
            stem.append(name)
    done: list[str] = []
    stages = [("projection", behind)]
    stages += [(f"block {number}", blocks[number]) for number in reversed(range(len(blocks)))]
    stages.append(("stem", stem))
    for said, names in stages:
        if names:
            done += names
            yield said, _shuffled(encoder, done, seed)


def _shuffled(encoder: Encoder, names: Sequence[str], seed: int) -> Encoder:
    copied = copy.copy(encoder)
    copied.model = copy.copy(encoder.model)
    # A shallow copy of a module shares its table of children, which must not see the new tower.
    if isinstance(copied.model, nn.Module):
        copied.model._modules = dict(encoder.model._modules)
    copied.model.visual = copy.deepcopy(encoder.model.visual)
    copied.trunk = describe_trunk(copied.model.visual)
    generator = torch.Generator().manual_seed(seed)
    wanted = set(names)
    with torch.no_grad():
        for name, parameter in copied.model.visual.named_parameters():
            # Drawn for every tensor, so that a part is shuffled in the same way at every stage.
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            if name in wanted:
                parameter.copy_(parameter.reshape(-1)[order].reshape(parameter.shape))
    copied.id = f"{encoder.id}-shuffled"
    return copied
