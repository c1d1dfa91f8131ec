"""`fluoro search` and `fluoro index check` on a small real model: queries of all kinds, filters, files, bad input."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from analysis.heads import LinearHead
from engine import sample_filter
from engine.cache import Cache
from engine.errors import CacheError, DataError, FluoroscopeError, ModelError, UsageError
from engine.sources import open_dataset
from jobs import embed, index, index_check, search
from jobs.cli import fluoro
from jobs.config import load_config
from tests import models

COUNT = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A table of images with patients, views, ages, two labels and texts that repeat; embedded."""
    root = tmp_path_factory.mktemp("search")
    rows = []
    for number in range(COUNT):
        rng = np.random.Generator(np.random.PCG64(number))
        Image.fromarray(rng.integers(0, 256, (40, 50), np.uint8)).save(root / f"{number:02d}.png")
        rows.append(
            {
                "image": f"{number:02d}.png",
                "id": f"s{number:02d}",
                "group": f"P{number // 4}",
                "view": "frontal" if number % 3 else "lateral",
                "text": ["clear lungs", "large effusion", "an enlarged heart"][number % 3],
                "age": 20 + number,
                "Effusion": int(number % 3 == 1),
                "Nodule": int(number % 5 == 0),
            }
        )
    pd.DataFrame(rows).to_csv(root / "table.csv", index=False)
    models.open_clip_vit(root / "model")
    embed.run(embed.Config(**base(root), what=["image", "text"]))
    return root


def base(root) -> dict:
    return {
        "dataset": f"table:{root / 'table.csv'}",
        "data": {"labels": ["Effusion", "Nodule"]},
        "model": f"local-dir:{root / 'model'}",
        "device": "cpu",
        "precision": "fp32",
        "cache": root / "cache",
    }


def found(place, **values) -> search.Found:
    return search.run(search.Config(**base(place), **values))


def vectors(place) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and embeddings of length one, as plain zarr reads them."""
    from jobs import opening

    config = search.Config(**base(place), text=["x"])
    dataset, cache = opening.open_data(config), Cache(place / "cache")
    features = cache.features(dataset, cache.encoders()[0]["id"])
    values = features.values.astype(np.float64)
    return dataset.ids[features.rows], values / np.linalg.norm(values, axis=1, keepdims=True)


def ids(answer: search.Answer) -> list[str]:
    return [hit["id"] for hit in answer.hits]


def test_vectors_from_a_file_find_what_brute_force_finds(place, tmp_path):
    names, values = vectors(place)
    queries = np.random.Generator(np.random.PCG64(9)).standard_normal((3, values.shape[1]))
    np.save(tmp_path / "q.npy", queries)
    answers = found(place, vector=[tmp_path / "q.npy"], k=6).answers
    assert [answer.query["vector"] for answer in answers] == [f"{tmp_path / 'q.npy'}[{n}]" for n in range(3)]
    for answer, query in zip(answers, queries, strict=True):
        assert ids(answer) == list(names[np.argsort(-(values @ query))[:6]])


def test_a_heads_label_finds_what_its_logits_put_first(place, tmp_path):
    names, values = vectors(place)
    generator = np.random.Generator(np.random.PCG64(4))
    weight = generator.standard_normal((3, values.shape[1]))
    weight[2] = 0
    encoder = Cache(place / "cache").encoders()[0]["id"]
    head = LinearHead(weight, np.array([0.0, 5.0, 0.0]), ("Effusion", "Nodule", "Never"), True, encoder)
    (tmp_path / "run").mkdir()
    file = head.save(tmp_path / "run" / "probe.npz")
    done = found(place, head=tmp_path / "run", label=["Nodule", "Effusion"], k=7)
    assert [answer.query for answer in done.answers] == [{"head": "Nodule"}, {"head": "Effusion"}]
    for answer, row in zip(done.answers, (1, 0), strict=True):
        assert ids(answer) == list(names[np.argsort(-head.logits(values)[:, row])[:7]])
    said = "\n".join(done.lines())
    assert "searched by the weights of Nodule, Effusion" in said and "that of the head's own logits" in said
    (joined,) = found(place, head=file, label=["Nodule"], minus_id=["s03"], k=3).answers
    assert joined.query == {"together": "head Nodule - id s03"}
    arguments = ["search", f"table:{place / 'table.csv'}", "-m", f"local-dir:{place / 'model'}", "--device", "cpu",
                 "--precision", "fp32", "--cache", str(place / "cache"), "-q"]  # fmt: skip
    shown = CliRunner().invoke(fluoro, [*arguments, "--head", str(file), "--label", "Nodule", "-k", "2"])
    assert shown.exit_code == 0 and "head Nodule" in shown.output and ids(done.answers[0])[0] in shown.output
    for values_, error, problem in (
        ({"head": file, "label": ["Nodul"]}, UsageError, "no label 'Nodul'; nearest: Nodule"),
        ({"head": file, "label": ["Never"]}, UsageError, "only zeros for 'Never'"),
        ({"head": tmp_path, "label": ["Nodule"]}, UsageError, "no run of fluoro probe"),
    ):
        with pytest.raises(error, match=problem):
            found(place, **values_)
    other = LinearHead(weight, np.zeros(3), head.label_names, False, "another-encoder").save(tmp_path / "other.npz")
    with pytest.raises(ModelError, match="trained on embeddings of 'another-encoder'"):
        found(place, head=other, label=["Nodule"])
    for options, problem in (({"head": file}, "--head needs --label"), ({"label": ["Nodule"]}, "give --head FILE")):
        with pytest.raises(UsageError, match=problem):
            load_config(search.Config, {**base(place), **options})


def test_together_is_the_mean_and_minus_keeps_away(place):
    names, values = vectors(place)
    at = {name: number for number, name in enumerate(names)}
    # Three of them: two would be equally far from their mean.
    wanted = values[[at["s03"], at["s08"], at["s10"]]].mean(axis=0)
    (answer,) = found(place, id=["s03", "s08", "s10"], together=True, k=5).answers
    assert ids(answer) == list(names[np.argsort(-(values @ wanted))[:5]])
    (away,) = found(place, id=["s03", "s08", "s10"], minus_id=["s11"], k=COUNT).answers
    expected = values @ (wanted - values[at["s11"]])
    assert ids(away) == list(names[np.argsort(-expected)]) and away.query == {
        "together": "id s03 + id s08 + id s10 - id s11"
    }
    assert ids(away).index("s11") > 12
    with pytest.raises(UsageError, match="id s03 - id s03 cancel out"):
        found(place, id=["s03"], minus_id=["s03"])


def test_a_filter_leaves_k_answers_and_a_query_need_not_pass_it(place):
    done = found(place, id=["s00"], where=["view=frontal", "label:Effusion", "age<=40"], k=5)
    assert len(done.answers[0].hits) == 5 and done.searched == 7
    assert all(hit["view"] == "frontal" and "Effusion" in hit["labels"] for hit in done.answers[0].hits)
    more = found(place, id=["s00"], where=["group=P1|P2"], k=50).answers[0]
    assert sorted(ids(more)) == [f"s{number:02d}" for number in range(4, 12)]


def test_one_per_group_gives_each_patient_once(place):
    (answer,) = found(place, id=["s05"], one_per="group", k=6).answers
    assert sorted(hit["group"] for hit in answer.hits) == [f"P{number}" for number in range(6)]
    assert "s05" not in ids(answer)
    with pytest.raises(UsageError, match="no column 'gruop' to find one of each; nearest: group"):
        found(place, id=["s05"], one_per="gruop")


def test_batches_come_from_files(place, tmp_path):
    (tmp_path / "ids.txt").write_text("s01\ns02\n")
    pd.DataFrame({"id": ["s01", "s02"], "text": ["one", "two"]}).to_parquet(tmp_path / "both.parquet")
    pd.DataFrame({"text": ["one", "two"]}).to_csv(tmp_path / "texts.csv", index=False)
    single = found(place, id=["s01", "s02"], k=3).answers
    assert found(place, id_file=[tmp_path / "ids.txt"], k=3).answers == single
    assert found(place, id_file=[tmp_path / "both.parquet"], k=3).answers == single
    texts = found(place, text=["one", "two"], k=3).answers
    assert found(place, text_file=[tmp_path / "both.parquet"], k=3).answers == texts
    assert found(place, text_file=[tmp_path / "texts.csv"], k=3).answers == texts


def test_answers_are_written_as_tables_json_and_a_sheet(place, tmp_path):
    files = [tmp_path / "new" / name for name in ("a.csv", "a.parquet", "a.json", "a.png")]
    done = found(place, id=["s01"], text=["an effusion"], k=4, output=files)
    assert done.files == files
    csv, table = pd.read_csv(files[0], keep_default_na=False), pd.read_parquet(files[1])
    assert list(csv["id"]) == list(table["id"]) == [*ids(done.answers[0]), *ids(done.answers[1])]
    assert list(table["query_kind"].unique()) == ["text", "id"] and len(table) == 8
    assert [answer["query"] for answer in json.loads(files[2].read_text())] == [{"text": "an effusion"}, {"id": "s01"}]
    sheet = Image.open(files[3])
    assert sheet.width > 5 * 160 and sheet.height > 2 * 160
    assert np.asarray(sheet.convert("L"))[:170, 200:360].std() > 20, "the first hit's image stands beside the text"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"id": ["s01"], "where": ["veiw=frontal"]}, "no column 'veiw'.*nearest: view"),
        ({"id": ["s01"], "where": ["label:Nodul"]}, "no label 'Nodul'.*nearest: Nodule"),
        ({"id": ["s01"], "where": ["view=frontal", "view=lateral"]}, "no sample .* passes the filter"),
        ({"id": ["s99"]}, "no sample 's99'"),
        ({"id": ["s01"], "how": "hnsw"}, "no index .*--how hnsw"),
    ],
)
def test_what_cannot_be_searched_is_an_error_with_the_next_step(place, values, problem):
    with pytest.raises(FluoroscopeError, match=problem):
        found(place, **values)


def test_an_image_file_that_cannot_be_decoded_is_named(place, tmp_path):
    (tmp_path / "table.png").write_bytes(b"id,label")
    with pytest.raises(UsageError, match=r"image '.*table\.png' cannot be read: not an image of a known format"):
        found(place, image=[tmp_path / "table.png"])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (np.zeros((2, 5)), r"has shape \(2, 5\); embeddings here have"),
        (np.full((1, 16), np.nan), "row 0 holds NaN"),
        (np.zeros((1, 16)), "or zeros only"),
        (np.array(["a"]), "must hold numbers"),
        (np.zeros((0, 16)), "shape"),
        (b"not an array", "cannot be read as a .npy file"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(tmp_path, content, problem):
    path = tmp_path / "q.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(UsageError, match=problem):
        search.search_queries.read_vectors(path, 16)


@pytest.mark.parametrize(
    ("name", "content", "error", "problem"),
    [
        ("q.txt", "", UsageError, "is empty; write one text a line"),
        ("q.txt", "one\n\ntwo\n", UsageError, "is blank in line 2"),
        ("q.csv", "id,text\n1,one\n2, \n", UsageError, "is blank in line 3"),
        ("q.csv", "txet\none\n", DataError, "no column 'text'; nearest: txet"),
        ("q.txt", b"\xff\xfe\x00", UsageError, "no UTF-8 text"),
        (None, "", UsageError, "cannot be read: No such file"),
    ],
)
def test_query_files_that_cannot_be_are_refused(tmp_path, name, content, error, problem):
    path = tmp_path / (name or "absent.txt")
    if name:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=problem):
        search.search_queries.lines_of(path, "text")


def test_wrong_options_are_refused_before_anything_is_loaded():
    minimal = {"dataset": "folder:x", "model": "m", "text": ["a"]}
    for values, problem in (
        ({"how": "flat"}, "unknown kind of index 'flat'"),
        ({"output": ["answers.xlsx"]}, "does not say what to write"),
        ({"minus_text": [" "]}, "empty text"),
        ({"text": []}, "--text, --image, --id, --vector, --text-file or --id-file"),
    ):
        with pytest.raises(UsageError, match=problem):
            load_config(search.Config, {**minimal, **values})


def test_a_cache_without_the_asked_samples_is_an_error_that_says_how_to_add_them(place):
    others = pd.read_csv(place / "table.csv").assign(image=[f"new{number:02d}.png" for number in range(COUNT)])
    for number, name in enumerate(others["image"]):
        Image.fromarray(np.full((40, 50), number, np.uint8)).save(place / name)
    others.to_csv(place / "others.csv", index=False)
    values = {**base(place), "dataset": f"table:{place / 'others.csv'}"}
    problem = r"none of the 8 samples .* that pass the filter \(view=lateral\) has its image embedding"
    with pytest.raises(CacheError, match=problem):
        search.run(search.Config(**values, text=["x"], where=["view=lateral"]))


def test_texts_that_are_not_there_cannot_be_searched_and_embedding_does_not_help(place):
    table = pd.read_csv(place / "table.csv")
    table.drop(columns="text").to_csv(place / "mute.csv", index=False)
    values = {**base(place), "dataset": f"table:{place / 'mute.csv'}", "kind": "text", "text": ["x"]}
    with pytest.raises(UsageError, match=r"mute.* has no texts to search among; name its column, such as --data text="):
        search.run(search.Config(**values))
    table.assign(text=table["text"].where(table["view"] == "frontal", "")).to_csv(place / "partly.csv", index=False)
    values |= {"dataset": f"table:{place / 'partly.csv'}", "where": ["view=lateral"]}
    with pytest.raises(CacheError, match=r"none of the 8 samples .* none of them has a text"):
        search.run(search.Config(**values))


def test_errors_call_a_data_set_of_many_options_by_its_name(place):
    schema = f"table:{place / 'table.csv'}?labels=Effusion,{'Nodule,' * 12}"
    dataset = open_dataset(f"table:{place / 'table.csv'}", labels=["Effusion", "Nodule"])
    long = dataclasses.replace(dataset, schema=schema)
    for asked in (lambda: long.position("s99"), lambda: long.label_position("Mass")):
        with pytest.raises(UsageError) as caught:
            asked()
        assert repr(dataset.name) in str(caught.value) and "Nodule,Nodule" not in str(caught.value)
    with pytest.raises(UsageError, match=f"no sample of {dataset.name!r} passes the filter"):
        sample_filter.matching(long, ["view=frontal", "view=lateral"])


def test_an_index_behind_answers_says_so_and_takes_in_new_rows(place, tmp_path):
    import shutil

    from engine.arrays.keyed_array import KeyedArray

    cache = tmp_path / "cache"
    shutil.copytree(place / "cache", cache)
    built = index.run(index.Config(cache=cache, how="HNSW8"))
    assert (built.rows, built.added) == (COUNT, COUNT) and "exact search, which needs no index" in list(built.lines())[
        -1
    ]
    array = KeyedArray.open(cache, "image", built.encoder)
    array.append(np.full((1, 16), 7, np.uint8), np.ones((1, *array.form.row_shape), np.float16))
    values = {**base(place), "cache": cache, "id": ["s01"], "how": "HNSW8", "k": COUNT + 5}
    done = search.run(search.Config(**values))
    assert done.behind == 1 and len(done.answers[0].hits) == COUNT - 1
    assert any("behind by 1 rows" in line for line in done.lines())
    again = index.run(index.Config(cache=cache, how="HNSW8"))
    assert (again.rows, again.added) == (COUNT + 1, 1) and any("took in 1 new" in line for line in again.lines())
    assert index.run(index.Config(cache=cache, how="HNSW8", rebuild=True)).added == COUNT + 1


def test_check__recall_pairs_and_labels(place):
    index.run(index.Config(cache=place / "cache", how="IVF2,Flat"))
    data = {"dataset": base(place)["dataset"], "data": base(place)["data"]}
    done = index_check.run(index_check.Config(cache=place / "cache", how="IVF2,Flat", **data))
    assert list(done.recall["queries"]) == ["image rows", "text rows"] and list(done.recall["count"]) == [COUNT, 3]
    assert (done.recall[["recall@1", "recall@10"]] >= 0.99).all(axis=None), "both cells are looked into"
    assert set(done.pairs["direction"]) == {"text to image", "image to text"}
    assert (done.pairs.set_index("direction").loc["image to text", "recall@5"]) == 1.0, "there are three texts"
    labels = done.labels.set_index("label")
    assert labels.loc["Effusion", "queries"] == COUNT / 3 and 0 < labels.loc["(mean)", "map"] <= 1
    with pytest.raises(CacheError, match=r"no index .*--how hnsw"):
        index_check.run(index_check.Config(cache=place / "cache", how="hnsw"))


def test_check__pairs_are_those_of_a_loop_over_all_cosines(place):
    """Three texts for 24 images: any image of a text counts, and an image finds its text under any of its names."""
    config = {"dataset": base(place)["dataset"], "data": base(place)["data"]}
    done = index_check.run(index_check.Config(cache=place / "cache", k=[2, 1], **config))
    dataset, cache = open_dataset(config["dataset"], **config["data"]), Cache(place / "cache")
    (encoder,) = {name for _, name in cache.arrays()}
    images, texts = (cache.features(dataset, encoder, kind).values.astype(np.float64) for kind in ("image", "text"))
    words = dataset.samples["text"].to_numpy()
    first = [int(np.flatnonzero(words == word)[0]) for word in sorted(set(words))]
    unit = {"image": images / np.linalg.norm(images, axis=1, keepdims=True),
            "text": texts[first] / np.linalg.norm(texts[first], axis=1, keepdims=True)}  # fmt: skip
    found = {"text to image": {1: [], 2: []}, "image to text": {1: [], 2: []}}
    for sample in range(COUNT):
        own = texts[sample] / np.linalg.norm(texts[sample])
        by_text, by_image = np.argsort(-(unit["image"] @ own)), np.argsort(-(unit["text"] @ unit["image"][sample]))
        for k in (1, 2):
            found["text to image"][k].append(words[sample] in words[by_text[:k]])
            found["image to text"][k].append(words[sample] in np.array(sorted(set(words)))[by_image[:k]])
    table = done.pairs.set_index("direction")
    assert list(table.columns) == ["queries", "items", "recall@1", "recall@2"]
    assert table["items"].to_dict() == {"text to image": COUNT, "image to text": 3}
    for direction, by_k in found.items():
        for k, hits in by_k.items():
            assert table.loc[direction, f"recall@{k}"] == pytest.approx(np.mean(hits)), (direction, k)
    # Neither all nor nothing, or a mistake could not show.
    assert 0 < table.loc["image to text", "recall@1"] < 1 and 0 < table.loc["text to image", "recall@1"] < 1


def test_check__takes_a_model_for_its_encoder(place):
    model = {name: base(place)[name] for name in ("model", "device", "cache")}
    named = index_check.run(index_check.Config(**model))
    assert named.encoder == index_check.run(index_check.Config(cache=place / "cache")).encoder
    with pytest.raises(UsageError, match=f"is encoder {named.encoder}, not other-fp32-000000000000"):
        index.run(index.Config(**model, encoder="other-fp32-000000000000"))


def test_check__an_index_that_misses_rows_has_a_lower_recall(place, monkeypatch):
    from engine.index import Index

    index.run(index.Config(cache=place / "cache", how="IVF2,Flat"))
    search_rows = Index.search_rows

    def missing(self, queries, k, **options):
        scores, rows = search_rows(self, queries, k, **options)
        return (scores, np.where(rows % 2, -1, rows)) if self.engine is not None else (scores, rows)

    monkeypatch.setattr(Index, "search_rows", missing)
    done = index_check.run(index_check.Config(cache=place / "cache", how="IVF2,Flat"))
    assert (done.recall["recall@10"] < 0.8).all()


def test_the_command_line_knows_index_and_index_check(place):
    runner = CliRunner()
    shown = runner.invoke(fluoro, ["index", "check", "--help"])
    assert shown.exit_code == 0 and "Measure how much of what is nearest an index finds" in shown.output
    assert "Build a search index" in runner.invoke(fluoro, ["index", "--help"]).output
    done = runner.invoke(fluoro, ["index", "check", "--cache", str(place / "cache"), "--json", "-q"])
    assert done.exit_code == 0 and json.loads(done.output)["recall"][0]["recall@10"] == 1.0
