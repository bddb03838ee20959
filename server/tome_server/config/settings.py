"""Reads settings from YAML files, strictly: errors name the line, what is wrong there and the nearest valid key."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo

from tome_api import durations
from tome_api.nearest import meant
from tome_server.config.policy_names import PATTERN as POLICY_PATTERN
from tome_server.config.policy_names import parse_policy
from tome_server.config.text_file import read_text
from tome_server.errors import ConfigError

_SIZES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# pydantic's context for values that come from a file, and not from code.
FROM_FILE: Final = {"from": "file"}
# The most bytes of one file; PyYAML takes a few seconds to parse as many.
MOST_BYTES = 2**20
# The most values in one file. Aliases of aliases can stand for more than any memory holds.
MOST_VALUES = 100_000
_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
# NUL and surrogates.
_ODD = re.compile("[\0\ud800-\udfff]")
# In place of pydantic's messages that speak of Python.
_WORDS = {
    "model_type": "must be a mapping, `setting: value`",
    "tuple_type": "must be a list",
    "path_type": "must be a path",
    "missing": "is missing",
}
_BOUNDS = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than_equal": "must be at most {le:g}",
}


def parse_duration(value: object, info: ValidationInfo) -> object:
    """Turn "50ms", "1.5s" or "2m" into seconds; raises ValueError for other text.

    A number in code is in seconds. In a file a number needs a unit: unless it is 0 it raises ValueError there.
    """
    if isinstance(value, str | bool):
        return durations.parse_duration(str(value))
    if info.context is FROM_FILE and isinstance(value, int | float) and 0 < value < math.inf:
        raise ValueError(durations.needs_unit(value))
    return value


def parse_budget(value: object, info: ValidationInfo) -> object:
    """Turn a duration into seconds, and "none" into infinity: no deadline. Raises ValueError for 0 and other text."""
    if isinstance(value, str | bool):
        return durations.parse_budget(str(value))
    return parse_duration(value, info)


def parse_size(value: object) -> object:
    """Turn "16MiB" or a number of bytes into bytes. Raises ValueError for other text."""
    if not isinstance(value, str | bool):
        return value
    found = re.fullmatch(r"([0-9]+)\s*(KiB|MiB|GiB)", str(value).strip())
    if not found:
        raise ValueError(f"{value!r} is no size; write for example 512KiB or 16MiB")
    return int(found[1]) * _SIZES[found[2]]


# Seconds of a year: what is longer is a mistake, and couldn't be told to clients.
MOST_SECONDS = 365 * 86400.0


def _bounded(seconds: float) -> float:
    """Return seconds. Raises ValueError for more than a year, but not for infinity, no deadline."""
    if MOST_SECONDS < seconds < math.inf:
        raise ValueError("must be at most 365 days")
    return seconds


Count = Annotated[int, Field(ge=1, strict=True)]
# The limit is more than any device gains from, and less than a mistyped number that would take all of its memory.
BatchSize = Annotated[int, Field(ge=1, le=4096, strict=True)]
# The JSON Schema checks these patterns; the server itself calls the functions.
_DurationText = Annotated[str, Field(pattern=rf"^\s*(?:{durations.PATTERN})\s*$")]
_SizeText = Annotated[str, Field(pattern=r"^\s*[0-9]+\s*(KiB|MiB|GiB)\s*$")]
_PolicyText = Annotated[str, Field(pattern=f"^({POLICY_PATTERN})$")]
Duration = Annotated[
    float,
    BeforeValidator(parse_duration, json_schema_input_type=Literal[0] | _DurationText),
    AfterValidator(_bounded),
    Field(ge=0, allow_inf_nan=False),
]
_BudgetText = Annotated[str, Field(pattern=rf"^\s*(?:{durations.PATTERN}|{durations.NO_DEADLINE})\s*$")]
Budget = Annotated[
    float, BeforeValidator(parse_budget, json_schema_input_type=_BudgetText), AfterValidator(_bounded), Field(gt=0)
]
Size = Annotated[
    int, BeforeValidator(parse_size, json_schema_input_type=Annotated[int, Field(gt=0)] | _SizeText), Field(gt=0)
]
SizeOrZero = Annotated[
    int, BeforeValidator(parse_size, json_schema_input_type=Annotated[int, Field(ge=0)] | _SizeText), Field(ge=0)
]

Policy = Annotated[str, BeforeValidator(parse_policy, json_schema_input_type=_PolicyText)]


class Strict(BaseModel):
    """Settings in which an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Settings = TypeVar("Settings", bound=Strict)


def read_settings(path: Path, kind: type[Settings]) -> Settings:
    """Read a YAML file; an empty file leaves all settings at their defaults. Paths in it are not resolved.

    Raises ConfigError with file, line and, for an unknown key, the nearest valid one.
    """
    try:
        root = yaml.compose(read_text(path, MOST_BYTES, pipe=True), Loader=yaml.SafeLoader)
        if root is None or root.tag == "tag:yaml.org,2002:null":
            start = yaml.Mark(str(path), 0, 0, 0, None, 0)
            root = yaml.MappingNode("tag:yaml.org,2002:map", [], start, start)
        if _values(root, {}) > MOST_VALUES:
            raise ConfigError(f"{path}: holds more than {MOST_VALUES:,} values, counting what aliases repeat")
        wrong = [f"{path}:{node.start_mark.line + 1}: {what}" for node, what in _wrong_nodes(root, set())]
        if wrong:
            raise ConfigError("\n".join(wrong))
        settings = yaml.SafeLoader("").construct_document(root)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not valid YAML: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: text that isn't UTF-8, and dates that don't exist
        raise ConfigError(f"{path}{_place(error)}: not valid YAML: {_problem(error)}") from error
    try:
        return kind.model_validate(settings, context=FROM_FILE)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, root, kind, *fault) for fault in faults(error))) from error


def _place(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark else ""


def _problem(error: Exception) -> str:
    """Return what is wrong in one line; PyYAML's own message has several."""
    said = [getattr(error, "context", None), getattr(error, "problem", None)]
    return ", ".join(part for part in said if part) or str(error).partition("\n")[0]


def faults(error: ValidationError) -> Iterator[tuple[tuple[str | int, ...], str | None]]:
    """Yield where each fault is and what is wrong there: None for a setting that doesn't exist."""
    found = error.errors()
    for fault in found:
        location = fault["loc"]
        # pydantic also reports a list as too short if none of its items is valid.
        if any(len(other["loc"]) > len(location) and other["loc"][: len(location)] == location for other in found):
            continue
        what = _WORDS.get(fault["type"], fault["msg"].removeprefix("Value error, "))
        if bound := _BOUNDS.get(fault["type"]):
            what = bound.format(**fault["ctx"])
        elif fault["type"] == "literal_error":
            expected = str(fault["ctx"]["expected"])
            what = f"{fault['input']!r} is none of {expected}"
            what += meant(str(fault["input"]), re.findall("'([^']+)'", expected))
        yield location, None if fault["type"] == "extra_forbidden" else what


def _values(node: yaml.Node, known: dict[int, float]) -> float:
    """Return how many values a node stands for once its aliases are written out; infinity if it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = node.value if isinstance(node, yaml.SequenceNode) else ()
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def _wrong_nodes(node: yaml.Node, seen: set[int]) -> Iterator[tuple[yaml.Node, str]]:
    """Find what YAML accepts and settings don't: keys that are given twice or aren't text, and odd characters."""
    if id(node) in seen:  # an anchor may hold itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode) and _ODD.search(node.value):
        yield node, "text can't hold NUL or halves of characters, which files' names and messages don't have"
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _wrong_nodes(item, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEY_TAGS:
                yield key, "a setting's name must be text"
            elif key.value in first:
                yield key, f"{key.value} is given twice, first on line {first[key.value]}"
            else:
                first[key.value] = key.start_mark.line + 1
            yield from _wrong_nodes(value, seen)


def _explain(path: Path, root: yaml.Node, kind: type[Strict], location: tuple[str | int, ...], what: str | None) -> str:
    line = _line(root, location)
    where = ".".join(map(str, location)) or "the file"
    if what is not None:
        return f"{path}:{line}: {where}: {what}"
    valid = _keys(kind, location[:-1])
    hint = meant(str(location[-1]), valid) or f"; valid keys are {', '.join(valid)}"
    return f"{path}:{line}: {where} is not a setting{hint}"


def _line(node: yaml.Node, location: tuple[str | int, ...]) -> int:
    """Return the line, from 1, of the key at `location`."""
    line = node.start_mark.line
    for step in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == step]
            if not found:
                break
            line, node = found[0][0].start_mark.line, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            node = node.value[step]
            line = node.start_mark.line
    return line + 1


def _keys(kind: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """Return the names of the settings at `location`."""
    for step in location:
        if isinstance(step, str) and step in kind.model_fields:
            kind = next(_sections(kind.model_fields[step].annotation), kind)
    return sorted(kind.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Find the settings' classes in a type such as `tuple[ModelConfig, ...]` or `TlsConfig | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)
