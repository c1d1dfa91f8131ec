"""Probes without weights on the embedding, in a file: the same answers again, no pickle, and errors that say why."""

from __future__ import annotations

import json

import joblib
import numpy as np
import pytest

from analysis.heads import LinearHead
from analysis.probes import AttentionPoolingProbe, MLPProbe, NeighbourProbe, TipAdapterProbe
from analysis.probes.stored import StoredProbe, load_probe
from engine.errors import DataError, ModelError
from tests.analysis.probes.data import study_like

TEXT = np.random.default_rng(0).normal(size=(3, 6))
MADE = {
    "neighbours": lambda: NeighbourProbe(7),
    "tip-adapter": lambda: TipAdapterProbe(TEXT, alpha=3.0, scale=4.0, bias=None),
    "mlp": lambda: MLPProbe(4, epochs=2),
    "attention": lambda: AttentionPoolingProbe(epochs=2),
}


def stored(kind, labels=3):
    x, y = study_like(60, 6)
    x = np.stack([x, 2 * x], axis=1) if kind == "attention" else x
    probe = MADE[kind]() if labels == 3 or kind != "tip-adapter" else TipAdapterProbe(TEXT[:labels])
    probe.fit(x[:40] if kind in ("mlp", "attention") else x[:40] / np.linalg.norm(x[:40], axis=1)[:, None],
              np.squeeze(y[:40, :labels].astype(int)))  # fmt: skip
    names = ("a", "b", "c")[:labels]
    return StoredProbe(probe, kind, names, kind in ("neighbours", "tip-adapter"), "encoder", {"k": 7}), x[40:]


@pytest.mark.parametrize("labels", [3, 1])
@pytest.mark.parametrize("kind", list(MADE))
def test_a_file__gives_the_same_answers_to_the_bit(kind, labels, tmp_path):
    probe, x = stored(kind, labels)
    loaded = load_probe(probe.save(tmp_path / "probe.npz"))
    assert isinstance(loaded, StoredProbe) and loaded.kind == kind and loaded.provenance == {"k": 7}
    assert loaded.label_names == probe.label_names and loaded.encoder_id == "encoder"
    asked = x if probe.kind == "attention" or not probe.normalised else x / np.linalg.norm(x, axis=1)[:, None]
    direct = probe.probe.decision_function(asked).reshape(len(x), labels)
    np.testing.assert_array_equal(probe.logits(x), direct)
    np.testing.assert_array_equal(loaded.logits(x), direct)
    np.testing.assert_allclose(loaded.probabilities(x), 1 / (1 + np.exp(-direct)))
    np.testing.assert_array_equal(loaded.probe.predict(asked), probe.probe.predict(asked))
    with np.load(tmp_path / "probe.npz", allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive)
    loaded.check_encoder("encoder")
    with pytest.raises(ModelError, match="trained on embeddings of 'encoder', not of 'other'"):
        loaded.check_encoder("other")
    with pytest.raises(DataError, match="belongs to encoder 'encoder'"):
        loaded.logits(x[..., :3])


def test_files__that_are_no_probe_are_refused_without_unpickling(tmp_path):
    probe, _ = stored("neighbours")
    file = probe.save(tmp_path / "probe.npz")
    with pytest.raises(ModelError, match=r"kind 'neighbours', which has no weights.*--kind logistic, text-prior"):
        LinearHead.load(file)
    joblib.dump(probe.probe, tmp_path / "old.joblib")
    for load in (LinearHead.load, load_probe):
        with pytest.raises(ModelError, match=r"no weights on the embedding.*logistic, text-prior, ridge or"):
            load(tmp_path / "old.joblib")
    head = LinearHead(np.ones((1, 2)), np.zeros(1), ("a",), True).save(tmp_path / "head.npz")
    assert isinstance(load_probe(head), LinearHead)
    with pytest.raises(ModelError, match="not a 'fluoroscope probe'"):
        StoredProbe.load(head)
    with pytest.raises(ModelError, match="no probe at"):
        StoredProbe.load(tmp_path / "none.npz")
    with np.load(file) as archive:
        arrays = {name: archive[name] for name in archive}
    for change, problem in (
        ({"kind": np.array("forest")}, "unknown kind 'forest'"),
        ({"settings": np.array(json.dumps({"trees": 3}))}, "is damaged"),
        ({"array.stored": np.array([{}], dtype=object)}, "cannot be read"),
        ({"format_version": np.array(99)}, "newer fluoroscope"),
    ):
        np.savez(tmp_path / "changed.npz", **{**arrays, **change})
        with pytest.raises(ModelError, match=problem):
            load_probe(tmp_path / "changed.npz")
    del arrays["array.truth"]
    np.savez(tmp_path / "changed.npz", **arrays)
    with pytest.raises(ModelError, match="is damaged: 'truth'"):
        load_probe(tmp_path / "changed.npz")
