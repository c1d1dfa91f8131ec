"""Probes that compare with stored samples: nearest class mean, nearest neighbours, Tip-Adapter.

In come features and truth, which are kept as they are or averaged; out go logits from distances and affinities. Nothing
is trained. Products with the stored samples go in blocks, so that memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from analysis.probes.base import LinearEstimator, Probe, WeightedProbe, unit_rows
from analysis.probes.linear import text_vectors
from analysis.vectors import without_rounding

# Products (queries x stored samples) that are held at once.
_CELLS = 1 << 24


class NearestMean(LinearEstimator):
    """Nearest class mean: how much closer a sample is to the mean of a label's positives than of its negatives.

    The logit is (|x - m0|^2 - |x - m1|^2) / (2 s^2), which is linear in x; s^2 is the mean squared distance of rows
    from their own mean. It orders well, but is no calibrated chance. Among several classes the nearest mean wins.

    Parameters
    ----------
    normalize : bool
        Bring features to length 1 first.

    Attributes
    ----------
    means_ : ndarray of float64, (L, 2, d)
        Of negatives and positives; where there are none, of all rows, and the logit is 0.
    """

    def __init__(self, *, normalize: bool = False) -> None:
        self.normalize = normalize

    def _learn(self, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> None:
        values = np.asarray(self._scaled(x), dtype=np.float64)
        everything = weight @ values / weight.sum()
        self.means_ = np.empty((y.shape[1], 2, x.shape[1]))
        for label, column in enumerate(y.T):
            for side in (0, 1):
                share = weight * (column == bool(side))
                self.means_[label, side] = share @ values / share.sum() if share.sum() > 0 else everything
            if not (weight * column).any() or not (weight * ~column).any():
                self.means_[label] = everything
        negative, positive = self.means_[:, 0], self.means_[:, 1]
        if self._kind == "multiclass":
            # Half the squared distance to each mean, what all classes share left out.
            negative = np.zeros_like(positive)
        spread = np.array(
            [
                weight @ ((values - means[column.astype(int)]) ** 2).sum(axis=1) / weight.sum()
                for means, column in zip(self.means_, y.T, strict=True)
            ]
        )
        if self._kind == "multiclass":
            spread[:] = spread.mean()
        spread[spread == 0] = 1
        self.coef_ = (positive - negative) / spread[:, None]
        self.intercept_ = -0.5 * (self.coef_ * (positive + negative)).sum(axis=1)

    def _answer(self, x: np.ndarray) -> np.ndarray:
        # Samples that are equally near are tied, and not ordered by rounding.
        return np.round(super()._answer(x), 12)


class NeighbourProbe(Probe):
    """k nearest neighbours: the log-odds of a label's share among them.

    Parameters
    ----------
    n_neighbors : int
        All stored samples where there are fewer.
    metric : "cosine" | "euclidean"
    temperature : float or None
        Neighbours count equally if None, else by exp(similarity / temperature), as in DINO's evaluation; the similarity
        is the cosine, or minus the distance.
    """

    def __init__(self, n_neighbors: int = 20, *, metric: str = "cosine", temperature: float | None = None) -> None:
        self.n_neighbors = n_neighbors
        self.metric = metric
        self.temperature = temperature

    def _learn(self, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> None:
        if self.n_neighbors < 1 or self.metric not in ("cosine", "euclidean"):
            raise ValueError(
                f"n_neighbors must be at least 1 and metric cosine or euclidean, got {self.n_neighbors} and "
                f"{self.metric!r}"
            )
        self.stored_, self.truth_ = self._scaled(x), y

    def fitted_arrays(self) -> dict[str, np.ndarray]:
        """Return the stored rows and their truth."""
        return {"stored": self.stored_, "truth": self.truth_}

    def take_arrays(self, arrays: Mapping[str, np.ndarray], labels: int, features: int) -> NeighbourProbe:
        """Become the probe that stored these rows."""
        super().take_arrays(arrays, labels, features)
        self.stored_, self.truth_ = arrays["stored"], arrays["truth"].astype(bool)
        return self

    def _scaled(self, x: np.ndarray) -> np.ndarray:
        return unit_rows(x) if self.metric == "cosine" else np.asarray(x, dtype=np.float64)

    def shares(self, x: np.ndarray) -> np.ndarray:
        """Return each label's share (m, L) among the neighbours of features (m, d); ties go to the earlier row."""
        return self._shares(x, [self.n_neighbors])[0]

    def logits_of(self, x: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """Return the logits (K, m, L) that so many neighbours give each, from one comparison with the stored rows."""
        # Half a neighbour on either side keeps the log-odds finite and their sign right.
        half = 0.5 / np.minimum(counts, len(self.stored_))[:, None, None]
        shares = self._shares(x, counts)
        return np.log(shares + half) - np.log(1 - shares + half)

    def _shares(self, x: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        asked, stored = self._scaled(x), self.stored_
        if self.metric == "euclidean":
            # Seen from the middle of those stored, fewer digits cancel.
            middle = stored.mean(axis=0)
            asked, stored = asked - middle, stored - middle
        most = min(max(counts), len(stored))
        found = np.empty((len(counts), len(asked), self.truth_.shape[1]))
        squares = (stored**2).sum(axis=1)
        step = max(1, _CELLS // len(stored))
        for start in range(0, len(asked), step):
            some = asked[start : start + step]
            similarity = some @ stored.T
            if self.metric == "euclidean":
                lengths = (some**2).sum(axis=1)
                away = np.maximum(lengths[:, None] + squares - 2 * similarity, 0)
                similarity = -np.sqrt(without_rounding(away, float(lengths.max() + squares.max())))
            else:
                similarity = without_rounding(similarity)
            nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :most]
            near = np.take_along_axis(similarity, nearest, axis=1)
            truth = self.truth_[nearest]
            for place, count in enumerate(counts):
                share = np.ones_like(near[:, :count])
                if self.temperature is not None:
                    share = np.exp((near[:, :count] - near.max(axis=1, keepdims=True)) / self.temperature)
                share /= share.sum(axis=1, keepdims=True)
                found[place, start : start + step] = np.einsum("mk,mkl->ml", share, truth[:, :count])
        return found

    def _answer(self, x: np.ndarray) -> np.ndarray:
        return self.logits_of(x, [self.n_neighbors])[0]


class TipAdapterProbe(WeightedProbe):
    """Tip-Adapter for several labels: zero-shot logits, and affinity to stored samples with and without the label.

    A stored sample i has the affinity exp(-beta (1 - cos(x, x_i))). Where Tip-Adapter adds one-hot labels of a few
    shots a class, here positives and negatives of a label are averaged each for itself, so that rare labels are not
    drowned:
    logit = scale x.t + bias + alpha (mean affinity to positives - mean affinity to negatives).

    Source: Zhang et al., Tip-Adapter, ECCV 2022 (arXiv 2111.03930), for one label a sample.

    Parameters
    ----------
    text : ndarray of float, (L, d), or None
        Text vectors for zero-shot; None leaves the stored samples alone.
    alpha, beta : float
        Weight and sharpness of the affinities.
    scale : float
        Of the dot product of normalised features and text.
    bias : float or None
        Added to the zero-shot logits; None: for each label what brings its mean over the stored samples to the log-odds
        of its share among them (half a sample added to either side).
    """

    def __init__(
        self,
        text: np.ndarray | None = None,
        *,
        alpha: float = 10.0,
        beta: float = 5.5,
        scale: float = 1.0,
        bias: float | None = 0.0,
    ) -> None:
        self.text = text
        self.alpha = alpha
        self.beta = beta
        self.scale = scale
        self.bias = bias

    def _learn(self, x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> None:
        self.text_ = text_vectors(self.text, y.shape[1], x.shape[1])
        positive, negative = (weight[:, None] * side for side in (y, ~y))
        # A label without positives or without negatives gets no share of that side.
        shares = [side / np.where(side.sum(axis=0) > 0, side.sum(axis=0), 1) for side in (positive, negative)]
        self.stored_, self.share_ = unit_rows(x), shares[0] - shares[1]
        self.bias_ = np.full(y.shape[1], 0.0 if self.bias is None else self.bias)
        if self.bias is None:
            odds = np.log((positive.sum(axis=0) + 0.5) / (negative.sum(axis=0) + 0.5))
            self.bias_ = odds - weight @ self.zero_shot(x) / weight.sum()

    def fitted_arrays(self) -> dict[str, np.ndarray]:
        """Return the stored rows, what each says about each label, text vectors and bias."""
        return {"stored": self.stored_, "share": self.share_, "text": self.text_, "bias": self.bias_}

    def take_arrays(self, arrays: Mapping[str, np.ndarray], labels: int, features: int) -> TipAdapterProbe:
        """Become the probe that stored these rows."""
        super().take_arrays(arrays, labels, features)
        self.stored_, self.share_ = arrays["stored"], arrays["share"]
        self.text = self.text_ = arrays["text"]
        self.bias_ = arrays["bias"]
        return self

    def zero_shot(self, x: np.ndarray) -> np.ndarray:
        """Return the logits (m, L) of features (m, d) by the text alone."""
        return self.scale * unit_rows(x) @ self.text_.T + self.bias_

    def affinities(self, x: np.ndarray, betas: Sequence[float]) -> np.ndarray:
        """Return for each beta how much nearer features (m, d) are to a label's positives than to its negatives.

        (B, m, L), from one comparison with the stored rows.
        """
        asked, step = unit_rows(x), max(1, _CELLS // len(self.stored_))
        found = np.empty((len(betas), len(asked), self.share_.shape[1]))
        for start in range(0, len(asked), step):
            away = 1 - asked[start : start + step] @ self.stored_.T
            for place, beta in enumerate(betas):
                found[place, start : start + step] = np.exp(-beta * away) @ self.share_
        return found

    def _answer(self, x: np.ndarray) -> np.ndarray:
        return self.zero_shot(x) + self.alpha * self.affinities(x, [self.beta])[0]
