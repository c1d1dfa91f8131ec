"""The page's colours, light and dark, as one table that the style sheet is written from.

Each name is a CSS variable. A browser that knows ``light-dark()`` follows the reader's theme; an older one shows the
light page. Paper is always light, so print takes the first of each pair. Every text colour reaches the contrast 4.5 : 1
of WCAG 2.2 on every ground that it stands on, and every colour of a drawing 3 : 1; a test computes it.
"""

from __future__ import annotations

COLOURS: dict[str, tuple[str, str]] = {
    "paper": ("#f7f6f2", "#14171a"),
    "card": ("#ffffff", "#1b1f23"),
    "sunk": ("#efede6", "#23282d"),
    "ink": ("#1c2126", "#e8e6e1"),
    "muted": ("#59626b", "#a3acb4"),
    "rule": ("#dfdcd3", "#343b41"),
    "accent": ("#0a647d", "#5cc0da"),
    "good": ("#1b6e45", "#62c995"),
    "bad": ("#a83a2a", "#f0907f"),
    "caution": ("#8a5a00", "#e6b45a"),
    "series-1": ("#2f6db5", "#6ea8ee"),
    "series-2": ("#c06a10", "#f0a54e"),
    "series-3": ("#16877a", "#4fc4b4"),
    "series-4": ("#8b5bb0", "#bd93dd"),
    "series-5": ("#b4485f", "#ec8ba0"),
    "series-6": ("#757926", "#c3c763"),
}
TEXTS = ("ink", "muted", "accent", "good", "bad", "caution")
GROUNDS = ("paper", "card", "sunk")
DRAWN = tuple(name for name in COLOURS if name.startswith("series-"))


def variables(which: str) -> str:
    """Return the CSS declarations of all colours.

    Parameters
    ----------
    which : "light" | "both"
        Plain light values, or pairs that follow the reader's theme.
    """
    if which == "light":
        return " ".join(f"--{name}:{light};" for name, (light, _) in COLOURS.items())
    return " ".join(f"--{name}:light-dark({light},{dark});" for name, (light, dark) in COLOURS.items())
