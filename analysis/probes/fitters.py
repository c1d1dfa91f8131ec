"""Fits of every candidate of a sweep on every part of the rows, made when the object is.

In come embeddings (or tokens), truth and which rows each fit may see; out go logits of any rows by any fit, and the
probe that is kept. The convex kinds are one sweep of `solve_logistic` a feature set, whatever the number of parts;
neighbours and Tip-Adapter compare once for all of their candidates; the others are estimators, fitted one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from analysis.heads import LinearHead
from analysis.probes.base import LinearEstimator, Probe
from analysis.probes.candidates import CONVEX, Candidate, Options, prepared
from analysis.probes.fitting import warn_of_unfinished
from analysis.probes.inputs import on_device
from analysis.probes.linear import RidgeProbe, text_vectors
from analysis.probes.logistic import TOLERANCE, LogisticFits, solve_logistic
from analysis.probes.neighbours import NearestMean, NeighbourProbe, TipAdapterProbe
from analysis.probes.stored import StoredProbe
from analysis.probes.trained import AttentionPoolingProbe, MLPProbe
from engine.errors import DataError


class Fitter(Protocol):
    """Fits of candidates (A) on parts of the rows (G)."""

    fits: Mapping[str, LogisticFits]

    def logits(self, which: int, values: np.ndarray) -> np.ndarray:
        """Return logits (A, m, L) of embeddings as they come, (m, d), by the fits on part `which`."""

    def probe(self, which: int, candidate: int) -> LinearHead | StoredProbe:
        """Return the probe of a part and a candidate."""


def fitter_of(x: np.ndarray, y: np.ndarray, rows: np.ndarray, names: tuple[str, ...], options: Options) -> Fitter:
    """Fit everything.

    Parameters
    ----------
    x : ndarray of float, (n, d)
        Un-normalised embeddings; (n, t, width) tokens for the kind "attention".
    y : ndarray of bool, (n, L)
    rows : ndarray of bool, (G, n)
        Rows that each fit sees.
    names : tuple of str, length L
    options : Options

    Raises
    ------
    DataError
        The only label has one value in a part, which the kinds that are estimators do not take.
    """
    if options.kind in CONVEX:
        return _Convex(x, y, rows, names, options)
    _check_lone_label(y, rows, names, options.kind)
    comparing = {"neighbours": _Neighbours, "tip-adapter": _TipAdapter}
    return comparing.get(options.kind, _Estimators)(x, y, rows, names, options)


def _check_lone_label(y: np.ndarray, rows: np.ndarray, names: tuple[str, ...], kind: str) -> None:
    if y.shape[1] > 1:
        return
    # One column is two classes to scikit-learn, so a part with one class only would be refused there.
    lone = [number for number, seen in enumerate(rows) if len(set(y[seen, 0].tolist())) < 2]
    if lone and len(rows) == 1:
        raise DataError(
            f"label {names[0]!r} has one value only among the training samples, so a {kind} probe learns "
            "nothing from them; take the logistic one, which gives the prior, or another split"
        )
    if lone:
        raise DataError(f"label {names[0]!r} has one value only in training part {lone[0]}; use fewer folds")


class _Convex:
    """Logistic regressions, from 0 or from text."""

    def __init__(
        self, x: np.ndarray, y: np.ndarray, rows: np.ndarray, names: tuple[str, ...], options: Options
    ) -> None:
        self.y, self.rows, self.names, self.options = y, rows, names, options
        self.candidates = options.candidates()
        grid = list(dict.fromkeys(candidate.C for candidate in self.candidates if candidate.C is not None))
        self.prior = options.scale * text_vectors(
            options.text if options.kind == "text-prior" else None, y.shape[1], x.shape[1]
        )
        fits: dict[str, LogisticFits] = {}
        for features in dict.fromkeys(options.features):
            values = prepared(x, features)
            offset = values @ self.prior.T if options.kind == "text-prior" else None
            fits[features] = solve_logistic(
                on_device(values, options.device), y, grid, row_weights=rows,
                class_weights=tuple(dict.fromkeys(options.class_weights)), offset=offset, label_names=names,
            )  # fmt: skip
            warn_of_unfinished(fits[features], TOLERANCE, 200)
        self.fits: Mapping[str, LogisticFits] = fits

    def _place(self, candidate: int) -> tuple[LogisticFits, int, int]:
        mine = self.candidates[candidate]
        assert mine.C is not None  # every convex candidate has one
        fits = self.fits[mine.features]
        return fits, fits.class_weights.index(mine.class_weight), fits.c_grid.index(mine.C)

    def _parts(self, which: int, candidate: int) -> tuple[np.ndarray, np.ndarray]:
        fits, weighting, level = self._place(candidate)
        return fits.weight[which, weighting, :, level] + self.prior, fits.bias[which, weighting, :, level]

    def logits(self, which: int, values: np.ndarray) -> np.ndarray:
        sets = {features: prepared(values, features) for features in self.fits}
        found = []
        for number, candidate in enumerate(self.candidates):
            weight, bias = self._parts(which, number)
            found.append(sets[candidate.features] @ weight.T + bias)
        return np.stack(found)

    def probe(self, which: int, candidate: int) -> LinearHead:
        weight, bias = self._parts(which, candidate)
        fits, weighting, _ = self._place(candidate)
        mine, truth = self.candidates[candidate], self.y[self.rows[which]]
        logistic = self.options.kind == "logistic"
        provenance = {
            "kind": self.options.kind,
            "recipe": "logistic regression" if logistic else "logistic regression drawn to text",
            "C": mine.C,
            "c_grid": list(fits.c_grid),
            "class_weight": mine.class_weight,
            "select": self.options.selection if len(self.candidates) > 1 else None,
            "tol": TOLERANCE,
            "train_samples": len(truth),
            "train_positives": truth.sum(axis=0).tolist(),
            "untrained_labels": [self.names[k] for k in np.flatnonzero(~fits.trained[which, weighting])],
        }
        return LinearHead(weight, bias, self.names, mine.features == "unit", self.options.encoder_id, provenance)


class _Estimators:
    """One estimator a candidate and part; a subclass shares work among candidates."""

    fits: Mapping[str, LogisticFits] = {}

    def __init__(
        self, x: np.ndarray, y: np.ndarray, rows: np.ndarray, names: tuple[str, ...], options: Options
    ) -> None:
        self.x, self.y, self.rows, self.names, self.options = x, y, rows, names, options
        self.candidates = options.candidates()
        self._fitted = [self._fit_part(seen) for seen in rows]

    def _fit_part(self, seen: np.ndarray) -> list[Probe]:
        return [self._fit(self._estimator(candidate), seen, candidate.features) for candidate in self.candidates]

    def _fit(self, estimator: Probe, seen: np.ndarray, features: str) -> Probe:
        return estimator.fit(prepared(self.x[seen], features), self.y[seen].astype(int))

    def _estimator(self, candidate: Candidate) -> Probe:
        options, unit = self.options, candidate.features == "unit"
        made: dict[str, Callable[[], Probe]] = {
            "ridge": lambda: RidgeProbe(normalize=unit, alphas=tuple(options.ridge)),
            "nearest-mean": lambda: NearestMean(normalize=unit),
            "neighbours": lambda: NeighbourProbe(int(candidate.value("k"))),
            "tip-adapter": lambda: TipAdapterProbe(
                options.text, alpha=candidate.value("alpha"), beta=candidate.value("beta"), scale=options.scale,
                bias=None,
            ),
            "mlp": lambda: MLPProbe(
                int(candidate.value("hidden")), epochs=int(candidate.value("epochs")), random_state=options.seed,
                device=options.device,
            ),
            "attention": lambda: AttentionPoolingProbe(
                epochs=int(candidate.value("epochs")), random_state=options.seed, device=options.device
            ),
        }  # fmt: skip
        return made[options.kind]()

    def logits(self, which: int, values: np.ndarray) -> np.ndarray:
        found = [
            probe.decision_function(prepared(values, candidate.features)).reshape(len(values), -1)
            for probe, candidate in zip(self._fitted[which], self.candidates, strict=True)
        ]
        return np.stack(found)

    def probe(self, which: int, candidate: int) -> LinearHead | StoredProbe:
        mine, probe = self.candidates[candidate], self._kept(which, candidate)
        truth = self.y[self.rows[which]]
        provenance: dict[str, Any] = {
            "kind": self.options.kind,
            "select": self.options.selection if len(self.candidates) > 1 else None,
            "train_samples": len(truth),
            "train_positives": truth.sum(axis=0).tolist(),
        }
        if isinstance(probe, LinearEstimator):
            return probe.to_head(self.names, self.options.encoder_id, provenance)
        return StoredProbe(
            probe, self.options.kind, self.names, mine.features == "unit", self.options.encoder_id, provenance
        )

    def _kept(self, which: int, candidate: int) -> Probe:
        return self._fitted[which][candidate]


class _Comparing(_Estimators):
    """Kinds that compare with stored rows: what one fit of a part stores serves all candidates."""

    def _fit_part(self, seen: np.ndarray) -> list[Probe]:
        return [self._fit(self._estimator(self.candidates[0]), seen, "unit")]

    def _kept(self, which: int, candidate: int) -> Probe:
        return self._fit(self._estimator(self.candidates[candidate]), self.rows[which], "unit")


class _Neighbours(_Comparing):
    """Nearest neighbours: those of the largest k hold those of all others."""

    def logits(self, which: int, values: np.ndarray) -> np.ndarray:
        (probe,) = self._fitted[which]
        assert isinstance(probe, NeighbourProbe)
        return probe.logits_of(prepared(values, "unit"), [int(candidate.value("k")) for candidate in self.candidates])


class _TipAdapter(_Comparing):
    """Tip-Adapter: affinities of one beta serve all alphas."""

    def logits(self, which: int, values: np.ndarray) -> np.ndarray:
        (probe,) = self._fitted[which]
        assert isinstance(probe, TipAdapterProbe)
        unit, betas = prepared(values, "unit"), list(dict.fromkeys(each.value("beta") for each in self.candidates))
        zero_shot, near = probe.zero_shot(unit), dict(zip(betas, probe.affinities(unit, betas), strict=True))
        return np.stack([zero_shot + each.value("alpha") * near[each.value("beta")] for each in self.candidates])
