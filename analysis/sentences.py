"""What may be said of numbers with intervals, by fixed rules that cannot praise.

In come values, intervals, bootstraps and nulls; out go sentences for the report. A difference is called one only where
its whole interval lies on one side of zero; otherwise the sentence says "not above", with the figures, whatever one
hoped for. Each function is one rule, and the same numbers always give the same words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from analysis.bootstrap import Bootstrap, Interval, percentile_ends
from analysis.distances import Null
from analysis.metrics import LOWER_IS_BETTER

TITLES = {
    "f1_macro": "macro-F1",
    "f1_micro": "micro-F1",
    "exact_match": "exact match",
    "lrap": "LRAP",
    "coverage_error": "coverage error",
    "map": "mAP",
    "auroc_macro": "macro-AUROC",
    "hamming": "Hamming loss",
    "auroc_micro": "micro-AUROC",
    "ranking_loss": "ranking loss",
    "brier": "Brier score",
    "ece": "calibration error",
    "over_prediction": "over-prediction",
}
COMPARED = ("lrap", "f1_macro", "exact_match", "coverage_error")
# Words by which these rules, and those of `analysis.verdicts`, say that something does not hold or must be discounted.
_CAUTIONS = (
    "cannot be compared",
    "is undefined",
    "not above chance",
    "below chance",
    "say little",
    "no more than they give",
    "within their range",
    "below them",
    "has no positive of",
    "depends on the threshold",
    "are more than chance gives",
    "was seen",
    "hardly tells apart",
    "count as misses",
    "outside what the model sees",
    "are not scored",
    "is not measured",
    "could not be read",
)
FEW_POSITIVES = 10


def figure(value: float, digits: int = 2) -> str:
    """Return a number with fixed digits, never "-0.00"; "undefined" for NaN."""
    if not math.isfinite(value):
        return "undefined"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def with_protocol(text: str, protocol: object) -> str:
    """Return a sentence as it stands among those of several protocols: of the published one it says so."""
    said = "protocol paper: "
    return said + text if protocol == "paper" and not text.startswith(said) else text


def is_caution(text: str) -> bool:
    """Tell whether a sentence of these rules warns: something is not shown, or is shown to be worse, or cannot be told.

    Parameters
    ----------
    text : str
        A sentence of this module or of `analysis.verdicts`.
    """
    if any(words in text for words in _CAUTIONS):
        return True
    # "is below that of": bad news of a score, good news of an error.
    lower = any(TITLES[metric] in text.partition(" is ")[0] for metric in LOWER_IS_BETTER if metric in TITLES)
    return (
        "is not above that of" in text
        or "is not below that of" in text
        or ("is above that of" in text if lower else "is below that of" in text)
    )


def difference_sentence(
    name: str, other: str, value: float, low: float, high: float, *, lower_is_better: bool = False, level: float = 0.95
) -> str:
    """Return whether one figure is above (or, where lower is better, below) another's, from a paired difference.

    Parameters
    ----------
    name : str
        Whose figure and which, such as "Linear probe's LRAP".
    other : str
        Whose it is held against, such as "prevalence ranking".
    value, low, high : float
        The difference (first minus other) with its interval.
    lower_is_better : bool
        Changes what is asked: below instead of above.
    level : float
        Confidence level of the interval.
    """
    if not all(math.isfinite(each) for each in (value, low, high)):
        return f"{name} cannot be compared with {_of(other)}: the difference or its interval is undefined."
    wanted = "below" if lower_is_better else "above"
    if low > 0:
        verdict = "is above"
    elif high < 0:
        verdict = "is below"
    else:
        verdict = f"is not {wanted}"
    digits = _digits(low, high)
    return (
        f"{name} {verdict} {_of(other)}: difference {figure(value, digits)}, {_percent(level)} interval "
        f"{figure(low, digits)} to {figure(high, digits)}."
    )


def chance_sentence(name: str, found: Interval, chance: float, level: float = 0.95) -> str:
    """Return whether a figure's interval lies above a fixed chance level, such as 0.5 for AUROC."""
    if not all(math.isfinite(each) for each in found[:3]):
        return f"{name} is undefined here or has no interval, so nothing is said of chance ({figure(chance)})."
    if found.low > chance:
        verdict = "above"
    elif found.high < chance:
        verdict = "below"
    else:
        verdict = "not above"
    return (
        f"{name} is {figure(found.value)}, {_percent(level)} interval {figure(found.low)} to {figure(found.high)}: "
        f"{verdict} chance ({figure(chance)})."
    )


def null_sentence(name: str, value: float, null: Null, singletons: int = 0, level: float = 0.95) -> str:
    """Return how a ratio stands to what permuted labels give.

    Parameters
    ----------
    name : str
        Such as "Zero-shot's inter/intra ratio".
    value : float
    null : Null
        From `analysis.distances.permuted_null`.
    singletons : int
        Classes with one sample, which raise both the ratio and its null.
    level : float
        Share of permutations between the null's ends.
    """
    if not (math.isfinite(value) and math.isfinite(null.low) and math.isfinite(null.high)):
        return f"{name} is undefined here: it needs two classes, one of them with two samples that differ."
    if value > null.high:
        verdict = "above them"
    elif value < null.low:
        verdict = "below them"
    else:
        verdict = "no more than they give" if value <= null.value else "within their range"
    alone = ""
    if singletons:
        alone = f" {_count(singletons, 'class has', 'classes have')} a single image, which raises both."
    return (
        f"{name} is {figure(value)}; labels dealt at random to the same images give {figure(null.value)} "
        f"({_percent(level)} of permutations {figure(null.low)} to {figure(null.high)}): {verdict} "
        f"(p = {figure(null.p, 3)}).{alone}"
    )


def prediction_sentence(bootstrap: Bootstrap, setting: str) -> str:
    """Return whether a setting says too much or too little: labels an image, and labels said too often.

    A label counts only where the interval of (predicted rate - prevalence) lies on one side of zero.
    """
    said, true = _columns(bootstrap, "predicted_rate"), _columns(bootstrap, "prevalence")
    row = bootstrap.settings.index(setting)
    values, drawn = bootstrap.values[row], bootstrap.replicates[row]
    text = (
        f"{setting} says {figure(values[said].sum())} labels an image where the truth has {figure(values[true].sum())}"
    )
    if bootstrap.groups < 2:
        return text + "."
    low, high = percentile_ends(drawn[:, said] - drawn[:, true], bootstrap.level, axis=0)
    more, less = int((low > 0).sum()), int((high < 0).sum())
    return (
        f"{text}; of {_count(len(said), 'label', 'labels')} it says {more} more often than they occur and {less} less "
        "often."
    )


def classification_sentences(
    bootstrap: Bootstrap, settings: Sequence[str], baselines: Sequence[str], metrics: Sequence[str] = COMPARED
) -> list[str]:
    """Return what a study's test figures say, in a fixed order.

    First how far the test split carries (labels without or with few positives), then for each setting: its macro-AUROC
    against chance, each of `metrics` against the best trivial baseline in that metric, and whether it over-predicts;
    then the settings among themselves by LRAP.

    Parameters
    ----------
    bootstrap : Bootstrap
        With the settings and the baselines.
    settings, baselines : sequence of str
        Names in the bootstrap.
    metrics : sequence of str
        Overall metrics to hold against the baselines.
    """
    sentences = rarity_sentences(bootstrap)
    level = bootstrap.level
    for setting in settings:
        auroc = bootstrap.interval(setting, "auroc_macro")
        sentences.append(chance_sentence(f"{setting}'s macro-AUROC", auroc, 0.5, level))
        for metric in metrics if baselines else ():
            best = best_of(bootstrap, baselines, metric)
            found = bootstrap.difference(setting, best, metric)
            sentences.append(_difference(setting, best, metric, found, level))
        sentences.append(prediction_sentence(bootstrap, setting))
    for place, setting in enumerate(settings):
        for other in settings[:place]:
            found = bootstrap.difference(setting, other, "lrap")
            sentences.append(_difference(setting, other, "lrap", found, level))
    return sentences


def best_of(bootstrap: Bootstrap, names: Sequence[str], metric: str) -> str:
    """Return which of some settings has the best value of a metric; the first of equals."""
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    return max(names, key=lambda name: sign * np.nan_to_num(bootstrap.interval(name, metric).value, nan=-sign * np.inf))


def rarity_sentences(bootstrap: Bootstrap, few: int = FEW_POSITIVES) -> list[str]:
    """Return which labels the test split has none or few of, so that their own figures say little."""
    positives = bootstrap.values[0, _columns(bootstrap, "positives")].astype(int).tolist()
    counts = dict(zip(bootstrap.label_names, positives, strict=True))
    absent = [label for label, count in counts.items() if count == 0]
    rare = [f"{label} ({count})" for label, count in counts.items() if 0 < count < few]
    sentences = []
    if absent:
        sentences.append(
            f"The test split has no positive of {', '.join(absent)}: no part of macro-AUROC and mAP, and an F1 of 0 in "
            "macro-F1."
        )
    if rare:
        sentences.append(f"Fewer than {few} test positives: {', '.join(rare)}; the figures of these labels say little.")
    return sentences


def reference_sentence(name: str, found: Interval, published: float, source: str, level: float = 0.95) -> str:
    """Return whether a published figure lies within ours' interval."""
    if not all(math.isfinite(each) for each in found[:3]):
        return f"{name} is undefined here or has no interval; {source} published {figure(published, 3)}."
    inside = "within" if found.low <= published <= found.high else "outside"
    return (
        f"{name} is {figure(found.value, 3)} here; {source} published {figure(published, 3)}, {inside} our "
        f"{_percent(level)} interval {figure(found.low, 3)} to {figure(found.high, 3)}."
    )


def data_sentence(counts: Mapping[str, int], groups: int, failed: int) -> str:
    """Return how many samples each split has, of how many patients, and how many could not be used.

    Parameters
    ----------
    counts : mapping of split name to samples
    groups : int
        Patients or studies in all.
    failed : int
        Samples that could not be read.
    """
    parts = ", ".join(f"{name} {count}" for name, count in counts.items())
    lost = (
        f"{_count(failed, 'image', 'images')} could not be read (see the list of failures)"
        if failed
        else "every image was read"
    )
    return f"{sum(counts.values())} samples of {_count(groups, 'patient', 'patients')} ({parts}); {lost}."


def _difference(setting: str, other: str, metric: str, found: Interval, level: float) -> str:
    return difference_sentence(
        f"{setting}'s {TITLES[metric]}",
        other,
        found.value,
        found.low,
        found.high,
        lower_is_better=metric in LOWER_IS_BETTER,
        level=level,
    )


def _columns(bootstrap: Bootstrap, metric: str) -> list[int]:
    """Return where one metric of every label stands among a bootstrap's columns."""
    return [bootstrap.columns.index((metric, label)) for label in bootstrap.label_names]


def _of(other: str) -> str:
    return f"that of {other}"


def _digits(low: float, high: float) -> int:
    """Return digits enough that an end of the interval does not pass for zero when it is not."""
    smallest = min((abs(end) for end in (low, high) if end), default=1.0)
    return min(6, max(2, -math.floor(math.log10(smallest))))


def _percent(level: float) -> str:
    return f"{100 * level:g} %"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
