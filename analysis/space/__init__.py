"""The shape of embedding space, in numbers with intervals and nulls."""

from analysis.space.measures import Measure, measure_table
from analysis.space.neighbours import hubness, knn_purity, label_purity, nearest_neighbours
from analysis.space.scatter import centroid_measures
from analysis.space.silhouettes import silhouette, silhouette_samples
from analysis.space.similarity import linear_cka, procrustes_disparity, space_similarity
from analysis.space.sphere import class_alignment, modality_gap, pair_alignment, uniformity
from analysis.space.survey import measure_space

__all__ = [
    "Measure",
    "centroid_measures",
    "class_alignment",
    "hubness",
    "knn_purity",
    "label_purity",
    "linear_cka",
    "measure_space",
    "measure_table",
    "modality_gap",
    "nearest_neighbours",
    "pair_alignment",
    "procrustes_disparity",
    "silhouette",
    "silhouette_samples",
    "space_similarity",
    "uniformity",
]
