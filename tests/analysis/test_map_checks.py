"""Shuffled towers, similarity of maps and faithfulness, on tiny towers and against scipy and plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from analysis import faithfulness, heatmap_nulls, map_sanity, randomised
from analysis.cam import TextTarget
from analysis.localization import energy_inside
from tests.analysis.tiny_encoder import some_pixels, tiny_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("towers")


@pytest.mark.parametrize("kind", ["open_clip_token_vit", "timm_token_vit", "cnn"])
def test_cascade_shuffles_one_part_more_each_time_and_leaves_the_original(kind: str, folder: Path) -> None:
    encoder = tiny_encoder(kind, folder)
    before = {name: value.clone() for name, value in encoder.model.visual.named_parameters()}
    changed: set[str] = set()
    stages = []
    for said, altered in randomised.cascade(encoder, seed=3):
        now = dict(altered.model.visual.named_parameters())
        # Tensors of one value only, such as fresh norms, cannot show that they were shuffled.
        differ = {name for name, value in now.items() if not torch.equal(value, before[name])}
        assert differ >= changed
        for name, value in now.items():
            torch.testing.assert_close(value.flatten().sort().values, before[name].flatten().sort().values)
        changed = differ
        stages.append(said)
    blocks = [f"block {number}" for number in reversed(range(len(encoder.trunk.blocks)))]
    assert stages == ["projection", *blocks, "stem"]
    assert changed == {name for name, value in before.items() if value.unique().numel() > 1}
    assert all(torch.equal(value, before[name]) for name, value in encoder.model.visual.named_parameters())
    whole = dict(randomised.random_weights(encoder, seed=3).model.visual.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in whole.items())


def test_similarity_is_spearmans_of_the_positive_parts() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(5, 6, 6)), rng.normal(size=(5, 6, 6))
    after[0] = before[0] ** 3
    after[1] = -1
    found = map_sanity.map_similarity(before, after)
    assert found[0] == pytest.approx(1)
    assert np.isnan(found[1])
    for row in (2, 3, 4):
        expected = spearmanr(np.maximum(before[row], 0).ravel(), np.maximum(after[row], 0).ravel()).statistic
        assert found[row] == pytest.approx(expected)


def test_mean_map_of_others_never_saw_the_patient() -> None:
    maps = [np.full((2, 2), 3.0), np.array([[2.0, 0], [0, -4]]), np.array([[0.0, 5], [0, 0]]), np.zeros((2, 2))]
    found = heatmap_nulls.mean_maps_of_others(maps, ["a", "a", "b", "c"])
    np.testing.assert_allclose(found[0], np.array([[0, 1], [0, 0]]) / 2)
    np.testing.assert_allclose(found[2], (np.ones((2, 2)) + np.array([[1, 0], [0, 0]])) / 3)
    assert heatmap_nulls.mean_maps_of_others(maps[:2], ["a", "a"]) == [None, None]


def test_other_label_is_one_that_the_image_lacks() -> None:
    names = ["A", "B", "C", "D"]
    drawn = {heatmap_nulls.other_label("A", names, ["A", "C"], np.random.default_rng(seed)) for seed in range(20)}
    assert drawn == {"B", "D"}
    assert heatmap_nulls.other_label("A", ["A", "B"], ["B"], np.random.default_rng(0)) is None


def test_annotators_are_scored_against_each_other_both_ways() -> None:
    one, two = np.zeros((10, 10), dtype=bool), np.zeros((10, 10), dtype=bool)
    one[0:4, 0:4], two[2:4, 0:8] = True, True
    found = {(a, b): scores for a, b, scores in heatmap_nulls.other_annotators({"one": one, "two": two}, 0.0)}
    assert found["one", "two"].energy == 8 / 16 == energy_inside(one.astype(float), two)
    assert found["two", "one"].pointing_game == 8 / 16
    assert found["one", "two"].iou == found["two", "one"].iou == 8 / 24
    assert found["one", "two"].best_dice == 16 / 32


def test_relevance_order_is_a_rank_whose_ties_a_seed_breaks() -> None:
    heat = np.array([[0.0, 0.5], [0.0, 1.0]], dtype=np.float32)
    ranks = faithfulness.relevance_order(heat, seed=1)
    assert ranks[1, 1] == 1 and ranks[0, 1] == pytest.approx(2 / 3)
    assert sorted([ranks[0, 0], ranks[1, 0]]) == pytest.approx([0, 1 / 3])
    drawn = {float(faithfulness.relevance_order(heat, seed)[0, 0]) for seed in range(20)}
    assert len(drawn) == 2


def test_faithful_maps_score_better_than_misleading_ones(folder: Path) -> None:
    encoder = tiny_encoder("cnn", folder)

    class Corner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, :1, :16, :16].mean(dim=(2, 3)) * self.weight

    encoder.model.visual = Corner()
    height, width = encoder.preprocess.size
    pixels = some_pixels(encoder) // 4
    pixels[:16, :16] = 250
    target = TextTarget(np.ones(1, dtype=np.float32), "corner", normalize=False)
    right, wrong = np.zeros((height, width), dtype=np.float32), np.ones((height, width), dtype=np.float32)
    right[:16, :16], wrong[:16, :16] = 1, 0
    good, bad = (faithfulness.faithfulness(encoder, pixels, target, heat, seed=0) for heat in (right, wrong))
    assert good.road > 0.1 > -0.1 > bad.road
    assert good.deletion < bad.deletion and good.insertion > bad.insertion
    # Deletion by hand: the corner's mean while its pixels, a share of the image, turn to the image's mean grey.
    share = 256 / (height * width)
    full = float(encoder.preprocess.normalise(torch.from_numpy(pixels)[None])[0, 0, :16, :16].mean())
    grey = np.broadcast_to(np.round(pixels.reshape(-1, 3).mean(axis=0)).astype(np.uint8), pixels.shape).copy()
    low = float(encoder.preprocess.normalise(torch.from_numpy(grey)[None])[0, 0, :16, :16].mean())
    gone = np.minimum(np.linspace(0, 1, faithfulness.STEPS + 1) / share, 1)
    assert good.deletion == pytest.approx(float((full + (low - full) * gone).mean()), abs=0.05)
