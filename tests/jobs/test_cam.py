"""`fluoro cam` on demand: from cached tokens, pixels or the image; of texts, all labels, all blocks; and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from analysis import cam as heatmaps
from analysis.heads import LinearHead
from engine.cache import Cache
from engine.encoder import load_encoder
from engine.errors import ModelError, UsageError
from engine.sources import open_dataset
from jobs import cam, cam_inputs, cli
from jobs.config import load_config
from tests import models

PHANTOMS = "phantom:24?seed=3&size=96&enrich=0.2"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cam")


@pytest.fixture(scope="module")
def model(place: Path) -> str:
    return f"local-dir:{models.open_clip_vit(place / 'model', image_size=64)}"


def options(place: Path, model: str, **more: Any) -> dict[str, Any]:
    return {"dataset": PHANTOMS, "model": model, "device": "cpu", "cache": place / "cache", "side": 96, **more}


def run(place: Path, model: str, out: str, **more: Any) -> cam.Result:
    return cam.run(load_config(cam.Config, options(place, model, **more)), out=place / out, overwrite=True)


def annotated() -> tuple[str, str]:
    pairs = open_dataset(PHANTOMS).annotations.pairs
    return str(pairs["sample_id"].iloc[0]), str(pairs["label"].iloc[0])


def a_head(place: Path, model: str, name: str = "head.npz", **changes: Any) -> Path:
    names = open_dataset(PHANTOMS).label_names
    weight = np.random.default_rng(0).standard_normal((len(names), 32))
    given = {"weight": weight, "bias": np.zeros(len(names)), "label_names": names, "normalised": True}
    given["encoder_id"] = load_encoder(model, device="cpu").id
    return LinearHead(**{**given, **changes}).save(place / name)


# -- From the cheapest place -------------------------------------------------------------------------------------------


class _Refusing:
    """A reader whose images may be recognised and not read."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self.fingerprint, self.fingerprints = reader.fingerprint, reader.fingerprints

    def read(self, uri: str) -> bytes:
        raise AssertionError(f"{uri} was read")


def test_map_comes_from_cached_tokens_then_pixels_then_the_image(tmp_path: Path, model: str) -> None:
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (80, 60), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    dataset = open_dataset(f"folder:{tmp_path}")
    encoder = load_encoder(model, device="cpu")
    target = heatmaps.TextTarget(rng.standard_normal(32))
    explainer = heatmaps.Explainer(encoder)
    last = len(encoder.trunk.blocks) - 1
    cache = Cache(tmp_path / "cache")
    maps = {}
    for what, source in (
        (None, cam_inputs.IMAGE),
        ("pixels", cam_inputs.PIXELS),
        (f"tokens@{last}", "tokens of block 2"),
    ):
        if what is not None:
            cache.embed(dataset, encoder, what=[what])
        inputs = cam_inputs.MapInputs(Cache(tmp_path / "cache"), dataset, [1])
        if what is not None:
            object.__setattr__(inputs.dataset, "reader", _Refusing(dataset.reader))
        seen, found = inputs.of(1, encoder, explainer.first_block)
        assert found.endswith(source)
        maps[source] = explainer.batch(seen, [target]).raw[0, 0].numpy()
        if what == f"tokens@{last}":
            assert isinstance(seen, heatmaps.Tokens) and seen.block == last
            assert inputs.of(1, encoder, None).source == cam_inputs.PIXELS, "a method that wants images gets no tokens"
            assert inputs.of(1, encoder, 0).source == cam_inputs.PIXELS, "nor one that wants an earlier block"
        object.__setattr__(dataset, "reader", getattr(dataset.reader, "reader", dataset.reader))
    image, pixels, tokens = maps.values()
    np.testing.assert_array_equal(pixels, image)
    assert np.corrcoef(tokens.ravel(), image.ravel())[0, 1] > 0.999, "tokens are kept in float16"


def test_result_says_where_a_map_came_from(place: Path, model: str) -> None:
    sample, label = annotated()
    dataset, encoder = open_dataset(PHANTOMS), load_encoder(model, device="cpu")
    first = run(place, model, "first", ids=[sample], labels=[label]).maps.iloc[0]
    Cache(place / "cache").embed(dataset, encoder, what=["tokens@-1"])
    second = run(place, model, "second", ids=[sample], labels=[label]).maps.iloc[0]
    assert first["source"] == "image" and second["source"] == "cached tokens of block 2"
    assert second["score"] == pytest.approx(first["score"], abs=1e-3)
    assert second["energy"] == pytest.approx(first["energy"], abs=1e-2)


# -- What can be asked -------------------------------------------------------------------------------------------------


def test_free_text_is_explained_by_zero_shot_alone(place: Path, model: str) -> None:
    sample, label = annotated()
    head = a_head(place, model)
    result = run(place, model, "text", ids=[sample], labels=[label], texts=["fluid in the lung"], heads=[head])
    settings = result.maps[~result.maps["baseline"]].groupby("label")["setting"].apply(list)
    assert settings[label] == ["Zero-shot", "Linear probe"] and settings["fluid in the lung"] == ["Zero-shot"]
    assert result.maps.set_index("label").loc["fluid in the lung", "truth"] is None or np.isnan(
        result.maps.set_index("label").loc["fluid in the lung", "truth"]
    )
    encoder = load_encoder(model, device="cpu")
    text = Cache(place / "cache").text_features(["fluid in the lung"], encoder)[0]
    dataset = open_dataset(PHANTOMS)
    inputs = cam_inputs.MapInputs(Cache(place / "cache"), dataset, [dataset.position(sample)])
    expected = heatmaps.heatmap(
        encoder, inputs.of(dataset.position(sample), encoder, None).seen[0], heatmaps.TextTarget(text)
    )
    found = result.maps.set_index("label").loc["fluid in the lung", "score"]
    assert found == pytest.approx(expected.score, abs=1e-3)
    with pytest.raises(UsageError, match="needs the setting 'zero-shot'"):
        run(place, model, "text-2", ids=[sample], texts=["fluid"], heads=[head], settings=["probe"])


def test_settings_are_chosen_and_a_run_of_probe_is_a_head(place: Path, model: str) -> None:
    sample, label = annotated()
    folder = a_head(place, model, "a-run/probe.npz").parent
    result = run(place, model, "chosen", ids=[sample], labels=[label], heads=[folder], settings=["probe"])
    assert list(result.maps.loc[~result.maps["baseline"], "setting"]) == ["Linear probe"]
    kinds = {
        "ridge": a_head(place, model, "ridge.npz", provenance={"kind": "ridge"}),
        "prior": a_head(place, model, "prior.npz"),
    }
    result = run(place, model, "kind", ids=[sample], labels=[label], heads=[kinds["ridge"]], settings=["probe"])
    assert list(result.maps.loc[~result.maps["baseline"], "setting"]) == ["Linear probe (ridge)"]
    result = run(place, model, "two", ids=[sample], labels=[label], heads=list(kinds.values()), settings=["probe"])
    shown = ["Linear probe (ridge, ridge)", "Linear probe (prior)"]
    assert list(result.maps.loc[~result.maps["baseline"], "setting"]) == shown
    for name, option in (("probe", "--head"), ("fine-tuned", "--tuned")):
        with pytest.raises(UsageError, match=option):
            run(place, model, "none", ids=[sample], labels=[label], settings=[name])
    (place / "empty").mkdir()
    with pytest.raises(UsageError, match="no run of fluoro probe"):
        run(place, model, "none", ids=[sample], labels=[label], heads=[place / "empty"])


def test_all_labels_stand_in_one_grid_with_what_a_head_cannot_say(place: Path, model: str) -> None:
    sample, _ = annotated()
    names = open_dataset(PHANTOMS).label_names
    weight = np.random.default_rng(0).standard_normal((len(names), 32))
    weight[3] = 0
    result = run(place, model, "all", ids=[sample], all_labels=True, heads=[a_head(place, model, weight=weight)])
    assert len(result.sheets) == 1 and not (place / "all" / "maps").exists()
    of_head = result.maps[result.maps["setting"] == "Linear probe"].set_index("label")
    assert list(of_head.index) == list(names)
    assert of_head.loc[names[3], "empty"] and "no gradient reaches" in of_head.loc[names[3], "note"]
    assert Image.open(result.sheets[0]).width > 7 * 48


def test_layers_side_by_side_come_with_their_numbers(
    place: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sample, label = annotated()
    arguments = ["cam", PHANTOMS, "--model", model, "--device", "cpu", "--cache", str(place / "cache"), "--layers"]
    arguments += ["--id", sample, "--label", label, "--head", str(a_head(place, model)), "--json", "--quiet"]
    assert cli.run([*arguments, "--out", str(place / "layers"), "--overwrite"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [Path(sheet).is_file() for sheet in said["sheets"]] == [True, True]
    table = pd.DataFrame(said["layers"])
    counts = table.groupby(["setting", "method"]).size()
    assert counts["Zero-shot", "gradcam"] == counts["Linear probe", "gradcam"] == 4
    assert counts["Zero-shot", "rollout"] == 3 and ("Linear probe", "rollout") not in counts, "once a tower"
    last = table[(table["method"] == "gradcam") & (table["block"] == 3)]
    assert not last["reached"].any() and last["note"].str.contains("no gradient reaches the output").all()
    assert table["energy"].notna().all()


# -- Bad input ---------------------------------------------------------------------------------------------------------


def test_wrong_requests_name_what_there_is(place: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    sample, label = annotated()
    wrong = [
        ({"ids": [sample[:-1]], "labels": [label]}, f"no sample.*nearest: .*{sample[:6]}"),
        ({"ids": [sample], "labels": ["Cardiomegali"]}, "unknown label 'Cardiomegali'.*Cardiomegaly"),
        ({"ids": [sample], "labels": [label], "method": "fullgrad"}, "does not fit.*It has gradcam"),
        ({"ids": [sample], "labels": [label], "layer": "transformer.resblock.1.ln_1"}, "nearest: .*resblocks.1.ln_1"),
        ({"ids": [sample], "labels": [label], "layer": 9}, "3 blocks"),
        ({"labels": [label]}, "name at least one sample"),
    ]
    for more, said in wrong:
        with pytest.raises(UsageError, match=said):
            run(place, model, "wrong", **more)
    arguments = ["cam", PHANTOMS, "--model", model, "--device", "cpu", "--cache", str(place / "cache")]
    arguments += ["--id", sample, "--label", label, "--method", "gradcamm", "--out", str(place / "wrong-cli")]
    assert cli.run(arguments) == 2
    assert "did you mean 'gradcam" in capsys.readouterr().err


def test_head_of_another_encoder_is_refused(place: Path, model: str) -> None:
    sample, label = annotated()
    for changes, said in (
        ({"encoder_id": "another-fp32-0"}, "another-fp32-0"),
        ({"encoder_id": "", "weight": np.ones((14, 31))}, "31 numbers.*trained for another encoder"),
    ):
        head = a_head(place, model, "stranger.npz", **changes)
        with pytest.raises(ModelError, match=said):
            run(place, model, "stranger", ids=[sample], labels=[label], heads=[head])
