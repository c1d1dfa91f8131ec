"""The plan of the house, held: imports go one way, start-up stays light, code is documented and keeps its manners."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("engine", "analysis", "jobs")
MAY_IMPORT = {"engine": {"engine"}, "analysis": {"analysis", "engine"}, "jobs": {"jobs", "analysis", "engine"}}
HEAVY = {
    "torch", "torchvision", "open_clip", "transformers", "timm", "faiss", "zarr", "sklearn", "scipy", "pandas", "numpy",
    "matplotlib", "pydantic", "yaml", "rich", "dask", "distributed", "pyarrow", "cv2", "PIL", "pytorch_grad_cam",
}  # fmt: skip
LIGHT_FILES = ("jobs/cli.py", *(f"jobs/commands/{name}.py" for name in ("catalogue", "group", "options", "verb")))
# Written in pieces, so that this file does not break its own rule.
UNWANTED = ("/wo" + "rk/", "../sha" + "red", "assis" + "tant", "pypi." + "org", "anthro" + "pic", "clau" + "de")


def sources() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(nodes: Iterator[ast.AST] | list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of every import among some nodes."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield node.lineno, node.module or ""


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_imports_go_from_jobs_to_analysis_to_engine(path):
    room = path.relative_to(ROOT).parts[0]
    wrong = [
        f"{name_of(path)}:{line} imports {name}"
        for line, name in imported(ast.walk(tree(path)))
        if name.split(".")[0] in {*ROOMS, "tests", "benchmarks"} - MAY_IMPORT[room]
    ]
    assert not wrong


def test_what_starts_with_the_command_line_imports_nothing_heavy():
    light = [ROOT / name for name in LIGHT_FILES] + [path for path in sources() if path.name == "__init__.py"]
    wrong = [
        f"{name_of(path)}:{line} imports {name}"
        for path in light
        for line, name in imported(tree(path).body)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield public functions and classes, and the public methods of public classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, f"{prefix}{child.name}.")


def test_every_module_function_and_class_says_what_it_is():
    silent = []
    for path in sources():
        module = tree(path)
        if not ast.get_docstring(module):
            silent.append(name_of(path))
        for name, node in definitions(module):
            overloaded = any("setter" in ast.dump(each) or "overload" in ast.dump(each) for each in node.decorator_list)
            if not ast.get_docstring(node) and not overloaded:
                silent.append(f"{name_of(path)}:{node.lineno} {name}")
    assert not silent


def test_library_code_neither_prints_nor_swallows_errors():
    wrong = []
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                wrong.append(f"{name_of(path)}:{node.lineno} prints")
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                wrong.append(f"{name_of(path)}:{node.lineno} has a bare except")
    assert not wrong


def tracked_texts() -> Iterator[tuple[str, str]]:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        try:
            yield name, (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def test_no_file_names_places_or_tools_of_the_writers():
    pattern = re.compile("|".join(map(re.escape, UNWANTED)), re.IGNORECASE)
    wrong = [
        f"{name}:{text.count(chr(10), 0, found.start()) + 1} has {found[0]!r}"
        for name, text in tracked_texts()
        for found in pattern.finditer(text)
    ]
    assert not wrong
