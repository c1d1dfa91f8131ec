"""Maps of embedding space as pictures: one panel a map, points coloured by label, setting or split.

In come two coordinates a sample and a name for each (its label, setting or split); out goes a PNG. The colours are
those of the report's light theme. The largest group is drawn faint and underneath, because in these data it is mostly
"No Finding" and would hide the rest.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from engine.errors import DataError

PAPER, INK, MUTED, RULE = "#fbfaf7", "#1c2126", "#626b74", "#e3e1da"
SERIES = ("#2f6db5", "#d07a1c", "#16877a", "#8b5bb0", "#b4485f", "#7b7f2a")
OTHERS = "others"
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": RULE,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}


def map_picture(
    maps: Mapping[str, np.ndarray], names: np.ndarray, *, title: str, note: str = "", dots_per_inch: int = 150
) -> bytes:
    """Return a PNG of maps side by side.

    Parameters
    ----------
    maps : mapping of panel title to ndarray of float, (n, 2)
        Maps of the same n samples, such as "PCA" and "t-SNE".
    names : ndarray of str, (n,)
        What colours a sample. The most frequent name is faint; the next five have colours of their own, all others
        share the sixth.
    title : str
        What the colours are, such as "label".
    note : str
        How to read the maps, written above them.

    Raises
    ------
    DataError
        No map, or maps and names of different length.
    """
    names = np.asarray(names, dtype=object).astype(str)
    if not maps or any(np.shape(places) != (len(names), 2) for places in maps.values()):
        shapes = ", ".join(str(np.shape(places)) for places in maps.values()) or "none"
        raise DataError(f"maps of shapes {shapes} for {len(names)} samples; each needs two coordinates a sample")
    drawn = colour_groups(names)
    # Points overlap; drawn smaller and fainter the more they are.
    size = float(np.clip(4000 / max(1, len(names)), 2.0, 16.0))
    with rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(4.6 * len(maps) + 0.2, 5.3), layout="constrained")
        axes = figure.subplots(1, len(maps), squeeze=False)[0]
        for axis, (panel, places) in zip(axes, maps.items(), strict=True):
            for name, colour, members in drawn:
                faint = colour == MUTED
                axis.scatter(
                    places[members, 0], places[members, 1], s=size * (0.6 if faint else 1.0), color=colour,
                    alpha=0.45 if faint else 0.8, linewidths=0, label=f"{name} ({len(members):,})",
                )  # fmt: skip
            axis.set_title(panel, loc="left")
            axis.set(xticks=[], yticks=[])
            axis.set_aspect("equal", adjustable="datalim")
            axis.spines[["top", "right"]].set_visible(False)
        handles, texts = axes[0].get_legend_handles_labels()
        # Drawn early so as not to hide the named ones, but told last.
        last = [number for number, (_, colour, _) in enumerate(drawn) if colour == SERIES[5]]
        shown = [number for number in range(len(drawn)) if number not in last] + last
        handles, texts = [handles[number] for number in shown], [texts[number] for number in shown]
        legend = figure.legend(
            handles, texts, loc="outside lower center", ncols=min(4, len(texts)), frameon=False, fontsize=8,
            title=f"coloured by {title}", title_fontsize=8, markerscale=1.6,
        )  # fmt: skip
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1.0)
        if note:
            figure.suptitle(note, fontsize=8, color=MUTED, x=0.01, ha="left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dots_per_inch, metadata={"Software": None})
    return buffer.getvalue()


def colour_groups(names: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """Return name, colour and members of what is drawn, undermost first; equal counts in the order of names."""
    found, counts = np.unique(names, return_counts=True)
    ranked = found[np.argsort(-counts, kind="stable")]
    groups = [(str(name), np.flatnonzero(names == name)) for name in ranked]
    if len(groups) <= 2:
        return [(name, SERIES[number], members) for number, (name, members) in enumerate(groups)]
    own = [(groups[0][0], MUTED, groups[0][1])]
    rest = groups[6:]
    if rest:
        merged = np.sort(np.concatenate([members for _, members in rest]))
        own.append((OTHERS if len(rest) > 1 else rest[0][0], SERIES[5], merged))
    return own + [(name, colour, members) for (name, members), colour in zip(groups[1:6], SERIES, strict=False)]
