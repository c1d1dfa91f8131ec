"""Bootstrap against a plain loop that resamples rows and calls scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as oracle

from analysis import bootstrap
from analysis.metrics import LABEL_METRICS, OVERALL_METRICS, Prediction, summary
from engine.errors import DataError, UsageError

EXACT = {"rtol": 0, "atol": 1e-12}


def random_study(seed: int = 0, count: int = 90, labels: int = 6, group_count: int = 40) -> tuple:
    generator = np.random.default_rng(seed)
    y = generator.random((count, labels)) < np.array([0.6, 0.3, 0.1, 0.05, 0.02, 0.2][:labels])
    y[0, :] = True
    groups = np.array([f"patient {number}" for number in generator.integers(0, group_count, count)], dtype=object)
    predictions = {}
    for name, strength in (("good", 2.0), ("poor", 0.2), ("tied", 1.0)):
        scores = generator.normal(size=y.shape) + strength * y
        if name == "tied":
            scores = np.round(scores)
        predictions[name] = Prediction(scores, scores > 0.8)
    names = tuple(f"label {number}" for number in range(labels))
    return y, predictions, groups, names


def loop_over_resamples(y, prediction, codes, counts) -> dict[str, list]:
    """Draw the rows of each resample and score them one resample at a time.

    A label that a resample lacks enters the means of AUROC and AP with its value of the sample.
    """
    own_aurocs = [_or_nan(oracle.roc_auc_score, *both) for both in zip(y.T, prediction.scores.T, strict=True)]
    own_aps = [_or_nan(oracle.average_precision_score, *both) for both in zip(y.T, prediction.scores.T, strict=True)]
    drawn: dict[str, list] = {name: [] for name in (*OVERALL_METRICS, *LABEL_METRICS)}
    for count in counts:
        rows = np.repeat(np.arange(len(y)), count[codes])
        truth, scores, decisions = y[rows], prediction.scores[rows], prediction.decisions[rows]
        average = {"average": None, "zero_division": 0}
        precision, recall, f1, positives = oracle.precision_recall_fscore_support(truth, decisions, **average)
        aurocs = [_or_nan(oracle.roc_auc_score, *both) for both in zip(truth.T, scores.T, strict=True)]
        aps = [_or_nan(oracle.average_precision_score, *both) for both in zip(truth.T, scores.T, strict=True)]
        for name, value in {
            "f1_macro": oracle.f1_score(truth, decisions, average="macro", zero_division=0),
            "f1_micro": oracle.f1_score(truth, decisions, average="micro", zero_division=0),
            "exact_match": oracle.accuracy_score(truth, decisions),
            "lrap": oracle.label_ranking_average_precision_score(truth, scores),
            "coverage_error": oracle.coverage_error(truth, scores),
            "map": np.nanmean(np.where(np.isnan(aps), own_aps, aps)),
            "auroc_macro": np.nanmean(np.where(np.isnan(aurocs), own_aurocs, aurocs)),
            "hamming": oracle.hamming_loss(truth, decisions),
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "auroc": aurocs,
            "ap": aps,
            "prevalence": truth.mean(axis=0),
            "predicted_rate": decisions.mean(axis=0),
            "positives": positives,
            "auroc_micro": oracle.roc_auc_score(truth.ravel(), scores.ravel()),
            "ranking_loss": oracle.label_ranking_loss(truth, scores),
            "over_prediction": decisions.sum() / truth.sum(),
        }.items():
            drawn[name].append(value)
    return drawn


def _or_nan(metric, truth, scores) -> float:
    undefined = not truth.any() or (metric is oracle.roc_auc_score and truth.all())
    return np.nan if undefined else metric(truth, scores)


def test_bootstrap_metrics__equals_a_loop_over_the_same_resamples(monkeypatch):
    y, predictions, groups, names = random_study()
    del predictions["poor"]
    monkeypatch.setattr(bootstrap, "usable_cores", lambda: 1)
    monkeypatch.setattr(bootstrap, "_BLOCK", (36, 36))
    result = bootstrap.bootstrap_metrics(y, predictions, groups, label_names=names, replicates=41, seed=3)
    codes, counts = bootstrap.resample_counts(groups, 41, 3)
    for row, prediction in enumerate(predictions.values()):
        expected = loop_over_resamples(y, prediction, codes, counts)
        for column, (metric, label) in enumerate(result.columns):
            if metric in ("brier", "ece"):  # not of logits; tests/analysis/metrics/test_calibration.py has them
                assert np.isnan(result.replicates[row, :, column]).all()
                continue
            if (metric, label is None) == ("over_prediction", False):
                with np.errstate(invalid="ignore", divide="ignore"):
                    rates = np.array(expected["predicted_rate"]) / np.array(expected["prevalence"])
                expected["over_prediction of labels"] = np.where(np.isfinite(rates), rates, np.nan)
                metric = "over_prediction of labels"
            values = np.array(expected[metric])
            if label is not None:
                values = values[:, names.index(label)]
            np.testing.assert_allclose(result.replicates[row, :, column], values, err_msg=f"{metric} {label}", **EXACT)


def test_resamples__draw_whole_groups():
    groups = np.array(["b", "a", "b", "c", "a"], dtype=object)
    codes, counts = bootstrap.resample_counts(groups, 200, 0)
    np.testing.assert_array_equal(codes, [1, 0, 1, 2, 0])
    assert (counts.sum(axis=1) == 3).all()
    assert abs(counts.mean(axis=0) - 1).max() < 0.2
    np.testing.assert_array_equal(counts, bootstrap.resample_counts(groups, 200, 0)[1])
    assert (counts != bootstrap.resample_counts(groups, 200, 1)[1]).any()


def test_interval_and_difference__are_percentiles_of_the_replicates():
    y, predictions, groups, names = random_study()
    result = bootstrap.bootstrap_metrics(y, predictions, groups, label_names=names, replicates=300, seed=1, level=0.9)
    column = result.columns.index(("lrap", None))
    low, high = np.percentile(result.replicates[0, :, column], [5, 95])
    interval = result.interval("good", "lrap")
    np.testing.assert_allclose([interval.low, interval.high], [low, high])
    assert interval.low < interval.value < interval.high and interval.replicates == 300
    difference = result.difference("good", "poor", "lrap")
    np.testing.assert_allclose(difference.value, interval.value - result.interval("poor", "lrap").value)
    paired = result.replicates[0, :, column] - result.replicates[1, :, column]
    np.testing.assert_allclose([difference.low, difference.high], np.percentile(paired, [5, 95]))
    assert difference.low > 0
    assert result.difference("good", "good", "map") == (0.0, 0.0, 0.0, 300)


def test_rare_label__interval_counts_the_replicates_that_have_it():
    y, predictions, groups, names = random_study()
    y[:, 3] = False
    y[7, 3] = True
    result = bootstrap.bootstrap_metrics(y, predictions, groups, label_names=names, replicates=400, seed=1)
    interval = result.interval("good", "auroc", names[3])
    assert 200 < interval.replicates < 300  # 1 - 1/e of them have the only positive's patient
    y[7, 3] = False
    nothing = bootstrap.bootstrap_metrics(y, predictions, groups, label_names=names, replicates=20, seed=1)
    interval = nothing.interval("good", "ap", names[3])
    assert np.isnan([interval.value, interval.low, interval.high]).all() and interval.replicates == 0
    assert np.isfinite(nothing.interval("good", "map").value)


def rare_study(seed: int, count: int = 120) -> tuple:
    """Twelve labels, half of them with one to three positives, and probabilities that a calibrated model might say."""
    generator = np.random.default_rng(seed)
    odds = np.log(np.array([0.4, 0.2, 0.1, 0.05, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01, 0.01, 0.01]))
    scores = 1 / (1 + np.exp(-(odds + generator.normal(size=(count, 12)))))
    y = generator.random(scores.shape) < scores
    y[generator.integers(0, count, 12), np.arange(12)] = True
    decisions = scores > np.quantile(scores, 0.9, axis=0)
    return y, Prediction(scores, decisions), generator.integers(0, 90, count)


@pytest.mark.parametrize("seed", range(4))
def test_rare_labels__every_interval_holds_its_own_value(seed):
    y, prediction, groups = rare_study(seed)
    names = tuple(f"label {number}" for number in range(12))
    other = Prediction(prediction.scores[::-1], prediction.decisions[::-1])
    result = bootstrap.bootstrap_metrics(
        y, {"one": prediction, "two": other}, groups, label_names=names, replicates=400, seed=seed
    )
    table = result.table()
    outside = table[(table["value"] < table["low"]) | (table["value"] > table["high"])]
    assert not len(outside), outside
    assert (table.loc[table["metric"].isin(bootstrap.BIASED), "low"] >= 0).all()
    for metric in ("map", "ece", "f1_macro"):
        drawn = result.replicates[0, :, result.columns.index((metric, None))]
        moved = drawn - drawn.mean() + result.values[0, result.columns.index((metric, None))]
        expected = np.clip(np.percentile(moved, [2.5, 97.5]), 0, 1)
        found = result.interval("one", metric)
        np.testing.assert_allclose([found.low, found.high], expected, **EXACT)
        in_table = table[(table.setting == "one") & (table.metric == metric) & table.label.isna()].iloc[0]
        np.testing.assert_allclose([in_table.low, in_table.high], expected, **EXACT)
        apart = result.difference("one", "two", metric)
        assert apart.low < apart.value < apart.high


def test_macro_means__are_over_the_labels_of_the_sample_in_every_resample():
    """A label that knows its single positive would leave the mean with it; held, it moves nothing."""
    generator = np.random.default_rng(0)
    y = generator.random((60, 3)) < 0.4
    y[:, 2] = False
    y[5, 2] = True
    scores = generator.normal(size=y.shape)
    scores[5, 2] = 9.0
    prediction = Prediction(scores, scores > 0)
    result = bootstrap.bootstrap_metrics(
        y, {"a": prediction}, np.arange(60), label_names=("x", "y", "z"), replicates=300
    )
    for mean, metric in (("map", "ap"), ("auroc_macro", "auroc")):
        columns = [result.replicates[0, :, result.columns.index((metric, label))] for label in ("x", "y")]
        np.testing.assert_allclose(
            result.replicates[0, :, result.columns.index((mean, None))], (columns[0] + columns[1] + 1.0) / 3, **EXACT
        )


def test_intervals__cover_what_other_samples_of_this_size_give():
    """The mean of each metric over samples that were not seen lies in 95 % intervals nearly as often."""

    def drawn(seed: int) -> tuple:
        y, prediction, _ = rare_study(seed)
        return y[:, :4], Prediction(prediction.scores[:, :4], prediction.decisions[:, :4])

    metrics, unseen, inside = ("ece", "map", "auroc_macro", "f1_macro"), [], []
    for seed in range(500):
        y, prediction = drawn(10_000 + seed)
        unseen.append([summary(y, *prediction)["overall"][metric] for metric in metrics])
    expected = np.mean(unseen, axis=0)
    for seed in range(120):
        y, prediction = drawn(seed)
        found = bootstrap.bootstrap_metrics(
            y, {"a": prediction}, np.arange(len(y)), label_names=tuple("wxyz"), replicates=200, seed=seed
        )
        ends = np.array([found.interval("a", metric)[1:3] for metric in metrics])
        inside.append((ends[:, 0] <= expected) & (expected <= ends[:, 1]))
    # Of 120 at 0.95, 0.87 is four standard errors below; plain percentiles of ECE cover a quarter.
    assert (np.mean(inside, axis=0) >= 0.87).all(), dict(zip(metrics, np.mean(inside, axis=0), strict=True))


def test_table__has_a_row_for_every_number():
    y, predictions, groups, names = random_study()
    result = bootstrap.bootstrap_metrics(y, predictions, groups, label_names=names, replicates=30, seed=1)
    table = result.table()
    assert len(table) == len(predictions) * (len(OVERALL_METRICS) + len(LABEL_METRICS) * len(names))
    chosen = table[(table.setting == "poor") & (table.metric == "ap") & (table.label == names[1])].iloc[0]
    interval = result.interval("poor", "ap", names[1])
    np.testing.assert_allclose([chosen.value, chosen.low, chosen.high], interval[:3])
    assert (table.n == len(y)).all()


def test_one_group__gives_no_interval():
    y, predictions, _, names = random_study()
    result = bootstrap.bootstrap_metrics(y, predictions, np.zeros(len(y)), label_names=names, replicates=10)
    assert np.isnan(result.interval("good", "lrap").low) and np.isfinite(result.interval("good", "lrap").value)
    assert result.table().low.isna().all()


def test_clustered_bootstrap__equals_a_loop_and_skips_missing_values():
    generator = np.random.default_rng(5)
    statistics = generator.normal(size=(50, 3))
    statistics[::4, 1] = np.nan
    statistics[:, 2] = np.nan
    statistics[4, 2] = 1.0
    groups = generator.integers(0, 12, 50)
    result = bootstrap.clustered_bootstrap(statistics, groups, replicates=60, seed=9)
    codes, counts = bootstrap.resample_counts(groups, 60, 9)
    for replicate, count in enumerate(counts):
        rows = np.repeat(np.arange(50), count[codes])
        np.testing.assert_allclose(result.replicates[replicate, :2], np.nanmean(statistics[rows, :2], axis=0), **EXACT)
    np.testing.assert_allclose(result.value[:2], np.nanmean(statistics[:, :2], axis=0))
    np.testing.assert_allclose(result.low[:2], np.nanpercentile(result.replicates[:, :2], 2.5, axis=0))
    assert result.value[2] == 1.0 and np.isnan(result.low[2])


def test_intervals_by_patient__are_wider_than_by_image():
    generator = np.random.default_rng(2)
    patients = np.repeat(np.arange(30), 10)
    values = (generator.normal(size=30)[patients] + 0.1 * generator.normal(size=300))[:, None]
    by_patient = bootstrap.clustered_bootstrap(values, patients, seed=1)
    by_image = bootstrap.clustered_bootstrap(values, np.arange(300), seed=1)
    assert (by_patient.high - by_patient.low)[0] > 2 * (by_image.high - by_image.low)[0]


def test_intervals__are_within_three_standard_errors_of_a_scikit_learn_loop():
    """Resamples drawn by other means than ours: the ends of the intervals must agree up to what 150 replicates can."""
    y, predictions, groups, names = random_study(seed=4, count=80, labels=3)
    prediction = predictions["good"]
    ours = bootstrap.bootstrap_metrics(y, {"good": prediction}, groups, label_names=names, replicates=4000, seed=1)
    patients = np.unique(groups)
    generator = np.random.default_rng(5)
    rows_of = {patient: np.flatnonzero(groups == patient) for patient in patients}
    drawn = []
    for _ in range(150):
        rows = np.concatenate([rows_of[patient] for patient in generator.choice(patients, len(patients))])
        drawn.append(oracle.label_ranking_average_precision_score(y[rows], prediction.scores[rows]))
    spread = np.std(drawn)
    # Standard error of a quantile at 2.5 % of a normal distribution: sqrt(q(1-q)/R) over its density there.
    error = spread * np.sqrt(0.025 * 0.975 / 150) / 0.05845
    interval = ours.interval("good", "lrap")
    np.testing.assert_allclose([interval.low, interval.high], np.percentile(drawn, [2.5, 97.5]), rtol=0, atol=3 * error)
    own_spread = ours.replicates[0, :, ours.columns.index(("lrap", None))].std()
    assert abs(own_spread - spread) < 3 * spread / np.sqrt(2 * 150)


def test_percentile_ends__are_numpy_s_with_nans_left_out():
    generator = np.random.default_rng(6)
    values = generator.normal(size=(3, 101, 4))
    values[generator.random(values.shape) < 0.3] = np.nan
    values[0, :, 1] = np.nan
    values[1, 1:, 2] = np.nan
    low, high = bootstrap.percentile_ends(values, 0.9, axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        expected = np.nanquantile(values, [0.05, 0.95], axis=1)
    np.testing.assert_allclose([low, high], expected, **EXACT)


def test_resamples__are_the_same_in_any_block():
    blocks = list(bootstrap.resample_blocks(7, 50, 3, 50))
    for block in (1, 8, 49):
        np.testing.assert_array_equal(np.concatenate(list(bootstrap.resample_blocks(7, 50, 3, block))), blocks[0])
    generator = np.random.Generator(np.random.PCG64(3))
    np.testing.assert_array_equal(blocks[0][0], np.bincount(generator.integers(0, 7, 7), minlength=7))


def test_one_sample__has_values_and_no_interval():
    y, predictions, groups, names = random_study()
    one = {name: Prediction(each.scores[:1], each.decisions[:1]) for name, each in predictions.items()}
    result = bootstrap.bootstrap_metrics(y[:1], one, groups[:1], label_names=names, replicates=40)
    assert result.interval("good", "lrap").value == 1.0 and np.isnan(result.interval("good", "lrap").low)
    assert np.isnan(result.interval("good", "auroc_macro").value)  # no negatives: documented as undefined


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groups": np.arange(3)}, DataError, "3 groups for 90 samples"),
        ({"groups": np.array([None] * 90, dtype=object)}, DataError, "90 samples have no group"),
        ({"groups": pd.Series([pd.NA, ""] + ["a"] * 88, dtype="string")}, DataError, "2 samples have no group"),
        ({"label_names": ("a",)}, DataError, "1 label names for 6"),
        ({"replicates": 0}, UsageError, "at least 1"),
        ({"level": 95}, UsageError, "not between 0 and 1"),
        ({"predictions": {}}, UsageError, "no settings to score"),
    ],
)
def test_bootstrap_metrics__refuses_wrong_input(options, error, message):
    y, predictions, groups, names = random_study()
    with pytest.raises(error, match=message):
        bootstrap.bootstrap_metrics(
            y, **({"predictions": predictions, "groups": groups, "label_names": names} | options)
        )


def test_unknown_names__are_told_with_the_known_ones():
    y, predictions, groups, names = random_study()
    result = bootstrap.bootstrap_metrics(y, predictions, groups, label_names=names, replicates=5)
    with pytest.raises(UsageError, match=r"no setting 'best'.*good, poor, tied"):
        result.interval("best", "lrap")
    with pytest.raises(UsageError, match="no metric 'recall' overall"):
        result.interval("good", "recall")


def test_tensors__are_scored_where_they_lie_with_the_same_result():
    torch = pytest.importorskip("torch")
    y, predictions, groups, names = random_study(count=60, group_count=30)
    options = {"label_names": names, "replicates": 80, "seed": 2}
    expected = bootstrap.bootstrap_metrics(y, predictions, groups, **options)
    tensors = {
        name: Prediction(torch.as_tensor(each.scores), torch.as_tensor(each.decisions))
        for name, each in predictions.items()
    }
    result = bootstrap.bootstrap_metrics(y, tensors, groups, **options)
    np.testing.assert_allclose(result.replicates, expected.replicates, **EXACT)
    np.testing.assert_allclose(result.values, expected.values, **EXACT)
