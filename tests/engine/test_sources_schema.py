"""Schema strings: taken apart, and what is said of those that cannot be read."""

import pytest

from engine.errors import UsageError
from engine.sources import open_dataset
from engine.sources.schema import as_flag, as_integer, as_mapping, as_names, as_number, dataset_name, parse_schema


@pytest.mark.parametrize(
    ("schema", "kind", "path", "options"),
    [
        ("folder:/data/x", "folder", "/data/x", {}),
        ("phantom:2000?seed=1&size=64", "phantom", "2000", {"seed": "1", "size": "64"}),
        ("table:a.csv?group=&text=a%20b,c", "table", "a.csv", {"group": "", "text": "a b,c"}),
        ("folder:C:/data", "folder", "C:/data", {}),
    ],
)
def test_parse_schema(schema, kind, path, options):
    assert parse_schema(schema) == (kind, path, options)


def test_parse_schema__a_path_with_a_question_mark_that_exists(tmp_path):
    (tmp_path / "what?").mkdir()
    assert parse_schema(f"folder:{tmp_path}/what?").path == f"{tmp_path}/what?"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("", r"has no colon; say its kind first, such as folder:PATH"),
        ("nowhere", r"'nowhere' has no colon"),
        ("fodler:/x", r"unknown kind 'fodler' .*nearest: folder"),
        ("webdataset:/x", r"unknown kind 'webdataset'.*folder, table, tar, iu-xray, phantom"),
        ("folder:", r"names nothing after the colon"),
        ("phantom:10?seed", r"cannot read the options 'seed'"),
        ("phantom:10?sead=1", r"no option 'sead'.*nearest: seed"),
        ("phantom:ten", r"N='ten' must be a whole number of 1 or more"),
        ("phantom:10?seed=-1", r"seed='-1' must be a whole number of 0 or more"),
        ("phantom:10?size=4", r"size='4' must be from 64"),
        ("phantom:10?enrich=2", r"enrich='2' must be a number from 0 to"),
    ],
)
def test_open_dataset__says_what_is_wrong(schema, message):
    with pytest.raises(UsageError, match=message):
        open_dataset(schema)


def test_open_dataset__offers_the_kind_for_a_bare_path(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'folder:"):
        open_dataset(str(tmp_path))
    (tmp_path / "a.csv").touch()
    with pytest.raises(UsageError, match="did you mean 'table:"):
        open_dataset(str(tmp_path / "a.csv"))


def test_open_dataset__keywords_win_over_the_string():
    dataset = open_dataset("phantom:3?seed=1&size=64", seed=2, size=None)
    assert dataset.samples["uri"][0].startswith("phantom:seed=2&size=64")


def test_options():
    assert as_names("a, b,,c") == ["a", "b", "c"] == as_names(("a", "b", "c"))
    assert as_mapping("keep", "a:1, b:2") == {"a": "1", "b": "2"} and as_mapping("keep", None) == {}
    assert as_flag("x", "Yes") and not as_flag("x", False)
    with pytest.raises(UsageError, match="'a' has no colon"):
        as_mapping("keep", "a")
    with pytest.raises(UsageError, match="neither true nor false"):
        as_flag("x", "perhaps")
    with pytest.raises(UsageError, match="whole number"):
        as_integer("x", "1.5")
    with pytest.raises(UsageError, match="from 0 to 1"):
        as_number("x", "nan", 0, 1)


def test_dataset_name__is_short_safe_and_tells_options_apart():
    name = dataset_name("table", "/data/My images (2)/manifest.final.csv", keep="a:b")
    assert name.startswith("table-manifest.final-") and "/" not in name and " " not in name
    assert name != dataset_name("table", "/data/My images (2)/manifest.final.csv")
    assert name != dataset_name("table", "/other/manifest.final.csv", keep="a:b")
