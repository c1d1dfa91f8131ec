"""jobs/cli.py: quick help, one clear message an error, exit statuses, and options that fit the configs."""

import importlib
import inspect
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pandas as pd
import pytest
from pydantic import BaseModel

from engine.errors import CacheError, UsageError
from engine.version import __version__
from jobs import cli
from jobs.commands.catalogue import GROUPS, VERBS
from jobs.commands.verb import key_of
from jobs.config import JobConfig, known_keys
from jobs.runs import open_run

ROOT = Path(__file__).resolve().parent.parent.parent
HEAVY = ["torch", "numpy", "pandas", "pydantic", "yaml", "rich", "zarr", "faiss", "sklearn", "open_clip", "matplotlib"]


def command_of(path: str) -> click.Command:
    module, _, attribute = VERBS[path].target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def fluoro(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from jobs.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, **options)


@pytest.fixture
def doctor(monkeypatch):
    """Replace what `fluoro doctor` runs."""
    import jobs.doctor

    def replace(run):
        monkeypatch.setattr(jobs.doctor, "run", run)

    return replace


def raising(error: BaseException):
    def run(config):
        raise error

    return run


def test_embed_opens_its_data_and_begins_to_hash_weights_before_torch_is_imported():
    script = "import sys, jobs.embed, engine.sources.folder; print({'torch', 'open_clip'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("module", ["jobs.cache_export", "jobs.cache_import", "jobs.index", "jobs.cache"])
def test_verbs_that_copy_rows_do_not_import_torch(module):
    script = f"import sys, {module}; print({{'torch', 'open_clip'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout == "set()\n", done.stderr


# -- Help ------------------------------------------------------------------------------------------------------------


def test_help_takes_less_than_half_a_second():
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert fluoro("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: what a busy machine does beside does not count.
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


def test_no_help_imports_anything_heavy():
    code = (
        "import sys; from jobs.cli import run\n"
        f"for path in {list(VERBS)!r}: assert run([*path.split(), '--help']) == 0, path\n"
        "run(['--help'])\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]; sys.exit(str(heavy) if heavy else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ran.returncode == 0, ran.stderr


def test_help_shows_verbs_in_groups_with_examples(capsys):
    assert cli.run(["--help"]) == 0
    text = capsys.readouterr().out
    for title, verbs in GROUPS.items():
        assert f"\n{title}:\n" in text
        for verb in verbs:
            assert f"  {verb.path} " in text and verb.summary in text
    assert "fluoro study configs/demo.yaml --out runs/demo" in text
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("path", VERBS)
def test_each_verb_has_help_an_example_and_json(path, capsys):
    assert cli.run([*path.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert VERBS[path].example in text
    for option in ("--json", "--quiet", "--debug", "--set"):
        assert option in text
    assert len(VERBS[path].summary) <= 50, "a summary fits on its line of 80 columns"


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"fluoro {__version__}\n"


@pytest.mark.parametrize("path", VERBS)
def test_options_fit_the_config_and_the_run_function(path):
    """An option whose key neither the config nor run() knows would fail only when somebody gives it."""
    command = command_of(path)
    module_name, config_name, run_name = command.job
    module = importlib.import_module(module_name)
    known = {*known_keys(getattr(module, config_name)), *inspect.signature(getattr(module, run_name)).parameters}
    common = {"config_file", "overrides", "as_json", "quiet", "debug", "data"}
    assert {key_of(parameter.name) for parameter in command.params} - common <= known


@pytest.mark.parametrize("path", VERBS)
def test_configs_describe_their_keys(path):
    module_name, config_name, _ = command_of(path).job
    config_class = getattr(importlib.import_module(module_name), config_name)
    assert issubclass(config_class, BaseModel)
    nameless = [name for name, field in config_class.model_fields.items() if not field.description]
    sections = [name for name in nameless if any(key.startswith(f"{name}.") for key in known_keys(config_class))]
    assert set(nameless) <= {*sections, "seed", "title", "subtitle", "batch_size", "threads", "protocols"}


# -- Wrong usage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["embd"], "fluoro embed"),
        (["studdy", "x"], "fluoro study"),
        (["ls"], "fluoro cache ls"),
        (["cache", "verfy"], "fluoro cache verify"),
        (["dataset-info", "x"], "fluoro dataset info"),
        (["zero-shot"], "fluoro zeroshot"),
    ],
)
def test_an_unknown_verb_offers_the_nearest(arguments, meant, capsys):
    assert cli.run(arguments) == 2
    assert f"did you mean '{meant}'?" in capsys.readouterr().err


def test_an_unknown_verb_without_a_near_one_points_to_the_list(capsys):
    assert cli.run(["xylophone"]) == 2
    assert "'fluoro --help' lists all verbs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["embed"], "Missing argument 'DATASET'"),
        (["embed", "x", "--modl", "y"], "--model"),
        (["doctor", "--set", "cach=1"], "unknown key 'cach'; did you mean 'cache'?"),
        (["doctor", "--set", "cache"], "is not of the form key=value"),
        (["study", "nowhere.yaml"], "config 'nowhere.yaml' does not exist"),
        (["report", "nowhere"], "nowhere"),
        (["search", "folder:x", "--text", "a", "dog"], "too many arguments: dog; a value with blanks needs quotes"),
        (
            ["embed", *(f"tar:/data/{number:03d}.tar" for number in range(5)), "--model", "m"],
            "got 5 data sets where one is wanted: tar:/data/000.tar tar:/data/001.tar tar:/data/002.tar "
            "tar:/data/003.tar ...; the shell has made them of one pattern, so put that in quotes, such as "
            "'tar:shard-{000..099}.tar'",
        ),
    ],
)
def test_wrong_usage_is_status_2_and_one_message(arguments, said, capsys):
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and captured.out == ""


# -- Ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (CacheError("the cache '/x' was written by a newer version; update fluoroscope"), 1, "error: the cache '/x'"),
        (UsageError("no such layer 'z'"), 2, "error: no such layer 'z'"),
        (OSError(28, "No space left on device", "/cache/image"), 1, "error: No space left on device: /cache/image"),
        (MemoryError(), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_an_error_is_one_message_and_its_status(error, status, said, doctor, capsys):
    doctor(raising(error))
    assert cli.run(["doctor", "--quiet"]) == status
    text = capsys.readouterr().err
    assert said in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ({}, "the same command with --overwrite goes on from there"),
        ({"overwrite": True}, "the same command goes on from there"),
        ({"out": None}, "the same command goes on from there"),
        ({"resume": False}, "`fluoro study --resume --out 'a run'` goes on from there"),
    ],
)
def test_a_stopped_run_tells_how_it_is_gone_on_with(options, way, doctor, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def stopped(config):
        with open_run("study", JobConfig(), cache=tmp_path / "cache", **{"out": Path("a run"), **options}):
            raise KeyboardInterrupt

    doctor(stopped)
    assert cli.run(["doctor", "--quiet"]) == 130
    assert capsys.readouterr().err.strip() == f"stopped; what was stored so far is kept, and {way}"


def test_debug_shows_where_an_error_came_from(doctor, capsys):
    doctor(raising(CacheError("broken")))
    assert cli.run(["doctor", "--debug"]) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text and "error: broken" in text


def test_a_mistake_of_ours_shows_its_traceback(doctor, capsys):
    doctor(raising(ZeroDivisionError("oops")))
    assert cli.run(["doctor"]) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text and "mistake in fluoroscope" in text


def test_failed_samples_are_status_3_and_told(doctor, capsys):
    rows = [{"id": f"s{n}", "uri": f"{n}.png", "what": "image", "reason": "zero bytes"} for n in range(7)]
    doctor(lambda config: SimpleNamespace(failures=pd.DataFrame(rows), lines=lambda: ["done"]))
    assert cli.run(["doctor"]) == 3
    captured = capsys.readouterr()
    assert captured.out == "done\n"
    assert "7 samples failed" in captured.err and "s0 (0.png): zero bytes" in captured.err and "2 more" in captured.err


def test_json_is_all_that_standard_output_gets(doctor, capsys):
    def run(config, progress):
        with progress.step("look", total=2) as step:
            step.advance(2)
        progress.note("a remark")
        return {"answer": 42, "cache": config.cache}

    doctor(run)
    assert cli.run(["doctor", "--json", "--cache", "/tmp/c"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"answer": 42, "cache": "/tmp/c"}
    assert "look: done" in captured.err
    assert cli.run(["doctor", "--json", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_config_file_options_and_set_reach_the_job(doctor, tmp_path, capsys):
    (tmp_path / "doctor.yaml").write_text("cache: /from/file\n")
    doctor(lambda config: {"cache": config.cache})
    for arguments, expected in (
        (["--config", str(tmp_path / "doctor.yaml")], "/from/file"),
        (["--config", str(tmp_path / "doctor.yaml"), "--cache", "/from/option"], "/from/option"),
        (["--cache", "/from/option", "--set", "cache=/from/set"], "/from/set"),
    ):
        assert cli.run(["doctor", "--json", *arguments]) == 0
        assert json.loads(capsys.readouterr().out)["cache"] == expected


def test_ctrl_c_in_a_real_process_leaves_without_a_traceback(tmp_path):
    code = (
        "import os, signal, jobs.doctor\n"
        "jobs.doctor.run = lambda config: os.kill(os.getpid(), signal.SIGINT)\n"
        "from jobs.cli import main; main(['doctor'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ran.returncode == 130
    assert "stopped" in ran.stderr and "Traceback" not in ran.stderr


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -c 'from jobs.cli import main; main()' doctor --help | head -1"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ran.stdout.startswith("Usage: fluoro doctor") and "Traceback" not in ran.stderr


@pytest.mark.parametrize("arguments", [["doctor", "--help"], ["dataset", "info", "phantom:4", "--json"]])
def test_a_reader_that_has_left_makes_no_failure(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    code = f"from jobs.cli import main; main({arguments!r})"
    ran = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writing)
    assert ran.returncode == 0 and "Exception" not in ran.stderr and "Traceback" not in ran.stderr
