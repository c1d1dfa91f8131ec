"""One validated config object for Python, YAML files and ``--set key=value``.

Comes in: a YAML file (a path, or the name of a shipped one), options of the command line and dotted overrides. Goes
out: a `JobConfig`, or a `UsageError` that names the value, the place it stands in and the nearest known key. Later
doors win: file, then options, then overrides. A verb's module holds ``class Config(JobConfig)`` and
``run(config) -> Result``.
"""

from __future__ import annotations

import difflib
import os
import re
import types
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from engine.arrays.durable import write_plainly
from engine.errors import UsageError

KeyPath = tuple[str | int, ...]
COMMAND_LINE = "the command line"


class JobConfig(BaseModel):
    """Base of every verb's config and of its sections: unknown keys are refused and ``~`` in paths is expanded."""

    model_config = ConfigDict(
        extra="forbid", validate_default=True, validate_assignment=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="after")
    @classmethod
    def _expand_home(cls, value: Any) -> Any:
        return value.expanduser() if isinstance(value, Path) else value


class DatasetOptions(JobConfig):
    """Fields shared by the verbs that open a data set."""

    dataset: str = Field(description="schema string, such as table:FILE.csv, tar:PATTERN or phantom:2000?seed=1")
    data: dict[str, Any] = Field(default_factory=dict, description="options of the data set, such as labels or boxes")


class SplitOptions(JobConfig):
    """Which samples train, choose and test."""

    how: Literal["auto", "given", "study", "grouped", "stratified"] = Field(
        "auto",
        description="in the data, the study's own, by group, or by group with labels kept in proportion; auto: in the "
        "data if there is one, else by group",
    )
    fractions: tuple[float, float, float] = Field((0.7, 0.15, 0.15), description="train, val, test of a split by group")
    seed: int = Field(0, description="seed of a split by group")


class ModelOptions(JobConfig):
    """Fields shared by the verbs that load an encoder."""

    model: str = Field(description="open_clip name/weights, hf-hub:OWNER/NAME, local-dir:PATH or phantom-clip")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="numbers the model computes in; auto: what the cache holds, else the device's fastest"
    )
    decoder: Literal["exact", "fast"] = Field("exact", description="fast: JPEGs decoded at a fraction of their size")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")


def user_folder() -> Path:
    """Return the user's own folder for what programs keep: $XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fluoroscope"


def default_cache() -> Path | str:
    """Return where embeddings are kept unless told otherwise: $FLUOROSCOPE_CACHE, else the user's own folder."""
    named = os.environ.get("FLUOROSCOPE_CACHE")
    return path_or_url(named) if named else user_folder()


def path_or_url(text: str) -> Path | str:
    """Return a path, but leave a URL such as ``memory://name`` as it is."""
    return text if "://" in text else Path(text).expanduser()


class CacheOptions(JobConfig):
    """Fields shared by the verbs that read or fill the cache."""

    cache: Path | str = Field(
        default_factory=default_cache, description="folder of the embedding cache, or a URL; archives are read-only"
    )

    @field_validator("cache", mode="before")
    @classmethod
    def _url_or_path(cls, value: Any) -> Any:
        return path_or_url(value) if isinstance(value, str) else value


ConfigT = TypeVar("ConfigT", bound=JobConfig)


def load_config(
    config_class: type[ConfigT],
    source: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    options: Mapping[str, Any] | None = None,
    spelled: Mapping[str, str] | None = None,
) -> ConfigT:
    """Return a validated config.

    Parameters
    ----------
    config_class : subclass of JobConfig
    source : str, Path, mapping or None
        A YAML file, the name of a shipped one ("demo", "demo.yaml" or "configs/demo.yaml"), or values.
    overrides : sequence of "dotted.key=value", or mapping of dotted keys
        Values in a text are read as YAML, so 3 is a number and [a, b] a list; for a text field they stay as typed.
    options : mapping of dotted keys, optional
        What the command line's own options gave; None values are left out.
    spelled : mapping of dotted key to text, optional
        How the command line gives a key, such as {"model": "--model NAME"}, for the error where it is missing.

    Raises
    ------
    UsageError
        No such file, not YAML, an unknown key (the nearest known one is named), a wrong type or a missing value.
    """
    values: dict[str, Any] = {}
    place = COMMAND_LINE if source is None else "the given values"
    lines: dict[KeyPath, int] = {}
    if isinstance(source, str | Path):
        path = find_config(source)
        values, lines = read_yaml(path)
        place = str(path)
    elif source is not None:
        values = _copied(source)
    from_command_line: set[KeyPath] = set()
    for dotted, value in (options or {}).items():
        if value is not None:
            from_command_line.add(_assign(values, dotted, value))
    for dotted, value in _override_pairs(config_class, overrides):
        from_command_line.add(_assign(values, dotted, value))
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        explained = _explained(error, config_class, values, place, lines, from_command_line, spelled or {})
        raise UsageError(explained) from None


def find_config(name: str | Path) -> Path:
    """Return the file of a path or of a shipped config's name; UsageError naming the shipped ones if there is none."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    from engine.resources import resource, shipped_configs

    if not path.is_absolute() and ".." not in path.parts:
        stem = path if path.suffix in (".yaml", ".yml") else path.with_name(path.name + ".yaml")
        relative = stem if stem.parts[0] == "configs" else Path("configs") / stem
        if relative.stem in shipped_configs() and len(relative.parts) == 2:
            return resource(relative.as_posix())
    what = "is a folder, not a config file" if path.is_dir() else "does not exist"
    known = shipped_configs()
    near = difflib.get_close_matches(path.stem, known, n=1)
    raise UsageError(
        f"config {str(name)!r} {what}; give the path of a YAML file or the name of a shipped one "
        f"({', '.join(known) or 'none'})" + (f": did you mean {near[0]!r}?" if near else "")
    )


def save_config(config: JobConfig, path: Path) -> None:
    """Write the resolved config as YAML, every default spelled out, so that `load_config` reads it back equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)
    write_plainly(path, text.encode())


def known_keys(config_class: type[BaseModel], prefix: str = "") -> list[str]:
    """Return all dotted keys of a config class, sections before what they hold."""
    keys: list[str] = []
    for name, field in config_class.model_fields.items():
        keys.append(prefix + name)
        for section in _sections(field.annotation):
            keys += [key for key in known_keys(section, f"{prefix}{name}.") if key not in keys]
    return keys


# -- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses double keys, reads 1e-3 as a number and leaves dates as text."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                problem = f"the key {key!r} stands here a second time"
                raise yaml.MarkedYAMLError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """Return a YAML file's values and the line number (from 1) of every key in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config {str(path)!r} cannot be read: {error}") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)  # a SafeLoader, see _Loader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: a config is a mapping of keys to values, not a {_kind(values)}")
    return values, dict(_key_lines(node))


def _key_lines(node: yaml.Node, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = (*prefix, key_node.value)
            yield key, key_node.start_mark.line + 1
            yield from _key_lines(value_node, key)
    elif isinstance(node, yaml.SequenceNode):
        for number, value_node in enumerate(node.value):
            yield (*prefix, number), value_node.start_mark.line + 1
            yield from _key_lines(value_node, (*prefix, number))


# -- Overrides -------------------------------------------------------------------------------------------------------


def parse_pairs(pairs: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """Return ``key=value`` texts as a dict with values read as YAML; UsageError for one without ``=``."""
    return {key: _yaml_value(text, option, key) for key, text in _split_pairs(pairs, option)}


def _split_pairs(pairs: Iterable[str], option: str) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{option} {pair!r} is not of the form key=value, such as {option} seed=1")
        yield key.strip(), text


def _yaml_value(text: str, option: str, key: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise UsageError(f"{option} {key}={text!r}: the value is not valid YAML; put quotes around a text") from None


def _override_pairs(
    config_class: type[BaseModel], overrides: Sequence[str] | Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for dotted, text in _split_pairs(overrides, "--set"):
        annotation = _annotation_at(config_class, dotted.split("."))
        kinds = _members(annotation)
        if str in kinds and not (type(None) in kinds and text in ("", "null", "~")) and not text.startswith(("[", "{")):
            yield dotted, _unquoted(text)
        else:
            yield dotted, _yaml_value(text, "--set", dotted)


def _unquoted(text: str) -> str:
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    return str(yaml.load(text, Loader=_Loader)) if quoted else text


def _assign(values: dict[str, Any], dotted: str, value: Any) -> KeyPath:
    """Set a dotted key in nested values, making sections on the way; return the path as pydantic will report it."""
    *sections, last = dotted.split(".")
    here: Any = values
    for depth, name in enumerate(sections):
        if here.get(name) is None:
            here[name] = {}
        here = here[name]
        if not isinstance(here, dict):
            raise UsageError(
                f"{dotted!r} cannot be set on {COMMAND_LINE}: {'.'.join(sections[: depth + 1])!r} is a {_kind(here)}, "
                "not a section; set it as a whole"
            )
    here[last] = value
    return tuple(dotted.split("."))


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in values.items()}


# -- Types of fields -------------------------------------------------------------------------------------------------


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the annotation itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(inner for member in get_args(annotation) for inner in _members(member))
    return (annotation,)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the config classes that a field may hold, also within lists."""
    found: list[type[BaseModel]] = []
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            found.append(member)
        elif get_origin(member) in (list, tuple, set, dict) or get_origin(member) is not None:
            for inner in get_args(member):
                if not isinstance(inner, str | int):
                    found += _sections(inner)
    return found


def _annotation_at(config_class: type[BaseModel], path: Sequence[str]) -> Any:
    """Return the type of a dotted key, or None where the class does not know it."""
    field = config_class.model_fields.get(path[0])
    if field is None:
        return None
    if len(path) == 1:
        return field.annotation
    for section in _sections(field.annotation):
        found = _annotation_at(section, path[1:])
        if found is not None:
            return found
    return None


# -- Errors in plain words -------------------------------------------------------------------------------------------

_PLAIN = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "path_type": "must be a path",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a section of keys and values",
    "model_type": "must be a section of keys and values",
    "model_attributes_type": "must be a section of keys and values",
    "none_required": "must be left empty",
}


def _explained(
    error: ValidationError,
    config_class: type[BaseModel],
    values: Mapping[str, Any],
    place: str,
    lines: Mapping[KeyPath, int],
    from_command_line: set[KeyPath],
    spelled: Mapping[str, str],
) -> str:
    """Return a validation error in the reader's words, one line a key, with the place it stands in."""
    by_key: dict[KeyPath, list[str]] = {}
    for detail in error.errors(include_url=False):
        key = _key_of(detail["loc"], values, detail["type"] == "missing")
        sentence = _sentence(dict(detail), key, config_class, spelled)
        if sentence not in by_key.setdefault(key, []):
            by_key[key].append(sentence)
    messages = []
    for key, sentences in by_key.items():
        given = any(key[: len(path)] == path or path[: len(key)] == key for path in from_command_line)
        where = COMMAND_LINE if given else place
        line = None if given else next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
        messages.append(f"{where}{f', line {line}' if line else ''}: {_joined(sentences)}")
    return "\n".join(messages)


def _joined(sentences: list[str]) -> str:
    """Join what the members of a union asked for into one sentence: 'x' must be a or must be b, not c."""
    if len(sentences) == 1:
        return sentences[0]
    parts = [re.match(r"(.*?) (must .*?)(, not .*)?$", sentence, re.S) for sentence in sentences]
    if not all(parts):
        return "; ".join(sentences)
    found = [part for part in parts if part]
    return f"{found[0][1]} {' or '.join(part[2] for part in found)}{found[-1][3] or ''}"


def _key_of(location: Sequence[str | int], values: Any, missing: bool) -> KeyPath:
    """Cut pydantic's location down to what stands in the config: it also names the members of unions."""
    key: list[str | int] = []
    here = values
    for part in location:
        known = (isinstance(here, Mapping) and part in here) or (
            isinstance(here, Sequence) and not isinstance(here, str) and isinstance(part, int) and part < len(here)
        )
        if known:
            key.append(part)
            here = here[part]
    if missing:
        key.append(location[-1])
    return tuple(key)


def _sentence(detail: dict[str, Any], key: KeyPath, config_class: type[BaseModel], spelled: Mapping[str, str]) -> str:
    dotted = dotted_key(key)
    kind, given, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key {dotted!r}; {_nearest_key(dotted, config_class)}"
    if kind == "missing":
        way = spelled.get(dotted, f"--set {dotted}=VALUE")
        return f"{dotted!r} is required and not given; give {way}, or add it to the config file"
    if kind in ("value_error", "assertion_error"):
        reason = str(context.get("error", detail["msg"]))
        return f"{dotted!r}: {reason}" if dotted else reason
    if kind == "literal_error":
        return f"{dotted!r} must be one of {context['expected']}, not {_shown(given)}{_nearest_value(given, context)}"
    asked = _PLAIN.get(kind) or detail["msg"].replace("Input should be", "must be", 1)
    return f"{dotted!r} {asked}, not {_shown(given)}"


def dotted_key(key: Sequence[str | int]) -> str:
    """Return a key path as it is written on the command line, such as ``data.labels[2]``."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _nearest_key(dotted: str, config_class: type[BaseModel]) -> str:
    plain = re.sub(r"\[\d+\]", "", dotted)
    section, _, name = plain.rpartition(".")
    known = known_keys(config_class)
    spelled = [key for key in known if key.lower() == plain.lower()]
    if spelled:
        return f"did you mean {spelled[0]!r}? Upper and lower case count"
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    last = {key.rpartition(".")[2].lower(): key for key in siblings}
    near = difflib.get_close_matches(name.lower(), last, n=1, cutoff=0.5)
    if near:
        return f"did you mean {last[near[0]]!r}?"
    elsewhere = [key for key in known if key.rpartition(".")[2].lower() == name.lower()]
    if elsewhere:
        return f"did you mean {elsewhere[0]!r}?"
    return f"known keys here: {', '.join(key.rpartition('.')[2] for key in siblings)}"


def _nearest_value(given: Any, context: Mapping[str, Any]) -> str:
    choices = re.findall(r"'([^']*)'", str(context.get("expected", "")))
    near = difflib.get_close_matches(str(given), choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _kind(value: Any) -> str:
    names = {list: "list", str: "text", int: "number", float: "number", bool: "true/false value", dict: "section"}
    return names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
