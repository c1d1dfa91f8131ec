"""Means, F1 and differences of heatmap scores against sums by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from jobs import heatmap_tables
from jobs.cam_sweep import summary, verdicts

FINDINGS = 24


def scored_frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for row in range(FINDINGS):
        for setting, baseline, lift in (
            ("Probe", False, 0.4),
            ("Centre prior", True, 0.0),
            ("Location prior", True, 0.6),
        ):
            base = rng.random() * 0.2 + lift
            hit = float(rng.random() < lift + 0.2)
            rows.append(
                {
                    "row": row,
                    "group": f"P{row // 2}",
                    "label": "Edema" if row % 3 else "Mass",
                    "setting": setting,
                    "baseline": baseline,
                    "pointing_game": hit,
                    **dict.fromkeys(("energy", "best_iou", "best_dice", "pixel_ap"), base),
                    **{f"{by}_hit": hit for by in ("peak", "region")},
                    **{f"{by}_vain": 1 - hit for by in ("peak", "region")},
                    **{f"{by}_missed": float(rng.integers(0, 3)) for by in ("peak", "region")},
                    "empty": False,
                    "region_visible": 1.0,
                }
            )
    return pd.DataFrame(rows)


def test_summaries_are_means_and_an_f1_of_added_counts() -> None:
    scored = scored_frame()
    found = heatmap_tables.summaries(scored, 200, 0)
    for label in (None, "Edema", "Mass"):
        part = scored if label is None else scored[scored["label"] == label]
        part = part[part["setting"] == "Probe"]
        rows = found[
            (found["setting"] == "Probe") & (found["label"].isna() if label is None else found["label"] == label)
        ]
        values = rows.set_index("metric")
        assert values.loc["energy", "value"] == pytest.approx(part["energy"].mean())
        hit, vain, missed = (part[f"region_{name}"].sum() for name in ("hit", "vain", "missed"))
        assert values.loc["region_f1", "value"] == pytest.approx(2 * hit / (2 * hit + vain + missed))
        assert (values["low"] <= values["value"] + 1e-12).all() and (values["value"] <= values["high"] + 1e-12).all()
        assert (values["n"] == len(part)).all()


def test_f1_interval_is_that_of_resampled_patients() -> None:
    scored = scored_frame()
    part = scored[scored["setting"] == "Probe"]
    found = heatmap_tables.summaries(scored, 4000, 1)
    overall = found[(found["setting"] == "Probe") & found["label"].isna()].set_index("metric")
    low, high = overall.loc["peak_f1", ["low", "high"]]
    sums = part.groupby("group")[["peak_hit", "peak_vain", "peak_missed"]].sum().to_numpy()
    rng = np.random.default_rng(5)
    drawn = [sums[rng.integers(0, len(sums), len(sums))].sum(axis=0) for _ in range(4000)]
    values = [2 * hit / (2 * hit + vain + missed) for hit, vain, missed in drawn]
    np.testing.assert_allclose([low, high], np.percentile(values, [2.5, 97.5]), atol=0.02)


def test_differences_are_paired_and_their_verdict_follows_the_interval() -> None:
    scored = scored_frame()
    scored = scored[~((scored["setting"] == "Location prior") & (scored["row"] == 3))]  # no prior for one finding
    found = heatmap_tables.differences(scored, 500, 0)
    wide = scored.pivot(index="row", columns="setting", values="energy")
    one = found[(found["label"] == "all") & (found["metric"] == "energy")].set_index("null")
    assert one.loc["Centre prior", "difference"] == pytest.approx((wide["Probe"] - wide["Centre prior"]).mean())
    assert one.loc["Location prior", "difference"] == pytest.approx((wide["Probe"] - wide["Location prior"]).mean())
    assert (one.loc["Location prior", "n"], one.loc["Centre prior", "n"]) == (FINDINGS - 1, FINDINGS)
    assert (one.loc["Centre prior", "verdict"], one.loc["Location prior", "verdict"]) == ("above", "below")
    assert ((found["verdict"] == "above") == (found["low"] > 0)).all()


def test_grid_of_verdicts_says_above_only_where_both_figures_do() -> None:
    scored = scored_frame()
    own = scored[scored["setting"] == "Centre prior"].assign(setting="Mean map of others (Probe)")
    compared = heatmap_tables.differences(pd.concat([scored, own]), 500, 0)
    grid = heatmap_tables.verdict_grid(compared)
    assert list(grid.columns) == ["setting", "label", "n", "Centre prior", "Location prior", "Mean map of others"]
    assert list(grid["label"]) == ["all", "Mass", "Edema"] and list(grid["n"]) == [24, 8, 16]
    for row in grid.to_dict("records"):
        for null in ("Centre prior", "Location prior"):
            part = compared[(compared["label"] == row["label"]) & (compared["null"] == null)]
            assert row[null].startswith(" / ".join(f"{value:+.2f}" for value in part["difference"]))
            assert row[null].endswith("above") == bool((part["low"] > 0).all())
            assert row[null].endswith("below") == bool((part["high"] < 0).all())


def test_differences_hold_a_setting_against_its_own_nulls_only() -> None:
    scored = scored_frame()
    other = scored[scored["setting"] == "Probe"].assign(setting="Zero-shot")
    nulls = [
        scored[scored["setting"] == "Centre prior"].assign(setting=f"Random label ({name})")
        for name in ("Probe", "Zero-shot")
    ]
    found = heatmap_tables.differences(pd.concat([scored, other, *nulls]), 100, 0)
    pairs = set(zip(found["setting"], found["null"], strict=True))
    assert ("Probe", "Random label (Probe)") in pairs and ("Probe", "Random label (Zero-shot)") not in pairs


def test_verdicts_ask_for_both_figures_and_name_where_they_are_missing() -> None:
    rows = []
    for label, pointing, energy in (("all", "above", "above"), ("Edema", "above", "above"), ("Mass", "above", "below")):
        for metric, verdict in (("pointing_game", pointing), ("energy", energy)):
            low = 0.1 if verdict == "above" else -0.3
            rows.append(("Probe", "Centre prior", label, metric, low + 0.1, low, low + 0.2, 9, verdict))
    columns = ["setting", "null", "label", "metric", "difference", "low", "high", "n", "verdict"]
    told = pd.DataFrame(rows, columns=columns)
    assert verdicts(told).set_index("label")["above centre prior"].to_dict() == {
        "all": "yes",
        "Edema": "yes",
        "Mass": "no",
    }
    assert summary(told) == ["above the centre prior (pointing game and energy) on 1 of 2 labels; not on Mass"]


def test_sentences_tell_of_empty_maps_and_of_what_lies_outside_the_crop() -> None:
    scored = scored_frame()
    scored.loc[scored["row"] == 2, "region_visible"] = 0.2
    scored.loc[(scored["row"] == 5) & (scored["setting"] == "Probe"), "empty"] = True
    told = heatmap_tables.heatmap_sentences(scored, heatmap_tables.differences(scored, 200, 0))
    assert any("Probe: 1 of 24 maps are empty" in text for text in told)
    assert any(text.startswith("1 findings lie more than half outside") for text in told)
    assert any("Probe's pointing game" in text and "centre prior" in text for text in told)
