"""Small multiples by label: precision-recall and ROC curves, and each label's metrics with their intervals.

Comes in: test scores and result rows. Goes out: SVG text in the page's own colours (`analysis.figures`). Curves of
large studies are thinned to as many points as can be seen, and labels beyond the most frequent ones are left to the
table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import figures
from analysis.figures import FAINT, INK

MOST_LABELS = 30
MOST_POINTS = 200
COLUMNS = 5
_STRIPS = (("ap", "average precision", None), ("auroc", "AUROC", 0.5), ("f1", "F1", None))


def frequent_labels(truth: np.ndarray) -> np.ndarray:
    """Return the columns of the at most `MOST_LABELS` most frequent labels that have a positive, in their order.

    Parameters
    ----------
    truth : ndarray, (n, L), 0/1
    """
    counts = truth.sum(axis=0)
    ranked = np.argsort(-counts, kind="stable")[:MOST_LABELS]
    return np.sort(ranked[counts[ranked] > 0])


def thinned(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `MOST_POINTS` points of a curve, evenly by position, with both ends."""
    if len(first) <= MOST_POINTS:
        return first, second
    kept = np.unique(np.linspace(0, len(first) - 1, MOST_POINTS).round().astype(int))
    return first[kept], second[kept]


def precision_recall_grid(
    truth: np.ndarray, scores: np.ndarray, settings: Sequence[str], labels: Sequence[str], colours: dict[str, str]
) -> str:
    """Draw a precision-recall curve of each label and setting; the dotted line is the label's prevalence.

    Parameters
    ----------
    truth : ndarray, (n, L), 0/1
    scores : ndarray of float, (S, n, L)
    """
    from sklearn.metrics import precision_recall_curve

    def curve(column: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        precision, recall, _ = precision_recall_curve(truth[:, column], scores[position, :, column])
        return thinned(recall, precision)

    return _grid(
        truth, settings, labels, colours, curve, ("recall", "precision"), "Precision-recall curves by label and setting"
    )


def roc_grid(
    truth: np.ndarray, scores: np.ndarray, settings: Sequence[str], labels: Sequence[str], colours: dict[str, str]
) -> str:
    """Draw a ROC curve of each label and setting; the dotted line is chance.

    Parameters
    ----------
    truth : ndarray, (n, L), 0/1
    scores : ndarray of float, (S, n, L)
    """
    from sklearn.metrics import roc_curve

    def curve(column: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        false, true, _ = roc_curve(truth[:, column], scores[position, :, column])
        return thinned(false, true)

    names = ("false positive rate", "true positive rate")
    return _grid(truth, settings, labels, colours, curve, names, "ROC curves by label and setting", diagonal=True)


def label_strips(rows: pd.DataFrame, labels: Sequence[str], settings: Sequence[str], colours: dict[str, str]) -> str:
    """Draw average precision, AUROC and F1 of each label with their intervals, one line a label, rarest last.

    Parameters
    ----------
    rows : DataFrame
        Metric rows with label: setting, metric, label, value, low, high.
    labels, settings : sequence of str
    colours : dict
    """
    counts = rows[rows["metric"] == "positives"].drop_duplicates("label").set_index("label")["value"]
    prevalence = rows[rows["metric"] == "prevalence"].drop_duplicates("label").set_index("label")["value"]
    ordered = sorted((label for label in labels if counts.get(label, 0) > 0), key=lambda label: -counts[label])
    ordered = ordered[:MOST_LABELS]
    found = rows.drop_duplicates(["setting", "metric", "label"]).set_index(["setting", "metric", "label"])

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(_STRIPS), sharey=True)
        for axis, (metric, title, chance) in zip(axes, _STRIPS, strict=True):
            for line, label in enumerate(ordered):
                none = prevalence.get(label) if metric == "ap" else chance
                if none is not None:
                    axis.plot([none, none], [line - 0.42, line + 0.42], color=FAINT, linewidth=1.4)
                for number, setting in enumerate(settings):
                    if (setting, metric, label) not in found.index:
                        continue
                    row = found.loc[(setting, metric, label)]
                    place = line + (number - (len(settings) - 1) / 2) * 0.24
                    if pd.notna(row["low"]) and pd.notna(row["high"]):
                        ends = [row["low"], row["high"]]
                        axis.plot(ends, [place, place], color=colours[setting], linewidth=2, alpha=0.5)
                    if pd.notna(row["value"]):
                        axis.plot(row["value"], place, "o", color=colours[setting], markersize=3.6)
            axis.set_title(title, loc="left")
            axis.set_xlim(-0.02, 1.02)
            axis.spines["left"].set_visible(False)
            axis.tick_params(length=0)
        axes[0].set_yticks(range(len(ordered)), [f"{label} ({int(counts[label])})" for label in ordered])
        axes[0].set_ylim(len(ordered) - 0.4, -0.6)
        for label in axes[0].get_yticklabels():
            label.set_color(INK)
        _legend(figure, settings, colours)

    height = 0.95 + 0.34 * max(1, len(ordered))
    return figures.svg(draw, 10.0, height, "Average precision, AUROC and F1 of each label and setting with intervals")


def _grid(
    truth: np.ndarray,
    settings: Sequence[str],
    labels: Sequence[str],
    colours: dict[str, str],
    curve: Callable[[int, int], tuple[np.ndarray, np.ndarray]],
    names: tuple[str, str],
    title: str,
    diagonal: bool = False,
) -> str:
    """Draw one panel a label; ``curve(column, position)`` returns the points of a label and setting."""
    shown = frequent_labels(truth)
    lines = max(1, -(-len(shown) // COLUMNS))

    def draw(figure: Figure) -> None:
        axes = figure.subplots(lines, COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
        for axis, column in zip(axes, shown, strict=False):
            for position, setting in enumerate(settings):
                across, up = curve(column, position)
                if diagonal:
                    axis.plot(across, up, color=colours[setting], linewidth=1.3)
                else:
                    axis.step(across, up, where="post", color=colours[setting], linewidth=1.3)
            if diagonal:
                axis.plot([0, 1], [0, 1], color=FAINT, linewidth=0.9, linestyle=":")
            else:
                axis.axhline(truth[:, column].mean(), color=FAINT, linewidth=0.9, linestyle=":")
            axis.set_title(f"{labels[column]}\nn = {int(truth[:, column].sum())}", fontsize=8, loc="left")
            axis.set(xlim=(0, 1), ylim=(0, 1.03), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        for axis in axes[len(shown) :]:
            axis.set_visible(False)
        figure.supxlabel(names[0], fontsize=8, color=FAINT)
        figure.supylabel(names[1], fontsize=8, color=FAINT)
        _legend(figure, settings, colours)

    return figures.svg(draw, 10.0, 0.8 + 1.7 * lines, title)


def _legend(figure: Figure, settings: Sequence[str], colours: dict[str, str]) -> None:
    """Name the settings' colours above the panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colours[setting], marker="o", markersize=4, linewidth=1.6) for setting in settings]
    figure.legend(
        handles, list(settings), loc="outside upper left", ncols=4, frameon=False, fontsize=8.5, labelcolor=INK
    )
