"""A training that is killed (SIGKILL, in its own process) at any step goes on to the weights of one left alone."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from analysis import finetuning as tuning
from analysis.finetuning import Captions, Checkpoints, FinetuneConfig, FinetuneResult
from engine.encoder import load_encoder
from engine.errors import CacheError, ModelError, TrainingError, UsageError
from tests import models
from tests.analysis.finetuning.tasks import LABELS, a_task, texts_of
from tests.analysis.tiny_encoder import tiny_encoder

FORK = multiprocessing.get_context("fork")  # a fresh interpreter would spend the test's time on imports
TRAIN, VAL = np.arange(26), np.arange(26, 40)
STEPS = 7  # an epoch
RECIPES: dict[str, dict[str, Any]] = {
    "whole tower, augmented, averaged": {"shift": 2, "rotation": 5.0, "contrast": 0.1, "ema_decay": 0.9},
    "last block": {"trainable": 1, "monitor": "map"},
    "adapters": {"trainable": "lora", "lora_rank": 2},
    "the study's": {"remake_optimizer": True, "schedule": "constant", "warmup": 0.0, "min_improvement": 1e-4},
    "bf16 in parts": {"autocast": "bf16", "micro_batch": 3, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_encoder("open_clip_token_vit", tmp_path_factory.mktemp("models"))


def config_of(name: str) -> FinetuneConfig:
    return FinetuneConfig(**{"epochs": 3, "batch_size": 4, "learning_rate": 3e-3, "seed": 5, **RECIPES[name]})


def train(encoder: Any, config: FinetuneConfig, folder: Path | None, kill_at: int | None = None) -> FinetuneResult:
    """Train, and die at a step's end where one is named (before its checkpoint is written)."""
    pixels, y = a_task(encoder, 40)
    steps = itertools.count(1)

    def progress(name: str, done: int, total: int | None) -> None:
        if name == "fine-tune" and next(steps) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints = None if folder is None else Checkpoints(folder, steps=2)
    return tuning.finetune(
        encoder, pixels, y, TRAIN, VAL, config, label_names=LABELS, progress=progress, checkpoints=checkpoints
    )


def killed(operation: Callable[[], Any]) -> bool:
    child = FORK.Process(target=operation)
    child.start()
    child.join(120)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def assert_same(found: FinetuneResult, expected: FinetuneResult) -> None:
    assert found.state.keys() == expected.state.keys()
    differing = [name for name in expected.state if not torch.equal(found.state[name], expected.state[name])]
    assert not differing
    np.testing.assert_array_equal(found.head.weight, expected.head.weight)
    np.testing.assert_array_equal(found.head.bias, expected.head.bias)
    unlike = ["seconds"]
    assert found.history.drop(columns=unlike).equals(expected.history.drop(columns=unlike))
    assert found.best_epoch == expected.best_epoch


@pytest.mark.parametrize("name", RECIPES)
def test_killed_at_some_steps_ends_with_the_same_weights(name: str, encoder: Any, tmp_path: Path) -> None:
    config = config_of(name)
    expected = train(encoder, config, None)
    for kill_at in (1, 6, 6, 5):  # each from where the one before came to
        assert killed(lambda kill_at=kill_at: train(encoder, config, tmp_path, kill_at))
    assert_same(train(encoder, config, tmp_path), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_killed_at_every_step_ends_with_the_same_weights(name: str, encoder: Any, tmp_path: Path) -> None:
    config = config_of(name)
    expected = train(encoder, config, None)
    for kill_at in range(1, 3 * STEPS + 1):
        folder = tmp_path / str(kill_at)
        assert killed(lambda kill_at=kill_at, folder=folder: train(encoder, config, folder, kill_at))
        assert_same(train(encoder, config, folder), expected)


def test_killed_between_any_two_file_operations_goes_on(encoder: Any, tmp_path: Path) -> None:
    config = config_of("last block")
    expected = train(encoder, config, None)
    for operation in range(1, 60, 12):
        folder = tmp_path / str(operation)
        child = FORK.Process(target=_killed_at_file, args=(encoder, config, folder, operation))
        child.start()
        child.join(120)
        assert child.exitcode in (0, -signal.SIGKILL)
        assert_same(train(encoder, config, folder), expected)
        assert [path.name for path in folder.glob("*.pt")].count("last.pt") == 1
        assert len(list(folder.glob("best-*.pt"))) == 1 and not list((folder / "tmp").iterdir())


def _killed_at_file(encoder: Any, config: FinetuneConfig, folder: Path, at: int) -> None:
    counted = itertools.count(1)

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if next(counted) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return run

    for name in ("replace", "fsync", "unlink"):
        setattr(os, name, dying(getattr(os, name)))
    train(encoder, config, folder)


def test_a_contrast_with_a_free_text_tower_goes_on_too(tmp_path: Path) -> None:
    encoder = load_encoder(f"local-dir:{models.open_clip_vit(tmp_path / 'model')}", device="cpu")
    pixels, y = a_task(encoder, 40)
    config = FinetuneConfig(
        epochs=2, batch_size=8, micro_batch=3, objective="contrastive", text_trainable=True, monitor="contrastive",
        learning_rate=1e-3,
    )  # fmt: skip
    captions = Captions.of(texts_of(y))

    def run(folder: Path | None, kill_at: int | None = None) -> FinetuneResult:
        steps = itertools.count(1)

        def progress(name: str, done: int, total: int | None) -> None:
            if name == "fine-tune" and next(steps) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoints = None if folder is None else Checkpoints(folder, steps=1)
        return tuning.finetune(
            encoder, pixels, y, TRAIN, VAL, config, captions=captions, progress=progress, checkpoints=checkpoints
        )

    expected = run(None)
    assert killed(lambda: run(tmp_path / "state", 3))
    found = run(tmp_path / "state")
    assert_same(found, expected)
    assert found.text_state.keys() == expected.text_state.keys() and len(found.text_state) > 5
    assert all(torch.equal(found.text_state[name], value) for name, value in expected.text_state.items())


def test_a_finished_training_is_not_done_again(encoder: Any, tmp_path: Path) -> None:
    config = config_of("last block")
    expected = train(encoder, config, tmp_path)
    seen: list[str] = []
    pixels, y = a_task(encoder, 40)
    found = tuning.finetune(
        encoder, pixels, y, TRAIN, VAL, config, label_names=LABELS, checkpoints=Checkpoints(tmp_path, steps=2),
        progress=lambda name, done, total: seen.append(name),
    )  # fmt: skip
    assert_same(found, expected)
    assert "fine-tune" not in seen


def test_a_diverging_loss_names_step_and_checkpoint_and_that_one_is_sound(encoder: Any, tmp_path: Path) -> None:
    config = FinetuneConfig(epochs=3, batch_size=4, learning_rate=1e30, warmup=0, gradient_clip=None)
    with pytest.raises(TrainingError, match=rf"at step \d+ .*last good checkpoint: {tmp_path}/last\.pt \(epoch 1"):
        train(encoder, config, tmp_path)
    one_step = FinetuneConfig(epochs=1, batch_size=26, learning_rate=1e38, warmup=0, gradient_clip=None)
    with pytest.raises(TrainingError, match="a validation logit is no finite number at step 1 "):
        train(encoder, one_step, tmp_path / "one step")
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["weights"].values())


def test_checkpoints_of_others_and_damaged_ones_are_refused(encoder: Any, tmp_path: Path) -> None:
    config = config_of("last block")
    train(encoder, config, tmp_path)
    with pytest.raises(UsageError, match=r"belongs to another training.*--overwrite"):
        train(encoder, FinetuneConfig(**{**config.__dict__, "learning_rate": 1e-4}), tmp_path)
    last = tmp_path / "last.pt"
    content = last.read_bytes()
    last.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"last\.pt is damaged"):
        train(encoder, config, tmp_path)
    torch.save({"format": 99, "fingerprint": ""}, last)
    with pytest.raises(ModelError, match="format 99"):
        train(encoder, config, tmp_path)
    torch.save(Path("/"), last)
    with pytest.raises(ModelError, match=r"last\.pt is damaged"):
        train(encoder, config, tmp_path)
    last.write_bytes(content)
    next(tmp_path.glob("best-*.pt")).unlink()
    with pytest.raises(ModelError, match=r"best-\d+\.pt is missing"):
        train(encoder, config, tmp_path)


def test_a_full_disk_is_one_clear_error_and_the_last_checkpoint_stays(encoder: Any, tmp_path: Path) -> None:
    config = config_of("last block")
    assert killed(lambda: train(encoder, config, tmp_path, 5))
    before = (tmp_path / "last.pt").read_bytes()

    def on_a_full_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
        try:
            train(encoder, config, tmp_path)
        except CacheError as error:
            os._exit(7 if "no space left" in str(error) and "last.pt" in str(error) else 8)
        os._exit(9)

    child = FORK.Process(target=on_a_full_disk)
    child.start()
    child.join(120)
    assert child.exitcode == 7
    assert (tmp_path / "last.pt").read_bytes() == before and not list((tmp_path / "tmp").iterdir())
    assert_same(train(encoder, config, tmp_path), train(encoder, config, None))
