"""All settings, read from the classes that check them: as a table for people, and as JSON Schema for tools."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tome_server.config.server import ServerConfig
from tome_server.config.settings import Strict, parse_duration, parse_size

# Keywords that pydantic adds to a schema and that are its own, or of no use to editors.
_NOISE = ("title", "format", "default", "ge", "gt", "allow_inf_nan")


def settings_table(kind: type[Strict] = ServerConfig) -> str:
    """Return a Markdown table of every setting: where it stands in the file, its default, what it means."""
    rows = [f"| `{name}` | {default} | {text} |" for name, default, text in _rows(kind)]
    return "\n".join(["| setting | default | |", "|---|---|---|", *rows]) + "\n"


def settings_schema(kind: type[Strict] = ServerConfig) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a settings file, without references, so that another schema can contain it.

    It accepts whatever the server accepts. Of durations, sizes, addresses and names of policies it checks the form
    alone.
    """
    schema = kind.model_json_schema()
    parts = schema.pop("$defs", {})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_inlined(schema, parts)}


def _rows(kind: type[BaseModel], where: str = "") -> Iterator[tuple[str, str, str]]:
    for name, field in kind.model_fields.items():
        part, listed = _section(field.annotation)
        path = f"{where}{name}{'[]' if listed else ''}"
        if part is None or listed or field.get_default() is None:
            yield path.removesuffix("[]"), _default(field), (field.description or "").replace("|", "\\|")
        if part is not None:
            yield from _rows(part, f"{path}.")


def _section(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Return the class of a setting's section, if it is one, and whether the setting is a list of such sections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        for part in get_args(annotation):
            found, listed = _section(part)
            if found is not None:
                return found, listed or get_origin(annotation) is tuple
    return None, False


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, tuple):
        return "one, of all defaults" if value else "none"
    if value is None or value in ({}, ""):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    parsers = [getattr(part, "func", None) for part in field.metadata]
    if parse_duration in parsers:
        return f"`{value:g}s`" if value >= 1 or value == 0 else f"`{value * 1e3:g}ms`"
    if parse_size in parsers:
        return f"`{value / 2**20:g}MiB`"
    return f"`{value}`"


def _inlined(node: Any, parts: dict[str, Any]) -> Any:
    """Replace each `$ref` by the schema that it names, and leave out noise."""
    if isinstance(node, list):
        return [_inlined(item, parts) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        part = parts[Path(node["$ref"]).name]
        return _inlined({**part, **{key: value for key, value in node.items() if key != "$ref"}}, parts)
    kept = {}
    for key, value in node.items():
        if key == "properties":
            kept[key] = {name: _inlined(item, parts) for name, item in value.items()}
        elif key not in _NOISE:
            kept[key] = _inlined(value, parts)
    return kept
