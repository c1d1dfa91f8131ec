"""Pairs of samples of one patient, to be taken out of sums over all pairs.

In come embeddings as blocks of rows and the patient of each sample; out come all pairs within patients with their
squared distances. Two images of one patient are alike whatever their labels mean, and mostly share labels, so distances
that are to say something about labels are over pairs of different patients. Sums over all pairs follow from sums over
samples; those within patients are few and are subtracted one by one.
"""

from __future__ import annotations

import numpy as np
import torch

from analysis.space.rows import Rows

_AT_A_TIME = 1 << 16


class PatientPairs:
    """All pairs i < j of samples of one patient.

    Parameters
    ----------
    rows : Rows, (n, d)
        Of patients with several samples, rows are kept in float32 while distances are computed.
    codes : ndarray of int, (n,)

    Attributes
    ----------
    first, second : ndarray of int64, (K,)
    squares : ndarray of float64, (K,)
        Squared distances.
    """

    def __init__(self, rows: Rows, codes: np.ndarray) -> None:
        self.first, self.second = pairs_within(codes)
        self.squares = np.zeros(len(self.first))
        needed = np.unique(np.concatenate([self.first, self.second]))
        if not len(needed):
            return
        kept: torch.Tensor | None = None
        for place, block in rows.blocks():
            if kept is None:
                kept = torch.empty((len(needed), rows.shape[1]), dtype=torch.float32, device=block.device)
            start, stop = np.searchsorted(needed, [place.start, place.stop])
            kept[start:stop] = block[torch.from_numpy(needed[start:stop] - place.start).to(block.device)].float()
        assert kept is not None  # rows are at least one
        one, other = (
            torch.from_numpy(np.searchsorted(needed, each)).to(kept.device) for each in (self.first, self.second)
        )
        for start in range(0, len(one), _AT_A_TIME):
            part = slice(start, start + _AT_A_TIME)
            apart = kept[one[part]].double() - kept[other[part]].double()
            self.squares[part] = apart.square().sum(dim=1).cpu().numpy()

    def __len__(self) -> int:
        return len(self.first)

    def weights(self, of_samples: np.ndarray) -> np.ndarray:
        """Return the weight of each pair under weights of samples (n, R), (K, R) float64."""
        return of_samples[self.first].astype(np.float64) * of_samples[self.second]


def pairs_within(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs i < j of samples of one group, (K,) int64 each."""
    order = np.argsort(codes, kind="stable")
    _, starts, sizes = np.unique(codes[order], return_index=True, return_counts=True)
    first, second = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for size in np.unique(sizes[sizes > 1]):
        members = order[starts[sizes == size][:, None] + np.arange(size)]
        i, j = np.triu_indices(size, k=1)
        first.append(members[:, i].ravel())
        second.append(members[:, j].ravel())
    return np.concatenate(first), np.concatenate(second)
