"""jobs/dataset.py: `fluoro dataset info` counts what is there, `fluoro dataset write` writes what reads back equal."""

import json

import numpy as np
import pytest

from engine.errors import UsageError
from engine.sources import open_dataset
from jobs import cli, dataset
from jobs.config import SplitOptions


def test_info_counts_phantoms():
    found = dataset.info(dataset.InfoConfig(dataset="phantom:60?seed=3", split=SplitOptions(how="grouped")))
    assert found.samples == found.images == 60
    assert sum(found.splits.values()) == 60 and set(found.splits) == {"train", "val", "test"}
    table = found.labels.set_index("label")
    assert (table[["train", "val", "test"]].sum(axis=1) == table["all"]).all()
    truth = open_dataset("phantom:60?seed=3")
    assert table["all"].tolist() == truth.labels.sum(axis=0).tolist()
    assert table.loc["No Finding", "annotated"] == 0


def test_data_options_reach_the_reader(capsys):
    assert cli.run(["dataset", "info", "phantom:8", "--data", "seed=5", "--json", "--quiet"]) == 0
    by_option = json.loads(capsys.readouterr().out)
    assert cli.run(["dataset", "info", "phantom:8?seed=5", "--json", "--quiet"]) == 0
    in_schema = json.loads(capsys.readouterr().out)
    assert by_option["labels"] == in_schema["labels"] and by_option["samples"] == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["folder:/no/such/place"], "no such folder"),
        (["phantom:8?sed=5"], "seed"),
        (["phantoms:8"], "phantom"),
        (["phantom:8", "--data", "seed"], "--data 'seed' is not of the form key=value"),
    ],
)
def test_what_cannot_be_opened_is_told_in_one_message(arguments, said, capsys):
    assert cli.run(["dataset", "info", *arguments]) in (1, 2)
    text = capsys.readouterr().err
    assert said in text and "Traceback" not in text


def test_written_phantoms_read_back(tmp_path, capsys):
    assert cli.run(["dataset", "write", "phantom:6?seed=2&size=64", str(tmp_path / "out"), "--quiet"]) == 0
    assert f"iu-xray:{tmp_path / 'out'}" in capsys.readouterr().out
    drawn, read = open_dataset("phantom:6?seed=2&size=64"), open_dataset(f"iu-xray:{tmp_path / 'out'}")
    assert drawn.ids.tolist() == read.ids.tolist()
    assert np.array_equal(drawn.labels, read.labels)


def test_write_refuses_a_full_folder_and_what_is_no_phantom(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UsageError, match="not an empty folder"):
        dataset.write(dataset.WriteConfig(dataset="phantom:2", directory=tmp_path))
    (tmp_path / "table.csv").write_text("id,image\na,a.png\n")
    (tmp_path / "a.png").touch()
    with pytest.raises(UsageError, match="only phantoms"):
        dataset.write(
            dataset.WriteConfig(dataset=f"table:{tmp_path}/table.csv?image=image&id=id", directory=tmp_path / "o")
        )
