"""`fluoro dataset leaks` on files of which some are copies: the same bytes, the same picture, the same text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from jobs import cli
from tests import models


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Images of twelve patients, of which test holds copies of two of train, one byte by byte, one stored anew."""
    folder = tmp_path_factory.mktemp("leaks")
    models.open_clip_pair(folder / "model")
    generator = np.random.default_rng(0)
    for number in range(12):
        coarse = Image.fromarray(generator.integers(0, 255, (4, 4), dtype=np.uint8))
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    shutil.copy(folder / "0.png", folder / "8.png")
    Image.open(folder / "1.png").save(folder / "9.png", compress_level=0)
    texts = [f"Report {number}" for number in range(12)]
    texts[2], texts[10] = "No acute disease.", "no  acute DISEASE"
    frame = pd.DataFrame({
        "id": [f"s{number}" for number in range(12)], "image": [f"{number}.png" for number in range(12)],
        "patient": [f"p{number}" for number in range(12)], "split": ["train"] * 6 + ["val"] * 2 + ["test"] * 4,
        "report": texts,
    })  # fmt: skip
    frame.to_csv(folder / "table.csv", index=False)
    return folder


def leaks(place: Path, table: str, *options: str) -> tuple[int, list[str]]:
    schema = f"table:{place}/{table}?id=id&image=image&group=patient&split=split&text=report"
    words = ["dataset", "leaks", schema, "--model", f"local-dir:{place}/model", "--device", "cpu", "--quiet"]
    return cli.run([*words, "--cache", str(place / "cache"), *options]), words


def test_copies_are_named_and_the_exit_status_says_so(place, capsys):
    status, _ = leaks(place, "table.csv", "--threshold", "0.999999", "--json")
    found = json.loads(capsys.readouterr().out)
    assert status == 1
    pairs = {(row["kind"], row["id"], row["other_id"]) for row in found["pairs"]}
    assert pairs == {("identical image", "s0", "s8"), ("near-duplicate image", "s1", "s9")}
    assert {(row["group"], row["other_group"]) for row in found["pairs"]} == {("p0", "p8"), ("p1", "p9")}
    assert [row["text"] for row in found["texts"]] == ["no acute disease"]
    assert found["texts"][0]["train first"] == "s2" and found["texts"][0]["test first"] == "s10"
    status, _ = leaks(place, "table.csv", "--threshold", "0.999999")
    text = capsys.readouterr().out
    assert "2 pairs of images across splits" in text and "near-duplicate" in text and "1 texts of 2 samples" in text


def test_a_clean_split_ends_well(place, capsys):
    frame = pd.read_csv(place / "table.csv")
    frame[~frame["id"].isin(["s8", "s9", "s10"])].to_csv(place / "clean.csv", index=False)
    status, _ = leaks(place, "clean.csv", "--threshold", "0.999999")
    text = capsys.readouterr().out
    assert status == 0 and "no image lies on both sides: 9 images" in text
    assert "Highest cosine of an image to one in train" in text


def test_an_approximate_index_is_asked_where_wanted_and_said(place, capsys):
    status, words = leaks(place, "table.csv", "--threshold", "0.999999", "--how", "HNSW8")
    assert status == 1 and "no index" in capsys.readouterr().err
    encoder = json.loads(_said(capsys, leaks, place, "table.csv", "--json"))["encoder"]
    assert cli.run(["index", "--encoder", encoder, "--how", "HNSW8", "--cache", str(place / "cache"), "--quiet"]) == 0
    capsys.readouterr()
    status, _ = leaks(place, "table.csv", "--threshold", "0.999999", "--how", "HNSW8")
    text = capsys.readouterr().out
    assert status == 1 and "2 pairs of images across splits" in text
    assert "with the HNSW8 index" in text and "may miss some" in text
    assert cli.run([*words, "--how", "exotic"]) == 2
    assert "exotic" in capsys.readouterr().err


def test_an_index_behind_its_cache_is_refused(place, capsys, tmp_path):
    frame = pd.read_csv(place / "table.csv")
    frame.head(9).to_csv(place / "early.csv", index=False)
    own = ("--cache", str(tmp_path))
    encoder = json.loads(_said(capsys, leaks, place, "early.csv", "--json", *own))["encoder"]
    assert cli.run(["index", "--encoder", encoder, "--how", "HNSW8", *own, "--quiet"]) == 0
    status, _ = leaks(place, "table.csv", "--how", "HNSW8", *own)
    error = capsys.readouterr().err
    assert status == 1 and "behind its cache by 3 rows" in error and "fluoro index --how HNSW8" in error


def _said(capsys, run, *words) -> str:
    capsys.readouterr()
    run(*words)
    return capsys.readouterr().out
