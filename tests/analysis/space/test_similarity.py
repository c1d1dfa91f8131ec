"""CKA and Procrustes against their definitions on full kernels, and scipy."""

from __future__ import annotations

import dask.array
import numpy as np
import pytest
from scipy.spatial import procrustes
from scipy.stats import special_ortho_group

from analysis.space import resampling, rows, similarity
from engine.errors import DataError


def spaces(seed: int = 0, count: int = 90, width: int = 7):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(count, width)) + 4
    return x, x @ generator.normal(size=(width, width)) + generator.normal(size=(count, width))


def unbiased_hsic(k, l):  # noqa: E741
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    n, ones = len(k), np.ones(len(k))
    through = ones @ k @ l @ ones
    return (np.trace(k @ l) + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * through / (n - 2)) / (n * (n - 3))


def cka(x, y, hsic=unbiased_hsic):
    k, l = x @ x.T, y @ y.T  # noqa: E741
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def plain_hsic(k, l):  # noqa: E741
    centre = np.eye(len(k)) - 1 / len(k)
    return np.trace(k @ centre @ l @ centre)


@pytest.mark.parametrize("widths", [(7, 7), (7, 3)])
def test_cka__equals_the_kernel_definition(widths):
    x, y = (each[:, :width] for each, width in zip(spaces(), widths, strict=True))
    assert similarity.linear_cka(x, y) == pytest.approx(cka(x, y), abs=1e-10)
    assert similarity.linear_cka(x, y, unbiased=False) == pytest.approx(cka(x, y, plain_hsic), abs=1e-10)


@pytest.mark.parametrize("other", [np.float32, np.float64])
def test_float32__equals_the_definitions_to_its_digits(monkeypatch, other):
    monkeypatch.setattr(rows, "BLOCK_ROWS", 16)
    x, y = spaces(8, width=12)
    x, y = (x + 20).astype(np.float32), y.astype(other)
    wide = x.astype(np.float64), y.astype(np.float64)
    assert similarity.linear_cka(x, y) == pytest.approx(cka(*wide), abs=1e-5)
    assert similarity.procrustes_disparity(x, y) == pytest.approx(procrustes(*wide)[2], abs=1e-5)


def test_interval_of_procrustes__is_that_of_resampled_patients(monkeypatch):
    monkeypatch.setattr(similarity, "_BAGGED_ROWS", 16)
    monkeypatch.setattr(rows, "BLOCK_ROWS", 7)
    x, y = spaces(9)
    groups = np.arange(90) // 2
    found = similarity.space_similarity(x, y, groups, replicates=20, permutations=0, seed=4)[1]
    drawn = []
    for w in resampling.resample_weights(groups, 20, 4).T[1:]:
        chosen = np.repeat(np.arange(90), w.astype(int))
        drawn.append(procrustes(x[chosen], y[chosen])[2])
    moved = np.percentile(drawn, [2.5, 97.5]) + found.value - np.mean(drawn)
    np.testing.assert_allclose([found.low, found.high], moved, atol=1e-5)


def test_procrustes__equals_scipy_and_pads_the_narrower_space():
    x, y = spaces(1)
    assert similarity.procrustes_disparity(x, y) == pytest.approx(procrustes(x, y)[2], abs=1e-7)
    padded = np.pad(y[:, :4], ((0, 0), (0, 3)))
    assert similarity.procrustes_disparity(x, y[:, :4]) == pytest.approx(procrustes(x, padded)[2], abs=1e-7)


def test_rotation_scale_and_shift__change_nothing():
    x, _ = spaces(2)
    turned = 3.0 * x @ special_ortho_group.rvs(7, random_state=0) + 11
    assert similarity.linear_cka(x, turned) == pytest.approx(1, abs=1e-9)
    assert similarity.procrustes_disparity(x, turned) == pytest.approx(0, abs=1e-6)


def test_unrelated_wide_spaces__have_no_unbiased_cka_but_a_plain_one():
    generator = np.random.default_rng(3)
    x, y = generator.normal(size=(2, 60, 200))
    assert abs(similarity.linear_cka(x, y)) < 0.1 < 0.5 < similarity.linear_cka(x, y, unbiased=False)


def test_blocks_that_end_at_different_rows__give_the_same():
    x, y = spaces(4)
    tiled = dask.array.from_array(x, chunks=(40, 7)), [y[:13], y[13:70], y[70:]]
    assert similarity.linear_cka(*tiled) == pytest.approx(similarity.linear_cka(x, y), abs=1e-12)


def test_null__pairs_patients_at_random_and_interval_holds_the_value():
    x, y = spaces(5)
    groups = np.arange(90) // 2
    found = {m.name: m for m in similarity.space_similarity(x, y, groups, replicates=60, permutations=12, seed=7)}
    orders = resampling.permuted_rows(groups, 12, 7)
    assert found["cka"].null == pytest.approx(np.mean([cka(x, y[order]) for order in orders]), abs=1e-5)
    assert found["procrustes"].null == pytest.approx(
        np.mean([procrustes(x, y[order])[2] for order in orders]), abs=1e-5
    )
    for each in found.values():
        assert each.low < each.value < each.high and each.p == pytest.approx(1 / 13)


def test_resamples_of_cka__do_not_count_copies_as_pairs():
    # With literal copies an unrelated wide space would look related in every resample.
    generator = np.random.default_rng(6)
    x, y = generator.normal(size=(2, 80, 150))
    found = similarity.space_similarity(x, y, replicates=40, permutations=5)[0]
    assert found.low < 0.1 and abs(found.value) < 0.1 and found.high < 0.25
    assert "4 samples a dimension" in similarity.space_similarity(x, y, replicates=2, permutations=2)[1].note


def test_constant_spaces_and_wrong_rows__are_told():
    x, y = spaces(7)
    cka_found, turned = similarity.space_similarity(np.ones((90, 3)), y, replicates=3, permutations=3)
    assert np.isnan(cka_found.value) and "constant" in cka_found.note
    assert np.isnan(turned.value) and "constant" in turned.note
    with pytest.raises(DataError, match="90 and 89 rows are no pairs"):
        similarity.linear_cka(x, y[:-1])
    with pytest.raises(DataError, match="at least 4 samples, got 1"):
        similarity.linear_cka(x[:1], y[:1])
    x[8, 0] = np.nan
    with pytest.raises(DataError, match="first row 8"):
        similarity.procrustes_disparity(x, y)
