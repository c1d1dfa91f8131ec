"""Several files by one string: ``a-{000..099}.tar``, ``{train,val}.tar``, ``*.tar``, a folder, or a list with commas.

A string comes in, local or a URL; the files that it names go out, in its order (those of ``*`` and of a folder sorted).
"""

from __future__ import annotations

import glob
import itertools
import os
import re
from fnmatch import fnmatchcase

from engine.errors import UsageError
from engine.remote_files import is_url, join, last_part, list_files, local_path, parent

MOST = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")


def expand_braces(pattern: str) -> list[str]:
    """Return what a pattern with ``{000..099}`` and ``{a,b}`` stands for; leading zeros are kept.

    Examples
    --------
    >>> expand_braces("{a,b}-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar', 'b-09.tar', 'b-10.tar']
    """
    pieces = [_choices(part, pattern) if number % 2 else [part] for number, part in enumerate(_BRACES.split(pattern))]
    count = 1
    for choices in pieces:
        count *= len(choices)
    if count > MOST:
        raise UsageError(f"{pattern!r} stands for {count:,} files, more than {MOST:,}; is a range mistyped?")
    return ["".join(chosen) for chosen in itertools.product(*pieces)]


def _choices(inner: str, pattern: str) -> list[str]:
    found = _RANGE.fullmatch(inner)
    if found is None:
        if "," not in inner:
            raise UsageError(f"{pattern!r}: {{{inner}}} is no range; write {{000..099}} or {{a,b}}")
        return inner.split(",")
    first, last = found.groups()
    step = 1 if int(first) <= int(last) else -1
    if abs(int(last) - int(first)) >= MOST:
        raise UsageError(f"{pattern!r}: the range {{{inner}}} is longer than {MOST:,}; is it mistyped?")
    padded = any(len(end.lstrip("-")) > 1 and end.lstrip("-").startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]


def expand_files(pattern: str, suffix: str) -> list[str]:
    """Return the files that a pattern names.

    Parameters
    ----------
    pattern : str
        Paths or URLs with braces, ``*`` in local paths or in a URL's last part, a local folder (all its files of the
        suffix), or several of these with commas between them.
    suffix : str
        Such as ``.tar``.

    Raises
    ------
    UsageError
        A part that names nothing, a local file that is absent, or a file twice.
    """
    if os.path.isfile(pattern):
        return [os.path.abspath(pattern)]
    files: list[str] = []
    for part in re.split(r",(?![^{]*\})", pattern):
        for name in expand_braces(local_path(part.strip())):
            files += _matching(name, suffix) if name else []
    absent = [name for name in files if not is_url(name) and not os.path.isfile(name)]
    if absent:
        raise UsageError(f"{len(absent)} of {len(files)} files of {pattern!r} are absent, first {absent[0]!r}")
    if not files:
        raise UsageError(f"{pattern!r} names no file")
    if len(set(files)) < len(files):
        twice = next(name for number, name in enumerate(files) if name in files[:number])
        raise UsageError(f"{pattern!r} names {twice!r} more than once; name each file once")
    return files


def _matching(name: str, suffix: str) -> list[str]:
    """Return the files of one name, which may be a folder or hold a ``*``."""
    if is_url(name):
        wanted, folder = last_part(name), parent(name)
        if "*" not in wanted:
            return [name]
        found = [join(folder, file) for file in list_files(folder) if "/" not in file and fnmatchcase(file, wanted)]
    else:
        name = os.path.abspath(os.path.expanduser(name))
        if os.path.isdir(name):
            found = sorted(glob.glob(os.path.join(glob.escape(name), f"*{suffix}")))
        elif "*" in name and not os.path.exists(name):
            found = sorted(glob.glob(name))
        else:
            return [name]
    if not found:
        raise UsageError(f"no file matches {name!r}" + ("" if "*" in name else f" (files named *{suffix})"))
    return found
