"""jobs/config.py: one config from YAML, options and --set, and errors a person can act on."""

from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field

from engine.errors import UsageError
from jobs.config import JobConfig, find_config, known_keys, load_config, parse_pairs, save_config


class Split(JobConfig):
    how: Literal["given", "study", "grouped"] = "given"
    seed: int = 0
    fractions: tuple[float, ...] = (0.7, 0.15, 0.15)


class Setting(JobConfig):
    name: str
    rate: float = 1e-4


class Config(JobConfig):
    dataset: str
    root: Path | None = None
    batch_size: int | Literal["auto"] = "auto"
    workers: int = Field(0, ge=0)
    tags: list[str] = []
    text: str = ""
    normalize: bool = True
    split: Split = Split()
    settings: list[Setting] = []
    data: dict[str, object] = {}


@pytest.fixture
def write(tmp_path):
    def _write(text: str) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return path

    return _write


def message(*args, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(Config, *args, **kwargs)
    return str(caught.value)


def test_three_doors_give_the_same_config(write):
    from_file = load_config(Config, write("dataset: phantom:10\nworkers: 2\nsplit: {how: grouped, seed: 7}\n"))
    from_set = load_config(Config, None, ["dataset=phantom:10", "workers=2", "split.how=grouped", "split.seed=7"])
    from_python = Config(dataset="phantom:10", workers=2, split=Split(how="grouped", seed=7))
    assert from_file == from_set == from_python


def test_overrides_win_over_options_and_options_over_the_file(write):
    path = write("dataset: a\nworkers: 1\nsplit: {seed: 1}\n")
    config = load_config(Config, path, ["split.seed=3"], {"workers": 2, "split.seed": 2, "text": None})
    assert (config.dataset, config.workers, config.split.seed, config.text) == ("a", 2, 3, "")


@pytest.mark.parametrize(
    ("pair", "key", "value"),
    [
        ("workers=3", "workers", 3),
        ("batch_size=auto", "batch_size", "auto"),
        ("batch_size=16", "batch_size", 16),
        ("text=012", "text", "012"),
        ("text=no", "text", "no"),
        ("text='quoted text'", "text", "quoted text"),
        ("text=a=b", "text", "a=b"),
        ("text=", "text", ""),
        ("normalize=false", "normalize", False),
        ("tags=[a, b]", "tags", ["a", "b"]),
        ("root=null", "root", None),
    ],
)
def test_values_of_set_are_read_by_the_type_of_the_field(pair, key, value):
    assert getattr(load_config(Config, {"dataset": "x"}, [pair]), key) == value


def test_scientific_notation_is_a_number(write):
    config = load_config(Config, write("dataset: x\nsettings:\n- {name: probe, rate: 1e-3}\ndata: {tol: 1e-8}\n"))
    assert config.settings[0].rate == 1e-3
    assert config.data["tol"] == 1e-8


def test_home_is_expanded_in_paths(write):
    assert load_config(Config, write("dataset: x\nroot: ~/images\n")).root == Path.home() / "images"


def test_save_and_load_give_the_same_config(tmp_path):
    config = Config(dataset="Ünï", root=Path("/data"), settings=[Setting(name="1"), Setting(name="no", rate=1e-5)])
    save_config(config, tmp_path / "deep" / "config.yaml")
    assert load_config(Config, tmp_path / "deep" / "config.yaml") == config


def test_unknown_key_names_the_file_the_line_and_the_nearest(write):
    text = message(write("dataset: x\nsplit:\n  seeds: 3\n"))
    assert "job.yaml, line 3" in text
    assert "unknown key 'split.seeds'; did you mean 'split.seed'?" in text


def test_unknown_key_on_the_command_line():
    text = message(None, ["dataset=x", "wrokers=3"])
    assert text == "the command line: unknown key 'wrokers'; did you mean 'workers'?"


def test_unknown_key_in_another_case_is_the_nearest():
    assert "did you mean 'split.how'? Upper and lower case count" in message({"dataset": "x", "split": {"HOW": 1}})
    assert "did you mean 'split.fractions'?" in message({"dataset": "x", "split": {"FRACTION": 1}})
    assert "did you mean 'split.fractions'?" in message({"dataset": "x", "Fractions": [1]})


def test_unknown_key_that_lives_in_another_section():
    assert "did you mean 'split.fractions'?" in message({"dataset": "x", "fractions": [1]})


def test_unknown_key_without_a_near_one_lists_those_there_are():
    assert "known keys here: how, seed, fractions" in message({"dataset": "x", "split": {"zzz": 1}})


def test_unknown_key_in_a_list_of_sections(write):
    text = message(write("dataset: x\nsettings:\n- name: a\n- nam: b\n"))
    assert "line 4: unknown key 'settings[1].nam'; did you mean 'settings.name'?" in text
    assert "'settings[1].name' is required" in text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"workers": "many"}, "'workers' must be a whole number, not 'many'"),
        ({"workers": 1.5}, "'workers' must be a whole number, not 1.5"),
        ({"workers": -1}, "'workers' must be greater than or equal to 0, not -1"),
        ({"normalize": "perhaps"}, "'normalize' must be true or false, not 'perhaps'"),
        ({"tags": "one"}, "'tags' must be a list, not 'one'"),
        ({"split": 3}, "'split' must be a section of keys and values, not 3"),
        ({"split": {"how": "group"}}, "'split.how' must be one of 'given', 'study' or 'grouped', not 'group'; did you"),
        ({"batch_size": "big"}, "'batch_size' must be a whole number or must be one of 'auto', not 'big'"),
        ({"text": ["a"]}, "'text' must be a text, not ['a']"),
    ],
)
def test_wrong_values_are_explained_in_plain_words(values, expected):
    assert expected in message({"dataset": "x", **values})


def test_missing_value_names_the_next_step():
    assert "'dataset' is required and not given; give --set dataset=VALUE, or add it to the config file" in message({})
    assert "not given; give DATASET, or add" in message({}, spelled={"dataset": "DATASET"})


def test_all_mistakes_are_told_at_once(write):
    text = message(write("wrkers: 1\nworkers: x\n"))
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1, 2\n", "not valid YAML"),
        ("- a\n- b\n", "a config is a mapping of keys to values, not a list"),
        ("dataset: a\nworkers: 1\ndataset: b\n", "line 3: not valid YAML: the key 'dataset' stands here a second time"),
        ("dataset: !!python/object:os.system x\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_config(write, text, expected):
    assert expected in message(write(text))


def test_set_without_equals_and_set_through_a_value():
    assert "is not of the form key=value" in message({"dataset": "x"}, ["workers"])
    assert "'dataset' is a text, not a section" in message({"dataset": "x"}, ["dataset.root=3"])


def test_no_such_config_file(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        find_config(tmp_path / "nothing.yaml")
    with pytest.raises(UsageError, match="is a folder"):
        find_config(tmp_path)


def test_known_keys_are_dotted():
    assert "split.seed" in known_keys(Config) and "settings.rate" in known_keys(Config)


def test_pairs_of_data_options():
    assert parse_pairs(["size=256", "labels=[a]", "root=/x"]) == {"size": 256, "labels": ["a"], "root": "/x"}


def test_saved_config_is_plain_yaml(tmp_path):
    save_config(Config(dataset="x"), tmp_path / "c.yaml")
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["split"]["fractions"] == [0.7, 0.15, 0.15]
