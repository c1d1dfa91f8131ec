"""The training loop: it learns a task, repeats itself, and says what went wrong."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from analysis import contrastive, contrastive_training
from engine.errors import UsageError
from tests.analysis.small_towers import LABELS, StripeTask, small_vit


def test_train__learns_spots_in_seconds() -> None:
    task, model = StripeTask(), small_vit()
    config = contrastive.ContrastiveConfig(steps=150, warmup_steps=10, learning_rate=4e-3, average_decay=0.9)
    losses: list[float] = []
    averaged = contrastive_training.train(
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
        contrastive_training.train(small_vit(), StripeTask().batches(8), LABELS, config).state_dict() for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_train__two_batches_a_step_give_the_mean_gradient() -> None:
    model = small_vit()
    config = contrastive.ContrastiveConfig(steps=2, warmup_steps=1)
    objective = contrastive.ContrastiveObjective(LABELS, config)
    parameters = [*model.parameters(), *objective.parameters()]
    source = StripeTask().batches(8)
    together = [next(source), next(source)]
    with contrastive_training._workers(2) as workers:
        contrastive_training._set_gradients(objective, model, parameters, together, 0.0, workers)
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
        contrastive_training.train(small_vit(), [next(source), next(source)], LABELS, config)


def test_train__a_spent_limit_ends_the_schedule_not_the_run() -> None:
    config = contrastive.ContrastiveConfig(steps=100_000, warmup_steps=1, limit_minutes=0.01)
    rates: list[float] = []
    contrastive_training.train(
        small_vit(), StripeTask().batches(4), LABELS, config, lambda step, terms, model: rates.append(terms["rate"])
    )
    assert len(rates) < 100_000
    assert rates[-1] < 0.5 * max(rates)


def test_learning_rate__warms_up_and_comes_down() -> None:
    config = contrastive.ContrastiveConfig(steps=100, warmup_steps=10, learning_rate=1.0, final_rate=0.1)
    rates = [contrastive_training.learning_rate(step / 100, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert all(late <= early for early, late in itertools.pairwise(rates[11:]))


def test_config__steps_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="steps 0"):
        contrastive.ContrastiveConfig(steps=0)
    with pytest.raises(UsageError, match="average_decay 1"):
        contrastive.ContrastiveConfig(steps=1, warmup_steps=0, average_decay=1)
