"""The contrastive objective against open_clip's own loss, plain loops, and a task small enough to be learnt at once."""

from __future__ import annotations

import itertools
import math

import numpy as np
import open_clip
import pytest
import torch
from open_clip.loss import ClipLoss
from torch import nn
from torch.nn import functional

from analysis import contrastive
from engine.errors import UsageError

LABELS = 3


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def small_vit(**changes: object) -> nn.Module:
    vision = {"image_size": 16, "patch_size": 4, "width": 16, "layers": 3, "head_width": 8, "pool_type": "tok"}
    text = {"context_length": 4, "vocab_size": 12, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    return open_clip.CLIP(8, {**vision, **changes}, text)


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


class StripeTask:
    """Images with up to three bright spots; label k is a spot in the k-th row of patches."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.names = torch.tensor([[10, name, 0, 11] for name in range(1, LABELS + 1)])

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        labels = (torch.rand(count, LABELS, generator=self.generator) < 0.4).float()
        column = torch.randint(0, 4, (count, LABELS), generator=self.generator)
        coverage = labels[:, :, None, None] * functional.one_hot(column, 4)[:, :, None, :]
        grid = torch.zeros(count, LABELS, 4, 4)
        for label in range(LABELS):
            grid[:, label, label] = coverage[:, label, 0]
        pixels = grid.sum(dim=1).repeat_interleave(4, 1).repeat_interleave(4, 2)
        return pixels[:, None].expand(-1, 3, -1, -1).contiguous(), labels, grid.flatten(2)

    def batches(self, count: int, with_coverage: bool = True):  # type: ignore[no-untyped-def]
        while True:
            pixels, labels, coverage = self.draw(count)
            chosen = torch.multinomial(labels + 0.01, 1, generator=self.generator)[:, 0]
            texts, text_of = chosen.unique(return_inverse=True)
            said = functional.one_hot(texts, LABELS).bool()
            yield contrastive.ContrastiveBatch(
                pixels, self.names[texts], text_of, contrastive.subset_mask(labels.bool(), said), self.names, labels,
                coverage if with_coverage else None,
            )  # fmt: skip


def test_train__learns_spots_in_seconds() -> None:
    task, model = StripeTask(), small_vit()
    config = contrastive.ContrastiveConfig(steps=150, warmup_steps=10, learning_rate=4e-3, average_decay=0.9)
    losses: list[float] = []
    averaged = contrastive.train(
        model, task.batches(32), LABELS, config, lambda step, terms, model: losses.append(terms["loss"])
    )
    pixels, labels, _ = StripeTask(9).draw(200)
    with torch.no_grad():
        scores = averaged.encode_image(pixels, normalize=True) @ averaged.encode_text(task.names, normalize=True).T
    for label in range(LABELS):
        positive, negative = scores[labels[:, label] == 1, label], scores[labels[:, label] == 0, label]
        assert (positive[:, None] > negative[None, :]).float().mean() > 0.8
    assert len(losses) == 150
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])


@pytest.mark.parametrize("parallel", [1, 2])
def test_train__same_seed_same_weights(parallel: int) -> None:
    config = contrastive.ContrastiveConfig(steps=4, warmup_steps=1, parallel=parallel)
    first, second = (
        contrastive.train(small_vit(), StripeTask().batches(8), LABELS, config).state_dict() for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_train__two_batches_a_step_give_the_mean_gradient() -> None:
    model = small_vit()
    config = contrastive.ContrastiveConfig(steps=2, warmup_steps=1)
    objective = contrastive.ContrastiveObjective(LABELS, config)
    parameters = [*model.parameters(), *objective.parameters()]
    source = StripeTask().batches(8)
    together = [next(source), next(source)]
    with contrastive._workers(2) as workers:
        contrastive._set_gradients(objective, model, parameters, together, 0.0, workers)
    found = [parameter.grad for parameter in parameters]
    loss = sum(objective(model, batch, 0.0)[0] for batch in together) / 2
    wanted = torch.autograd.grad(loss, parameters, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_train__says_where_the_batches_ended() -> None:
    source = StripeTask().batches(4)
    config = contrastive.ContrastiveConfig(steps=3, warmup_steps=0)
    with pytest.raises(UsageError, match="after 2 steps of 3"):
        contrastive.train(small_vit(), [next(source), next(source)], LABELS, config)


def test_train__a_spent_limit_ends_the_schedule_not_the_run() -> None:
    config = contrastive.ContrastiveConfig(steps=100_000, warmup_steps=1, limit_minutes=0.01)
    rates: list[float] = []
    contrastive.train(
        small_vit(), StripeTask().batches(4), LABELS, config, lambda step, terms, model: rates.append(terms["rate"])
    )
    assert len(rates) < 100_000
    assert rates[-1] < 0.5 * max(rates)


def test_learning_rate__warms_up_and_comes_down() -> None:
    config = contrastive.ContrastiveConfig(steps=100, warmup_steps=10, learning_rate=1.0, final_rate=0.1)
    rates = [contrastive.learning_rate(step / 100, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert all(late <= early for early, late in itertools.pairwise(rates[11:]))


def test_config__steps_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="steps 0"):
        contrastive.ContrastiveConfig(steps=0)
    with pytest.raises(UsageError, match="average_decay 1"):
        contrastive.ContrastiveConfig(steps=1, warmup_steps=0, average_decay=1)
