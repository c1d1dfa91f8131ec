"""Do two encoders, or one before and after fine-tuning, see the same samples alike? Linear CKA and Procrustes.

In come two tables of embeddings of the same samples, (n, d) and (n, e); out go both measures with intervals by patient
and the null of samples paired at random.

* CKA: centred kernel alignment of the linear kernels, HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)); 1 for spaces equal up
  to rotation, scale and shift (Kornblith et al., Similarity of neural network representations revisited, 2019). With
  few samples a dimension the plain form is far above 0 for unrelated spaces; the default is the unbiased HSIC (Song et
  al., Feature selection via dependence maximization, 2012; Nguyen et al., Do wide and deep networks learn the same
  things?, 2021), which is 0 on average there.
* Procrustes disparity: what is left of the squared distance between two spaces, both centred and of size 1, after the
  best rotation, reflection and scaling: 1 - (sum of singular values of X'Y)^2, between 0 and 1. As
  `scipy.spatial.procrustes`, which needs equal widths; the narrower space is thought of as padded with zeros.

The n x n kernels never exist: of linear kernels all that is needed are sums over samples (X'X, X'Y, Y'Y and some
vectors). Kept for bags of patients, they give every resample by addition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from analysis.bootstrap import resample_counts
from analysis.space.measures import NAN, Better, Measure, measure
from analysis.space.resampling import group_codes, merged_groups, patients_up_to, permuted_rows
from analysis.space.rows import Rows, Shifted, gathered, precision_of, rows_of
from engine.errors import DataError

NULL_SAMPLES = 5000
# Memory for the sums of all bags.
_BAG_BYTES = 512 << 20
_MOST_BAGS = 200
# Rows that are put into bags together.
_BAGGED_ROWS = 1 << 15
_AT_A_TIME = 20
_PAIRS = (("x", "x"), ("x", "y"), ("y", "y"))


def linear_cka(x: Any, y: Any, *, unbiased: bool = True, device: str = "cpu") -> float:
    """Return the linear CKA of two spaces of the same samples.

    Parameters
    ----------
    x, y : array-like, (n, d) and (n, e)
        Anything that `analysis.space.rows.rows_of` reads, also dask arrays.
    unbiased : bool
        Of HSIC; may be a little below 0 for unrelated spaces, and needs 4 samples.

    Returns
    -------
    float
        NaN where the unbiased variance of a space is not above 0 (constant, or too few samples for its dimensions).
    """
    sums = _BagSums(_pair(x, y, device), None)
    return _cka(sums.exact() if unbiased else sums.biased())


def procrustes_disparity(x: Any, y: Any, *, device: str = "cpu") -> float:
    """Return the Procrustes disparity of two spaces of the same samples, between 0 and 1; NaN for a constant space."""
    first, second = (Shifted(table) for table in _pair(x, y, device))
    cross = torch.zeros((first.shape[1], second.shape[1]), dtype=torch.float64, device=device)
    sums = [torch.zeros(table.shape[1], dtype=torch.float64, device=device) for table in (first, second)]
    squares = [0.0, 0.0]
    for _, *tables in joint_blocks(first, second):
        cross += tables[0].T @ tables[1]
        for number, table in enumerate(tables):
            sums[number] += table.sum(dim=0)
            squares[number] += float(_squares(table).sum())
    return _disparity(*_centred(cross, sums, squares, first.shape[0]))


def space_similarity(
    x: Any,
    y: Any,
    groups: np.ndarray | None = None,
    *,
    replicates: int = 200,
    permutations: int = 200,
    seed: int = 0,
    level: float = 0.95,
    device: str = "cpu",
    null_samples: int = NULL_SAMPLES,
) -> list[Measure]:
    """Return "cka" (unbiased) and "procrustes" of two spaces of the same samples.

    Parameters
    ----------
    x, y : array-like, (n, d) and (n, e)
    groups : ndarray, (n,), optional
        Patients, put into at most 200 bags at random for the intervals. In a resample, copies of a sample are no pair
        in CKA. In Procrustes they are, and fewer different samples are easier to turn onto each other, so its resamples
        are moved up until their mean is the value: the interval shows spread.
    null_samples : int
        The null pairs at most so many samples (whole patients) with others at random.

    Raises
    ------
    DataError
        Tables of different length, fewer than 4 samples, values that are not finite.
    """
    pair = _pair(x, y, device)
    count = pair[0].shape[0]
    codes = group_codes(groups, count)
    widths = pair[0].shape[1], pair[1].shape[1]
    whole = _BagSums(pair, None)
    exact = _cka(whole.exact())
    disparity = _disparity(*whole.centred(None))
    drawn = np.full((2, replicates), NAN)
    bags = merged_groups(codes, _most_bags(*widths), seed)
    number = int(bags.max()) + 1
    if replicates:
        sums = _BagSums(pair, bags)
        counts = resample_counts(np.arange(number), replicates, seed)[1]
        for row, (weights, products) in enumerate(sums.resampled(counts.astype(np.float64))):
            drawn[0, row] = _cka(sums.distinct(weights, products))
            drawn[1, row] = _disparity(*sums.centred(weights, products))
    null, observed, used = _null(x, y, codes, permutations, seed, device, null_samples)
    notes = [""] * 2
    if not math.isfinite(exact):
        notes[0] = "undefined: a space is constant, or has too few samples for its dimensions"
    if not math.isfinite(disparity):
        notes[1] = "undefined: a space is constant"
    elif count < 4 * max(widths):
        notes[1] = "fewer than 4 samples a dimension: any two spaces can be turned onto each other, see the null"
    merged = "" if number == int(codes.max()) + 1 else f"interval: patients in {number} bags"
    figures: tuple[tuple[str, float, Better], ...] = (("cka", exact, "higher"), ("procrustes", disparity, "lower"))
    return [
        measure(
            name, value, drawn=drawn[row] if replicates else None, null=null[row] if permutations else None,
            observed=observed[row], better=better, centred=True, level=level, samples=count,
            groups=len(np.unique(codes)), null_samples=used, note="; ".join(filter(None, (notes[row], merged))),
        )
        for row, (name, value, better) in enumerate(figures)
    ]  # fmt: skip


def _most_bags(width: int, other: int) -> int:
    """Return into how many bags patients are put, so that the products of all of them fit into memory."""
    return max(20, min(_MOST_BAGS, _BAG_BYTES // (4 * (width**2 + width * other + other**2))))


class _BagSums:
    """Sums over the samples of each bag of patients, from which CKA and Procrustes of any resample of bags follow.

    For a pair of tables a and b: products sum a b', and of k = |a|^2, l = |b|^2: sum a, sum k, sum k l, sum k b.
    """

    def __init__(self, pair: tuple[Rows, Rows], bags: np.ndarray | None) -> None:
        self.count = pair[0].shape[0]
        self.bags = 1 if bags is None else int(bags.max()) + 1
        self.sizes = np.bincount(np.zeros(self.count, dtype=np.int64) if bags is None else bags).astype(np.float64)
        # One bag is the value alone, which is wanted to the last digits; resamples are not.
        kept = torch.float64 if bags is None else torch.float32
        # Neither measure changes with a shift, and near the centre fewer digits are lost.
        rows = dict(zip("xy", (Shifted(table) for table in pair), strict=True))
        blocks = joint_blocks(rows["x"], rows["y"])
        for place, *tables in blocks if bags is None else _larger(blocks, _BAGGED_ROWS):
            if place.start == 0:
                self._make_room({name: table.shape[1] for name, table in rows.items()}, kept, tables[0].device)
            if bags is None:
                self._add(0, dict(zip("xy", tables, strict=True)))
                continue
            order = np.argsort(bags[place], kind="stable")
            present, starts = np.unique(bags[place][order], return_index=True)
            inside = torch.from_numpy(order).to(tables[0].device)
            parts = (torch.tensor_split(table[inside], starts[1:].tolist()) for table in tables)
            for bag, x, y in zip(present, *parts, strict=True):
                self._add(bag, {"x": x, "y": y})

    def _make_room(self, widths: dict[str, int], kept: torch.dtype, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.zeros((self.bags, *shape), dtype=dtype, device=device)

        self._products = {a + b: zeros(widths[a], widths[b], dtype=kept) for a, b in _PAIRS}
        self._sums = {name: zeros(width) for name, width in widths.items()}
        self._moments = {k + b: zeros(widths[b]) for k in widths for b in widths}
        self._squares = {name: np.zeros(self.bags) for name in widths}
        self._square_products = {a + b: np.zeros(self.bags) for a, b in _PAIRS}

    def _add(self, bag: int, tables: dict[str, torch.Tensor]) -> None:
        squares = {name: _squares(table) for name, table in tables.items()}
        for name, table in tables.items():
            self._sums[name][bag] += table.sum(dim=0)
            self._squares[name][bag] += float(squares[name].sum())
            for k, of_k in squares.items():
                self._moments[k + name][bag] += of_k.to(table.dtype) @ table
        for a, b in _PAIRS:
            self._products[a + b][bag] += _gram(tables[a]) if a == b else tables[a].T @ tables[b]
            self._square_products[a + b][bag] += float(squares[a] @ squares[b])

    def exact(self) -> dict[str, float]:
        """Return the unbiased HSIC of each pair (Song et al. 2012, equation 5)."""
        n = self.count
        return {
            pair: (both + of_k * of_l / ((n - 1) * (n - 2)) - 2 * through / (n - 2)) / (n * (n - 3))
            for pair, (both, of_k, of_l, through) in self._pair_sums(None).items()
        }

    def resampled(self, weights: np.ndarray) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """Yield weights of bags (R, bags) one by one, each with its sums of products, made some at a time."""
        for first in range(0, len(weights), _AT_A_TIME):
            some = weights[first : first + _AT_A_TIME]
            made = {pair: torch.from_numpy(some).to(kept) @ kept.view(self.bags, -1)
                    for pair, kept in self._products.items()}  # fmt: skip
            for row, each in enumerate(some):
                yield (
                    each,
                    {pair: made[pair][row].view(kept.shape[1:]).double() for pair, kept in self._products.items()},
                )

    def distinct(self, weights: np.ndarray, products: dict[str, torch.Tensor] | None = None) -> dict[str, float]:
        """Return HSIC over different samples under weights of bags: unbiased but for terms of 1 / n."""
        mass = float(weights @ self.sizes)
        second = float(weights**2 @ self.sizes)
        third = float((weights * (mass - weights) ** 2) @ self.sizes)
        if mass**2 - second <= 0:
            return dict.fromkeys(self._products, NAN)
        number = mass**2 - second
        return {
            pair: both / number + of_k * of_l / number**2 - 2 * through / third
            for pair, (both, of_k, of_l, through) in self._pair_sums(weights, products).items()
        }

    def biased(self) -> dict[str, float]:
        """Return HSIC of centred features, squared Frobenius norms of the cross products, up to one factor."""
        sums = {name: each.sum(dim=0) for name, each in self._sums.items()}
        return {
            a + b: float((self._products[a + b][0] - torch.outer(sums[a], sums[b]) / self.count).square().sum())
            for a, b in _PAIRS
        }

    def centred(
        self, weights: np.ndarray | None, products: dict[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, float, float]:
        """Return the cross product of the centred tables and their squared sizes."""
        w = np.ones(self.bags) if weights is None else weights
        cross = self._products["xy"][0] if products is None else products["xy"]
        sums = [self._weighted(each, w) for each in self._sums.values()]
        return _centred(cross, sums, [float(w @ each) for each in self._squares.values()], float(w @ self.sizes))

    def _pair_sums(
        self, weights: np.ndarray | None, products: dict[str, torch.Tensor] | None = None
    ) -> dict[str, tuple[float, float, float, float]]:
        """Return for each pair, over different samples: sum k l, sum k, sum l, and sum over i of (sum_j k)(sum_j l)."""
        w = np.ones(self.bags) if weights is None else weights
        sums = {name: self._weighted(each, w) for name, each in self._sums.items()}
        squares = {name: float(w**2 @ each) for name, each in self._squares.items()}
        totals = {name: float(each.square().sum()) - squares[name] for name, each in sums.items()}
        result = {}
        for a, b in _PAIRS:
            product = self._products[a + b][0] if products is None else products[a + b]
            diagonal = float(w**2 @ self._square_products[a + b])
            both = float(product.square().sum()) - diagonal
            through = float(sums[a] @ product @ sums[b])
            through -= float(self._weighted(self._moments[a + b], w**2) @ sums[b])
            through -= float(self._weighted(self._moments[b + a], w**2) @ sums[a])
            through += float(w**3 @ self._square_products[a + b])
            result[a + b] = (both, totals[a], totals[b], through)
        return result

    @staticmethod
    def _weighted(each: torch.Tensor, weights: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(weights).to(each) @ each


def joint_blocks(x: Rows, y: Rows) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield rows of two tables together, also where their blocks end at different rows."""
    others = y.blocks()
    waiting: torch.Tensor | None = None
    for place, block in x.blocks():
        start = place.start
        while len(block):
            if waiting is None or not len(waiting):
                waiting = next(others)[1]
            count = min(len(block), len(waiting))
            yield slice(start, start + count), block[:count], waiting[:count]
            block, waiting, start = block[count:], waiting[count:], start + count


def _larger(
    blocks: Iterator[tuple[slice, torch.Tensor, torch.Tensor]], least: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield blocks put together to so many rows at least, so that each bag has enough of them for a product."""
    waiting: list[tuple[slice, torch.Tensor, torch.Tensor]] = []
    for block in blocks:
        waiting.append(block)
        if block[0].stop - waiting[0][0].start >= least:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(blocks: list[tuple[slice, torch.Tensor, torch.Tensor]]) -> tuple[slice, torch.Tensor, torch.Tensor]:
    places, first, second = zip(*blocks, strict=True)
    return slice(places[0].start, places[-1].stop), torch.cat(first), torch.cat(second)


def _pair(x: Any, y: Any, device: str) -> tuple[Rows, Rows]:
    """Return two tables of the same samples, float32 where both are that or shorter."""
    short = all(precision_of(each) == torch.float32 for each in (x, y))
    first, second = (rows_of(each, device=device, dtype=torch.float32 if short else torch.float64) for each in (x, y))
    count = first.shape[0]
    if count != second.shape[0]:
        raise DataError(
            f"{count} and {second.shape[0]} rows are no pairs; both spaces need one row a sample, in one order"
        )
    if count < 4:
        raise DataError(f"CKA and Procrustes need at least 4 samples, got {count}")
    return first, second


def _gram(table: torch.Tensor) -> torch.Tensor:
    """Return the product of a table with itself, without the quarter that mirrors another one."""
    half = table.shape[1] // 2
    upper, last = table[:, :half].T @ table, table[:, half:].T @ table[:, half:]
    return torch.cat([upper, torch.cat([upper[:, half:].T, last], dim=1)])


def _squares(table: torch.Tensor) -> torch.Tensor:
    """Return squared lengths of rows, float64."""
    return torch.linalg.vector_norm(table, dim=1).double().square_()


def _centred(
    cross: torch.Tensor, sums: Sequence[torch.Tensor], squares: Sequence[float], mass: float
) -> tuple[torch.Tensor, float, float]:
    """Return the cross product and squared sizes of two tables as they are once centred."""
    sizes = []
    for whole, total in zip(squares, sums, strict=True):
        size = whole - float(total.square().sum()) / mass
        sizes.append(size if size > 1e-12 * whole else 0.0)  # what rounding leaves of a constant space is no size
    return cross - torch.outer(sums[0], sums[1]) / mass, sizes[0], sizes[1]


def _cka(hsic: dict[str, float]) -> float:
    if not (hsic["xx"] > 0 and hsic["yy"] > 0):
        return NAN
    return hsic["xy"] / math.sqrt(hsic["xx"] * hsic["yy"])


def _disparity(cross: torch.Tensor, x_size: float, y_size: float) -> float:
    if not (x_size > 0 and y_size > 0):
        return NAN
    # The smaller Gram matrix: its eigenvalues are the squared singular values, in a third of the time.
    gram = cross @ cross.T if cross.shape[0] <= cross.shape[1] else cross.T @ cross
    nuclear = float(torch.linalg.eigvalsh(gram).clamp(min=0.0).sqrt().sum())
    return max(0.0, 1.0 - nuclear**2 / (x_size * y_size))


def _null(
    x: Any, y: Any, codes: np.ndarray, permutations: int, seed: int, device: str, most: int
) -> tuple[np.ndarray, tuple[float, float], int]:
    """Return CKA and disparity of pairs at random, (2, P), those of the same samples as they are, and their number."""
    null = np.full((2, permutations), NAN)
    part = patients_up_to(codes, most, seed)
    if not permutations or len(part) < 4:
        return null, (NAN, NAN), len(part)
    tables = [gathered(each, part, device=device, dtype=torch.float32).double() for each in (x, y)]
    tables = [table - table.mean(dim=0) for table in tables]
    sums = _BagSums((rows_of(tables[0], device=device), rows_of(tables[1], device=device)), None)
    hsic, (_, x_size, y_size) = sums.exact(), sums.centred(None)
    # Centred tables have no sums, so of HSIC's terms only those of the diagonals are left beside the cross product.
    k, l = (table.square().sum(dim=1) for table in tables)  # noqa: E741
    n = len(part)
    of_both = float(k.sum() * l.sum()) / ((n - 1) * (n - 2))
    first, second = (table.float() for table in tables)
    for row, order in enumerate(permuted_rows(np.unique(codes[part], return_inverse=True)[1], permutations, seed)):
        turned = torch.from_numpy(order).to(device)
        cross = (first.T @ second[turned]).double()
        diagonal = float(k @ l[turned])
        value = (float(cross.square().sum()) - diagonal + of_both - 2 * diagonal / (n - 2)) / (n * (n - 3))
        null[:, row] = _cka({**hsic, "xy": value}), _disparity(cross, x_size, y_size)
    return null, (_cka(hsic), _disparity(*sums.centred(None))), n
