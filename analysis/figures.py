"""Figures of the report, as inline SVG that follows the page's light or dark theme.

Comes in: tidy rows and score arrays. Goes out: SVG text. matplotlib draws with stand-in colours which
are exchanged for the page's CSS variables afterwards, so one drawing serves both themes and print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from engine.keys import short_hash

# Stand-in colours: unlikely values that are replaced by CSS variables in the SVG text.
INK, FAINT, GRID = "#010203", "#040506", "#070809"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")
_VARIABLES = {INK: "var(--ink)", FAINT: "var(--muted)", GRID: "var(--rule)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)
}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fluoroscope",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
}


def interval_chart(rows: pd.DataFrame, metrics: Sequence[tuple[str, str]], colours: dict[str, str]) -> str:
    """Draw values with intervals, one panel a metric and one line a setting.

    Parameters
    ----------
    rows : DataFrame
        Columns setting, metric, value, low, high, baseline; only rows without a label are meant.
    metrics : sequence of (name, title)
    colours : dict
        Colour of each setting, one of `SERIES` or `FAINT`.
    """
    settings = sorted(dict.fromkeys(rows["setting"]), key=lambda setting: colours[setting] == FAINT)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for axis, (metric, title) in zip(axes, metrics, strict=True):
            for position, setting in enumerate(settings):
                found = rows[(rows["setting"] == setting) & (rows["metric"] == metric)]
                if found.empty or not np.isfinite(found["value"].iloc[0]):
                    continue
                row = found.iloc[0]
                if np.isfinite(row["low"]) and np.isfinite(row["high"]):
                    axis.plot(
                        [row["low"], row["high"]],
                        [position, position],
                        color=colours[setting],
                        linewidth=2.2,
                        solid_capstyle="round",
                        alpha=0.55,
                    )
                axis.plot(row["value"], position, "o", color=colours[setting], markersize=5)
            axis.set_title(title, loc="left")
            axis.grid(axis="y", visible=False)
            axis.spines["left"].set_visible(False)
            axis.tick_params(length=0)
            axis.margins(x=0.08)
        axes[0].set_yticks(range(len(settings)), settings)
        axes[0].invert_yaxis()
        for label in axes[0].get_yticklabels():
            label.set_color(INK)

    return svg(draw, 10.0, 0.75 + 0.27 * len(settings), "Values with 95 % intervals, one panel a metric")


def prediction_bars(rows: pd.DataFrame, labels: Sequence[str], settings: Sequence[str], colours: dict[str, str]) -> str:
    """Draw the predicted rate over the true prevalence of each label (1 is calibrated), on a logarithmic axis.

    Parameters
    ----------
    rows : DataFrame
        Metric rows with metric "predicted_rate" or "prevalence", setting, label, value.
    """

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        width = 0.8 / max(1, len(settings))
        for number, setting in enumerate(settings):
            part = rows[rows["setting"] == setting].pivot_table(
                index="label", columns="metric", values="value", observed=True
            )
            part = part.reindex(labels)
            positive = part["prevalence"] > 0
            ratio = (part["predicted_rate"] / part["prevalence"].where(positive)).to_numpy(dtype=float)
            place = np.arange(len(labels)) + (number - (len(settings) - 1) / 2) * width
            never = np.flatnonzero(ratio == 0)
            drawn = np.where(ratio > 0, ratio, np.nan)
            axis.vlines(place, 1, drawn, color=colours[setting], linewidth=2, alpha=0.6)
            axis.plot(place, drawn, "o", color=colours[setting], markersize=4.5, label=setting)
            axis.plot(
                place[never], np.full(len(never), 0.02), "v", color=colours[setting], markersize=4, fillstyle="none"
            )
        axis.axhline(1, color=INK, linewidth=0.8)
        axis.set_yscale("log")
        axis.set_ylim(0.015, None)
        axis.set_xticks(range(len(labels)), labels, rotation=35, ha="right")
        axis.set_ylabel("predicted rate / prevalence")
        axis.grid(axis="x", visible=False)
        axis.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.16))

    return svg(draw, 10.0, 3.6, "Predicted rate over prevalence by label; triangles: never predicted")


def reliability_panels(
    truth: np.ndarray, scores: np.ndarray, settings: Sequence[str], colours: dict[str, str], bins: int = 12
) -> str:
    """Draw how often what was said so surely is true, all labels together, one panel a setting, logarithmic axes.

    Parameters
    ----------
    truth : ndarray, (n, L), 0/1
    scores : ndarray of float in [0, 1], (S, n, L)
    settings : sequence of str, length S
    colours : dict
    bins : int
        Each holds as many (image, label) pairs as any other, so that rare labels are not all in the first one.
    """
    least = 1e-3

    def draw(figure: Figure) -> None:
        # The page stretches a drawing to its width, so one panel must not be a drawing of its own size.
        axes = figure.subplots(1, max(3, len(settings)), sharex=True, sharey=True, squeeze=False)[0]
        for axis in axes[len(settings) :]:
            axis.set_visible(False)
        for axis, setting, values in zip(axes, settings, scores, strict=False):
            order = np.argsort(values, axis=None)
            parts = np.array_split(order, bins)
            said = np.array([values.ravel()[part].mean() for part in parts])
            found = np.array([truth.ravel()[part].mean() for part in parts])
            axis.plot([least, 1], [least, 1], color=FAINT, linewidth=0.9, linestyle=":")
            seen = found >= least
            axis.plot(
                np.maximum(said[seen], least), found[seen], "o-", color=colours[setting], markersize=4, linewidth=1.2
            )
            never = np.maximum(said[~seen], least)
            axis.plot(never, np.full(len(never), least), "v", color=colours[setting], markersize=4, fillstyle="none")
            axis.set_title(setting, loc="left")
            axis.set(xscale="log", yscale="log", xlim=(least * 0.8, 1.1), ylim=(least * 0.8, 1.1))
            axis.set_xlabel("mean probability")
        axes[0].set_ylabel("share that is true")

    return svg(draw, 10.0, 3.2, "Reliability: probability against frequency, all labels")


def cost_bars(rows: pd.DataFrame) -> str:
    """Draw the seconds of each step.

    Parameters
    ----------
    rows : DataFrame
        Columns step, seconds.
    """
    steps = list(rows["step"])
    seconds = rows["seconds"].to_numpy(dtype=float)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        axis.barh(range(len(steps)), seconds, color=SERIES[0], height=0.62)
        for position, value in enumerate(seconds):
            axis.annotate(f" {value:.1f} s", (value, position), va="center", fontsize=8, color=INK)
        axis.set_yticks(range(len(steps)), steps)
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.spines["left"].set_visible(False)
        axis.tick_params(length=0)
        axis.set_xlabel("seconds")
        axis.margins(x=0.1)

    return svg(draw, 10.0, 0.6 + 0.27 * max(1, len(steps)), "Seconds of each step")


def svg(draw: Callable[[Figure], None], width: float, height: float, title: str) -> str:
    """Return what a function draws as inline SVG in the page's colours, as wide as its place.

    Parameters
    ----------
    draw : callable
        Given a matplotlib figure to fill.
    width, height : float
        Inches of the drawing's own frame.
    title : str
        What it shows, for those who do not see it.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        draw(figure)
        for axis in figure.axes:
            axis.patch.set_alpha(0)
            axis.set_axisbelow(True)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    prefix = f"f{short_hash(text, 10)}-"  # ids of separate figures in one page must not meet
    text = re.sub(r'(id="|url\(#|xlink:href="#|href="#)', lambda match: match.group(1) + prefix, text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
