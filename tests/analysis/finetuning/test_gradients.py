"""A batch that is split has the gradient of the whole one; what is estimated of its memory; and adapters."""

from __future__ import annotations

import builtins
import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from analysis import finetuning as tuning
from analysis.finetuning import Captions, FinetuneConfig, gradients, material, memory, optimizing, training
from analysis.finetuning.texts import TextSide
from analysis.finetuning.tower import TowerWithHead
from analysis.heads import LinearHead
from engine.class_token import class_token_tail
from engine.encoder import load_encoder
from engine.errors import DataError, ModelError, UsageError
from tests import models
from tests.analysis.finetuning.tasks import LABELS, a_task, texts_of
from tests.analysis.tiny_encoder import KINDS, some_pixels, tiny_encoder

TRAIN, VAL = np.arange(32), np.arange(32, 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Any:
    return load_encoder(f"local-dir:{models.open_clip_vit(folder / 'pair')}", device="cpu")


def with_(config: FinetuneConfig, **changes: Any) -> FinetuneConfig:
    return FinetuneConfig(**{**config.__dict__, **changes})


# -- Splitting ---------------------------------------------------------------------------------------------------------


def gradients_of(encoder: Any, config: FinetuneConfig, micro_batch: int) -> dict[str, torch.Tensor]:
    """Return the gradients of one batch of 16, from a fresh copy of everything."""
    torch.manual_seed(0)
    pixels, y = a_task(encoder, 16)
    rows = np.arange(16)
    head = LinearHead(np.random.default_rng(0).normal(size=(2, 32)), np.zeros(2), LABELS, True)
    captions = Captions.of([*texts_of(y), ""])
    embedded = encoder.encode_text(list(captions.texts)).numpy() if config.contrasts else None
    captions = Captions(captions.texts, captions.of_row, None if config.text_trainable else embedded)
    one_more = np.concatenate([pixels, pixels[:1]]), np.concatenate([y, y[:1]])
    learnt = material.Material(*one_more, rows, np.array([16]), LABELS)
    run = training._Training(encoder, learnt, config, head, captions, None, None, None)
    source = run._inputs(rows, augment=True)
    run.model.train_free_part()
    labels = torch.from_numpy(y).float()
    drawn = config.augmentation.draw(16, np.random.Generator(np.random.PCG64(3)))
    loss = run.gradients.set(source, gradients.Batch(rows, source.read(rows), labels, drawn), micro_batch)
    found = {name: value.grad for name, value in run.numbers.weights.items()}
    return {"loss": torch.tensor(loss), **{name: value for name, value in found.items() if value is not None}}


@pytest.mark.parametrize(
    "recipe",
    [
        {"objective": "bce"},
        {"objective": "focal", "shift": 2, "rotation": 4.0},
        {"objective": "bce", "contrastive_weight": 0.5},
        {"objective": "contrastive", "text_trainable": True, "monitor": "contrastive"},
        {"objective": "asymmetric", "contrastive_weight": 1.0, "text_trainable": True},
    ],
)
@pytest.mark.parametrize("micro_batch", [1, 5])
def test_a_split_batch_has_the_gradient_of_the_whole(pair: Any, recipe: dict, micro_batch: int) -> None:
    config = FinetuneConfig(**recipe)
    whole, split = gradients_of(pair, config, 16), gradients_of(pair, config, micro_batch)
    assert whole.keys() == split.keys() and len(whole) > 10
    if config.text_trainable:
        assert any(name.startswith("texts.model.") for name in whole)
    for name, value in whole.items():
        assert float(value.abs().max()) > 0 or "bias" in name or "ln" in name or "embedding" in name, name
        torch.testing.assert_close(split[name], value, rtol=2e-3, atol=2e-6 + 1e-4 * float(value.abs().max()))


def test_gradient_of_the_contrast_is_autograds_of_the_plain_loop(pair: Any) -> None:
    config = FinetuneConfig(objective="contrastive", text_trainable=True, monitor="contrastive")
    found = gradients_of(pair, config, 4)
    pixels, y = a_task(pair, 16)
    texts = texts_of(y)
    having = [number for number, text in enumerate(texts) if text]
    model = copy.deepcopy(pair.model).requires_grad_(True)
    image = nn.functional.normalize(model.encode_image(pair.preprocess.normalise(pixels[having])), dim=-1)
    distinct = sorted({texts[number] for number in having}, key=[text for text in texts if text].index)
    words = nn.functional.normalize(model.encode_text(pair.tokenizer(distinct)), dim=-1)
    logits = pair.logit_scale * image @ words.T
    own = torch.tensor([distinct.index(texts[number]) for number in having])
    picked = torch.arange(len(having)), own
    loss = -(logits.log_softmax(1)[picked].mean() + logits.log_softmax(0)[picked].mean()) / 2
    loss.backward()
    assert float(found["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    for name, value in model.named_parameters():
        if name.startswith("visual."):
            ours = found[f"tower.{name.removeprefix('visual.')}"]
        elif name.startswith("logit"):
            continue
        else:
            ours = found.get(f"texts.model.{name}", torch.zeros_like(value))
        expected = torch.zeros_like(value) if value.grad is None else value.grad
        torch.testing.assert_close(ours, expected, rtol=2e-3, atol=1e-5 + 1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_and_recomputed_training_is_plain_training(folder: Path, checkpointing: bool) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    pixels, y = a_task(encoder)
    plain = FinetuneConfig(epochs=2, batch_size=8, learning_rate=1e-3)
    expected = tuning.finetune(encoder, pixels, y, TRAIN, VAL, plain)
    split = with_(plain, micro_batch=3, gradient_checkpointing=checkpointing)
    found = tuning.finetune(encoder, pixels, y, TRAIN, VAL, split)
    assert found.micro_batch == 3 and expected.micro_batch == 8
    np.testing.assert_allclose(found.history["train_loss"], expected.history["train_loss"], rtol=1e-3)
    np.testing.assert_allclose(found.head.weight, expected.head.weight, atol=2e-3)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_what_goes_through_and_changes_nothing_else(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    pixels, y = a_task(encoder)
    config = FinetuneConfig(epochs=1, batch_size=8, learning_rate=1e-3, shift=2)
    expected = tuning.finetune(encoder, pixels, y, TRAIN, VAL, with_(config, micro_batch=2))
    real = TowerWithHead.embed

    def embed(self: TowerWithHead, entered: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and len(entered) > 3:
            raise error
        return real(self, entered)

    monkeypatch.setattr(TowerWithHead, "embed", embed)
    found = tuning.finetune(encoder, pixels, y, TRAIN, VAL, config)
    assert found.micro_batch == 2 and "with the same gradient" in caplog.text
    np.testing.assert_allclose(found.head.weight, expected.head.weight, atol=1e-6)


def test_what_does_not_fit_is_split_and_said_before_the_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    pixels, y = a_task(encoder)
    caplog.set_level(logging.INFO, logger="analysis")
    config = FinetuneConfig(epochs=1, batch_size=16)
    tuning.finetune(encoder, pixels, y, TRAIN, VAL, config)
    assert "16 samples at once" in caplog.text and "available" in caplog.text
    assert caplog.text.index("memory: weights") < caplog.text.index("epoch 1 of 1")
    monkeypatch.setattr(memory, "available_bytes", lambda device: 3_000_000)
    caplog.clear()
    found = tuning.finetune(encoder, pixels, y, TRAIN, VAL, config)
    assert found.micro_batch < 16 and f"go through {found.micro_batch} samples at a time" in caplog.text


def test_kept_bytes_are_those_of_the_layers_inputs() -> None:
    first, second = nn.Linear(10, 20, bias=False), nn.Linear(20, 5, bias=False)
    spared = {value.untyped_storage().data_ptr() for module in (first, second) for value in module.parameters()}

    def forward(count: int) -> torch.Tensor:
        return second(torch.relu(first(torch.ones(count, 10)))).sum()

    # kept are: the first's input, and relu's output, which is the second's input
    assert memory.kept_bytes(lambda: forward(3), spared) == 4 * 3 * (10 + 20)
    need = memory.estimate([first, second], forward, copies=1)
    assert need.sample == 4 * 30 and need.batch == 0
    free = 4 * (200 + 100)
    assert (need.weights, need.gradients, need.moments, need.copies) == (free, free, 2 * free, free)
    available = need.fixed - need.weights + int(1.25 * 5 * 120)
    assert need.fitting(64, int(available / 0.85) + 1) in (4, 5) and need.fitting(64, 10**9) == 64
    assert need.fitting(64, 0) == 1


# -- The last block for the class token alone --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_tokens_last_block_gives_the_whole_ones_numbers_and_gradients(kind: str, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    tail = class_token_tail(encoder.trunk)
    assert (tail is not None) == ("token" in kind)
    if tail is None:
        return
    visual = encoder.model.visual
    last = len(encoder.trunk.blocks) - 1
    tokens = encoder.trunk.tokens(encoder.preprocess.normalise(some_pixels(encoder, 3)), last).detach()
    results = []
    for path in (tail, lambda tokens: encoder.trunk.from_tokens(tokens, last)):
        entered = tokens.clone().requires_grad_()
        weights = [value.requires_grad_() for value in visual.parameters()]
        found = path(entered)
        pulled = torch.autograd.grad(found.square().sum(), [entered, *weights], allow_unused=True)
        results.append([found.detach(), *(torch.zeros(1) if value is None else value for value in pulled)])
    visual.requires_grad_(False)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5 + 1e-4 * float(expected.abs().max()))


# -- Adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["timm_token_vit", "timm_average_vit", "open_clip_token_vit", "open_clip_average_vit"])
@pytest.mark.parametrize("from_block", [None, -1])
def test_adapters_train_alone_and_merge_into_plain_weights(kind: str, from_block: int | None, folder: Path) -> None:
    pytest.importorskip("peft")
    encoder = tiny_encoder(kind, folder)
    before = {name: value.clone() for name, value in encoder.model.visual.state_dict().items()}
    pixels, y = a_task(encoder, 24)
    images = encoder.preprocess.normalise(pixels)
    depth = len(encoder.trunk.blocks)
    source = pixels if from_block is None else encoder.trunk.tokens(images, depth - 1).numpy()
    config = FinetuneConfig(
        trainable="lora", from_block=from_block, lora_rank=2, epochs=2, batch_size=8, learning_rate=1e-2, warmup=0
    )
    found = tuning.finetune(encoder, source, y, np.arange(16), np.arange(16, 24), config)
    assert found.state.keys() == before.keys()
    first = 0 if from_block is None else depth - 1
    changed = {name for name, value in before.items() if not torch.equal(found.state[name], value)}
    numbers = {int(part) for name in changed for part in name.split(".") if part.isdigit()}
    assert numbers == set(range(first, depth)) and all("blocks" in name for name in changed)
    assert not any("bias" in name or "ln_" in name or "norm" in name for name in changed)
    for name in changed:  # what an adapter adds has its rank
        added = (found.state[name] - before[name]).double()
        strengths = torch.linalg.svdvals(added)
        # merging rounds in float32
        assert int((strengths > 1e-5 * strengths[0] + 1e-6).sum()) <= 2, name
    tower = copy.deepcopy(encoder.model.visual)
    tower.load_state_dict(found.state)
    with torch.no_grad():
        logits = torch.from_numpy(found.head.logits(tower(images[16:]).numpy()))
    bce = nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(y[16:]).double())
    assert float(bce) == pytest.approx(found.history["bce"].min(), rel=1e-4)


def test_own_weights_of_an_attention_stay_to_the_bit_while_adapters_train(folder: Path) -> None:
    pytest.importorskip("peft")
    encoder = tiny_encoder("open_clip_token_vit", folder)
    model = TowerWithHead(encoder, FinetuneConfig(trainable="lora", learning_rate=1e-2), 2, None, normalize=False)
    free = list(model.free_weights.values())
    optimizer = torch.optim.SGD(free, lr=0.1)
    images = encoder.preprocess.normalise(some_pixels(encoder, 4))
    for _ in range(5):
        model.tower(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = encoder.model.visual.state_dict()
    now = {name.replace("base_layer.", ""): value for name, value in model.tower.state_dict().items()}
    assert all(torch.equal(now[name], value) for name, value in before.items())


def test_adapters_name_what_they_need(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cnn = tiny_encoder("cnn", folder)
    pixels, y = a_task(cnn, 12)
    config = FinetuneConfig(trainable="lora")
    with pytest.raises(UsageError, match="CNN"):
        tuning.finetune(cnn, pixels, y, np.arange(8), np.arange(8, 12), config)
    real = builtins.__import__

    def without_peft(name: str, *rest: Any, **more: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    vit = tiny_encoder("open_clip_token_vit", folder)
    pixels, y = a_task(vit, 12)
    with pytest.raises(ModelError, match=r"pip install 'fluoroscope\[lora\]'"):
        tuning.finetune(vit, pixels, y, np.arange(8), np.arange(8, 12), config)


# -- Tokens, towers that stay, texts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["timm_token_vit", "timm_average_vit", "open_clip_token_vit"])
def test_tokens_of_a_block_train_as_its_pixels_do(kind: str, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    pixels, y = a_task(encoder)
    depth = len(encoder.trunk.blocks)
    with torch.no_grad():
        tokens = encoder.trunk.tokens(encoder.preprocess.normalise(pixels), depth - 2).numpy()
    config = FinetuneConfig(trainable=2, epochs=2, batch_size=8, learning_rate=1e-3)
    expected = tuning.finetune(encoder, pixels, y, TRAIN, VAL, config)
    found = tuning.finetune(encoder, tokens, y, TRAIN, VAL, with_(config, trainable="all", from_block=depth - 2))
    assert found.trained_weights == expected.trained_weights
    np.testing.assert_allclose(found.history["bce"], expected.history["bce"], rtol=1e-3)
    half = tuning.finetune(
        encoder, tokens.astype(np.float16), y, TRAIN, VAL, with_(config, trainable="all", from_block=-2)
    )
    np.testing.assert_allclose(half.history["bce"], expected.history["bce"], rtol=1e-2)


def test_a_locked_tower_trains_its_head_alone_from_embeddings_computed_once(folder: Path) -> None:
    encoder = tiny_encoder("cnn", folder)
    pixels, y = a_task(encoder)
    config = FinetuneConfig(trainable="none", epochs=3, batch_size=8, learning_rate=1e-2)
    found = tuning.finetune(encoder, pixels, y, TRAIN, VAL, config)
    before = encoder.model.visual.state_dict()
    assert all(torch.equal(found.state[name], value) for name, value in before.items()) and found.trained_weights == 0
    assert found.history["train_loss"].is_monotonic_decreasing


def test_the_running_average_is_what_is_validated_and_kept(folder: Path) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    pixels, y = a_task(encoder)
    config = FinetuneConfig(trainable="none", epochs=1, batch_size=8, learning_rate=0.01, ema_decay=0.5, warmup=0.0)
    seen: list[np.ndarray] = []
    real = optimizing.RunningAverage.update

    def update(self: Any) -> None:
        seen.append(self._weights["head.weight"].detach().numpy().copy())
        real(self)

    first = TowerWithHead(encoder, config, 2, None, normalize=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizing.RunningAverage, "update", update)
        found = tuning.finetune(encoder, pixels, y, TRAIN, VAL, config, head=_head_of(first))
    average = first.head.weight.detach().numpy()
    for step, weight in enumerate(seen, start=1):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    assert found.best_epoch == 1
    np.testing.assert_allclose(found.head.weight, average, atol=1e-5)


def _head_of(model: TowerWithHead) -> LinearHead:
    return LinearHead(model.head.weight.detach().numpy(), model.head.bias.detach().numpy(), LABELS, normalised=False)


def test_a_contrast_brings_images_to_their_texts(pair: Any) -> None:
    pixels, y = a_task(pair, 96)
    captions = Captions.of(texts_of(y))
    assert len(captions.texts) == 4 and (captions.of_row == -1).sum() == 14
    embedded = Captions(captions.texts, captions.of_row, np.random.default_rng(0).normal(size=(4, 32)))
    config = FinetuneConfig(objective="contrastive", monitor="contrastive", epochs=6, batch_size=16, learning_rate=2e-3)
    found = tuning.finetune(pair, pixels, y, np.arange(64), np.arange(64, 96), config, captions=embedded)
    contrast = found.history["contrastive"]
    assert contrast.min() < 0.6 * contrast.iloc[0]
    assert list(found.text_state) == ["logit_scale"]
    with pytest.raises(DataError, match="have 1 distinct texts"):
        TextSide(pair, Captions.of(["edema"] * 4), True, np.arange(4))
    with pytest.raises(UsageError, match="give captions"):
        tuning.finetune(pair, pixels, y, np.arange(64), np.arange(64, 96), config)


# -- What is refused ---------------------------------------------------------------------------------------------------


def test_labels_without_positives_in_training_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = tiny_encoder("open_clip_token_vit", folder)
    pixels, y = a_task(encoder)
    config = FinetuneConfig(trainable="none", epochs=1)
    lacking = y.copy()
    lacking[TRAIN, 1] = 0
    found = tuning.finetune(encoder, pixels, lacking, TRAIN, VAL, config, label_names=LABELS)
    assert found.untrained_labels == ("right",) and "absence of: right" in caplog.text
    assert found.card()["untrained_labels"] == ["right"]
    lacking[TRAIN] = 0
    with pytest.raises(DataError, match="none of the 2 labels has a positive among the 32 training samples"):
        tuning.finetune(encoder, pixels, lacking, TRAIN, VAL, config)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"from_block": -1, "shift": 2}, "excludes augmentation (shift 2)"),
        ({"from_block": 1, "trainable": 2}, "leave trainable 2 out"),
        ({"monitor": "contrastive"}, "needs the contrast"),
        ({"text_trainable": True}, "by the contrast alone"),
        ({"objective": "contrastive", "trainable": "none"}, "nothing to train"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"ema_decay": 1.0}, "below 1"),
        ({"trainable": "some"}, "not 'some'"),
    ],
)
def test_choices_that_exclude_each_other_are_named(wrong: dict, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        FinetuneConfig(**wrong)
    assert said in str(raised.value)


def test_a_cnn_has_no_tokens_to_train_from(folder: Path) -> None:
    encoder = tiny_encoder("cnn", folder)
    pixels, y = a_task(encoder, 12)
    with pytest.raises(UsageError, match="no tokens between blocks"):
        tuning.finetune(encoder, pixels, y, np.arange(8), np.arange(8, 12), FinetuneConfig(from_block=1))
    vit = tiny_encoder("open_clip_token_vit", folder)
    pixels, y = a_task(vit, 12)
    with pytest.raises(UsageError, match="no block 9"):
        tuning.finetune(vit, pixels, y, np.arange(8), np.arange(8, 12), FinetuneConfig(from_block=9))
    with pytest.raises(DataError, match="not float"):
        tuning.finetune(vit, pixels, y, np.arange(8), np.arange(8, 12), FinetuneConfig(from_block=1))
