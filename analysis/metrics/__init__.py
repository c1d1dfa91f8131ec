"""Metrics for imbalanced multi-label data: truth, scores and decisions in, numbers out; NumPy and torch by one code.

`samples` has what is a mean of one value a sample, `ranking` AUROC and average precision, `calibration` Brier score,
ECE and reliability curves, `weighted` all of them under many columns of weights, `arrays` the checks. The names that
others use are collected here.
"""

from __future__ import annotations

from analysis.metrics.arrays import check_decisions, check_scores, check_truth, divide, mean_of_defined
from analysis.metrics.calibration import brier, expected_calibration_error, reliability_curve
from analysis.metrics.ranking import auroc, auroc_micro, average_precision, ranking_of_label
from analysis.metrics.samples import (
    confusion_samples,
    coverage_samples,
    exact_match_samples,
    hamming_samples,
    lrap_samples,
    ranking_loss_samples,
)
from analysis.metrics.weighted import (
    LABEL_METRICS,
    LOWER_IS_BETTER,
    OVERALL_METRICS,
    MetricPlan,
    Prediction,
    WeightedMetrics,
    precision_recall_f1,
    summary,
    weighted_metrics,
)

__all__ = [
    "LABEL_METRICS",
    "LOWER_IS_BETTER",
    "OVERALL_METRICS",
    "MetricPlan",
    "Prediction",
    "WeightedMetrics",
    "auroc",
    "auroc_micro",
    "average_precision",
    "brier",
    "check_decisions",
    "check_scores",
    "check_truth",
    "confusion_samples",
    "coverage_samples",
    "divide",
    "exact_match_samples",
    "expected_calibration_error",
    "hamming_samples",
    "lrap_samples",
    "mean_of_defined",
    "precision_recall_f1",
    "ranking_loss_samples",
    "ranking_of_label",
    "reliability_curve",
    "summary",
    "weighted_metrics",
]
