"""How a click command becomes a job: options -> validated config -> ``jobs.<verb>.run(config)`` -> a table or JSON.

A command's function holds nothing but its options and its help; it returns the options as dotted config keys. Those
that the config does not know, but ``run`` takes as arguments (such as ``out``), are handed to ``run``. The verb's
module, with torch and the like, is imported only when the command runs, not for its help.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import click

from engine.errors import UsageError
from jobs import LOGGERS
from jobs.commands import group
from jobs.commands.catalogue import VERBS

# How a job computes is said on a terminal too, where other lines below a warning would disturb the display.
ALWAYS_SAID = ("engine.plan",)
Options = dict[str, Any]

COMMON = (
    click.Option(
        ["--config", "config_file"], metavar="FILE", help="YAML file with the verb's config; options win over it."
    ),
    click.Option(["--set", "overrides"], multiple=True, metavar="KEY=VALUE", help="Set any key of the config, dotted."),
    click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON on standard output."),
    click.Option(["--quiet", "-q"], is_flag=True, help="No progress; only the result."),
    click.Option(["--debug"], is_flag=True, help="Log everything, and show where an error was raised."),
)


class VerbCommand(click.Command):
    """A command whose arguments may also come from ``--config``, and whose help ends with its example."""

    def __init__(self, path: str, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.path = path
        self.job = ("", "", "")

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Take the arguments; where there are too many, say what may have made many of one."""
        context.allow_extra_args = True
        super().parse_args(context, args)
        if context.args and not context.resilient_parsing:
            given = [value for item in self.params if isinstance(value := context.params.get(str(item.name)), str)]
            raise click.UsageError(_too_many(given, context.args), context)
        return context.args

    def invoke(self, context: click.Context) -> Any:
        """Ask for the arguments, unless a config file or --set may hold them, or a run that is gone on with."""
        arguments = [context.params.get(str(item.name)) for item in self.params if isinstance(item, click.Argument)]
        run = context.params.get("out")
        if context.params.get("resume") and run and not any(arguments) and not context.params.get("config_file"):
            if not (run / "config.yaml").is_file():
                raise click.UsageError(
                    f"there is no run to go on with in {str(run)!r}: it has no config.yaml; name the run's folder with "
                    "--out, or begin one with its arguments",
                    context,
                )
            context.params["config_file"] = str(run / "config.yaml")
        if not context.params.get("config_file") and not context.params.get("overrides"):
            for parameter in self.params:
                if isinstance(parameter, click.Argument) and context.params.get(str(parameter.name)) in (None, ()):
                    raise click.MissingParameter(ctx=context, param=parameter)
        return super().invoke(context)

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verb's example, unwrapped."""
        group.write_examples(formatter, [VERBS[self.path]])


def _too_many(given: list[str], more: list[str]) -> str:
    """Return what to say of further arguments: data sets of one kind are what a shell has made of a pattern."""
    shown = " ".join(more[:3]) + (" ..." if len(more) > 3 else "")
    kind, colon, _ = more[0].partition(":")
    first = next((value for value in given if colon and value.startswith(kind + colon)), None)
    if first is None:
        return f"too many arguments: {shown}; a value with blanks needs quotes"
    return (
        f"got {len(more) + 1} data sets where one is wanted: {first} {shown}; the shell has made them of one pattern, "
        f"so put that in quotes, such as '{kind}:shard-{{000..099}}.tar'"
    )


def verb(
    path: str, module: str, *, config: str = "Config", run: str = "run"
) -> Callable[[Callable[..., Options]], VerbCommand]:
    """Make a click command of a function that returns config values.

    Parameters
    ----------
    path : str
        The verb's words, as in the catalogue.
    module : str
        Module with the config class and the function, such as "jobs.embed".
    config, run : str
        Their names in it.
    """

    def decorate(function: Callable[..., Options]) -> VerbCommand:
        parameters = list(reversed(getattr(function, "__click_params__", [])))
        taken = {parameter.name for parameter in parameters}

        def callback(
            config_file: str | None,
            overrides: tuple[str, ...],
            as_json: bool,
            quiet: bool,
            debug: bool,
            **options: Any,
        ) -> int:
            given = {key_of(name): value for name, value in function(**options).items() if value not in (None, ())}
            values = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
            job = Job(module, config, run, {key_of(str(item.name)): spelling(item) for item in parameters})
            return execute(job, values, config_file, overrides, as_json, quiet, debug)

        command = VerbCommand(
            path,
            name=path.split()[-1],
            callback=callback,
            params=[*parameters, *(option for option in COMMON if option.name not in taken)],
            help=inspect.getdoc(function),
            short_help=VERBS[path].summary,
        )
        command.job = (module, config, run)
        return command

    return decorate


class Job(NamedTuple):
    """Where a verb's work is: module, names of its config class and function; and how its options are written."""

    module: str
    config: str
    run: str
    spelled: Mapping[str, str]


def key_of(name: str) -> str:
    """Return the config key of a parameter: a section's ``.`` is written ``__``, as click wants identifiers."""
    return name.replace("__", ".")


def spelling(parameter: click.Parameter) -> str:
    """Return how a parameter is given, such as ``--model NAME`` or ``DATASET``."""
    shown = parameter.metavar or str(parameter.name).upper()
    return shown if isinstance(parameter, click.Argument) else f"{max(parameter.opts, key=len)} {shown}"


def execute(
    job: Job,
    values: Mapping[str, Any],
    config_file: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> int:
    """Validate, run and show one job; return its exit status."""
    # Imported here: pydantic and rich are not wanted for help texts.
    from engine.memory import importing, keep_freed_memory
    from jobs import config as configs
    from jobs import progress as displays
    from jobs.commands import show

    if config_file:
        configs.find_config(config_file)  # before the verb's module is imported, which takes seconds
    keep_freed_memory()
    with importing(job.module):
        module = importlib.import_module(job.module)
    config_class, run = getattr(module, job.config), getattr(module, job.run)
    taken = set(inspect.signature(run).parameters)
    fields = {key: value for key, value in values.items() if key.split(".")[0] in config_class.model_fields}
    arguments = {key: value for key, value in values.items() if key not in fields and key in taken}
    unknown = sorted(set(values) - set(fields) - set(arguments))
    if unknown:
        raise UsageError(f"{job.module} does not take {', '.join(unknown)}; leave the option out")
    config = configs.load_config(config_class, config_file, overrides, fields, job.spelled)
    progress = displays.make_progress("quiet" if quiet else "auto")
    if "progress" in taken:
        arguments["progress"] = progress
    with log_shown(progress, quiet, debug), progress:
        result = run(config, **arguments)
    return show.show(result, as_json)


@contextmanager
def log_shown(progress: Any, quiet: bool, debug: bool) -> Iterator[None]:
    """Send the log to standard error meanwhile: through a live display where there is one, as plain lines elsewhere.

    What is not shown is logged all the same, for a run's folder keeps it. Afterwards the loggers are as they were: a
    command may be called from a program, whose standard error of today is not that of tomorrow.
    """
    live = hasattr(progress, "console")
    handler: logging.Handler
    if live:
        from rich.logging import RichHandler

        handler = RichHandler(console=progress.console, show_path=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    least = logging.DEBUG if debug else logging.WARNING if quiet or live else logging.INFO
    handler.addFilter(lambda record: _is_for_the_user(record, least, quiet))
    root, loggers = logging.getLogger(), [logging.getLogger(name) for name in ("", *LOGGERS)]
    handlers, levels = root.handlers[:], [logger.level for logger in loggers]
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for logger in loggers[1:]:
        logger.setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _is_for_the_user(record: logging.LogRecord, least: int, quiet: bool) -> bool:
    """Leave out what other libraries say below a warning, also where they have set their own loggers to more."""
    if record.levelno >= logging.WARNING:
        return True
    shown = record.levelno >= least or (record.name in ALWAYS_SAID and not quiet)
    return shown and record.name.split(".")[0] in LOGGERS
