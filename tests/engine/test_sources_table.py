"""Tables of samples."""

import gzip
import time
import tracemalloc
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from engine import sample_scan
from engine.arrays import file_digest
from engine.cache import Cache
from engine.errors import DataError, ImageError, UsageError
from engine.keys import key_of_bytes
from engine.sample_table import load_table, save_table
from engine.sources import open_dataset
from engine.splits import apply_split
from tests.conftest import shared_data
from tests.engine.fakes import FakeEncoder, settle, write_images
from tests.engine.open_i_files import write_png

HEADER = "image,patient_id,view,split,findings,impression,Edema,Fracture,names,width,height"
ROWS = (
    "a.png,p1,PA,train,Wet.,,1,0,Edema;Mass,10,12",
    "b.png,p1,AP,training,,Broken.,0,1.0,Fracture,10,12",
    "c.png,,PA,validation,Wet.,Broken.,-1,,,10,12",
    "d.png,p4,PA,test,,,True,0,Mass,10,12",
)


@pytest.fixture
def table(tmp_path):
    return write(tmp_path, HEADER, *ROWS)


def write(folder, *lines):
    path = folder / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    for name in ("a.png", "b.png", "c.png", "d.png"):
        write_png(folder / name)
    return f"table:{path}"


def test_columns_are_mapped(table):
    dataset = open_dataset(table, labels=["Edema", "Fracture"], text=["findings", "impression"])
    assert dataset.ids.tolist() == ["a.png", "b.png", "c.png", "d.png"]
    assert dataset.groups.tolist() == ["p1", "p1", "c.png", "p4"]
    assert dataset.samples["text"].tolist() == ["Wet.", "Broken.", "Wet. Broken.", ""]
    assert dataset.samples["split"].tolist() == ["train", "train", "val", "test"]
    assert dataset.label_names == ("Edema", "Fracture")
    assert dataset.labels.tolist() == [[1, 0], [0, 1], [0, 0], [1, 0]] and dataset.labels.dtype == np.int8
    assert "names" in dataset.samples and "Edema" not in dataset.samples
    assert dataset.reader.read("a.png").startswith(b"\x89PNG")


def test_labels_from_a_list_column(table):
    dataset = open_dataset(table, labels="names")
    assert dataset.label_names == ("Edema", "Fracture", "Mass")
    assert dataset.labels.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    dataset = open_dataset(f"{table}?labels=names&label_names=Mass,Fracture,Edema,Hernia")
    assert dataset.labels.tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "names", "label_names": "Mass,Edema,Mass"}, "label_names names 'Mass' more than once"),
        ({"labels": ["Edema", "Fracture", "Edema"]}, "labels names 'Edema' more than once"),
    ],
)
def test_labels_named_twice_are_refused(table, options, message):
    with pytest.raises(UsageError, match=message):
        open_dataset(table, **options)


@pytest.mark.parametrize("separator", ["|", "||", ".*", " and "])
def test_labels_from_a_list_with_any_separator(tmp_path, separator):
    columns = {"text": ["a", "b", "c"], "names": [separator.join(["Edema", "Pleural Mass"]), "Edema", ""]}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    dataset = open_dataset(f"table:{tmp_path}/t.parquet", labels="names", separator=separator)
    assert dataset.label_names == ("Edema", "Pleural Mass") and dataset.labels.tolist() == [[1, 1], [1, 0], [0, 0]]
    with pytest.raises(UsageError, match="separator='' separates no names"):
        open_dataset(f"table:{tmp_path}/t.parquet?labels=names&separator=")


@pytest.mark.parametrize("values", [[True, False, True, None], ["TRUE", "false", "1", ""]])
def test_labels_from_one_column_of_truth_values(tmp_path, values):
    parquet.write_table(pa.table({"text": list("abcd"), "Edema": values}), tmp_path / "t.parquet")
    dataset = open_dataset(f"table:{tmp_path}/t.parquet?labels=Edema")
    assert dataset.label_names == ("Edema",) and dataset.labels.tolist() == [[1], [0], [1], [0]]


def test_keep__filters_rows_and_keeps_line_numbers(table):
    dataset = open_dataset(table + "?keep=view:PA&labels=names")
    assert dataset.ids.tolist() == ["a.png", "c.png", "d.png"]
    with pytest.raises(DataError, match=r"table.csv line 5, column 'names': unknown label 'Mass'.*nearest: Masses"):
        open_dataset(table, keep={"view": ["PA"], "patient_id": "p4"}, labels="names", label_names=["Masses"])


def test_parquet_is_read_as_csv_is(table, tmp_path):
    frame = pd.read_csv(tmp_path / "table.csv")
    frame["Edema"] = [1, 0, -1, 1]
    frame.to_parquet(tmp_path / "table.parquet")
    options = {"labels": ["Edema", "Fracture"], "text": ["findings", "impression"]}
    from_csv, from_parquet = open_dataset(table, **options), open_dataset(f"table:{tmp_path}/table.parquet", **options)
    columns = ["id", "uri", "text", "group", "view", "split"]
    pd.testing.assert_frame_equal(from_csv.samples[columns], from_parquet.samples[columns])
    np.testing.assert_array_equal(from_csv.labels, from_parquet.labels)


def test_paths_that_climb_out_of_the_root_are_the_reason_that_is_told(tmp_path):
    write_png(tmp_path / "a.png")
    (tmp_path / "tables").mkdir()
    for path, told in (("../a.png", True), (str(tmp_path / "a.png"), False), ("a..png", False)):
        with pytest.raises(DataError, match=r"none of 1 images .*root=FOLDER$") as caught:
            open_dataset(write(tmp_path / "tables", "image", path))
        assert ("paths with '..' are not followed" in str(caught.value)) == told


def test_numeric_ids_keep_their_form(tmp_path):
    dataset = open_dataset(write(tmp_path, "id,image,group", "007,a.png,1", "8,b.png,2"))
    assert dataset.ids.tolist() == ["007", "8"]
    pd.DataFrame({"id": [1, 2], "text": ["x", "y"], "group": [1.0, None]}).to_parquet(tmp_path / "t.parquet")
    dataset = open_dataset(f"table:{tmp_path}/t.parquet")
    assert dataset.ids.tolist() == ["1", "2"] and dataset.groups.tolist() == ["1", "2"]


def test_parquet__floating_point_numbers_beyond_whole_ones_are_text_too(tmp_path):
    columns = {"text": pa.array(["x", "y"]), "group": pa.array([1e20, -(2.0**63)]), "view": pa.array([2.0**62, None])}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    dataset = open_dataset(f"table:{tmp_path}/t.parquet")
    assert [float(group) for group in dataset.groups] == columns["group"].to_pylist()
    assert dataset.samples["view"].tolist() == [str(2**62), ""]


def test_parquet__long_whole_numbers_keep_every_digit_beside_blanks(tmp_path):
    """Beyond 2^53 pandas would round them, and two patients would become one."""
    columns = {
        "text": pa.array(["x", "y", "z"]),
        "group": pa.array([2**60 + 1, 2**60 + 2, None]),
        "series": pa.array([2**64 - 1, 2**64 - 2, None], pa.uint64()),
        "age": pa.array([3, None, 5]),
    }
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    dataset = open_dataset(f"table:{tmp_path}/t.parquet", view="series")
    assert dataset.groups.tolist() == [str(2**60 + 1), str(2**60 + 2), "row-2"]
    assert dataset.samples["view"].tolist() == [str(2**64 - 1), str(2**64 - 2), ""]
    assert dataset.samples["age"].dtype == np.float64


def test_texts_without_images(tmp_path):
    dataset = open_dataset(write(tmp_path, "report", "One.", "Two."))
    assert dataset.ids.tolist() == ["row-0", "row-1"] and dataset.samples["uri"].tolist() == ["", ""]
    with pytest.raises(ImageError, match="has no image"):
        dataset.reader.read("")


def test_boxes_are_matched_by_path_name_or_stem(table, tmp_path):
    (tmp_path / "boxes.csv").write_text(
        "image_path,label,x,y,width,height\na.png,Lung_Opacity,1,2,3,4\nb,Pneumonia,1,2,3,4\nz.png,Pneumonia,1,2,3,4\n"
    )
    dataset = open_dataset(table, boxes="boxes.csv", label_map={"Lung_Opacity": "Pneumonia"})
    assert dataset.annotations.sample_ids("Pneumonia") == ["a.png", "b.png"]
    with pytest.raises(UsageError, match="label_map renames the labels of boxes, but neither"):
        open_dataset(table, label_map="a:b")


BAD = {
    "named column absent": ({"labels": ["Edema", "Fractur"]}, r"no column 'Fractur'; nearest: Fracture"),
    "image column absent": ({"image": "file"}, r"no column 'file'"),
    "text column absent": ({"text": ["findings", "impresion"]}, r"no column 'impresion'; nearest: impression"),
    "unknown label name": (
        {"labels": "names", "label_names": ["Edema", "Fractures"]},
        r"line 2, .*unknown label 'Mass'",
    ),
    "labels that are words": ({"labels": ["Edema", "view"]}, r"line 2, column 'view': 'PA' is not a finite number"),
    "labels that are sizes": ({"labels": ["Edema", "width"]}, r"line 2, column 'width': 10 is no label; 1 is positive"),
    "ids twice": ({"id": "view"}, r"table.csv line 2 and line 4, column 'view': the id 'PA' occurs more than once"),
    "blank ids": ({"id": "patient_id"}, r"line 4, column 'patient_id': the id is blank"),
    "unknown split": ({"split": "view"}, r"line 2, column 'view': unknown split 'PA'; .*split='' ignores"),
    "group in two splits": ({"group": "view"}, r"1 groups are in more than one split.*'PA' in train and val and test"),
    "no row kept": ({"keep": {"view": "LAT"}}, r"no row of .* has view \['LAT'\]"),
    "wrong root": ({"root": "{}/empty"}, r"none of 4 images .* first 'a.png'; say which folder .* root=FOLDER"),
    "boxes outside": ({"boxes": "outside.csv"}, r"outside.csv line 2: .* reaches outside the image, which is 10 x 12"),
}


@pytest.mark.parametrize("case", BAD)
def test_table__says_what_is_wrong(table, tmp_path, case):
    options, message = BAD[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "outside.csv").write_text("image,label,x,y,width,height\na.png,Edema,1,2,30,4\n")
    options = {name: value.format(tmp_path) if name == "root" else value for name, value in options.items()}
    with pytest.raises(DataError, match=message):
        open_dataset(table, **options)


def test_table__that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"no table .*absent.csv"):
        open_dataset(f"table:{tmp_path}/absent.csv")
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(UsageError, match=r"must end in \.csv"):
        open_dataset(f"table:{tmp_path}/a.xlsx")
    for name, content, message in (
        ("empty.csv", b"", "cannot read the table"),
        ("rows.csv", b"image,text\n", "has no rows"),
        ("ragged.csv", b"a,b\n1,2\n1,2,3,4\n", "line 3, saw 4; check that it is a UTF-8 .csv file"),
        ("binary.csv", b"\x89PNG\xff\xfe\n", "cannot read the table"),
        ("twice.csv", b"image, image\na,b\n", "names the column 'image' more than once"),
        ("same.csv", b"image,text,text\na,b,c\n", "names the column 'text' more than once"),
        ("columns.csv", b"a,b\n1,2\n", "no column of images"),
        (
            "commas.csv",
            b"id,text\n1,Clear,\n2,Heart large, lungs clear\n",
            "line 3 has more .* ' lungs clear'",
        ),
        ("bad.parquet", b"PAR1", "cannot read the table"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_dataset(f"table:{tmp_path}/{name}")


def test_table__columns_may_end_in_numbers(tmp_path):
    dataset = open_dataset(write(tmp_path, "id,text,text.1,", "1,One,Two,"), text="text,text.1")
    assert dataset.samples["text"].tolist() == ["One Two"]


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_table__blank_cells_behind_the_last_column_do_no_harm(tmp_path, name):
    content = b"id,text\n007,One,,\n08,Two\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    dataset = open_dataset(f"table:{tmp_path}/{name}")
    assert dataset.ids.tolist() == ["007", "08"] and dataset.samples["text"].tolist() == ["One", "Two"]


def test_split_can_be_ignored(table):
    dataset = open_dataset(table, group="view", split="")
    assert set(dataset.samples["split"]) == {""}


def test_table__of_100_000_rows_opens_in_seconds(tmp_path):
    count = 100_000
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"image": [f"{row:06d}.png" for row in range(count)], "patient_id": np.arange(count) // 3})
    frame = frame.assign(**{f"label {column}": rng.integers(0, 2, count) for column in range(14)})
    frame["split"] = np.where(frame["patient_id"] % 10 == 0, "test", "train")
    frame.to_csv(tmp_path / "big.csv", index=False)
    write_png(tmp_path / "000000.png")
    start = time.process_time()
    dataset = open_dataset(f"table:{tmp_path}/big.csv", labels=[f"label {column}" for column in range(14)])
    assert dataset.labels.shape == (count, 14) and dataset.labels.sum() == frame.iloc[:, 2:16].to_numpy().sum()
    assert time.process_time() - start < 10


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_table__holds_no_python_object_a_row(tmp_path, kind):
    count = 200_000
    rows = np.arange(count)
    frame = pd.DataFrame({"image": np.char.mod("images/%07d.png", rows), "patient_id": np.char.mod("p%d", rows // 3)})
    frame["report"] = np.array(["Clear lungs.", "A mass.", ""])[rows % 3]
    frame["findings"] = np.array(["", "Edema;Mass", "Mass"])[rows % 3]
    frame["score"], frame["split"] = rows / 7, np.where(rows // 3 % 10 == 0, "test", "train")
    path = tmp_path / f"big.{kind}"
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    (tmp_path / "images").mkdir()
    write_png(tmp_path / "images" / "0000000.png")
    bytes_a_row = sum(len(line) for line in frame.astype(str).iloc[-1])

    before = pa.total_allocated_bytes()
    tracemalloc.start()
    dataset = open_dataset(f"table:{path}", labels="findings")
    of_python, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "object" not in {str(dtype) for dtype in dataset.samples.dtypes}
    # The columns twice (as read and as the engine calls them), offsets of 8 bytes, labels: nothing of an object's size.
    held = (pa.total_allocated_bytes() - before + of_python) / count
    assert held < 2 * bytes_a_row + 16 * len(dataset.samples.columns), f"{held} bytes a row"
    assert peak / count < 400
    assert dataset.labels.sum(axis=0).tolist() == [(rows % 3 == 1).sum(), (rows % 3 > 0).sum()]
    assert dataset.samples["text"].iloc[[0, 1, -1]].tolist() == ["Clear lungs.", "A mass.", "A mass."]
    part = dataset.take(rows % 2 == 1).samples
    assert part["id"].dtype == dataset.samples["id"].dtype and part["group"].iloc[1] == "p1"


def test_table__embedding_it_holds_no_python_object_a_row(tmp_path, monkeypatch):
    """Of rows whose images are known and there: what a row more costs, by the difference of two tables."""
    # What is taken at a time, made small beside the rows.
    monkeypatch.setattr(sample_scan, "NAMES_AT_ONCE", 256)
    monkeypatch.setattr(file_digest, "BLOCKS_AT_ONCE", 1)
    write_images(tmp_path / "images", range(8))
    settle()
    names = [f"images/{number:04d}.png" for number in range(8)]
    cache = Cache(tmp_path / "cache")
    peaks = {}
    for count in (8, 20_000, 60_000):
        rows = np.arange(count)
        told = {"id": np.char.mod("sample-%07d", rows), "image": np.array(names)[rows % 8], "patient_id": rows // 3}
        pd.DataFrame(told).to_parquet(tmp_path / f"{count}.parquet")
        dataset = open_dataset(f"table:{tmp_path}/{count}.parquet")
        if count == 8:
            assert cache.embed(dataset, FakeEncoder()).computed == {"image": 8}
        # As if all rows had been read before.
        scan = sample_scan.scan_dataset(dataset, load_table(tmp_path / "none"))
        keys = [key_of_bytes(dataset.reader.read(name)) for name in names]
        scan.keys[:] = np.frombuffer(b"".join(keys), np.uint8).reshape(8, 16)[rows % 8]
        scan.known[:], scan.scanned[:] = True, time.time_ns()
        save_table(cache.storage, dataset.name, dataset, scan)
        tracemalloc.start()
        done = Cache(tmp_path / "cache").embed(dataset, FakeEncoder())
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert done.reused == {"image": count} and done.opened == 0 and not len(done.failures)
    # Key, fingerprint and time are 57 bytes and some of them are there twice for a while: 222. With a text a row, 445.
    cost = (peaks[60_000] - peaks[20_000]) / 40_000
    assert cost < 300, f"{cost} bytes a row"


def test_parquet__bytes_are_not_read_and_lists_are_no_text(tmp_path, caplog):
    columns = {
        "image": pa.array(["a.png", "b.png"]),
        "content": pa.array([b"x" * 100, b"y"]),
        "file": pa.array([{"bytes": b"z", "path": "a.png"}] * 2),
        "kind": pa.array(["PA", "AP"]).dictionary_encode(),
        "scores": pa.array([[1.0, 2.0], []]),
        "price": pa.array([Decimal("1.5"), None]),
    }
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    write_png(tmp_path / "a.png")
    with caplog.at_level("WARNING"):
        dataset = open_dataset(f"table:{tmp_path}/t.parquet", view="kind")
    assert "columns ['content', 'file'] hold bytes and are not read" in caplog.text
    assert dataset.samples["view"].tolist() == ["PA", "AP"]
    assert set(dataset.samples) >= {"scores", "price"}
    assert "object" not in {str(dtype) for dtype in dataset.samples.dtypes}
    with pytest.raises(DataError, match=r"column 'scores' holds list<.*, not text"):
        open_dataset(f"table:{tmp_path}/t.parquet", text="scores")
    with pytest.raises(DataError, match=r"column 'scores' holds list<.*, not text"):
        open_dataset(f"table:{tmp_path}/t.parquet", labels=["scores"])


def test_table__of_real_radiographs_with_boxes():
    manifest = shared_data("data/nih-cxr-subset/manifest.csv")
    dataset = open_dataset(
        f"table:{manifest}", labels="labels", boxes="boxes.csv", label_map={"Lung_Opacity": "Pneumonia"}
    )
    assert len(dataset) == 654 and len(set(dataset.groups)) == 443
    assert dataset.labels[:, dataset.label_position("Pneumonia")].sum() == 329
    assert len(dataset.annotations.sample_ids()) == 106
    assert set(dataset.annotations.sample_ids()) <= set(dataset.ids)
    assert apply_split(dataset).samples["split"].value_counts().to_dict() == {"train": 396, "test": 159, "val": 99}
    columns = open_dataset(f"table:{manifest}", labels=[name for name in dataset.label_names if name != "No Finding"])
    keep = [column for column, name in enumerate(dataset.label_names) if name != "No Finding"]
    np.testing.assert_array_equal(columns.labels, dataset.labels[:, keep])


def test_table__of_texts_and_images():
    manifest = shared_data("data/covid-cxr-text/manifest.csv")
    dataset = open_dataset(f"table:{manifest}?labels=labels&group=case_group&boxes=lung_boxes.csv")
    assert (dataset.samples["text"] != "").sum() == 69
    assert dataset.annotations.labels == ("Right_Lung", "Left_Lung")
