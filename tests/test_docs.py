"""The documentation: every verb is told, every command spelled as the command line wants it, every example runs."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import pandas as pd
import pytest

from engine.cache import Cache
from engine.encoder import load_encoder
from engine.sources import open_dataset
from jobs.cli import run as command_line
from jobs.commands.catalogue import VERBS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.S | re.M)
COMMENT = re.compile(r"\s{2,}#.*$")
INLINE = re.compile(r"(?<!`)`(fluoro [^`\n]+)`(?!`)")


class Command(NamedTuple):
    """One line of a fenced block."""

    page: str
    line: str
    runs: bool
    fails_too: bool


def commands(page: Path) -> list[Command]:
    found = []
    for kind, block in FENCE.findall(page.read_text()):
        words = kind.split()
        if not words or words[0] != "sh":
            continue
        for line in block.splitlines():
            plain = COMMENT.sub("", line).strip()
            if plain.startswith("fluoro "):
                bare = plain.removesuffix("|| true").strip()
                found.append(Command(page.name, bare, "run" in words[1:], bare != plain))
    return found


ALL = [command for page in PAGES for command in commands(page)]


def verb_of(words: list[str]) -> str:
    longer = " ".join(words[:2])
    return longer if longer in VERBS else words[0]


def test_every_verb_is_documented_with_an_example() -> None:
    text = (ROOT / "docs/verbs.md").read_text()
    headings = re.findall(r"^### fluoro (.+)$", text, re.M)
    assert sorted(headings) == sorted(VERBS)
    shown = {verb_of(shlex.split(command.line)[1:]) for command in ALL if command.page == "verbs.md"}
    assert shown == set(VERBS)


@pytest.mark.parametrize("command", ALL, ids=lambda command: f"{command.page}: {command.line[:60]}")
def test_every_command_is_spelled_as_the_command_line_wants_it(command: Command) -> None:
    words = shlex.split(command.line)[1:]
    path = verb_of(words)
    assert path in VERBS, f"there is no verb {path!r}"
    module, _, attribute = VERBS[path].target.partition(":")
    verb = getattr(importlib.import_module(module), attribute)
    context = verb.make_context(path, words[len(path.split()) :])
    asked = [parameter for parameter in verb.params if isinstance(parameter, click.Argument)]
    # What is not given may stand in a config, or in the run that is gone on with.
    configured = any(context.params.get(name) for name in ("config_file", "overrides", "resume"))
    assert configured or all(context.params[str(parameter.name)] not in (None, ()) for parameter in asked)


def test_every_command_of_dask_is_spelled_as_dask_wants_it() -> None:
    from distributed.cli import dask_scheduler, dask_worker

    lines = [
        COMMENT.sub("", line)
        for page in PAGES
        for kind, block in FENCE.findall(page.read_text())
        for line in block.splitlines()
        if kind.split()[:1] == ["sh"] and line.startswith("dask ")
    ]
    assert {line.split()[1] for line in lines} == {"scheduler", "worker"}
    for line in lines:
        _, verb, *words = shlex.split(line)
        command = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}[verb]
        context = command.make_context(verb, words)
        # What Dask does not know it hands to preloaded modules, of which there is none.
        assert not context.params["preload_argv"] and not context.args, line
        assert context.params.get("scheduler", "HOST") is not None, line


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_every_command__reaches_the_command_line_from_a_shell_as_it_is_written() -> None:
    """As typed in bash, and in shells that refuse patterns which match nothing, as zsh does; tests split by shlex."""
    inline = [line for page in PAGES for line in INLINE.findall(page.read_text())]
    lines = sorted({command.line for command in ALL} | {verb.example for verb in VERBS.values()} | set(inline))
    wrong = {}
    for line in lines:
        ran = subprocess.run(
            ["bash", "-O", "failglob", "-c", f"words=({line}); printf '%s\\0' \"${{words[@]}}\""],
            capture_output=True, text=True, env={"PATH": os.environ["PATH"], "HOME": "~"}, check=False,
        )  # fmt: skip
        words = ran.stdout.split("\0")[:-1]
        if words != shlex.split(line):
            wrong[line] = ran.stderr.strip() or words
    assert not wrong, "put the words that a shell changes in single quotes"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("format") / "cache"
    Cache(folder).embed(open_dataset("phantom:20?seed=4"), load_encoder("phantom-clip"), ["image", "text", "pixels"])
    return folder


def test_format__the_page_reads_a_cache_without_this_project(cache: Path) -> None:
    code = next(block for kind, block in FENCE.findall((ROOT / "docs/format.md").read_text()) if kind == "python")
    assert not re.search(r"import (engine|analysis|jobs)|from (engine|analysis|jobs)", code)
    read: dict = {}
    exec(compile(code, "docs/format.md", "exec"), read)  # the page's own functions
    ours = Cache(cache)
    for kind, name in ours.arrays():
        payload, keys, checks = read["read"](cache, kind, name)
        array = ours.array(kind, name)
        np.testing.assert_array_equal(payload, array.read(np.arange(len(array))))
        np.testing.assert_array_equal(read["read_raw"](cache, kind, name), payload)
        np.testing.assert_array_equal(read["checks_of"](payload, keys), checks)
    (table,) = (cache / "datasets").glob("*.parquet")
    dataset, encoder = open_dataset("phantom:20?seed=4"), load_encoder("phantom-clip")
    for kind in ("image", "text"):
        rows, samples = read["features_of"](cache, table, kind, encoder.id)
        expected = ours.features(dataset, encoder, kind)
        by_id = dict(zip(samples["id"], rows, strict=True))
        np.testing.assert_array_equal(
            np.array([by_id[name] for name in dataset.ids[expected.rows]], np.float32), expected.values
        )


def test_python__the_examples_run_one_after_another(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    known: dict = {"CACHE": tmp_path / "cache", "RUNS": tmp_path / "runs"}
    for kind, block in FENCE.findall((ROOT / "docs/python.md").read_text()):
        if kind == "python":
            exec(compile(block, "docs/python.md", "exec"), known)
    assert len(known["scores"].ids) and set(known["metrics"]["setting"]) >= {"Linear probe"}
    assert known["features"].values.shape == (120, 128)


@pytest.mark.slow
def test_verbs__the_examples_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLUOROSCOPE_CACHE", str(tmp_path / "cache"))
    ran = [command for command in ALL if command.page == "verbs.md" and command.runs]
    assert len(ran) > 30
    for command in ran:
        status = command_line(shlex.split(command.line)[1:])
        told = capsys.readouterr()
        assert status == 0 or (command.fails_too and status == 1), f"{command.line}\n{told.out}\n{told.err}"
        if "--json" in command.line:
            json.loads(told.out)
    assert len(pd.read_parquet("rows.parquet")) == 160 and len(pd.read_csv("hits.csv"))
    assert Path("runs/study/report.html").is_file() and Path("runs/study/shareable/report.html").is_file()


@pytest.mark.slow
def test_walkthrough__embeds_probes_and_looks(tmp_path: Path) -> None:
    for computed in (300, 0):
        ran = subprocess.run(
            [sys.executable, str(ROOT / "docs/walkthrough.py"), str(tmp_path), "--samples", "300"],
            capture_output=True, text=True, timeout=600, cwd=ROOT, env=_environment(), check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert f"embedded {computed} images, {300 - computed} were there, 0 failed" in ran.stdout
    assert (tmp_path / "map.png").stat().st_size > 5000 and (tmp_path / "heatmap.png").stat().st_size > 5000
    found = dict(re.findall(r"LRAP of ([\w ]+): ([\d.]+)", ran.stdout))
    assert float(found["probe"]) > float(found["Prevalence ranking"])


def _environment() -> dict[str, str]:
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{known}" if known else str(ROOT)}
