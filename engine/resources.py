"""Files that fluoroscope ships: study configs and the demo model's folder.

One function finds them from a checkout, an editable install and a wheel: in the first two they lie in the top-level
``configs/`` folder beside the packages, in a wheel in ``engine/shipped/configs`` (``setup.cfg`` maps one to the other).
"""

from __future__ import annotations

from pathlib import Path

from engine.errors import UsageError

_PACKAGE = Path(__file__).resolve().parent
_ROOTS = (_PACKAGE.parent, _PACKAGE / "shipped")


def resource(relative: str) -> Path:
    """Return the path of a shipped file or folder.

    Parameters
    ----------
    relative : str
        With forward slashes, such as ``configs/demo.yaml`` or ``configs/phantom-clip``.

    Raises
    ------
    UsageError
        Nothing of that name is shipped, or the name leads out of the shipped files.
    """
    parts = Path(relative).parts
    if not parts or parts[0] != "configs" or ".." in parts:
        raise UsageError(f"{relative!r} is not a shipped file; their names start with 'configs/'")
    for root in _ROOTS:
        path = root.joinpath(*parts)
        if _is_ours(root) and path.exists():
            return path
    known = ", ".join(shipped_configs()) or "none"
    raise UsageError(f"nothing called {relative!r} is shipped; shipped configs: {known}")


def shipped_configs() -> list[str]:
    """Return the names of the shipped study configs, without ``.yaml``."""
    for root in _ROOTS:
        if _is_ours(root) and (root / "configs").is_dir():
            return sorted(path.stem for path in (root / "configs").glob("*.yaml"))
    return []


def _is_ours(root: Path) -> bool:
    """Tell a checkout from a site-packages folder in which a stranger's ``configs`` may lie beside ``engine``."""
    return root.name == "shipped" or (root / "setup.cfg").is_file()
