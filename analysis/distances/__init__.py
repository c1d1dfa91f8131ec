"""Distances between classes: the study's own figures, and forms that fit several labels a sample."""

from analysis.distances.multilabel import label_separation, overlap_distances
from analysis.distances.study import (
    NO_CLASS,
    Distances,
    Null,
    bootstrap_distances,
    class_distances,
    first_positive,
    permuted_null,
)

__all__ = [
    "NO_CLASS",
    "Distances",
    "Null",
    "bootstrap_distances",
    "class_distances",
    "first_positive",
    "label_separation",
    "overlap_distances",
    "permuted_null",
]
