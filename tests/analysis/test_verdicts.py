"""Sentences on thresholds, subgroups, pairs and leaks say what their tables hold, and no more."""

from __future__ import annotations

import pandas as pd

from analysis import verdicts


def conclusions(*rows: tuple[str, str, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["metric", "family", "order"]).assign(changes=False)


def test_an_order_that_every_threshold_gives_is_said_once():
    table = conclusions(("f1_macro", "fixed", "A > B"), ("f1_macro", "f1", "A > B"))
    assert verdicts.threshold_sentences(table) == [
        "By macro-F1 the order of the settings is the same under every threshold: A > B."
    ]


def test_an_order_that_depends_on_the_threshold_names_who_gives_which():
    table = conclusions(("exact_match", "fixed", "A > B"), ("exact_match", "minmax", "B > A"))
    (said,) = verdicts.threshold_sentences(table)
    assert "depends on the threshold: A > B (0.5); B > A (per-image min-max at 0.5)." in said


def gaps(*p_values: float) -> pd.DataFrame:
    names = ["Probe"] * len(p_values)
    return pd.DataFrame(
        {"setting": names, "metric": "lrap", "best": "F", "worst": "M", "value": 0.25, "p_holm": p_values}
    )


COUNTS = pd.DataFrame({"subgroup": ["F", "M"], "groups": [30, 40], "compared": [True, True]})


def test_a_gap_counts_by_its_corrected_p_value_only():
    (none,) = verdicts.gap_sentences("sex", gaps(0.051, 0.9), COUNTS)
    assert "none of 2 gaps" in none
    (one,) = verdicts.gap_sentences("sex", gaps(0.049, 0.9), COUNTS)
    assert "1 of 2 gaps" in one and "LRAP differs by 0.25 between F and M (corrected p = 0.049)" in one


def test_a_gap_without_a_test_is_not_counted():
    (said,) = verdicts.gap_sentences("sex", gaps(float("nan"), 0.2), COUNTS)
    assert "none of 1 gaps" in said


def test_too_few_patients_are_said_and_nothing_is_tested():
    counts = COUNTS.assign(compared=[True, False])
    (said,) = verdicts.gap_sentences("sex", gaps(0.001), counts)
    assert "no gap is tested" in said and "M (40)" in said


def test_differences_that_stand_name_the_better_setting():
    table = pd.DataFrame(
        {
            "setting": ["Probe", "Probe"],
            "other": ["Zero-shot", "Zero-shot"],
            "metric": ["lrap", "coverage_error"],
            "difference": [0.1, 0.5],
            "p": [0.002, 0.002],
            "better": ["Probe", "Zero-shot"],
            "replicates": 999,
        }
    )
    (said,) = verdicts.difference_sentences(table)
    assert "Of 2 paired differences between settings, 2 stand" in said
    assert "Probe is better than Zero-shot in LRAP; Zero-shot is better than Probe in coverage error" in said
    (none,) = verdicts.difference_sentences(table.assign(better=""))
    assert none.endswith("0 stand after Holm's correction.")
    (none,) = verdicts.difference_sentences(table.assign(better="", replicates=50))
    assert none.endswith("50 resamples are too few to show a difference here: the corrected p-value of one of 2 "
                         "comparisons cannot be below 0.078; give 80 replicates or more.")  # fmt: skip
    assert verdicts.difference_sentences(table[:0]) == []


def test_leaks_are_counted_by_kind():
    said = verdicts.leak_sentence({"identical text": 3, "near-duplicate image": 2}, 0.99)
    assert "there are 3 identical texts: what is tested there was seen" in said
    assert "2 pairs of images across the parts have a cosine of 0.99 or more" in said
    alike = verdicts.leak_sentence({"near-duplicate image": 2}, 0.99)
    assert "was seen" not in alike and "hardly tells apart" in alike
    assert "No image or text" in verdicts.leak_sentence({}, 0.99)
