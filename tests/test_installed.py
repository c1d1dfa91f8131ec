"""The release: an sdist installs in an environment of its own, and a study runs there without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from tests.test_packaging import ROOT, needs_setuptools


@needs_setuptools
@pytest.mark.slow
def test_a_study_runs_from_an_sdist_installed_in_an_environment_of_its_own(tmp_path):
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "build", "dist", "runs", "shared", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignored)
    build = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"
    say([sys.executable, "-c", build], copy)
    (source,) = (copy / "dist").glob("fluoroscope-*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"docs/format.md", "CHANGELOG.md", "CITATION.cff", "tests/test_packaging.py"} <= names
    # The wheel is made of what the sdist holds, not of the checkout.
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    say([sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('dist')"], unpacked)
    (wheel,) = (unpacked / "dist").glob("fluoroscope-*.whl")
    say([sys.executable, "-m", "venv", "own"], tmp_path)
    own = tmp_path / "own/bin"
    # torch and the like are those of this environment: six gigabytes are not fetched again. No .pth in it is followed,
    # so an editable fluoroscope there is not seen.
    (found,) = (tmp_path / "own").glob("lib/python*/site-packages")
    (found / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    say([str(own / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], tmp_path)
    shutil.rmtree(copy)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    told = say([str(own / "python"), "-c", "import engine, jobs; print(engine.__file__, jobs.__file__)"], elsewhere)
    assert all(Path(file).is_relative_to(found) for file in told.split())
    sets = ("data.source=phantom:160", "replicates=200", "finetune.enabled=false", "heatmaps.per_label=1")
    options = [word for value in (*sets, "split.fractions=[0.5,0.2,0.3]") for word in ("--set", value)]
    say([str(own / "fluoro"), "study", "demo", "--cache", "cache", "--out", "run", *options], elsewhere)
    text = (elsewhere / "run/report.html").read_text()
    assert "Demo study" in text and "phantom-clip" in text


def say(command: list[str], folder: Path) -> str:
    """Run a command in a folder, without this checkout on the path, and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=900, env=environment, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.strip()
