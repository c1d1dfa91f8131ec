"""The runner for GPUs on a device that is made up (`tests.engine.fake_cuda`): order, halving, capture, fallbacks."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.cuda_batches import CudaRunner
from engine.encoder import load_encoder
from tests import models
from tests.engine.fake_cuda import FakeCuda

ROWS = 8


@pytest.fixture
def cuda(monkeypatch) -> Iterator[FakeCuda]:
    device = FakeCuda(monkeypatch)
    with device:
        yield device
    assert device.races == []


class Means:
    """Embeds an image as its mean; has room for some rows, and may do what no graph can hold."""

    device = torch.device("cpu")
    preprocess = SimpleNamespace(size=(2, 2))

    def __init__(self, room: int = ROWS, asks: bool = False) -> None:
        self.room, self.asks = room, asks
        self.rows: list[int] = []

    def encode_pixels(self, pixels):
        pixels = torch.as_tensor(pixels)
        self.rows.append(len(pixels))
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if self.asks:
            pixels.sum().item()
        return pixels.reshape(len(pixels), -1).float().mean(1, keepdim=True)

    def encode_batch(self, pixels, *, image, layers):
        embedded = self.encode_pixels(pixels)
        return ({"image": embedded} if image else {}) | {layer: embedded + layer for layer in layers}


def run(runner: CudaRunner, batches: int, layers=(), *, rows: int = ROWS, checked=None) -> list[dict]:
    """Run batches as `engine.extract` does, some ahead; image r of batch b is of value 10 b + r."""
    under_way, answers = [], []

    def take() -> None:
        batch = under_way.pop(0)
        answer = runner.result(batch)
        assert checked is None or all(map(checked, answer.values()))
        answers.append({name: np.array(values)[: len(batch)] for name, values in answer.items()})

    for number in range(batches):
        batch = runner.new_batch()
        for row in range(rows):
            batch.add(bytes([row]) * 16, np.full((2, 2, 3), 10 * number + row, np.uint8), ("image",))
        runner.start(batch, True, list(layers))
        under_way.append(batch)
        while len(under_way) > runner.ahead:
            take()
    while under_way:
        take()
    return answers


def expected(batches: int, rows: int = ROWS) -> np.ndarray:
    return np.array([[10.0 * number + row for row in range(rows)] for number in range(batches)])


def embedded(answers: list[dict], name="image") -> np.ndarray:
    return np.stack([answer[name][:, 0] for answer in answers])


def test_batches_come_back_in_order_and_without_a_race(cuda):
    answers = run(CudaRunner(Means(), ROWS), 6, checked=cuda.host_may_read)
    np.testing.assert_array_equal(embedded(answers), expected(6))
    assert (cuda.captures, cuda.replays) == (1, 6)


def test_a_batch_that_is_not_full_goes_through_the_same_graph(cuda):
    encoder = Means()
    runner = CudaRunner(encoder, ROWS)
    np.testing.assert_array_equal(embedded(run(runner, 3, rows=5)), expected(3, 5))
    assert cuda.replays == 3 and set(encoder.rows) == {ROWS}


@pytest.mark.parametrize("room", [4, 3, 1])
def test_the_parts_of_a_halved_batch_keep_their_own_rows(cuda, caplog, room):
    """They leave one graph in one place of memory."""
    runner = CudaRunner(Means(room), ROWS)
    np.testing.assert_array_equal(embedded(run(runner, 5, checked=lambda values: True)), expected(5))
    fits = {4: 4, 3: 2, 1: 1}[room]
    assert runner.rows == fits and cuda.captures == 1 and cuda.replays >= 2 * ROWS // fits
    assert caplog.text.count("did not fit into the device's memory") == {4: 1, 2: 2, 1: 3}[fits]


def test_a_batch_that_does_not_fit_while_others_are_under_way(cuda):
    encoder = Means()
    runner = CudaRunner(encoder, ROWS)
    real, left = runner._forward, [2]

    def forward(*arguments):
        left[0] -= 1
        if left[0] == -1:
            encoder.room = 4
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments)

    runner._forward = forward
    np.testing.assert_array_equal(embedded(run(runner, 5)), expected(5))
    assert runner.rows == 4 and cuda.captures == 2


def test_batches_that_cannot_be_halved_evenly(cuda):
    runner = CudaRunner(Means(4), 7)
    answers = run(runner, 3, rows=7)
    np.testing.assert_array_equal(embedded(answers), expected(3, 7))
    assert runner.rows == 4  # 4 and 3 rows: the graph takes the first part


def test_a_device_without_room_for_one_row_is_an_error(cuda):
    with pytest.raises(torch.OutOfMemoryError):
        run(CudaRunner(Means(0), ROWS), 1)


def test_tokens_come_from_the_same_forward_pass_also_in_halves(cuda):
    for room in (ROWS, 4):
        answers = run(CudaRunner(Means(room), ROWS), 3, layers=(1, 2))
        for name, more in (("image", 0), (1, 1), (2, 2)):
            np.testing.assert_array_equal(embedded(answers, name), expected(3) + more)
    assert cuda.captures == 0


def test_a_tower_that_asks_for_values_is_launched_kernel_by_kernel(cuda, caplog):
    with caplog.at_level("INFO", logger="engine.cuda_batches"):
        answers = run(CudaRunner(Means(asks=True), ROWS), 4)
    np.testing.assert_array_equal(embedded(answers), expected(4))
    assert (cuda.captures, cuda.replays) == (0, 0)
    assert caplog.text.count("cannot be captured as a CUDA graph (operation not permitted") == 1


@pytest.mark.parametrize("build", [models.biomedclip_like, models.open_clip_pair])
def test_a_real_tower_is_captured_and_gives_the_embeddings_of_one_that_is_not(tmp_path, monkeypatch, build):
    """Nothing in a forward pass may come from Python's numbers: mean and standard deviation are on the device."""
    encoder = load_encoder(f"local-dir:{build(tmp_path)}", device="cpu")
    height, width = encoder.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, height, width, 3), np.uint8)
    plain = [encoder.encode_pixels(some).numpy() for some in pixels]
    with FakeCuda(monkeypatch) as cuda:
        runner = CudaRunner(encoder, 4)
        for some, values in zip(pixels, plain, strict=True):
            batch = runner.new_batch()
            for row in some:
                batch.add(b"k" * 16, row, ("image",))
            runner.start(batch, True, [])
            np.testing.assert_allclose(runner.result(batch)["image"], values, rtol=1e-4, atol=1e-5)
    assert (cuda.captures, cuda.replays, cuda.races) == (1, 3, [])
