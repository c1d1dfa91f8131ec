"""The report as Markdown: for a repository, a message, a text search; tables and sentences, no pictures.

Comes in: the page's view and sections. Goes out: text. Everything that a user wrote is escaped, so that it stays text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from analysis.report.blocks import Section
from analysis.report.tables import Table


def write_markdown(title: str, view: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """Return the report's sections as Markdown."""
    lines = [f"# {escape(title)}", ""]
    if view.get("subtitle"):
        lines += [escape(view["subtitle"]), ""]
    lines += [" · ".join(f"{escape(fact['name'])}: {escape(fact['value'])}" for fact in view["facts"]), ""]
    lines += _summary(view["summary"]) if view.get("summary") else []
    lines += [*_items(view["said"]), ""] if view.get("said") else []
    for section in sections:
        group = f" ({escape(section.group)})" if section.group.startswith("Protocol") else ""
        lines += [f"## {escape(section.title)}{group}", ""]
        lines += [escape(section.lead), ""] if section.lead else []
        for block in section.blocks:
            lines += _block(block)
    lines += [f"Made by fluoroscope {view.get('version', '')}. Research instrument; not for diagnosis.", ""]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    flat = " ".join(str(text).split())
    for sign in ("\\", "`", "*", "_", "[", "]", "<", ">", "|", "#"):
        flat = flat.replace(sign, "\\" + sign)
    return flat


def _summary(summary: Mapping[str, Any]) -> list[str]:
    lines = ["## Summary", "", escape(summary["question"]), ""]
    for part in summary["protocols"]:
        names = list(dict.fromkeys(answer.metric for line in part["lines"] for answer in line.answers))
        lines += [f"Protocol {escape(part['name'])}, test split, beside the best trivial baseline:", ""]
        lines += [_row(["setting", *names]), _row(["---"] * (1 + len(names)))]
        for line in part["lines"]:
            told = {answer.metric: answer for answer in line.answers}
            lines.append(_row([escape(line.setting), *(_answer(told.get(name)) for name in names)]))
        lines.append("")
    warnings = [*summary["warnings"], *summary["more_warnings"]]
    for title, items in (("Beware", warnings), ("What the numbers say", summary["findings"])):
        if items:
            lines += [f"**{title}**", "", *_items(items), ""]
    return lines


def _answer(answer: Any) -> str:
    if answer is None:
        return "–"
    beside = f"; {answer.beside}" if answer.beside else ""
    return escape(f"{answer.value} ({answer.interval}{beside})" if answer.interval else f"{answer.value}{beside}")


def _block(block: Any) -> list[str]:
    if isinstance(block, Table):
        return _table(block)
    if block.kind == "sentences":
        return [*_items(block.items), ""]
    if block.kind == "note":
        return [escape(block.text), ""]
    if block.kind == "heading":
        return [f"### {escape(block.text)}", ""]
    if block.kind == "facts":
        return [*_items([f"{name}: {value}" for name, value in block.items]), ""]
    if block.kind == "code":
        fence = "`" * max(3, 1 + _longest_run(block.text, "`"))
        return [fence + "text", block.text.rstrip("\n"), fence, ""]
    if block.kind == "details":
        return [f"### {escape(block.title)}", "", *(line for inner in block.blocks for line in _block(inner))]
    if block.kind == "matrix":
        return _matrix(block)
    return []


def _table(table: Table) -> list[str]:
    lines = [_row([escape(column) for column in table.columns]), _row(["---"] * len(table.columns))]
    for row in table.shown:
        cells = [f"{cell.text} ({cell.small})" if cell.small else cell.text for cell in row.cells]
        lines.append(_row([escape(text) for text in cells]))
    more = f" The first {len(table.shown)} of {len(table.rows)} rows." if table.left_out else ""
    source = f" CSV: `{table.csv}`." if table.csv else ""
    return [*lines, "", escape(table.caption + more) + source, ""]


def _matrix(matrix: Any) -> list[str]:
    lines = [_row(["", *map(escape, matrix.labels)]), _row(["---"] * (1 + len(matrix.labels)))]
    lines += [_row([escape(label), *(text for text, _ in cells)]) for label, cells in matrix.rows()]
    return [*lines, "", escape(matrix.caption), ""]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _items(items: Sequence[str]) -> Iterator[str]:
    return (f"- {escape(text)}" for text in items)


def _longest_run(text: str, sign: str) -> int:
    longest = run = 0
    for letter in text:
        run = run + 1 if letter == sign else 0
        longest = max(longest, run)
    return longest
