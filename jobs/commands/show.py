"""A job's result for a person or, with ``--json``, for a program.

Comes in: the result object of any verb. It may bring ``tables()`` (title -> DataFrame) and ``lines()`` (sentences,
shown below); else its plain fields are shown one a line. Goes out: standard output, and the exit status: 3 where
samples failed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sized
from typing import Any

from jobs.plain import plain

DONE, DONE_WITH_FAILURES = 0, 3
FAILURES_SHOWN = 5
WIDTH_OF_A_PIPE = 200


def show(result: Any, as_json: bool) -> int:
    """Print a result and return the exit status."""
    failures = failed_samples(result)
    if as_json:
        sys.stdout.write(json.dumps(plain(result), indent=1, ensure_ascii=False) + "\n")
    else:
        _show_text(result)
    if failures:
        _show_failures(result, failures)
    return DONE_WITH_FAILURES if failures else getattr(result, "exit_status", DONE)


def failed_samples(result: Any) -> int:
    """Return how many samples a result says have failed."""
    failures = getattr(result, "failures", None)
    if isinstance(failures, int):
        return failures
    return len(failures) if isinstance(failures, Sized) else 0


def _show_text(result: Any) -> None:
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=WIDTH_OF_A_PIPE)
    lines = result.lines() if hasattr(result, "lines") else None
    tables = result.tables() if hasattr(result, "tables") else {}
    if lines is None and not tables:
        lines = _fields(plain(result))
    for title, table in tables.items():
        console.print(table_of(title, table))
    for line in lines or ():
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def table_of(title: str, frame: Any) -> Any:
    """Return a DataFrame as a rich table: numbers to the right, three decimals, blanks for what is not there."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
    for column in frame.columns:
        table.add_column(str(column), justify="right" if frame[column].dtype.kind in "iuf" else "left")
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(_cell(value)) for value in row))
    return table


def _cell(value: Any) -> str:
    value = plain(value)
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def _fields(values: Any, indent: str = "") -> list[str]:
    if not isinstance(values, Mapping):
        return [f"{indent}{values}"]
    width = max((len(key) for key in values), default=0)
    lines: list[str] = []
    for key, value in values.items():
        name = key.replace("_", " ")
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{name}", *_fields(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines.append(f"{indent}{name}")
            for item in value:
                lines.append(f"{indent}  " + "  ".join(f"{part}={_cell(entry)}" for part, entry in item.items()))
        else:
            lines.append(f"{indent}{name:<{width}}  {_cell(value)}")
    return lines


def _show_failures(result: Any, count: int) -> None:
    sys.stderr.write(f"{count:,} {'sample' if count == 1 else 'samples'} failed; everything else is done\n")
    failures: Any = getattr(result, "failures", None)
    if hasattr(failures, "head") and hasattr(failures, "itertuples"):
        for row in failures.head(FAILURES_SHOWN).to_dict("records"):
            sys.stderr.write(f"  {row.get('id', '')} ({row.get('uri', '')}): {row.get('reason', '')}\n")
        if count > FAILURES_SHOWN:
            sys.stderr.write(f"  and {count - FAILURES_SHOWN:,} more\n")
