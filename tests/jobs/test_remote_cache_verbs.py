"""`embed`, `index`, `search` and `cache ls` on a cache that is no folder: in memory, in an archive, on a web server."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from engine.cache import Cache
from engine.errors import CacheError
from jobs import cache as cache_verbs
from jobs import cache_compact, cache_export, cache_import, cache_remove, doctor, embed, index, search
from jobs.config import CacheOptions, load_config, save_config
from jobs.runs import runs_folder
from tests import models
from tests.engine.read_only_copies import read_only_copy


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user" / "fluoroscope"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for number in range(6):
        rng = np.random.Generator(np.random.PCG64(number))
        Image.fromarray(rng.integers(0, 256, (80, 70), np.uint8)).save(root / f"{number:02d}.png")
        (root / f"{number:02d}.txt").write_text(f"image number {number}")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return models.open_clip_vit(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def memory() -> Iterator[str]:
    name = uuid.uuid4().hex
    yield f"memory://{name}"
    with suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


def values(folder: Path, model: Path, cache: Path | str, **more) -> dict:
    return {"dataset": f"folder:{folder}", "model": f"local-dir:{model}", "device": "cpu", "cache": cache, **more}


def embedded(folder: Path, model: Path, cache: Path | str, **options) -> embed.Embedded:
    config = embed.Config(**values(folder, model, cache, what=["image", "text"], precision="fp32"))
    return embed.run(config, **options)


def answers(folder: Path, model: Path, cache: Path | str) -> list[search.Answer]:
    config = search.Config(**values(folder, model, cache, text=["a shadow"], id=["03.png"], k=4, precision="fp32"))
    return search.run(config).answers


def test_memory__embed_index_search_and_ls_as_in_a_folder(tmp_path, folder, model, memory, user_folder):
    here, there = embedded(folder, model, tmp_path / "cache"), embedded(folder, model, memory)
    assert here.computed == there.computed == {"image": 6, "text": 6}
    assert here.folder.parent == tmp_path / "cache" / "runs"
    assert there.folder.parent == user_folder / "runs" and (there.folder / "config.yaml").is_file()
    built = index.run(index.Config(cache=memory))
    assert built.path == f"{memory}/indexes/{there.encoder}-image-exact.faiss"
    assert answers(folder, model, memory) == answers(folder, model, tmp_path / "cache")
    listed = cache_verbs.ls(cache_verbs.ListConfig(cache=memory))
    assert listed.arrays["rows"].tolist() == [6, 6] and listed.indexes == [f"{there.encoder}-image-exact"]
    assert listed.datasets["samples"].tolist() == [6] and memory in "\n".join(listed.lines())
    assert embedded(folder, model, memory).computed == {"image": 0, "text": 0}


def test_memory__the_run_goes_where_it_is_told(tmp_path, folder, model, memory):
    done = embedded(folder, model, memory, out=tmp_path / "run")
    assert done.folder == tmp_path / "run"


@pytest.mark.parametrize("way", ["zip path", "web"])
def test_read_only__search_and_ls_work_and_embed_refuses_what_is_missing(tmp_path, folder, model, way):
    embedded(folder, model, tmp_path / "cache")
    with read_only_copy(tmp_path / "cache", way) as address:
        assert answers(folder, model, address) == answers(folder, model, tmp_path / "cache")
        listed = cache_verbs.ls(cache_verbs.ListConfig(cache=address))
        assert listed.arrays["rows"].tolist() == [6, 6]
        assert embedded(folder, model, address, out=tmp_path / "again").computed == {"image": 0, "text": 0}
        config = embed.Config(**values(folder, model, address, what=["pixels"], precision="fp32"))
        with pytest.raises(CacheError, match="is read-only"):
            embed.run(config, out=tmp_path / "refused")
        assert doctor.look_at_cache(address).state == "good"


def test_upkeep__looks_exports_and_imports_anywhere_and_else_asks_for_a_folder(tmp_path, folder, model, memory):
    encoder = embedded(folder, model, memory).encoder
    assert not len(cache_verbs.verify(cache_verbs.VerifyConfig(cache=memory)).damage)
    out = cache_export.run(cache_export.Config(cache=memory, out=tmp_path / "text_emb.npy", kind="text"))
    captions = [f"image number {number}" for number in range(6)]
    pd.DataFrame({"caption": captions}).to_parquet(tmp_path / "text_emb.parquet")
    done = cache_import.run(cache_import.Config(cache=memory, folder=tmp_path, name="theirs", kind="text"))
    assert out.rows == done.rows["added"].sum() == 6
    theirs, ours = (Cache(memory).array("text", name) for name in (done.encoder, encoder))
    np.testing.assert_array_equal(theirs.keys, ours.keys)
    np.testing.assert_array_equal(theirs.read_all(), ours.read_all())
    for change in (
        lambda: cache_verbs.verify(cache_verbs.VerifyConfig(cache=memory, repair=True)),
        lambda: cache_compact.run(cache_compact.Config(cache=memory)),
        lambda: cache_remove.rm(cache_remove.RmConfig(cache=memory, encoder=encoder, yes=True)),
        lambda: cache_remove.forget_samples(
            cache_remove.ForgetConfig(cache=memory, dataset=f"folder:{folder}", id=["03.png"], yes=True)
        ),
        lambda: cache_export.run(
            cache_export.Config(cache=memory, out=tmp_path / "x.npy", encoder=encoder, dataset=f"folder:{folder}")
        ),
    ):
        with pytest.raises(CacheError, match="is not a folder of this machine"):
            change()


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("memory://a", "memory://a"),
        ("zip://x::https://host/c.zip", "zip://x::https://host/c.zip"),
        ("some/folder", Path("some/folder")),
        ("~/c.zip", Path.home() / "c.zip"),
        (Path("some/folder"), Path("some/folder")),
    ],
    ids=str,
)
def test_config__takes_a_url_or_a_path(tmp_path, monkeypatch, given, taken):
    config = CacheOptions(cache=given)
    assert config.cache == taken and type(config.cache) is type(taken)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(CacheOptions, tmp_path / "config.yaml") == config
    assert load_config(CacheOptions, overrides=[f"cache={given}"]) == config
    monkeypatch.setenv("FLUOROSCOPE_CACHE", str(given))
    assert CacheOptions() == config


def test_runs_folder__is_the_users_own_where_the_cache_is_no_folder(tmp_path, user_folder, memory):
    assert runs_folder(tmp_path) == tmp_path / "runs"
    assert runs_folder(memory) == user_folder / "runs"
    assert Cache(memory).address == memory
