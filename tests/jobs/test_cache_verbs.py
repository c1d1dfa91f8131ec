"""`embed`, `index`, `search`, `cache ls` and `cache verify` on a small real model and a folder of images with texts."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from engine import plan, precision
from engine.cache import Cache
from engine.encoder import Encoder
from engine.errors import CacheError, UsageError
from engine.sources import open_dataset
from jobs import cache as cache_verbs
from jobs import embed, index, search
from jobs.config import load_config
from jobs.plain import plain
from tests import models

TEXTS = {0: "clear lungs", 1: "large pleural effusion", 2: "clear lungs", 3: "enlarged heart"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images in two labels, some with texts, one broken, one twice."""
    root = tmp_path_factory.mktemp("images")
    for number in range(12):
        label = root / ("effusion" if number % 3 else "normal")
        label.mkdir(exist_ok=True)
        rng = np.random.Generator(np.random.PCG64(number))
        Image.fromarray(rng.integers(0, 256, (80, 70), np.uint8)).save(label / f"{number:02d}.png")
        if number in TEXTS:
            (label / f"{number:02d}.txt").write_text(TEXTS[number])
    (root / "effusion" / "broken.png").write_bytes((root / "effusion" / "01.png").read_bytes()[:90])
    shutil.copy(root / "normal" / "03.png", root / "normal" / "twin.png")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.open_clip_vit(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def cached(tmp_path_factory, folder, model):
    """A cache in which everything of the folder is embedded, and what the job said about it."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, embed.run(config(folder, model, cache, what=["image", "text"]))


def config(folder, model, cache, **values) -> embed.Config:
    return embed.Config(dataset=f"folder:{folder}", model=f"local-dir:{model}", device="cpu", cache=cache, **values)


def found(folder, model, cache, **values) -> search.Found:
    return search.run(
        search.Config(dataset=f"folder:{folder}", model=f"local-dir:{model}", device="cpu", cache=cache, **values)
    )


def ids_of(answer: search.Answer) -> list[str]:
    return [hit["id"] for hit in answer.hits]


def test_embed__says_what_it_did_and_keeps_a_record(cached, folder):
    cache, done = cached
    assert done.computed == {"image": 12, "text": 3} and done.reused == {"image": 1, "text": 1}
    assert done.failures["uri"].tolist() == ["effusion/broken.png"]
    record = json.loads((done.folder / "provenance.json").read_text())
    assert record["status"] == "done" and record["encoders"][0]["id"] == done.encoder
    (kept,) = json.loads((done.folder / "plan.json").read_text())
    assert (kept["batch_size"], kept["compiled"], kept["encoder"]) == (32, False, done.encoder)
    assert "compiling pays in bf16" in kept["compiled_reason"]
    assert pd.read_csv(done.folder / "failures.csv")["what"].tolist() == ["image"]
    said = "\n".join(done.lines())
    # Nothing was there before: one image is a copy, and of four texts two are the same.
    assert "image: 12 computed, 0 there already, 1 with the same bytes as another (" in said and done.encoder in said
    assert "text: 3 computed, 0 there already, 1 with the same words as another (" in said
    copy = done.doubles["image"]
    samples = open_dataset(f"folder:{folder}").samples.set_index("id")
    first, second = (folder / samples.loc[name, "uri"] for name in (copy.first, copy.second))
    assert first != second and first.read_bytes() == second.read_bytes()
    assert done.folder.parent == Cache(cache).runs_path


def test_embed__again_computes_nothing_and_lists_the_failure_again(cached, folder, model):
    again = embed.run(config(folder, model, cached[0], what=["image", "text"]))
    assert again.computed == {"image": 0, "text": 0} and len(again.failures) == 1


def test_embed__goes_on_with_a_stopped_run_by_its_plan(tmp_path, folder, model, monkeypatch, caplog):
    """Compiled, as long as the whole job pays for it, although what is left would not."""
    monkeypatch.setattr(plan, "instruction_sets", lambda: ["amx_bf16"])
    monkeypatch.setattr(precision, "moved_by", lambda *arguments: "")
    monkeypatch.setattr(Encoder, "image_operations", 1)
    monkeypatch.setattr(Encoder, "compiled", lambda self: compilations.append(self) or self.encode_pixels)
    monkeypatch.setattr(plan, "COMPILE_FROM", 12 / (plan.AMX_OPERATIONS * plan.usable_cores()))
    real, compilations = Cache.embed, []

    def stopped(self, *arguments, **options):
        def press(name, done, total):
            if done >= 4:
                raise KeyboardInterrupt

        return real(self, *arguments, **{**options, "progress": press})

    values = config(folder, model, tmp_path, precision="bf16")
    monkeypatch.setattr(Cache, "embed", stopped)
    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING):
        embed.run(values.model_copy(update={"batch_size": 4}))
    assert "the same command goes on from there" in caplog.text and len(compilations) == 1
    monkeypatch.setattr(Cache, "embed", real)
    done = embed.run(values)
    (kept,) = json.loads((done.folder / "plan.json").read_text())
    assert (kept["batch_size"], kept["compiled"], len(compilations)) == (4, True, 2) and done.computed["image"] < 12
    (later,) = json.loads((embed.run(values).folder / "plan.json").read_text())  # looks at the broken image again
    assert (later["batch_size"], later["compiled"]) == (32, False)


def test_search__by_text_image_and_sample_against_brute_force(cached, folder, model):
    cache, done = cached
    from engine.encoder import load_encoder
    from engine.sources import open_dataset

    dataset = open_dataset(f"folder:{folder}")
    encoder = load_encoder(f"local-dir:{model}", device="cpu")
    features = Cache(cache).features(dataset, encoder, normalize=True)
    words = encoder.encode_text(["clear lungs", "pneumonia"]).numpy()
    image = str(folder / "normal" / "06.png")
    result = found(folder, model, cache, text=["clear lungs", "pneumonia"], image=[image], id=["effusion/04.png"], k=4)
    assert (result.encoder, result.searched, result.missing, result.behind) == (done.encoder, 13, 1, 0)
    for answer, word in zip(result.answers[:2], words, strict=True):
        scores = features.values @ word / np.linalg.norm(word)
        expected = dataset.ids[features.rows][np.argsort(-scores, kind="stable")[:4]]
        assert ids_of(answer) == list(expected)
        np.testing.assert_allclose([hit["score"] for hit in answer.hits], np.sort(scores)[::-1][:4], atol=1e-5)
    assert result.answers[2].query == {"image": image} and ids_of(result.answers[2])[0] == "normal/06.png"
    assert result.answers[2].hits[0]["score"] == pytest.approx(1, abs=1e-4)
    assert "effusion/04.png" not in ids_of(result.answers[3]) and len(result.answers[3].hits) == 4
    hit = result.answers[2].hits[0]
    assert (hit["rank"], hit["labels"], hit["text"]) == (1, ["normal"], "")
    assert json.loads(json.dumps(plain(result)))["answers"][0]["query"] == {"text": "clear lungs"}
    assert list(result.tables()) == ["text clear lungs", "text pneumonia", f"image {image}", "id effusion/04.png"]
    assert "1 samples have no image embedding" in "\n".join(result.lines())


def test_search__samples_that_share_content_are_all_found(cached, folder, model):
    answer = found(folder, model, cached[0], id=["normal/twin.png"], k=20).answers[0]
    assert len(answer.hits) == 12 and answer.hits[0]["id"] == "normal/03.png"
    itself = found(folder, model, cached[0], id=["normal/twin.png"], k=2, exclude_self=False).answers[0]
    assert set(ids_of(itself)) == {"normal/03.png", "normal/twin.png"}


def test_search__among_texts_finds_samples_by_text(cached, folder, model):
    answer = found(folder, model, cached[0], text=["clear lungs"], kind="text", k=3).answers[0]
    assert set(ids_of(answer)[:2]) == {"normal/00.png", "effusion/02.png"}
    assert answer.hits[0]["score"] == pytest.approx(1, abs=1e-4)


def test_index__on_disk_answers_as_the_one_made_for_a_search_and_says_when_it_is_behind(
    tmp_path, cached, folder, model
):
    cache = tmp_path / "cache"
    shutil.copytree(cached[0], cache)
    fresh = found(folder, model, cache, text=["effusion"], k=5)
    with pytest.raises(CacheError, match=r"no index .*fluoro index"):
        found(folder, model, cache, text=["effusion"], how="hnsw")
    built = index.run(index.Config(cache=cache))
    assert built.rows == 12 and Path(built.path).exists() and "exact index over 12 image rows" in next(built.lines())
    index.run(index.Config(cache=cache, encoder=built.encoder, how="hnsw"))
    for how in ("exact", "hnsw"):
        assert ids_of(found(folder, model, cache, text=["effusion"], k=5, how=how).answers[0]) == ids_of(
            fresh.answers[0]
        )
    more = tmp_path / "more"
    shutil.copytree(folder, more)
    rng = np.random.Generator(np.random.PCG64(99))
    Image.fromarray(rng.integers(0, 256, (80, 70), np.uint8)).save(more / "normal" / "99.png")
    assert embed.run(config(more, model, cache)).computed == {"image": 1}
    behind = found(more, model, cache, text=["effusion"], how="hnsw", k=20)
    assert behind.behind == 1 and "behind by 1 rows" in "\n".join(behind.lines())
    assert found(more, model, cache, text=["effusion"], k=20).behind == 0
    listing = cache_verbs.ls(cache_verbs.ListConfig(cache=cache))
    assert listing.arrays["rows"].tolist() == [13, 3] and len(listing.indexes) == 2 and len(listing.datasets) == 2
    assert "Arrays" in listing.tables()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "nothing to search by; give --text, --image, --id, --vector"),
        ({"text": [" "]}, "an empty text"),
        ({"id": ["normal/0.png"]}, "no sample 'normal/0.png'.*nearest"),
        ({"id": ["effusion/broken.png"]}, "has no image embedding in the cache"),
        ({"image": ["nowhere.png"]}, "'nowhere.png' cannot be read: No such file"),
    ],
    ids=["nothing", "empty text", "unknown id", "failed sample", "no file"],
)
def test_search__wrong_requests(cached, folder, model, values, said):
    whole = {"dataset": f"folder:{folder}", "model": f"local-dir:{model}", "cache": str(cached[0]), **values}
    with pytest.raises(UsageError, match=said):
        search.run(load_config(search.Config, whole))


def test_index__names_the_encoders_to_choose_from(tmp_path, cached):
    with pytest.raises(UsageError, match="image rows of no encoders"):
        index.run(index.Config(cache=tmp_path))
    with pytest.raises(CacheError, match=f"no text rows of 'other'; it has those of {cached[1].encoder}"):
        index.run(index.Config(cache=cached[0], encoder="other", kind="text"))


def test_verify__is_silent_or_names_array_chunk_and_rows(tmp_path, cached):
    cache = tmp_path / "cache"
    shutil.copytree(cached[0], cache)
    good = cache_verbs.verify(cache_verbs.VerifyConfig(cache=cache))
    assert (good.arrays, good.rows, len(good.damage)) == (2, 15, 0) and "no damage" in next(good.lines())
    with pytest.raises(UsageError, match=r"there is no cache to verify in .*mistyped: no such folder"):
        cache_verbs.verify(cache_verbs.VerifyConfig(cache=tmp_path / "mistyped"))
    path = cache / "arrays.zarr" / "image" / cached[1].encoder / "embedding" / "c.0.0"
    content = bytearray(path.read_bytes())
    content[5 * 64 + 3] ^= 16
    path.write_bytes(content)
    with pytest.raises(CacheError, match=r"embedding, chunk 0, rows 5: 1 rows do not match(.|\n)*--repair"):
        cache_verbs.verify(cache_verbs.VerifyConfig(cache=cache))
    assert cache_verbs.check(cache_verbs.VerifyConfig(cache=cache)).damage["rows"].tolist() == ["5"]
    assert cache_verbs.ls(cache_verbs.ListConfig(cache=tmp_path / "none")).bytes == 0
    assert not os.path.exists(tmp_path / "none")


def test_repair__prints_the_commands_or_computes_exactly_the_damaged_rows(tmp_path, cached, folder, model):
    cache = tmp_path / "cache"
    shutil.copytree(cached[0], cache)
    index.run(index.Config(cache=cache))
    arrays = {kind: Cache(cache).array(kind, cached[1].encoder) for kind in ("image", "text")}
    whole = {kind: dict(zip(map(bytes, array.keys), array.read_all().tolist(), strict=True))
             for kind, array in arrays.items()}  # fmt: skip
    for array in arrays.values():
        path = array.folder / "embedding" / "c.0.0"
        content = bytearray(path.read_bytes())
        content[1 * 64 + 3] ^= 16
        path.write_bytes(content)
    (cache / "arrays.zarr" / "zarr.json").write_text("{}")
    with pytest.raises(CacheError, match="--repair"):
        cache_verbs.verify(cache_verbs.VerifyConfig(cache=cache))
    repaired = cache_verbs.verify(cache_verbs.VerifyConfig(cache=cache, repair=True))
    assert repaired.arrays[["dropped", "unnamed", "recomputed", "rows"]].to_numpy().tolist() == [
        [1, 0, 0, 11],
        [1, 0, 0, 2],
    ]
    said = "\n".join(repaired.lines())
    command = f"fluoro embed folder:{folder} --model local-dir:{model} --what image,text --cache {cache}"
    assert command in said and f"fluoro index --cache {cache} --encoder {cached[1].encoder}" in said
    assert embed.run(config(folder, model, cache, what=["image", "text"])).computed == {"image": 1, "text": 1}
    for kind, rows in whole.items():
        array = Cache(cache).array(kind, cached[1].encoder)
        assert dict(zip(map(bytes, array.keys), array.read_all().tolist(), strict=True)) == rows

    path = Cache(cache).array("image", cached[1].encoder).folder / "check" / "c.0"
    path.write_bytes(path.read_bytes()[:-1])
    asked = {"dataset": f"folder:{folder}", "model": f"local-dir:{model}", "device": "cpu"}
    with pytest.raises(UsageError, match="add --repair"):
        cache_verbs.verify(cache_verbs.VerifyConfig(cache=cache, **asked))
    done = cache_verbs.verify(cache_verbs.VerifyConfig(cache=cache, repair=True, **asked))
    assert done.arrays["recomputed"].tolist() == [12] and not done.commands and len(done.failures) == 0
    array = Cache(cache).array("image", cached[1].encoder)
    assert dict(zip(map(bytes, array.keys), array.read_all().tolist(), strict=True)) == whole["image"]
    assert cache_verbs.ls(cache_verbs.ListConfig(cache=cache)).datasets["samples"].tolist() == [14]
