"""A click group that knows its verbs by name and imports one only when it is called."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable

import click

from jobs.commands.catalogue import FAMILIES, FIRST_EXAMPLES, GROUPS, VERBS, Verb


class LazyGroup(click.Group):
    """A family of verbs; the one without a name is the whole command line."""

    def __init__(self, family: str = "", **attributes: object) -> None:
        super().__init__(**attributes)  # type: ignore[arg-type]
        self.family = family

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the next words that may follow."""
        return list(dict.fromkeys(self._rest(verb).split()[0] for verb in self._verbs()))

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Import one verb; make a group of a family's first word."""
        path = f"{self.family} {name}".strip()
        if path in VERBS:
            module, _, attribute = VERBS[path].target.partition(":")
            command: click.Command = getattr(importlib.import_module(module), attribute)
            return command
        if path in FAMILIES:
            return LazyGroup(path, name=name, help=FAMILIES[path], no_args_is_help=True)
        return None

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb; where there is none, say which one may have been meant."""
        name, longer = arguments[0], " ".join(arguments[:2])
        if name in VERBS and longer in VERBS:  # a verb that is also the first word of another, such as `index check`
            return longer, self.get_command(context, longer), arguments[2:]
        if not name.startswith("-") and self.get_command(context, name) is None:
            raise click.UsageError(f"there is no verb {f'{self.family} {name}'.strip()!r}{nearest(arguments)}", context)
        return super().resolve_command(context, arguments)

    def format_help(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write usage, verbs in their groups, options and examples."""
        self.format_usage(context, formatter)
        self.format_help_text(context, formatter)
        self.format_commands(context, formatter)
        self.format_options_only(context, formatter)
        shown = [VERBS[path] for path in FIRST_EXAMPLES] if not self.family else list(self._verbs())
        write_examples(formatter, shown)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each group's verbs with one line of help each."""
        width = max(len(verb.path) for verb in self._verbs())
        for title, verbs in GROUPS.items():
            rows = [(verb.path.ljust(width), verb.summary) for verb in verbs if verb in self._verbs()]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_options_only(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options without the commands, which click would put after them."""
        records = [record for record in (item.get_help_record(context) for item in self.get_params(context)) if record]
        with formatter.section("Options"):
            formatter.write_dl(records)

    def _verbs(self) -> list[Verb]:
        return [verb for verb in VERBS.values() if not self.family or verb.path.startswith(self.family + " ")]

    def _rest(self, verb: Verb) -> str:
        return verb.path[len(self.family) :].strip()


def nearest(arguments: list[str]) -> str:
    """Return "; did you mean ...?" for words that name no verb, or where to find all of them."""
    said = [" ".join(arguments[:2]), arguments[0], arguments[0].replace("-", " ")]
    names: dict[str, str] = {}
    for path in VERBS:
        names.update({path: path, path.split()[0]: path.split()[0]})
    for path in VERBS:
        names.setdefault(path.split()[-1], path)
    for words in said:
        found = difflib.get_close_matches(words, names, n=1, cutoff=0.6)
        if found:
            return f"; did you mean 'fluoro {names[found[0]]}'?"
    return "; 'fluoro --help' lists all verbs"


def write_examples(formatter: click.HelpFormatter, verbs: Iterable[Verb]) -> None:
    """Write examples as they are, unwrapped, so that they can be copied."""
    with formatter.section("Examples"):
        for verb in verbs:
            formatter.write(f"{'':{formatter.current_indent}}{verb.example}\n")
