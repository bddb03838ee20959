"""Reads JSON files field by field, each within bounds: errors name the field, its value and what is accepted."""

import json
import math
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tome_server.config.text_file import read_text

# Characters of a value that a message shows.
_SHOWN = 60


@dataclass(frozen=True)
class JsonObject:
    """An object of a JSON file. Its methods raise ValueError for a field that is missing or not as it must be."""

    values: dict[str, Any]
    place: str = ""
    """Where in the file it lies, such as `levels[2]`; empty for the whole of it."""

    def holds(self, name: str) -> bool:
        """Return whether a field is there and not null."""
        return self.values.get(name) is not None

    def number(self, name: str, least: float, most: float) -> float:
        """Return a finite number of `least` to `most`."""
        return _number(self._value(name), self._path(name), least, most)

    def whole(self, name: str, least: int, most: int) -> int:
        """Return a whole number of `least` to `most`."""
        return _whole(self._value(name), self._path(name), least, most)

    def truth(self, name: str) -> bool:
        """Return true or false."""
        value = self._value(name)
        if type(value) is not bool:
            _refuse(self._path(name), value, "must be true or false")
        return value

    def text(self, name: str) -> str:
        """Return a text."""
        value = self._value(name)
        if not isinstance(value, str):
            _refuse(self._path(name), value, "must be text")
        return value

    def wholes(self, name: str, least: int, most: int, longest: int) -> tuple[int, ...]:
        """Return a list of at most `longest` whole numbers of `least` to `most`."""
        path = self._path(name)
        return tuple(_whole(item, at, least, most) for at, item in _items(self._value(name), path, longest))

    def table(self, name: str, least: float, most: float, longest: int) -> tuple[tuple[float, ...], ...]:
        """Return a list of lists, each of at most `longest`, of finite numbers of `least` to `most`."""
        path = self._path(name)
        return tuple(
            tuple(_number(item, at, least, most) for at, item in _items(row, row_at, longest))
            for row_at, row in _items(self._value(name), path, longest)
        )

    def numbers(self, name: str, least: float, most: float) -> dict[str, float]:
        """Return an object whose fields are all finite numbers of `least` to `most`."""
        inner = self.object(name)
        return {field: inner.number(field, least, most) for field in inner.values}

    def object(self, name: str) -> "JsonObject":
        """Return an object within this one."""
        return _object(self._value(name), self._path(name))

    def objects(self, name: str, longest: int) -> list["JsonObject"]:
        """Return a list of at most `longest` objects."""
        return [_object(item, at) for at, item in _items(self._value(name), self._path(name), longest)]

    def _value(self, name: str) -> Any:
        if name not in self.values:
            raise ValueError(f"{self._path(name)} is missing")
        return self.values[name]

    def _path(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name


def read_json(path: Path) -> JsonObject:
    """Read a file that holds a JSON object.

    Raises OSError, or ValueError for anything else: no JSON, a field that is given twice, NaN or infinity, nesting
    that is too deep, or a file that `read_text` refuses.
    """
    try:
        document = json.loads(
            read_text(path), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error}") from error
    return _object(document, "")


def shown(value: object) -> str:
    """Return a value as messages show it, however long or deeply nested it is."""
    text = value if isinstance(value, str) and value.isprintable() else _repr.repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _object(value: Any, path: str) -> JsonObject:
    if not isinstance(value, dict):
        _refuse(path or "the file", value, "must be an object, {…}")
    return JsonObject(value, path)


def _items(value: Any, path: str, longest: int) -> Iterable[tuple[str, Any]]:
    """Return the items of a list, each with its place."""
    if not isinstance(value, list):
        _refuse(path, value, "must be a list")
    if len(value) > longest:
        raise ValueError(f"{path} has {len(value):,} items; at most {longest:,} are accepted")
    return [(f"{path}[{number}]", item) for number, item in enumerate(value)]


def _number(value: Any, path: str, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        _refuse(path, value, f"must be a number of {least:g} to {most:g}")
    return float(value)


def _whole(value: Any, path: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        _refuse(path, value, f"must be a whole number of {least:,} to {most:,}")
    return value


def _refuse(path: str, value: object, what: str) -> NoReturn:
    raise ValueError(f"{path} {what}, not {shown(value)}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is given twice")
        found[name] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"it holds {shown(text)}, which is larger than any number may be")
    return value


_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxlist, _repr.maxdict = 3, _SHOWN, 8, 8
