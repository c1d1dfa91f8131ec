"""Does a model serve everyone equally? Every metric by subgroup, and a test of the gap between the best and the worst.

Truth, predictions, patients and one column of the samples (sex, age band, view, number of findings) come in; metrics
with intervals and counts for each of its values go out, and the gaps. The intervals come from resamples of all
patients, so that subgroups which share patients (two views of one) are resampled together.

Choosing the best and the worst of K subgroups makes a gap of its own: the more subgroups and the smaller they are, the
larger it is by chance. So the gap is tested by permutation: the values of the column are dealt out anew among the
blocks of samples that belong together (one patient's samples with one value), all metrics are taken for each new
subgroup, and each permutation's own largest minus smallest value is held beside the one observed; the p-value corrects
for the choice by construction (max-min statistic; Phipson and Smyth 2010 for the ones added). What it tests is
exchangeability: a gap can come from the model serving a subgroup worse, and also from another case mix in it (F1 and
average precision rise with prevalence), so read it beside the counts. Blocks of one patient with different values are
dealt out separately, which for a column that varies within patients, such as the view, makes the test err on the side
of no finding.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.bootstrap import (
    Bootstrap,
    block_size,
    check_options,
    evaluate_blocks,
    group_codes,
    hold_means,
    metric_columns,
    metric_names,
    on_device,
    percentile_ends,
    resample_blocks,
)
from analysis.comparison import holm
from analysis.metrics import LOWER_IS_BETTER, MetricPlan, Prediction, check_truth
from engine.errors import DataError, UsageError

NOT_GIVEN = "(not given)"
LEADING_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")
# Patients below which a subgroup's metrics are shown, and not held against the others.
LEAST_GROUPS = 10
GAP_METRICS = ("f1_macro", "exact_match", "lrap", "coverage_error", "map", "auroc_macro", "brier", "over_prediction")


@dataclass(frozen=True)
class Subgroups:
    """All metrics of all settings in each subgroup, and where subgroups were dealt out by chance.

    Parameters
    ----------
    column : str
        What the samples were divided by.
    counts : DataFrame
        subgroup, samples, groups, labels_a_sample, compared (whether it is large enough to be held against others).
    bootstraps : dict of subgroup to Bootstrap
        Under the same resamples of all patients.
    null : ndarray of float64, (P, K, S, M)
        Metrics of the compared subgroups (K, in the order of `counts`) in each of P permutations; P is 0 where fewer
        than two are compared.
    """

    column: str
    counts: pd.DataFrame
    bootstraps: dict[str, Bootstrap]
    null: np.ndarray

    def table(self) -> pd.DataFrame:
        """Return one row a subgroup, setting, metric and label: these, value, low, high, n, replicates."""
        parts = [each.table().assign(subgroup=name) for name, each in self.bootstraps.items()]
        table = pd.concat(parts, ignore_index=True)
        return table[["subgroup", *(name for name in table.columns if name != "subgroup")]]

    def gaps(self, metrics: Sequence[str] = GAP_METRICS, labels: Sequence[str | None] = (None,)) -> pd.DataFrame:
        """Return the gap between the best and the worst subgroup of each setting, with its test.

        Parameters
        ----------
        metrics : sequence of str
            Overall metrics (label None), or metrics of labels with `labels`.
        labels : sequence of str or None

        Returns
        -------
        DataFrame
            setting, metric, label, best, worst, gap (not negative), low, high (interval of the difference between
            these two, chosen as they are: it does not know of the choice, the p-value does; NaN where one of them has
            one patient alone), p, p_holm (over all rows), subgroups (how many were compared). A subgroup in which the
            metric is undefined is left out; where fewer than two remain, best and worst are "" and the numbers NaN.
        """
        compared = self.counts.loc[self.counts["compared"], "subgroup"].tolist()
        rows = []
        for setting in next(iter(self.bootstraps.values())).settings:
            for metric in metrics:
                rows += [self._gap(compared, setting, metric, label) for label in labels]
        table = pd.DataFrame(rows)
        table.insert(9, "p_holm", holm(table["p"].to_numpy()))
        return table

    def difference(
        self, first: str, second: str, metrics: Sequence[str] = GAP_METRICS, labels: Sequence[str | None] = (None,)
    ) -> pd.DataFrame:
        """Return each setting's metrics in one subgroup less those in another, both scored on each resample together.

        For two subgroups that were named beforehand: nothing is chosen, so the interval says what it says. There is no
        permutation test, because subgroups such as numbers of findings differ in every metric by what they are.

        Parameters
        ----------
        first, second : str
            Subgroups.
        metrics, labels
            As for `gaps`.

        Returns
        -------
        DataFrame
            setting, metric, label, first, second (values in the two), difference, low, high (NaN where either is
            undefined, or of one patient alone).

        Raises
        ------
        UsageError
            A subgroup that is not here.
        """
        for name in (first, second):
            if name not in self.bootstraps:
                raise UsageError(f"no subgroup {name!r} of {self.column!r}; there are {', '.join(self.bootstraps)}")
        one, other = self.bootstraps[first], self.bootstraps[second]
        rows = []
        for setting, metric, label in itertools.product(one.settings, metrics, labels):
            here, there = one.column(setting, metric, label), other.column(setting, metric, label)
            apart = here.value - there.value
            low, high = np.nan, np.nan
            if min(one.groups, other.groups) > 1 and not np.isnan(apart):
                low, high = (float(end) for end in percentile_ends(here.replicates - there.replicates, one.level))
            rows.append(
                {"setting": setting, "metric": metric, "label": label, "first": here.value, "second": there.value,
                 "difference": apart, "low": low, "high": high}
            )  # fmt: skip
        return pd.DataFrame(rows)

    def _gap(self, compared: list[str], setting: str, metric: str, label: str | None) -> dict:
        row: dict[str, Any] = {"setting": setting, "metric": metric, "label": label, "best": "", "worst": ""}
        columns = {name: self.bootstraps[name].column(setting, metric, label) for name in compared}
        defined = [place for place, name in enumerate(compared) if not np.isnan(columns[name].value)]
        row |= dict.fromkeys(("gap", "low", "high", "p"), np.nan) | {"subgroups": len(defined)}
        if len(defined) < 2:
            return row
        ordered = sorted((columns[compared[place]].value, place) for place in defined)
        (lowest, low_place), (highest, high_place) = ordered[0], ordered[-1]
        low_name, high_name = compared[low_place], compared[high_place]
        best, worst = (low_name, high_name) if metric in LOWER_IS_BETTER else (high_name, low_name)
        any_bootstrap = self.bootstraps[compared[0]]
        low, high = np.nan, np.nan
        if min(self.bootstraps[name].groups for name in (low_name, high_name)) > 1:
            drawn = columns[high_name].replicates - columns[low_name].replicates
            low, high = (float(end) for end in percentile_ends(drawn, any_bootstrap.level))
        null = self.null[
            :, defined, any_bootstrap.settings.index(setting), any_bootstrap.columns.index((metric, label))
        ]
        spread = _largest(null) + _largest(-null)
        reached = (spread >= highest - lowest - 1e-12).sum()  # equal up to rounding counts as reached
        return row | {
            "best": best,
            "worst": worst,
            "gap": highest - lowest,
            "low": low,
            "high": high,
            "p": float((1 + reached) / (1 + (~np.isnan(spread)).sum())),
        }


def subgroup_metrics(
    y: np.ndarray,
    predictions: Mapping[str, Prediction],
    groups: np.ndarray,
    values: Sequence[object] | np.ndarray | pd.Series,
    *,
    label_names: tuple[str, ...],
    column: str = "subgroup",
    replicates: int = 1000,
    permutations: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    least_groups: int = LEAST_GROUPS,
    device: str = "cpu",
) -> Subgroups:
    """Score every setting in every subgroup, and under permutations of the subgroups.

    Parameters
    ----------
    y : ndarray of 0/1, (n, L)
    predictions : mapping of setting name to Prediction
    groups : ndarray, (n,)
        Patient of each sample.
    values : (n,)
        The subgroup of each sample, as text or anything that can be written; blank or missing where it is not given,
        which is shown as a subgroup of its own and not compared.
    label_names : tuple of str, length L
    column : str
        What `values` is called.
    replicates, permutations, seed, level
        Resamples for the intervals and permutations for the gaps.
    least_groups : int
        Patients below which a subgroup is shown but not compared.
    device : str
        Where predictions are scored.

    Raises
    ------
    DataError
        Lengths that differ, or no sample with a value.
    """
    truth = check_truth(y)
    check_options(truth, predictions, groups, label_names, level)
    names = _names(values)
    if len(names) != len(truth):
        raise DataError(f"{len(names)} values of {column!r} for {len(truth)} samples; give one a sample")
    if (names == NOT_GIVEN).all():
        raise DataError(f"no sample has a value of {column!r}; choose another column")
    predictions = on_device(predictions, device)
    codes, group_count = group_codes(groups)
    counts = _counts(truth, codes, names, least_groups)
    subgroups = counts["subgroup"].tolist()
    plans, plain = [], []
    for name in subgroups:
        rows = np.flatnonzero(names == name)
        for each in predictions.values():
            part = Prediction(each.scores[rows], each.decisions[rows])
            plans.append(MetricPlan(truth[rows], part, codes[rows], group_count, label_names))
            plain.append(metric_columns(plans[-1].evaluate(np.ones((group_count, 1))))[0])
    blocks = resample_blocks(group_count, replicates, seed, block_size(group_count, replicates))
    drawn = evaluate_blocks(plans, blocks, replicates)
    hold_means(drawn, np.stack(plain), len(label_names))
    count = len(predictions)
    bootstraps = {
        name: Bootstrap(
            settings=tuple(predictions),
            label_names=tuple(label_names),
            columns=metric_names(label_names),
            values=np.stack(plain[place * count : (place + 1) * count]),
            replicates=drawn[place * count : (place + 1) * count],
            samples=int(counts["samples"].iloc[place]),
            groups=int(counts["groups"].iloc[place]),
            level=level,
        )
        for place, name in enumerate(subgroups)
    }
    compared = counts.loc[counts["compared"], "subgroup"].tolist()
    null = _null(truth, predictions, codes, names, compared, permutations, seed, label_names)
    return Subgroups(column, counts, bootstraps, null)


def age_bands(ages: Sequence[float] | np.ndarray | pd.Series, edges: Sequence[float] = (18, 40, 60, 80)) -> np.ndarray:
    """Return the age band of each sample, such as "under 18", "18-39", "80 and over"; "" where no age is given.

    Parameters
    ----------
    ages : (n,) numbers in years; what is no number, or is NaN, counts as not given
    edges : increasing ages at which a new band begins
    """
    years = pd.to_numeric(pd.Series(np.asarray(ages, dtype=object)), errors="coerce").to_numpy(dtype=np.float64)
    steps = [f"{value:g}" for value in edges]
    if not steps or sorted(set(edges)) != list(edges):
        raise UsageError(f"age bands must begin at increasing ages, got {tuple(edges)}")
    # Whole years end the year before the next band; halves have no year before.
    whole = all(float(value).is_integer() for value in edges)
    inner = [f"{low:g}-{high - 1:g}" if whole else f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)]
    titles = np.array([f"under {steps[0]}", *inner, f"{steps[-1]} and over"], dtype=object)
    bands = titles[np.searchsorted(np.asarray(edges, dtype=np.float64), np.nan_to_num(years), side="right")]
    return np.where(np.isnan(years), "", bands)


def number_bands(values: Sequence[object] | np.ndarray | pd.Series, most: int, parts: int = 4) -> np.ndarray:
    """Return the band of each sample of a column of numbers, (n,) object; the values themselves where they are few.

    Parameters
    ----------
    values : (n,)
        Anything; a column that holds something else than numbers and blanks is returned as it is.
    most : int
        Up to so many different numbers are subgroups by themselves.
    parts : int
        Bands, of about as many samples each; fewer where one number fills several.

    Returns
    -------
    ndarray of object, (n,)
        Such as "below 12.5", "12.5 to 20", "20 and over"; "" where nothing is given.
    """
    given = pd.Series(np.asarray(values, dtype=object))
    blank = _names(values) == NOT_GIVEN
    numbers = pd.to_numeric(given.where(~blank), errors="coerce").to_numpy(dtype=np.float64)
    if not np.isfinite(numbers[~blank]).all() or len(np.unique(numbers[~blank])) <= most:
        return np.where(blank, "", given.to_numpy(dtype=object))
    known = np.unique(numbers[~blank])
    quantiles = np.quantile(numbers[~blank], np.arange(1, parts) / parts)
    # Rounded before they cut, so that a band's name says exactly who is in it; the lowest number may fill several.
    # More digits where four tell no two apart, as of dates and times.
    cuts = ({float(f"{quantile:.{digits}g}") for quantile in quantiles} for digits in (4, 6, 10, 15))
    edges = next(filter(None, (sorted(edge for edge in some if edge > known[0]) for some in cuts)), [known[1]])
    steps = [f"{edge:.15g}" for edge in edges]
    titles = [f"below {steps[0]}", *map(" to ".join, itertools.pairwise(steps)), f"{steps[-1]} and over"]
    bands = np.array(titles, dtype=object)[np.searchsorted(edges, np.nan_to_num(numbers), side="right")]
    return np.where(blank, "", bands)


def finding_counts(y: np.ndarray, label_names: tuple[str, ...], nothing: str | None = "No Finding") -> np.ndarray:
    """Return "no finding", "one finding" or "several findings" for each sample, (n,) object.

    Parameters
    ----------
    y : ndarray of 0/1, (n, L)
    nothing : str or None
        The label that says that there is no finding, and is none itself; may be absent.
    """
    truth = check_truth(y)
    findings = truth[:, [name != nothing for name in label_names]].sum(axis=1)
    return np.array(["no finding", "one finding", "several findings"], dtype=object)[np.minimum(findings, 2)]


def _names(values: Sequence[object] | np.ndarray | pd.Series) -> np.ndarray:
    """Return values as text, `NOT_GIVEN` where blank or missing; (n,) object."""
    column = pd.Series(np.asarray(values, dtype=object))
    text = column.map(lambda value: "" if pd.isna(value) else str(value).strip())
    return text.where(text != "", NOT_GIVEN).to_numpy(dtype=object)


def _place(name: str) -> tuple[int, float, str]:
    """Return by what subgroups are put in order: bands and numbers ascending, other names by letters, blanks last."""
    number = LEADING_NUMBER.match(name)
    if number:
        return 1, float(number[0]), name
    return (3 if name == NOT_GIVEN else 0 if name.startswith(("under ", "below ")) else 2), 0.0, name


def _counts(truth: np.ndarray, codes: np.ndarray, names: np.ndarray, least: int) -> pd.DataFrame:
    frame = pd.DataFrame({"subgroup": names, "group": codes, "labels": truth.sum(axis=1)})
    frame["subgroup"] = pd.Categorical(frame["subgroup"], sorted(set(names), key=_place), ordered=True)
    grouped = frame.groupby("subgroup", sort=True, observed=True)
    counts = grouped.agg(samples=("group", "size"), groups=("group", "nunique"), labels_a_sample=("labels", "mean"))
    counts = counts.reset_index().astype({"subgroup": object})
    return counts.assign(compared=(counts["groups"] >= least) & (counts["subgroup"] != NOT_GIVEN))


def _null(
    truth: np.ndarray,
    predictions: Mapping[str, Prediction],
    codes: np.ndarray,
    names: np.ndarray,
    compared: list[str],
    permutations: int,
    seed: int,
    label_names: tuple[str, ...],
) -> np.ndarray:
    """Return metrics of the compared subgroups under permutations, (P, K, S, M)."""
    columns = len(metric_names(label_names))
    if len(compared) < 2 or permutations < 1:
        return np.empty((0, len(compared), len(predictions), columns))
    rows = np.flatnonzero(np.isin(names, compared))
    numbers = pd.Categorical(names[rows], categories=compared).codes.astype(np.int64)
    # Samples of one patient with one value stay together.
    blocks, block_of = np.unique(codes[rows] * len(compared) + numbers, return_inverse=True)
    subgroup_of_block = blocks % len(compared)
    plans = [
        MetricPlan(truth[rows], Prediction(each.scores[rows], each.decisions[rows]), block_of, len(blocks), label_names)
        for each in predictions.values()
    ]

    def weights() -> Iterator[np.ndarray]:
        generator = np.random.Generator(np.random.PCG64(seed))
        step = max(1, block_size(len(blocks), permutations * len(compared)) // len(compared))
        for start in range(0, permutations, step):
            dealt = np.tile(subgroup_of_block, (min(step, permutations - start), 1))
            generator.permuted(dealt, axis=1, out=dealt)
            inside = dealt[:, None, :] == np.arange(len(compared))[:, None]
            yield inside.reshape(-1, len(blocks)).astype(np.int32)

    scored = evaluate_blocks(plans, weights(), permutations * len(compared))
    return scored.reshape(len(plans), permutations, len(compared), columns).transpose(1, 2, 0, 3)


def _largest(values: np.ndarray) -> np.ndarray:
    """Return the largest value over axis 1 that is not NaN, NaN where none is."""
    defined = ~np.isnan(values)
    largest = np.where(defined, values, -np.inf).max(axis=1, initial=-np.inf)
    return np.where(defined.any(axis=1), largest, np.nan)
