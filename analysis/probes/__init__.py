"""Probes on cached embeddings: many convex problems at once, estimators with scikit-learn's interface, the study's own.

In come embeddings and truth; out go heads, scores and choices. The encoder stays frozen throughout, so cached
embeddings give what the tower would.
"""

from analysis.probes.fitting import (
    C_GRID,
    ProbeResult,
    fit_probe,
    fit_probe_on_split,
    smoothed_prior,
)
from analysis.probes.linear import LinearProbe, RidgeProbe, TextPriorProbe
from analysis.probes.logistic import LogisticFits, solve_logistic
from analysis.probes.neighbours import NearestMean, NeighbourProbe, TipAdapterProbe
from analysis.probes.recipe import PaperProbeSettings, paper_head, paper_probe
from analysis.probes.selection import SELECTIONS, mean_log_loss
from analysis.probes.stored import StoredProbe, load_probe
from analysis.probes.trained import AttentionPoolingProbe, MLPProbe

__all__ = [
    "C_GRID",
    "SELECTIONS",
    "AttentionPoolingProbe",
    "LinearProbe",
    "LogisticFits",
    "MLPProbe",
    "NearestMean",
    "NeighbourProbe",
    "PaperProbeSettings",
    "ProbeResult",
    "RidgeProbe",
    "StoredProbe",
    "TextPriorProbe",
    "TipAdapterProbe",
    "fit_probe",
    "fit_probe_on_split",
    "load_probe",
    "mean_log_loss",
    "paper_head",
    "paper_probe",
    "smoothed_prior",
    "solve_logistic",
]
