"""The study's own recipe for the linear probe, transcribed: the training loop of arXiv 2506.14136.

In come un-normalised embeddings and truth of the training and validation rows; out goes a `ProbeResult`. The encoder is
frozen in that loop, so cached embeddings give what the tower would.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from analysis.heads import LinearHead
from analysis.probes.fitting import ProbeResult, check_part
from analysis.probes.threads import threads_for


@dataclass(frozen=True)
class PaperProbeSettings:
    """The study's recipe for the probe (its notebook, ``train_eval_biomedclip(mode="linearprobe")``)."""

    learning_rate: float = 1e-4
    weight_decay: float = 1e-2
    batch_size: int = 24
    epochs: int = 10
    patience: int = 5
    minimum_improvement: float = 1e-4


def paper_probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    val_x: np.ndarray,
    val_y: np.ndarray,
    *,
    label_names: Sequence[str],
    seed: int = 42,
    settings: PaperProbeSettings | None = None,
    encoder_id: str = "",
) -> ProbeResult:
    """Train the study's linear probe.

    One linear layer on un-normalised embeddings: weight Xavier-uniform, bias as torch's default; plain binary
    cross-entropy; AdamW; batches of 24 shuffled anew every epoch, the last one short; a cosine schedule stepped once an
    epoch over all epochs; validation loss as the mean over batches (the short one counting as much as the others); the
    best epoch's weights kept, an epoch being better if its loss is lower by more than 1e-4; stop after 5 epochs
    that are not.

    The study ran the tower under fp16 autocast during training; on cached embeddings that is a matter of the
    encoder's precision, and the head itself is trained in float32 on the CPU.

    Parameters
    ----------
    train_x, val_x : ndarray of float, (n, d) and (m, d)
        Un-normalised embeddings.
    train_y, val_y : ndarray of 0/1, (n, L) and (m, L)
    label_names : sequence of str, length L
    seed : int
        Of the weights and of the shuffling.
    settings : PaperProbeSettings, optional
    encoder_id : str
        Kept in the head.
    """
    begun = time.perf_counter()
    recipe = settings or PaperProbeSettings()
    names = tuple(label_names)
    x, y = (_tensor(each) for each in check_part(train_x, train_y, names, "training", False))
    x_val, y_val = (_tensor(each) for each in check_part(val_x, val_y, names, "validation", False))
    # A batch of 24 rows is too little to share among threads.
    with threads_for(0):
        best, best_epoch, history = _paper_loop(x, y, x_val, y_val, seed, recipe)
    trained = LinearHead(
        weight=best["weight"].double().numpy(),
        bias=best["bias"].double().numpy(),
        label_names=names,
        normalised=False,
        encoder_id=encoder_id,
        provenance={
            "recipe": "arXiv 2506.14136, linear probe",
            **asdict(recipe),
            "seed": seed,
            "best_epoch": best_epoch,
            "epochs_run": len(history),
            "train_samples": len(x),
            "train_positives": y.sum(dim=0).int().tolist(),
        },
    )
    return ProbeResult(trained, history, (), time.perf_counter() - begun)


def _paper_loop(
    x: torch.Tensor, y: torch.Tensor, x_val: torch.Tensor, y_val: torch.Tensor, seed: int, recipe: PaperProbeSettings
) -> tuple[dict[str, torch.Tensor], int, list[dict[str, float]]]:
    """Return the best epoch's parameters, its number (from 1), and one row an epoch."""
    generator = torch.Generator().manual_seed(seed)
    head = paper_head(x.shape[1], y.shape[1], generator)
    optimizer = torch.optim.AdamW(head.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=recipe.epochs)
    best_loss, best_epoch, waited = float("inf"), 0, 0
    best = {name: value.clone() for name, value in head.state_dict().items()}
    history: list[dict[str, float]] = []
    for epoch in range(1, recipe.epochs + 1):
        rate = float(schedule.get_last_lr()[0])
        order = torch.randperm(len(x), generator=generator)
        train_loss = _train_epoch(head, optimizer, x[order], y[order], recipe.batch_size)
        val_loss = _batch_loss(head, x_val, y_val, recipe.batch_size)
        schedule.step()
        history.append({"epoch": float(epoch), "learning_rate": rate, "train_loss": train_loss, "val_loss": val_loss})
        if val_loss < best_loss - recipe.minimum_improvement:
            best_loss, best_epoch, waited = val_loss, epoch, 0
            best = {name: value.clone() for name, value in head.state_dict().items()}
        else:
            waited += 1
            if waited >= recipe.patience:
                break
    return best, best_epoch, history


def paper_head(dimensions: int, labels: int, generator: torch.Generator) -> torch.nn.Linear:
    """Return the study's head, seeded: weight Xavier-uniform, bias uniform within 1/sqrt(d) as ``nn.Linear`` has it."""
    head = torch.nn.utils.skip_init(torch.nn.Linear, dimensions, labels)
    bound = dimensions**-0.5
    with torch.no_grad():
        torch.nn.init.xavier_uniform_(head.weight, generator=generator)
        torch.nn.init.uniform_(head.bias, -bound, bound, generator=generator)
    return head


def _train_epoch(
    head: torch.nn.Linear, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, batch_size: int
) -> float:
    losses = []
    for features, truth in zip(x.split(batch_size), y.split(batch_size), strict=True):
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(head(features), truth)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


@torch.no_grad()
def _batch_loss(head: torch.nn.Linear, x: torch.Tensor, y: torch.Tensor, batch_size: int) -> float:
    losses = [
        torch.nn.functional.binary_cross_entropy_with_logits(head(features), truth).item()
        for features, truth in zip(x.split(batch_size), y.split(batch_size), strict=True)
    ]
    return float(np.mean(losses))


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
