"""Heatmaps of findings are scored whatever a head has learnt of their label."""

import numpy as np
import pytest

from analysis import cam
from analysis.heads import LinearHead
from engine.encoder import load_encoder
from engine.sources import open_dataset
from jobs.heatmap_scoring import Finding, Options, score_findings
from jobs.study_settings import Explained


def test_a_label_without_weights_gets_an_empty_map_and_ends_nothing() -> None:
    dataset = open_dataset("phantom:60?seed=3&enrich=0.2")
    encoder = load_encoder("phantom-clip")
    names = dataset.label_names
    learnt, never = "Cardiomegaly", "Lung Opacity"
    weight = np.random.default_rng(0).normal(size=(len(names), encoder.dim))
    weight[names.index(never)] = 0
    head = LinearHead(weight, np.zeros(len(names)), names, normalised=True)
    setting = Explained("Linear probe", "sound", encoder, names, head=head)
    findings = [
        Finding(int(np.flatnonzero(dataset.labels[:, names.index(label)])[0]), label) for label in (learnt, never)
    ]
    explain = lambda each: cam.Explainer(each.encoder)  # noqa: E731 - one word for what is asked
    scored = score_findings(dataset, findings, [setting], explain, {}, Options(nulls=False))
    by_label = scored[~scored["baseline"]].set_index("label")
    assert not by_label.loc[learnt, "empty"] and by_label.loc[never, "empty"]
    assert "no gradient" in by_label.loc[never, "note"] and by_label.loc[never, "pointing_game"] == 0
    text = Explained("Zero-shot", "sound", encoder, names, text=np.zeros((len(names), encoder.dim)))
    with pytest.raises(cam.ZeroGradientError, match=never):
        score_findings(dataset, findings[1:], [text], explain, {}, Options(nulls=False))
