"""Fine-tuning against a loop written by hand, and what must stay as it was."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from analysis import finetuning as tuning
from analysis import metrics
from analysis.finetuning import inputs, objectives, optimizing
from analysis.finetuning.augmentation import Augmentation
from analysis.finetuning.tower import TowerWithHead
from analysis.heads import LinearHead
from engine.encoder import load_encoder
from engine.errors import DataError, TrainingError, UsageError
from engine.model_folder import save_model_folder
from tests import models
from tests.analysis.finetuning.tasks import LABELS, a_task
from tests.analysis.tiny_encoder import KINDS, some_pixels, tiny_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def weights_of(encoder: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in encoder.model.visual.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


SHORT = tuning.FinetuneConfig(trainable=1, epochs=2, batch_size=8, learning_rate=1e-3)
TRAIN, VAL = np.arange(32), np.arange(32, 48)


# -- The study's recipe ------------------------------------------------------------------------------------------------


def test_study_recipe_equals_its_loop_written_by_hand(folder: Path) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    pixels, y = a_task(encoder, 60)
    train, val = np.arange(50), np.arange(50, 60)
    found = tuning.finetune(encoder, pixels, y, train, val, tuning.study_recipe(seed=3), label_names=LABELS)

    tower = copy.deepcopy(encoder.model.visual).requires_grad_(True).train()
    torch.manual_seed(3)
    head = nn.Linear(32, 2)
    nn.init.xavier_uniform_(head.weight)
    order = np.random.Generator(np.random.PCG64(3))
    images = encoder.preprocess.normalise(pixels)
    labels = torch.from_numpy(y).float()
    best, best_state, waited, losses = math.inf, None, 0, []
    for _ in range(10):
        optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=1e-5, weight_decay=1e-2)
        shuffled = train[order.permutation(50)]
        for start in range(0, 50, 24):
            rows = shuffled[start : start + 24]
            loss = nn.functional.binary_cross_entropy_with_logits(head(tower(images[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            value = float(nn.functional.binary_cross_entropy_with_logits(head(tower(images[val])), labels[val]))
        losses.append(value)
        if value < best - 1e-4:
            best, waited = value, 0
            best_state = copy.deepcopy(tower.state_dict()), head.weight.detach().clone()
        else:
            waited += 1
            if waited == 5:
                break
    assert best_state is not None
    np.testing.assert_allclose(found.history["bce"], losses, atol=2e-5)
    assert set(found.history["rate"]) == {1e-5}
    np.testing.assert_allclose(found.head.weight, best_state[1], atol=2e-5)
    for name, value in best_state[0].items():
        np.testing.assert_allclose(found.state[name], value, atol=1e-4, err_msg=name)


# -- What trains and what does not -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainable", ["all", "projection", 1, 2])
def test_only_the_free_part_changes(kind: str, trainable: Any, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    before = weights_of(encoder)
    pixels, y = a_task(encoder, 12)
    config = tuning.FinetuneConfig(trainable=trainable, epochs=1, batch_size=4, learning_rate=1e-2, warmup=0)
    found = tuning.finetune(encoder, pixels, y, np.arange(8), np.arange(8, 12), config)
    assert same(before, weights_of(encoder)), "the encoder that was handed in must stay as it is"
    assert not encoder.model.visual.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.model.visual.modules())
    changed = {name for name in before if not torch.equal(before[name], found.state[name])}
    names = [name for name, _ in encoder.model.visual.named_parameters()]
    block_names = [
        {f"{path}.{name}" for name, _ in block.named_parameters()} for path, block in _blocks_by_name(encoder)
    ]
    if trainable == "all":
        assert changed >= set(names) - {name for name in names if "relative" in name}
        return
    free_blocks = 0 if trainable == "projection" else trainable
    for block in block_names[: len(block_names) - free_blocks]:
        assert not changed & block
    for block in block_names[len(block_names) - free_blocks :]:
        assert changed & block
    last = "proj" if "open_clip" in kind else "head.proj.weight"
    assert last in changed
    first = next(name for name in names if "conv1" in name or "patch_embed" in name or "stem" in name)
    assert first not in changed
    assert not any("running" in name or "embedding" in name or "pos_embed" in name for name in changed)
    assert found.trained_weights < found.all_weights


def _blocks_by_name(encoder: Any) -> list[tuple[str, nn.Module]]:
    by_identity = {id(module): name for name, module in encoder.model.visual.named_modules()}
    return [(by_identity[id(block)], block) for block in encoder.trunk.blocks]


def test_batch_norm_keeps_its_statistics(folder: Path) -> None:
    encoder = tiny_encoder("cnn", folder)
    before = weights_of(encoder)
    pixels, y = a_task(encoder, 12)
    config = tuning.FinetuneConfig(epochs=1, batch_size=4, learning_rate=1e-2, warmup=0)
    found = tuning.finetune(encoder, pixels, y, np.arange(8), np.arange(8, 12), config)
    kept = [name for name in before if "running" in name or "num_batches" in name]
    assert kept and all(torch.equal(before[name], found.state[name]) for name in kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainable", ["all", "projection", 1])
def test_halves_of_the_tower_give_the_whole(kind: str, trainable: Any, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    model = TowerWithHead(encoder, tuning.FinetuneConfig(trainable=trainable), 2, None, normalize=False).eval()
    pixels = some_pixels(encoder, 3)
    with torch.no_grad():
        expected = encoder.model.visual(encoder.preprocess.normalise(pixels))
        found = model.embed(model.frozen(torch.from_numpy(pixels)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["open_clip_token_vit", "open_clip_average_vit"])
def test_tokens_kept_in_memory_train_as_pixels_do(kind: str, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    pixels, y = a_task(encoder)
    kept = tuning.finetune(encoder, pixels, y, TRAIN, VAL, SHORT)
    again = tuning.finetune(encoder, pixels, y, TRAIN, VAL, _with(SHORT, token_memory=0))
    np.testing.assert_allclose(kept.history["bce"], again.history["bce"], rtol=1e-4)
    np.testing.assert_allclose(kept.head.weight, again.head.weight, atol=1e-4)


def test_frozen_part_runs_once_an_image(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    pixels, y = a_task(encoder)
    reads: list[int] = []

    class Counting:
        def __len__(self) -> int:
            return len(pixels)

        def __getitem__(self, rows: np.ndarray) -> np.ndarray:
            reads.append(len(rows))
            return pixels[rows]

    tuning.finetune(encoder, Counting(), y, TRAIN, VAL, _with(SHORT, epochs=3))
    assert sum(reads) == len(TRAIN) + len(VAL)
    reads.clear()
    tuning.finetune(encoder, Counting(), y, TRAIN, VAL, _with(SHORT, epochs=3, shift=2))
    for_the_estimate = 1 + 2
    assert sum(reads) == 3 * len(TRAIN) + len(VAL) + for_the_estimate
    tuning.finetune(encoder, pixels, y, TRAIN, VAL, _with(SHORT, token_memory=1000))
    assert "token_memory" in caplog.text


def _with(config: tuning.FinetuneConfig, **changes: Any) -> tuning.FinetuneConfig:
    return tuning.FinetuneConfig(**{**config.__dict__, **changes})


# -- What comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "trainable"), [("open_clip_token_vit", "all"), ("open_clip_average_vit", 2)])
def test_learns_what_can_be_seen_and_gives_the_best_epoch(kind: str, trainable: Any, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    pixels, y = a_task(encoder, 120)
    train, val = np.arange(90), np.arange(90, 120)
    config = tuning.FinetuneConfig(
        trainable=trainable, epochs=8, batch_size=16, learning_rate=3e-3, monitor="auroc_macro", patience=8, shift=1,
        contrast=0.05, seed=2,
    )  # fmt: skip
    found = tuning.finetune(encoder, pixels, y, train, val, config, label_names=LABELS)
    assert found.history["auroc_macro"].max() > 0.95
    assert found.history["train_loss"].iloc[-1] < found.history["train_loss"].iloc[0]
    best = found.history.loc[found.history["auroc_macro"].idxmax()]
    assert found.best_epoch == best["epoch"] and bool(best["best"])

    tower = copy.deepcopy(encoder.model.visual)
    tower.load_state_dict(found.state)
    with torch.no_grad():
        features = tower(encoder.preprocess.normalise(pixels[val])).numpy()
    scores = found.head.logits(features)
    assert metrics.auroc(y[val], scores).mean() == pytest.approx(best["auroc_macro"], abs=1e-6)
    bce = nn.functional.binary_cross_entropy_with_logits(torch.from_numpy(scores), torch.from_numpy(y[val]).double())
    assert float(bce) == pytest.approx(best["bce"], rel=1e-4)
    assert found.head.label_names == LABELS and found.images_per_second > 0
    card = found.card()
    assert card["validation"]["auroc_macro"] == best["auroc_macro"] and card["recipe"]["trainable"] == trainable


def test_result_becomes_an_encoder_of_its_own(tmp_path: Path) -> None:
    encoder = load_encoder(f"local-dir:{models.open_clip_vit(tmp_path / 'parent')}", device="cpu")
    pixels, y = a_task(encoder, 16)
    found = tuning.finetune(encoder, pixels, y, np.arange(12), np.arange(12, 16), SHORT, label_names=LABELS)
    state = {f"visual.{name}": value for name, value in found.state.items()}
    tuned = load_encoder(
        f"local-dir:{save_model_folder(encoder, state, tmp_path / 'tuned', 'card', name='tuned')}", device="cpu"
    )
    assert tuned.id != encoder.id and tuned.id.startswith("tuned-")
    assert torch.equal(tuned.encode_text(["edema"]), encoder.encode_text(["edema"]))
    logits = found.head.logits(tuned.encode_pixels(pixels).numpy())
    val = nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits[12:]), torch.from_numpy(y[12:]).double()
    )
    assert float(val) == pytest.approx(found.history["bce"].min(), rel=1e-3)


def test_same_seed_same_result_and_global_randomness_untouched(folder: Path) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    pixels, y = a_task(encoder)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = tuning.finetune(encoder, pixels, y, TRAIN, VAL, _with(SHORT, shift=2, contrast=0.1))
    assert torch.equal(torch.rand(1), expected)
    two = tuning.finetune(encoder, pixels, y, TRAIN, VAL, _with(SHORT, shift=2, contrast=0.1))
    other = tuning.finetune(encoder, pixels, y, TRAIN, VAL, _with(SHORT, shift=2, contrast=0.1, seed=1))
    assert same(one.state, two.state)
    np.testing.assert_array_equal(one.head.weight, two.head.weight)
    assert not np.allclose(one.head.weight, other.head.weight)


def test_works_within_inference_mode_and_without_grad(folder: Path) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    pixels, y = a_task(encoder)
    expected = tuning.finetune(encoder, pixels, y, TRAIN, VAL, SHORT)
    with torch.inference_mode():
        found = tuning.finetune(encoder, pixels, y, TRAIN, VAL, SHORT)
    assert same(found.state, expected.state)


def test_a_head_that_nothing_improves_on_is_kept(folder: Path) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    pixels, y = a_task(encoder)
    with torch.no_grad():
        features = encoder.model.visual(encoder.preprocess.normalise(pixels)).double().numpy()
    weight = np.linalg.lstsq(np.c_[features, np.ones(len(features))], 8.0 * y - 4.0, rcond=None)[0]
    head = LinearHead(weight[:-1].T, weight[-1], LABELS, normalised=False)
    config = _with(SHORT, learning_rate=0.5, patience=1, gradient_clip=None)
    found = tuning.finetune(encoder, pixels, y, TRAIN, VAL, config, head=head)
    assert found.best_epoch == 0
    assert list(found.history["epoch"]) == [0, 1], "patience 1: it stops after the first epoch that is no better"
    np.testing.assert_allclose(found.head.weight, head.weight, rtol=1e-5)
    assert same(found.state, weights_of(encoder))
    assert found.head.label_names == LABELS
    assert found.card()["best_epoch"] == 0


def test_normalised_head_starts_where_it_stood(folder: Path) -> None:
    encoder = tiny_encoder("cnn", folder)
    pixels, y = a_task(encoder, 12)
    text = np.random.default_rng(0).standard_normal((2, 32))
    head = tuning.head_from_text(text, LABELS, scale=10.0)
    config = _with(SHORT, trainable="projection")
    found = tuning.finetune(encoder, pixels, y, np.arange(8), np.arange(8, 12), config, head=head)
    with torch.no_grad():
        features = encoder.model.visual(encoder.preprocess.normalise(pixels[8:])).numpy()
    cosine = features @ text.T / np.linalg.norm(features, axis=1)[:, None] / np.linalg.norm(text, axis=1)
    logits, labels = torch.from_numpy(10 * cosine), torch.from_numpy(y[8:]).double()
    bce = nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert found.head.normalised
    assert found.history["bce"].iloc[0] == pytest.approx(float(bce), rel=1e-4)


def test_head_from_text_begins_at_the_prevalence() -> None:
    text = np.random.default_rng(1).standard_normal((3, 8)) + 2
    head = tuning.head_from_text(text, ("a", "b", "c"), scale=5.0, prevalence=np.array([0.5, 0.1, 0.01]))
    np.testing.assert_allclose(1 / (1 + np.exp(-head.bias)), [0.5, 0.1, 0.01], rtol=1e-5)
    np.testing.assert_allclose(head.weight.sum(axis=0), 0, atol=1e-5)


# -- Parts -------------------------------------------------------------------------------------------------------------


def test_rates_rise_and_fall_as_said() -> None:
    config = _with(SHORT, warmup=0.2)
    shares = [optimizing.rate_share(step, 50, config) for step in range(50)]
    np.testing.assert_allclose(shares[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(shares[10:], 0.5 * (1 + np.cos(np.pi * np.arange(40) / 40)))
    assert all(optimizing.rate_share(step, 50, _with(config, schedule="constant", warmup=0)) == 1 for step in range(50))


def test_deeper_blocks_learn_slower(folder: Path) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    model = TowerWithHead(encoder, tuning.FinetuneConfig(), 2, None, normalize=False)
    names = {id(weights): name for name, weights in model.tower.named_parameters()}
    levels = {names[id(weights)]: level for level, weights in model.layered_weights()}
    assert levels["proj"] == levels["ln_post.weight"] == levels["transformer.resblocks.2.mlp.c_fc.weight"] == 0
    assert levels["transformer.resblocks.1.ln_1.bias"] == 1 and levels["transformer.resblocks.0.ln_1.bias"] == 2
    assert levels["conv1.weight"] == levels["positional_embedding"] == levels["class_embedding"] == 3
    assert set(levels) == {name for name, _ in model.tower.named_parameters()}


def test_class_weights_are_negatives_over_positives() -> None:
    y = np.zeros((8, 3), dtype=int)
    y[:2, 0] = y[:, 1] = 1
    np.testing.assert_allclose(objectives.positive_weights(y, 5.0), [3.0, 1.0, 5.0])


def test_augmentation_moves_and_never_mirrors() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (40, 12, 10, 3), dtype=np.uint8))
    rng = np.random.Generator(np.random.PCG64(0))
    moving = Augmentation(shift=3)
    moved = moving.apply(pixels, moving.draw(40, rng))
    padded = np.pad(pixels.numpy(), ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    seen = set()
    for image, found in zip(padded, moved.numpy(), strict=True):
        places = [
            (top, left)
            for top in range(7)
            for left in range(7)
            if np.array_equal(image[top : top + 12, left : left + 10], found)
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 15 and min(min(place) for place in seen) == 0 and max(max(place) for place in seen) == 6
    toning = Augmentation(contrast=0.2)
    toned = toning.apply(pixels, toning.draw(40, rng))
    assert toned.dtype == torch.uint8 and not torch.equal(toned, pixels)
    correlation = np.corrcoef(toned[0].numpy().ravel(), pixels[0].numpy().ravel())[0, 1]
    assert correlation > 0.98


def test_progress_counts_images(folder: Path) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    pixels, y = a_task(encoder)
    seen: list[tuple[str, int, int | None]] = []
    tuning.finetune(encoder, pixels, y, TRAIN, VAL, SHORT, progress=lambda *step: seen.append(step))
    training = [step for step in seen if step[0] == "fine-tune"]
    assert training[-1] == ("fine-tune", 2 * len(TRAIN), 2 * len(TRAIN))
    assert [step[1] for step in training] == sorted(step[1] for step in training)


# -- What is refused ---------------------------------------------------------------------------------------------------


def test_wrong_requests_are_named(folder: Path) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    pixels, y = a_task(encoder)
    run = tuning.finetune
    with pytest.raises(DataError, match=r"in both train and val, first 31"):
        run(encoder, pixels, y, TRAIN, np.arange(31, 40), SHORT)
    with pytest.raises(DataError, match="none; look at the split"):
        run(encoder, pixels, y, TRAIN, np.array([], dtype=int), SHORT)
    with pytest.raises(DataError, match="47 images but 48"):
        run(encoder, pixels[:47], y, TRAIN, VAL, SHORT)
    with pytest.raises(DataError, match=r"0\.\.47"):
        run(encoder, pixels, y, TRAIN, np.array([48]), SHORT)
    with pytest.raises(DataError, match="uint8"):
        run(encoder, pixels.astype(np.float32), y, TRAIN, VAL, SHORT)
    with pytest.raises(DataError, match="3 label names for 2 labels"):
        run(encoder, pixels, y, TRAIN, VAL, SHORT, label_names=("a", "b", "c"))
    with pytest.raises(UsageError, match="3 blocks"):
        run(encoder, pixels, y, TRAIN, VAL, _with(SHORT, trainable=4))
    with pytest.raises(UsageError, match="embeddings of 5"):
        run(encoder, pixels, y, TRAIN, VAL, SHORT, head=LinearHead(np.ones((2, 5)), np.zeros(2), LABELS, False))
    with pytest.raises(UsageError, match="CUDA"):
        run(encoder, pixels, y, TRAIN, VAL, _with(SHORT, autocast="fp16"))
    with pytest.raises(DataError, match=r"'map'.*no positives"):
        run(encoder, pixels, np.where(np.arange(48)[:, None] < 32, y, 0), TRAIN, VAL, _with(SHORT, monitor="map"))
    with pytest.raises(TrainingError, match=r"loss is nan at step \d+ .*last good checkpoint: none was written"):
        run(encoder, pixels, y, TRAIN, VAL, _with(SHORT, learning_rate=1e30, gradient_clip=None, warmup=0, epochs=3))
    wrongs = ({"epochs": 0}, {"trainable": 0}, {"layer_decay": 0.0}, {"monitor": "accuracy"}, {"learning_rate": -1})
    for wrong in wrongs:
        with pytest.raises(UsageError):
            tuning.FinetuneConfig(**wrong)


def test_kept_results_of_one_training_serve_the_next(folder: Path) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    pixels, y = a_task(encoder, 24)
    config = tuning.FinetuneConfig(trainable=1, epochs=1, batch_size=8)
    kept = inputs.KeptResults()
    tuning.finetune(encoder, pixels, y, np.arange(12), np.arange(12, 16), config, kept=kept)
    assert kept.lacking(np.arange(24)).tolist() == list(range(16, 24))
    with_kept = tuning.finetune(encoder, pixels, y, np.arange(4, 20), np.arange(20, 24), config, kept=kept)
    without = tuning.finetune(encoder, pixels, y, np.arange(4, 20), np.arange(20, 24), config)
    np.testing.assert_allclose(with_kept.head.weight, without.head.weight, atol=1e-5)
