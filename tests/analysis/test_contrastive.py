"""The contrastive objective against open_clip's own loss, plain loops and sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from torch import nn
from torch.nn import functional

from analysis import contrastive
from engine.errors import UsageError
from tests.analysis.small_towers import LABELS, random_tensor, small_vit


def test_caption_loss__distinct_captions_match_open_clip() -> None:
    image, text = random_tensor(6, 8), random_tensor(6, 8, seed=1)
    scale = torch.tensor(14.0)
    ours = contrastive.caption_loss(image, text, torch.arange(6), torch.zeros(6, 6, dtype=torch.bool), scale)
    theirs = ClipLoss()(functional.normalize(image, dim=-1), functional.normalize(text, dim=-1), scale)
    torch.testing.assert_close(ours, theirs)


def test_caption_loss__masks_as_a_loop_would() -> None:
    image, text = random_tensor(5, 8), random_tensor(3, 8, seed=1)
    text_of = torch.tensor([0, 1, 0, 2, 1])
    also_true = torch.zeros(5, 3, dtype=torch.bool)
    also_true[3, 0] = also_true[4, 2] = True
    scale = torch.tensor(5.0)
    cosine = (functional.normalize(image, dim=-1) @ functional.normalize(text, dim=-1).T).double().numpy()
    rows = []
    for i in range(5):
        others = [j for j in range(5) if j == i or not (also_true[i, text_of[j]] or text_of[j] == text_of[i])]
        rows.append(-5 * cosine[i, text_of[i]] + math.log(sum(math.exp(5 * cosine[i, text_of[j]]) for j in others)))
        others = [j for j in range(5) if j == i or not (also_true[j, text_of[i]] or text_of[j] == text_of[i])]
        rows.append(-5 * cosine[i, text_of[i]] + math.log(sum(math.exp(5 * cosine[j, text_of[i]]) for j in others)))
    loss = contrastive.caption_loss(image, text, text_of, also_true, scale)
    assert float(loss) == pytest.approx(np.mean(rows), rel=1e-5)


def test_caption_loss__one_shared_caption_costs_nothing() -> None:
    loss = contrastive.caption_loss(
        random_tensor(4, 8), random_tensor(1, 8), torch.zeros(4, dtype=torch.int64),
        torch.zeros(4, 1, dtype=torch.bool), torch.tensor(10.0),
    )  # fmt: skip
    assert float(loss) == pytest.approx(0.0, abs=1e-6)


def test_subset_mask__as_sets_say() -> None:
    rng = np.random.default_rng(0)
    images, texts = rng.random((20, 5)) < 0.5, rng.random((15, 5)) < 0.3
    mask = contrastive.subset_mask(torch.from_numpy(images), torch.from_numpy(texts)).numpy()
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            said = set(np.flatnonzero(text))
            assert mask[i, j] == (bool(said) and said <= set(np.flatnonzero(image)))


def test_region_loss__unknown_and_barely_touched_patches_do_not_count() -> None:
    patches, names = random_tensor(2, 4, 8), random_tensor(LABELS, 8, seed=1)
    coverage = torch.zeros(2, LABELS, 4)
    coverage[0, 0, 1] = 1.0
    changed = coverage.clone()
    changed[1, 2, 3] = torch.nan
    scale, bias = torch.tensor(4.0), torch.zeros(1, LABELS)
    base = contrastive.region_loss(patches, names, changed, scale, bias)
    other = patches.clone()
    other[1, 3] = random_tensor(8, seed=5)
    moved = contrastive.region_loss(other, names, changed, scale, bias)
    changed[1, 2, 3] = 0.01
    touched = contrastive.region_loss(patches, names, changed, scale, bias)
    torch.testing.assert_close(base, touched)
    assert not torch.isclose(base, moved)  # the patch still counts for the other labels
    assert torch.isfinite(base)


def test_region_loss__all_unknown_is_zero() -> None:
    coverage = torch.full((1, LABELS, 4), torch.nan)
    patches = random_tensor(1, 4, 8).requires_grad_()
    loss = contrastive.region_loss(patches, random_tensor(LABELS, 8), coverage, torch.tensor(1.0), torch.zeros(1))
    assert float(loss.detach()) == 0.0
    loss.backward()


def test_image_and_patches__last_block_gives_the_towers_own_tokens() -> None:
    visual = small_vit(output_tokens=True).visual.eval()
    pixels = random_tensor(2, 3, 16, 16)
    image, patches = contrastive.image_and_patches(visual, pixels, -1)
    pooled, tokens = visual(pixels)
    torch.testing.assert_close(image, pooled)
    torch.testing.assert_close(patches, tokens @ visual.proj)


def test_image_and_patches__other_towers_are_refused() -> None:
    with pytest.raises(UsageError, match="region_weight to 0"):
        contrastive.image_and_patches(nn.Linear(2, 2), random_tensor(1, 3, 4, 4), -2)
