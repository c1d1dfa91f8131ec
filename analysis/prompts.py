"""From label names to texts for the text tower, and from their embeddings back to one vector a label.

In come label names and templates; out go the texts to embed (each once) and, when their embeddings have been made, one
vector a label: the mean of its normalised prompt embeddings, normalised again (Radford et al. 2021, section 3.1.4).
With negative prompts each label also gets a vector of its absence ("no edema"; Tiu et al. 2022, CheXzero), so that
scores of different labels start from a common zero.

A template holds ``{label}`` (the name in lower case, as reports write it) or ``{Label}`` (the name as it is, which the
study used bare).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.vectors import normalise_rows
from engine.errors import DataError, UsageError
from engine.labels import nothing_label

TEMPLATES: dict[str, tuple[str, ...]] = {
    "bare": ("{Label}",),
    "radiograph": ("a chest radiograph showing {label}",),
    "photo": ("this is a photo of {label}",),
    "ensemble": (
        "{label}",
        "a chest radiograph showing {label}",
        "a chest x-ray of a patient with {label}",
        "frontal radiograph of the chest with {label}",
        "there is {label}",
        "findings consistent with {label}",
    ),
}
NEGATIVE_TEMPLATES: dict[str, tuple[str, ...]] = {
    "no": ("no {label}",),
    "ensemble": ("no {label}", "a chest radiograph without {label}", "there is no evidence of {label}"),
}
# The absence of "No Finding" is a finding, not "no no finding".
A_FINDING = "an abnormal finding"


@dataclass(frozen=True)
class Prompts:
    """Texts of every label.

    Parameters
    ----------
    label_names : tuple of str, length L
    positive : tuple of tuple of str, length L
        The label's texts.
    negative : tuple of tuple of str, length L or 0
        Texts of the label's absence; empty without negative prompts.
    """

    label_names: tuple[str, ...]
    positive: tuple[tuple[str, ...], ...]
    negative: tuple[tuple[str, ...], ...] = ()

    @property
    def texts(self) -> list[str]:
        """Every text once, in order of first use: what the text tower has to embed."""
        return list(dict.fromkeys(text for group in (*self.positive, *self.negative) for text in group))

    def combine(self, embeddings: np.ndarray, *, normalize: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        """Return one vector a label from the embeddings of `texts`.

        Parameters
        ----------
        embeddings : ndarray of float, (t, d)
            One row for each of `texts`, in its order, un-normalised.
        normalize : bool
            Normalise each prompt before the mean and the mean after it. Without it the mean is of raw embeddings; the
            study has one bare prompt a label, whose raw embedding this then is.

        Returns
        -------
        positive : ndarray of float64, (L, d)
        negative : ndarray of float64, (L, d), or None
        """
        texts = self.texts
        values = np.asarray(embeddings, dtype=np.float64)
        if values.ndim != 2 or len(values) != len(texts):
            raise DataError(f"embeddings of shape {values.shape} for {len(texts)} prompts; expected one row a prompt")
        if normalize:
            values = normalise_rows(values)
        place = {text: row for row, text in enumerate(texts)}

        def mean(groups: Sequence[Sequence[str]]) -> np.ndarray:
            means = np.stack([values[[place[text] for text in group]].mean(axis=0) for group in groups])
            return normalise_rows(means) if normalize else means

        return mean(self.positive), mean(self.negative) if self.negative else None


def build_prompts(
    label_names: Sequence[str],
    templates: str | Sequence[str] = "ensemble",
    negatives: str | Sequence[str] | None = None,
    *,
    phrases: Mapping[str, str] | None = None,
) -> Prompts:
    """Return the texts of every label.

    Parameters
    ----------
    label_names : sequence of str, length L
    templates : str or sequence of str
        A name in `TEMPLATES`, or templates that hold ``{label}`` or ``{Label}``.
    negatives : str or sequence of str, optional
        A name in `NEGATIVE_TEMPLATES`, or templates of absence.
    phrases : mapping of label name to words, optional
        What stands for ``{label}`` where the name in lower case is not how one says it.

    Raises
    ------
    UsageError
        For an unknown name, an empty list, or a template without a place for the label.
    """
    names = tuple(label_names)
    said = {name: (phrases or {}).get(name, name.lower()) for name in names}
    positive = _templates(templates, TEMPLATES)
    texts = tuple(tuple(_fill(each, name, said[name]) for each in positive) for name in names)
    if negatives is None:
        return Prompts(names, texts)
    absent, nothing = _templates(negatives, NEGATIVE_TEMPLATES), nothing_label(names)
    without = tuple(
        (A_FINDING,) if name == nothing else tuple(_fill(each, name, said[name]) for each in absent) for name in names
    )
    return Prompts(names, texts, without)


def _templates(given: str | Sequence[str], named: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    if isinstance(given, str) and given in named:
        return named[given]
    templates = (given,) if isinstance(given, str) else tuple(given)
    if not templates:
        raise UsageError(f"no prompt templates given; name a set ({', '.join(named)}) or write some")
    for template in templates:
        if "{label}" not in template and "{Label}" not in template:
            raise UsageError(
                f"prompt template {template!r} is neither a set ({', '.join(named)}) nor does it hold {{label}}, such "
                "as 'a chest radiograph showing {label}'"
            )
    return templates


def _fill(template: str, name: str, phrase: str) -> str:
    return template.replace("{label}", phrase).replace("{Label}", name)
