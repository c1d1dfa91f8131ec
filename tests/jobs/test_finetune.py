"""`fluoro finetune` with its ways of starting, going on, and what is made of finished runs; tiny model, phantoms."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from analysis.heads import LinearHead
from engine.cache import Cache
from engine.encoder import load_encoder
from engine.errors import DataError, ModelError, UsageError
from engine.sources import open_dataset
from jobs import cli, finetune, finetune_average, finetune_wise, search
from jobs.config import SplitOptions, load_config
from jobs.opening import split_data
from tests import models

PHANTOMS = "phantom:48?seed=3&size=128&enrich=0.2"
SHORT = {"trainable": 1, "epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "monitor": "bce"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def model(place: Path) -> str:
    return f"local-dir:{models.open_clip_vit(place / 'model', image_size=64)}"


def options(place: Path, model: str, **more: Any) -> dict[str, Any]:
    given = {"dataset": PHANTOMS, "model": model, "device": "cpu", "cache": place / "cache", "replicates": 100}
    return {**given, "finetune": SHORT, **more}


def run(place: Path, model: str, out: str, **more: Any) -> Any:
    return finetune.run(load_config(finetune.Config, options(place, model, **more)), out=place / out)


@pytest.fixture(scope="module")
def tuned(place: Path, model: str) -> Path:
    return run(place, model, "tuned").folder


def test_the_card_says_where_the_model_comes_from_and_what_it_reaches(place: Path, model: str, tuned: Path) -> None:
    card = (tuned / "model" / "README.md").read_text()
    values = yaml.safe_load(card.partition("```yaml")[2].partition("```")[0])
    parent = load_encoder(model, device="cpu")
    assert values["parent"] == parent.id and values["data"] == PHANTOMS and values["objective"] == "bce"
    assert len(values["split"]) == 12 and set(values["validation"]) >= {"bce", "map", "auroc_macro", "lrap"}
    metrics = [json.loads(line) for line in (tuned / "results.jsonl").read_text().splitlines()]
    lrap = next(
        line["value"]
        for line in metrics
        if line["kind"] == "metric" and line["setting"] == "Fine-tuning" and line["metric"] == "lrap"
    )
    assert f"| lrap | {lrap:.4f} |" in card and "not for diagnosis" in card


def test_the_cost_counts_the_samples_that_epochs_went_through(tuned: Path) -> None:
    """The start is judged before the first epoch, and trains on nothing."""
    lines = [json.loads(line) for line in (tuned / "results.jsonl").read_text().splitlines()]
    provenance = json.loads((tuned / "provenance.json").read_text())
    (cost,) = (line for line in lines if line["kind"] == "cost" and line["step"] == "fine-tuning")
    assert cost["items"] == SHORT["epochs"] * provenance["split"]["counts"]["train"]


def test_plain_open_clip_loads_the_model_and_gives_its_numbers(place: Path, tuned: Path) -> None:
    child = load_encoder(f"local-dir:{tuned / 'model'}", device="cpu")
    folder = (tuned / "model").resolve()
    text = {**child.files.model_cfg["text_cfg"], "hf_model_name": str(folder), "hf_model_pretrained": False}
    plain, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", text_cfg=text)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = plain.eval().encode_image(child.preprocess.normalise(pixels))
    torch.testing.assert_close(child.encode_pixels(pixels), expected, rtol=1e-4, atol=1e-5)


def test_search_takes_the_model(place: Path, tuned: Path) -> None:
    config = load_config(
        search.Config,
        {
            "dataset": PHANTOMS, "model": f"local-dir:{tuned / 'model'}", "device": "cpu", "cache": place / "cache",
            "text": ["edema"], "k": 3,
        },
    )  # fmt: skip
    assert len(search.run(config).answers[0].hits) == 3


def test_from_block_trains_from_cached_tokens_without_early_blocks(
    place: Path, model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="jobs")
    section = {**SHORT, "from_block": 1}
    del section["trainable"]
    found = run(place, model, "from-block", finetune=section)
    assert "augmentation is excluded" in caplog.text
    encoder = load_encoder(model, device="cpu")
    tokens = Cache(place / "cache").tokens(open_dataset(PHANTOMS), encoder, 1)
    assert tokens.shape == (48, 17, 32) and tokens.dtype == np.float16
    child = load_encoder(f"local-dir:{found.folder / 'model'}", device="cpu")
    before, after = encoder.model.visual.state_dict(), child.model.visual.state_dict()
    early = [name for name in before if "resblocks.0" in name or "conv1" in name or "embedding" in name]
    assert early and all(torch.equal(before[name], after[name]) for name in early)
    assert not torch.equal(*(state["transformer.resblocks.1.mlp.c_fc.weight"] for state in (before, after)))
    history = pd.read_csv(found.folder / "history.csv")
    features = Cache(place / "cache").features(open_dataset(PHANTOMS), child).values
    assert np.isfinite(features).all() and history["bce"].notna().all()
    with pytest.raises(UsageError, match="excludes augmentation"):
        run(place, model, "refused", finetune={**section, "shift": 3})
    with pytest.raises(UsageError, match="has 3 blocks"):
        run(place, model, "refused", finetune={**section, "from_block": 7})


@pytest.mark.parametrize("text_trainable", [False, True])
def test_a_contrast_with_reports_changes_the_towers_and_leaves_a_probe(
    place: Path, model: str, text_trainable: bool
) -> None:
    section = {
        **SHORT,
        "trainable": "all",
        "objective": "contrastive",
        "monitor": None,
        "text_trainable": text_trainable,
    }
    found = run(place, model, f"contrast-{text_trainable}", finetune=section)
    history = pd.read_csv(found.folder / "history.csv")
    assert history["contrastive"].min() < history["contrastive"].iloc[0]
    parent, child = (
        load_encoder(name, device="cpu") for name in (model, f"local-dir:{(found.folder / 'model').resolve()}")
    )
    same = torch.equal(parent.encode_text(["edema"]), child.encode_text(["edema"]))
    assert same is not text_trainable and child.logit_scale != parent.logit_scale
    head = LinearHead.load(found.folder / "model" / "head.npz")
    assert head.encoder_id == child.id and "logistic" in str(head.provenance["recipe"])


def test_adapters_leave_a_plain_model(place: Path, model: str) -> None:
    pytest.importorskip("peft")
    found = run(place, model, "lora", finetune={**SHORT, "trainable": "lora"})
    child = load_encoder(f"local-dir:{found.folder / 'model'}", device="cpu")
    assert not any("lora" in name for name in child.model.state_dict())


# -- Going on ----------------------------------------------------------------------------------------------------------

KILLED = """
import itertools, os, signal, sys
from jobs import cli, progress
from analysis.finetuning import checkpoints
checkpoints.SECONDS_BETWEEN = 0
steps = itertools.count(1)
real = checkpoints.Checkpoints.due
def due(self, step):
    if next(steps) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return True
checkpoints.Checkpoints.due = due
sys.exit(cli.run(sys.argv[2:]))
"""


def test_a_killed_run_goes_on_with_resume_and_out_alone(
    place: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--device", "cpu", "--cache", str(place / "cache"), "--trainable", "1", "--replicates", "100", "--quiet"]
    common += ["--set", "finetune.batch_size=8", "--epochs", "2", "--learning-rate", "1e-3"]
    command = ["finetune", PHANTOMS, "--model", model, *common]
    assert cli.run([*command, "--out", str(place / "calm")]) == 0
    out = str(place / "disturbed")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, "6", *command, "--out", out], env=environment, capture_output=True, timeout=300
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()[-2000:]
    assert (place / "disturbed" / "checkpoints" / "last.pt").is_file()
    capsys.readouterr()
    assert cli.run(["finetune", "--resume", "--out", out, "--quiet"]) == 0
    weights = "model/open_clip_model.safetensors"
    assert (place / "disturbed" / weights).read_bytes() == (place / "calm" / weights).read_bytes()
    heads = [LinearHead.load(place / name / "model" / "head.npz") for name in ("calm", "disturbed")]
    np.testing.assert_array_equal(heads[0].weight, heads[1].weight)
    unlike = ["seconds"]
    calm, disturbed = (pd.read_csv(place / name / "history.csv") for name in ("calm", "disturbed"))
    pd.testing.assert_frame_equal(calm.drop(columns=unlike), disturbed.drop(columns=unlike))
    assert cli.run([*command, "--out", out]) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.run(["finetune", PHANTOMS, "--model", model, "--resume", "--out", out, "--epochs", "9", "--quiet"]) == 2
    assert "other values of" in capsys.readouterr().err


def test_a_run_that_goes_on_counts_the_minutes_of_the_process_before(place: Path, model: str) -> None:
    common = ["--device", "cpu", "--cache", str(place / "cache"), "--trainable", "1", "--epochs", "1", "--quiet"]
    out = place / "minutes"
    assert cli.run(["finetune", PHANTOMS, "--model", model, *common, "--replicates", "100", "--out", str(out)]) == 0
    last = out / "checkpoints" / "last.pt"
    state = torch.load(last, weights_only=True)
    assert 0 < state["seconds"] < 60 * _minutes(out)
    torch.save({**state, "seconds": 600.0}, last)
    assert cli.run(["finetune", "--resume", "--out", str(out), "--quiet"]) == 0
    assert 10 < _minutes(out) < 11
    assert "600." in (out / "model" / "README.md").read_text(encoding="utf-8")


def _minutes(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    (found,) = [line["value"] for line in lines if line.get("metric") == "minutes" and not line["baseline"]]
    return float(found)


# -- Between and among finished runs -----------------------------------------------------------------------------------


def test_wise_scores_the_line_from_parent_to_child(place: Path, model: str, tuned: Path) -> None:
    config = load_config(finetune_wise.Config, {"tuned": tuned, "share": [1, 0, 0.5], "device": "cpu", "by": "bce"})
    found = finetune_wise.run(config, out=place / "wise")
    assert list(found.curve["share"]) == [0, 0.5, 1]
    history = pd.read_csv(tuned / "history.csv")
    ends = found.curve["val_bce"].tolist()
    assert ends[0] == pytest.approx(history["bce"].iloc[0], rel=1e-3), (
        "the parent with the head that training began from"
    )
    assert ends[2] == pytest.approx(history["bce"].min(), rel=1e-3), "the child"
    assert found.chosen == found.curve.loc[found.curve["val_bce"].idxmin(), "share"]

    parent, child = load_encoder(model, device="cpu"), load_encoder(f"local-dir:{tuned / 'model'}", device="cpu")
    middle = {name: (value + child.model.state_dict()[name]) / 2 for name, value in parent.model.state_dict().items()}
    parent.model.load_state_dict(middle)
    heads = [LinearHead.load(tuned / name) for name in ("start.npz", "model/head.npz")]
    head = LinearHead(
        (heads[0].weight + heads[1].weight) / 2, (heads[0].bias + heads[1].bias) / 2, heads[0].label_names,
        heads[0].normalised,
    )  # fmt: skip
    dataset = open_dataset(PHANTOMS)
    assert len(pd.read_csv(place / "wise" / "curve.csv")) == 3
    pixels = Cache(place / "cache").pixels(dataset, parent.preprocess)
    split = split_data(dataset, SplitOptions()).samples["split"].to_numpy()
    rows = np.flatnonzero(split == "val")
    logits = torch.from_numpy(head.logits(parent.encode_pixels(pixels[rows]).numpy()))
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(dataset.labels[rows]).double())
    assert ends[1] == pytest.approx(float(bce), rel=1e-3)
    saved = load_encoder(f"local-dir:{place / 'wise' / 'model'}", device="cpu")
    assert LinearHead.load(place / "wise" / "model" / "head.npz").encoder_id == saved.id
    card = (place / "wise" / "model" / "README.md").read_text()
    assert "WiSE-FT" in card and parent.id in card and "share_of_child" in card


def test_average_makes_soups_of_runs_of_one_parent(place: Path, model: str, tuned: Path) -> None:
    other = run(place, model, "tuned-1", seed=1).folder
    config = load_config(
        finetune_average.Config, {"tuned": [tuned, other], "how": "uniform", "device": "cpu", "by": "bce"}
    )
    found = finetune_average.run(config, out=place / "soup")
    assert list(found.soups["what"]) == ["tuned", "tuned-1", "uniform mean", "greedy soup"]
    assert found.members == ("tuned", "tuned-1")
    greedy = found.soups.set_index("what")["val_bce"]
    assert greedy["greedy soup"] <= min(greedy["tuned"], greedy["tuned-1"]) + 1e-9
    states = [
        load_encoder(f"local-dir:{folder / 'model'}", device="cpu").model.state_dict() for folder in (tuned, other)
    ]
    saved = load_encoder(f"local-dir:{place / 'soup' / 'model'}", device="cpu").model.state_dict()
    name = "visual.transformer.resblocks.2.mlp.c_fc.weight"
    torch.testing.assert_close(saved[name], (states[0][name] + states[1][name]) / 2)
    with pytest.raises(UsageError, match="named twice"):
        finetune_average.run(load_config(finetune_average.Config, {"tuned": [tuned, tuned]}), out=place / "no")
    stranger = run(place, model, "other-split", split={"how": "grouped", "seed": 9}).folder
    with pytest.raises(UsageError, match="different split"):
        finetune_average.run(load_config(finetune_average.Config, {"tuned": [tuned, stranger]}), out=place / "no")


def test_blending_names_what_is_wrong(place: Path, model: str, tuned: Path) -> None:
    with pytest.raises(UsageError, match="no finished run"):
        finetune_wise.run(load_config(finetune_wise.Config, {"tuned": place}), out=place / "no")
    random = run(place, model, "random", start="random", finetune={**SHORT, "epochs": 1}).folder
    with pytest.raises(UsageError, match="started at random"):
        finetune_wise.run(load_config(finetune_wise.Config, {"tuned": random}), out=place / "no")
    with pytest.raises(UsageError, match="between 0 and 1"):
        load_config(finetune_wise.Config, {"tuned": tuned, "share": [2.0]})
    with pytest.raises(UsageError, match="chosen by one of"):
        finetune_wise.run(load_config(finetune_wise.Config, {"tuned": tuned, "by": "f1"}), out=place / "no")
    provenance = json.loads((tuned / "provenance.json").read_text())
    changed = {**provenance, "encoders": [{"id": "another-fp32-0"}]}
    (tuned / "provenance.json").write_text(json.dumps(changed))
    try:
        with pytest.raises(ModelError, match="from another-fp32-0"):
            finetune_wise.run(load_config(finetune_wise.Config, {"tuned": tuned, "device": "cpu"}), out=place / "no")
    finally:
        (tuned / "provenance.json").write_text(json.dumps(provenance))


# -- What is refused ---------------------------------------------------------------------------------------------------


def test_resume_of_a_folder_without_a_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = str(tmp_path / "nothing")
    assert cli.run(["finetune", "--resume", "--out", nothing]) == 2
    said = capsys.readouterr().err
    assert "no run to go on with" in said and nothing in said and "--out" in said


def test_precision_and_resume_are_refused_before_the_work(place: Path, model: str) -> None:
    with pytest.raises(UsageError, match="--autocast bf16"):
        run(place, model, "rounded", precision="bf16")
    with pytest.raises(UsageError, match="with --out"):
        finetune.run(load_config(finetune.Config, options(place, model)), resume=True)


def test_a_data_set_without_reports_has_no_contrast(place: Path, model: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(24):
        Image.fromarray(rng.integers(0, 255, (70, 70), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "edema": number % 2, "patient": number})
    pd.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
    given = {
        "dataset": f"table:{tmp_path / 'table.csv'}",
        "data": {"image": "image", "labels": ["edema"], "group": "patient"},
        "finetune": {**SHORT, "contrastive_weight": 1.0},
    }
    with pytest.raises(DataError, match="no texts"):
        run(place, model, "no-texts", **given)
    split = ["test"] * 12 + ["train"] * 6 + ["val"] * 6
    only_last = [int(row["patient"] == 23) for row in rows]
    pd.DataFrame(rows).assign(edema=only_last, split=split).to_csv(tmp_path / "table.csv", index=False)
    given |= {"finetune": SHORT, "start": "random"}
    given["data"] = {**given["data"], "split": "split"}
    with pytest.raises(DataError, match="none of the 1 labels has a positive among the 6 training"):
        run(place, model, "no-positives", **given)
