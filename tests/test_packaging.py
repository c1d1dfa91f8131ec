"""setup.cfg: everything that fluoroscope ships arrives, from a checkout, an editable install and a wheel."""

import configparser
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from engine.resources import resource, shipped_configs
from engine.version import __version__

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("engine", "analysis", "jobs")

needs_setuptools = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None,
    reason="building needs setuptools and pip in this environment",
)


def shipped_files() -> list[str]:
    """Every file of configs/, the way `resource` names it."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Copy what a build reads, so that it neither sees nor leaves anything in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in (*ROOMS, "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.partial"))
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


def ask(prelude: str, question: str) -> str:
    """Run a question in a bare interpreter: no site-packages, no checkout, no environment."""
    ran = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"{prelude}\n{question}"],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


QUESTION = """
from engine.resources import resource, shipped_configs
print("|".join(shipped_configs()))
for relative in {files!r}:
    assert resource(relative).read_bytes() == open("{root}/" + relative, "rb").read(), relative
"""


def question() -> str:
    return QUESTION.format(files=shipped_files(), root=ROOT)


def test_resources_are_found_in_the_checkout():
    for relative in shipped_files():
        assert resource(relative) == ROOT / relative


@needs_setuptools
def test_resources_are_found_in_an_installed_wheel(source, tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(source)]
    ran = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (wheel,) = tmp_path.glob("fluoroscope-*.whl")
    assert wheel.name == f"fluoroscope-{__version__}-py3-none-any.whl"
    target = tmp_path / "installed"
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    ran = subprocess.run(install, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    answer = ask(f"import sys; sys.path.insert(0, {str(target)!r})", question())
    assert answer.split("|") == shipped_configs() or not shipped_configs()
    assert (target / "analysis" / "templates" / "report.html.j2").is_file()
    assert not (target / "configs").exists(), "a top-level package called configs would collide with other projects"
    with zipfile.ZipFile(wheel) as archive:
        scripts = archive.read(f"fluoroscope-{__version__}.dist-info/entry_points.txt").decode()
    assert "fluoro = jobs.cli:main" in scripts


@needs_setuptools
def test_resources_are_found_in_an_editable_install(source, tmp_path):
    build = f"from setuptools.build_meta import build_editable; print(build_editable({str(tmp_path)!r}))"
    ran = subprocess.run([sys.executable, "-c", build], capture_output=True, text=True, cwd=source, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (wheel,) = tmp_path.glob("fluoroscope-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    answer = ask(f"import site; site.addsitedir({str(tmp_path / 'installed')!r})", question())
    assert answer.split("|") == shipped_configs() or not shipped_configs()


def test_every_package_is_named_in_setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    named = set(parser["options"]["packages"].split()) - {"engine.shipped.configs"}
    found = {
        ".".join(path.parent.relative_to(ROOT).parts) for room in ROOMS for path in (ROOT / room).rglob("__init__.py")
    }
    assert named == found


def test_nothing_but_shipped_names_is_a_resource():
    from engine.errors import UsageError

    for name in ("setup.cfg", "configs/../setup.cfg", "", "configs/nothing.yaml"):
        with pytest.raises(UsageError, match="shipped"):
            resource(name)
