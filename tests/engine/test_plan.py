"""Plans: how a job computes is said, compiled only where it pays, and kept until nothing is left to compute."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from engine import plan
from engine.cache import Cache
from engine.encoder import load_encoder
from engine.errors import UsageError
from engine.plan import make_plan
from tests import models
from tests.engine.fakes import FakeEncoder, FolderReader, dataset_of, settle, write_images


class CompilableEncoder(FakeEncoder):
    """Compiled, its numbers are a little others, as a real compiler's are in their last bits."""

    precision, device = "bf16", torch.device("cpu")
    image_operations = 1000

    def compiled(self):
        return lambda pixels: self.encode_pixels(pixels) + np.float32(0.01)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Give data sets of the first so many of 60 images."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, range(60))
    settle()
    uris = sorted(path.name for path in folder.iterdir())
    return lambda count: dataset_of(uris[:count], FolderReader(folder), texts=["a word"] * count)


@pytest.fixture
def compiles_from_40_images(monkeypatch):
    monkeypatch.setattr(plan, "instruction_sets", lambda: ["amx_bf16"])
    monkeypatch.setattr(plan, "usable_cores", lambda: 2)
    monkeypatch.setattr(plan, "AMX_OPERATIONS", 1000.0)
    monkeypatch.setattr(plan, "COMPILE_FROM", 20.0)


def stopped_after(cache, count, dataset, encoder, **options):
    """Embed until so many rows are computed, and press Ctrl-C."""

    def interrupt(name: str, done: int, total: int) -> None:
        if done >= count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cache(cache).embed(dataset, encoder, batch_size=4, progress=interrupt, **options)


def rows(cache, encoder) -> np.ndarray:
    return Cache(cache).array("image", encoder.id).read_all()


@pytest.mark.parametrize(
    ("change", "count", "expected"),
    [
        ({}, 40, ""),
        ({}, 39, "39 images are computed in less than the 20 s"),
        ({"image_operations": 2000}, 20, ""),
        ({"precision": "fp32"}, 10**9, "in bf16 on a processor with AMX only"),
        ({"device": torch.device("cuda")}, 10**9, "has not been measured"),
    ],
    ids=["long job", "short job", "larger tower", "float32", "CUDA"],
)
def test_compilation_is_chosen_where_the_job_repays_it(compiles_from_40_images, change, count, expected):
    encoder = CompilableEncoder()
    for name, value in change.items():
        setattr(encoder, name, value)
    settled = make_plan(encoder).settled(encoder, count)
    assert settled.compiled is (expected == "") and (expected or "long enough") in settled.compiled_reason
    asked = make_plan(encoder, compiled=True).settled(encoder, 1)
    assert asked.compiled is True and asked.compiled_reason == "as asked for"


def test_the_workers_of_a_cluster_are_asked_for_a_batch_size_where_none_is_kept_or_given():
    class Workers:
        def batch_size(self, encoder):
            return 256

    encoder, workers = CompilableEncoder(), Workers()
    assert [
        make_plan(encoder, batch_size=size, kept=kept, cluster=workers).batch_size
        for size, kept in ((None, None), (None, {"batch_size": 8}), (4, {"batch_size": 8}))
    ] == [256, 8, 4]
    with pytest.raises(UsageError, match="batch_size must be at least 1, not 0"):
        make_plan(encoder, batch_size=0, cluster=workers)


def test_without_amx_nothing_is_compiled(compiles_from_40_images, monkeypatch):
    monkeypatch.setattr(plan, "instruction_sets", lambda: ["avx512_bf16"])
    assert make_plan(CompilableEncoder()).settled(CompilableEncoder(), 10**9).compiled is False


def test_twice_the_cores_compute_twice_as_much_before_compiling_pays(compiles_from_40_images, monkeypatch):
    encoder = CompilableEncoder()
    monkeypatch.setattr(plan, "usable_cores", lambda: 4)
    assert [make_plan(encoder).settled(encoder, count).compiled for count in (79, 80)] == [False, True]


def test_the_operations_of_a_tower_are_those_of_its_products(tmp_path):
    """Two a weight and token; attention's products of tokens by tokens are counted or not, by the kernel."""
    encoder = load_encoder(f"local-dir:{models.open_clip_vit(tmp_path)}", device="cpu")
    tokens, width, blocks = 17, 32, 3
    weights = blocks * 2 * tokens * (4 * width**2 + 2 * 2 * width**2) + 2 * 16 * (3 * 16**2) * width + 2 * width * 32
    assert weights <= encoder.image_operations <= weights + blocks * 4 * tokens**2 * width


def test_how_a_job_computes_is_said_in_one_line_where_it_begins(images, tmp_path, caplog):
    encoder = CompilableEncoder()
    encoder.name, encoder.precision_reason = "fake", "the cache holds it for this model"
    with caplog.at_level("INFO", logger="engine.plan"):
        Cache(tmp_path).embed(images(5), encoder, ("image", "text"))
        said = [record.getMessage() for record in caplog.records if record.name == "engine.plan"]
        assert len(said) == 1 and said[0].startswith(
            "fake: precision bf16 (the cache holds it for this model), batches of 32, not compiled (compiling pays in"
        )
        Cache(tmp_path).embed(images(5), encoder, ("image", "text"))  # nothing is left to compute
        Cache(tmp_path / "texts").embed(images(5), encoder, ("text",))
        said = [record.getMessage() for record in caplog.records if record.name == "engine.plan"]
    assert len(said) == 2 and said[1].endswith("not compiled (text towers never are)")


def test_a_stopped_job_goes_on_compiled_although_too_little_is_left_for_it(images, tmp_path, compiles_from_40_images):
    stopped_after(tmp_path / "rough", 20, images(50), CompilableEncoder())
    plans = []
    Cache(tmp_path / "rough").embed(images(50), CompilableEncoder(), settled=plans.append)
    assert [(each.batch_size, each.compiled, each.compiled_reason) for each in plans] == [(4, True, plan.GOING_ON)]
    Cache(tmp_path / "calm").embed(images(50), CompilableEncoder(), batch_size=4)
    np.testing.assert_array_equal(*(rows(tmp_path / name, CompilableEncoder()) for name in ("rough", "calm")))
    uncompiled = CompilableEncoder()
    Cache(tmp_path / "uncompiled").embed(images(50), uncompiled, batch_size=4, compiled=False)
    assert (rows(tmp_path / "uncompiled", uncompiled) != rows(tmp_path / "calm", uncompiled)).any()


def test_a_plan_is_kept_by_work_and_until_it_is_done(images, tmp_path, compiles_from_40_images):
    encoder, plans = CompilableEncoder(), []
    stopped_after(tmp_path, 20, images(50), encoder)
    (kept,) = (tmp_path / "plans").iterdir()
    expected = {"encoder": encoder.id, "dataset": "fake", "what": ["image"], "batch_size": 4, "compiled": True}
    assert json.loads(kept.read_text()) == expected
    Cache(tmp_path).embed(images(10), CompilableEncoder("another-bf16-0123456789ab"), settled=plans.append)
    Cache(tmp_path).embed(images(50), encoder, compiled=False, settled=plans.append)  # what is asked for wins
    assert [(each.batch_size, each.compiled) for each in plans] == [(32, False), (4, False)]
    assert not list((tmp_path / "plans").iterdir())
    Cache(tmp_path).embed(images(60), encoder, settled=plans.append)
    assert (plans[-1].batch_size, plans[-1].compiled) == (32, False)


def test_a_damaged_plan_is_no_plan(images, tmp_path, compiles_from_40_images):
    stopped_after(tmp_path, 20, images(50), CompilableEncoder())
    (kept,) = (tmp_path / "plans").iterdir()
    for content in (b"", b"[]", b'{"batch_size": null}', b"\xff"):
        kept.write_bytes(content)
        plans = []
        stopped_after(tmp_path, 0, images(50), CompilableEncoder(), settled=plans.append)
        assert plans[0].compiled is False and kept.read_bytes() != content


def test_a_plan_that_cannot_be_written_is_said_and_does_not_end_the_job(images, tmp_path, caplog):
    (tmp_path / "plans").write_text("no folder")
    assert Cache(tmp_path).embed(images(5), CompilableEncoder()).computed == {"image": 5}
    assert "the job's plan is not kept" in caplog.text


def test_a_cache_elsewhere_keeps_plans_too(images, compiles_from_40_images):
    stopped_after("memory://plans", 20, images(50), CompilableEncoder())
    plans = []
    Cache("memory://plans").embed(images(50), CompilableEncoder(), settled=plans.append)
    assert [(each.batch_size, each.compiled) for each in plans] == [(4, True)]
