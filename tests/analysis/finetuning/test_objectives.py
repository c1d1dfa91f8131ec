"""Losses against torchvision, open_clip and sums written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from analysis.finetuning import FinetuneConfig, objectives


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(0, 3, (7, 5))).requires_grad_()


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 2, (7, 5)).astype(float))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_torchvisions(logits: torch.Tensor, labels: torch.Tensor, gamma: float) -> None:
    found = objectives.focal_loss(logits, labels, gamma)
    expected = sigmoid_focal_loss(logits, labels, alpha=-1, gamma=gamma, reduction="mean")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)))


def by_hand(logit: float, label: float, positive: float, negative: float, margin: float) -> float:
    chance = 1 / (1 + np.exp(-logit))
    if label:
        return float(-((1 - chance) ** positive) * np.log(chance))
    shifted = max(chance - margin, 0)
    return float(-(shifted**negative) * np.log(1 - shifted))


@pytest.mark.parametrize(("positive", "negative", "margin"), [(0, 0, 0), (1, 4, 0.05), (0, 2, 0.2), (1, 3, 0)])
def test_asymmetric_is_the_papers_formula(
    logits: torch.Tensor, labels: torch.Tensor, positive: float, negative: float, margin: float
) -> None:
    found = objectives.asymmetric_loss(logits, labels, positive, negative, margin)
    expected = [
        by_hand(logit, label, positive, negative, margin)
        for logit, label in zip(logits.detach().numpy().ravel(), labels.numpy().ravel(), strict=True)
    ]
    assert float(found.detach()) == pytest.approx(np.mean(expected), rel=1e-9)
    if not (positive or negative or margin):
        torch.testing.assert_close(found, functional.binary_cross_entropy_with_logits(logits, labels))


@pytest.mark.parametrize("name", ["bce", "weighted_bce", "focal", "asymmetric"])
def test_far_logits_have_finite_losses_and_gradients(name: str) -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0], [0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    config = FinetuneConfig(objective=name, focal_gamma=0.5, negative_gamma=0.5)  # type: ignore[arg-type]
    loss = objectives.label_loss(config, labels.numpy(), torch.device("cpu"))(logits, labels)
    loss.backward()
    assert torch.isfinite(loss) and logits.grad is not None and torch.isfinite(logits.grad).all()


def test_contrast_of_different_texts_is_clips() -> None:
    rng = np.random.default_rng(2)
    image, text = (torch.from_numpy(rng.normal(size=(6, 8))) for _ in range(2))
    found = objectives.contrastive_loss(image, text, torch.arange(6), torch.tensor(7.0))
    normal = functional.normalize(image, dim=-1), functional.normalize(text, dim=-1)
    torch.testing.assert_close(found, ClipLoss()(*normal, logit_scale=torch.tensor(7.0)))


def test_a_text_that_images_share_is_the_positive_of_each() -> None:
    rng = np.random.default_rng(3)
    image, text = rng.normal(size=(5, 8)), rng.normal(size=(3, 8))
    of = np.array([0, 2, 0, 1, 0])
    cosines = image @ text.T / np.outer(np.linalg.norm(image, axis=1), np.linalg.norm(text, axis=1))
    logits = 4.0 * cosines
    to_text = [-np.log(np.exp(row[own]) / np.exp(row).sum()) for row, own in zip(logits, of, strict=True)]
    to_image = []
    for column, number in zip(logits.T, range(3), strict=True):
        chances = np.exp(column) / np.exp(column).sum()
        has = of == number
        to_image += [np.mean(-np.log(chances[has]))] * int(has.sum())
    found = objectives.contrastive_loss(
        torch.from_numpy(image), torch.from_numpy(text), torch.from_numpy(of), torch.tensor(4.0)
    )
    assert float(found) == pytest.approx((np.mean(to_text) + np.mean(to_image)) / 2)
