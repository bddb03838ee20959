"""Mutations of JSON documents, as a hostile or damaged file has them."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

# Written as text, since some of it is no JSON that Python's encoder would write.
_VALUES = [
    "null", "true", "false", "0", "-1", "1", "2", "3", "0.5", "1e308", "-1e308", "1e-308", "5e-324", "1e400", "NaN",
    "Infinity", "-Infinity", str(10**30), "9" * 5000, '""', '"a"', '"\\ud800"', '"\\u0000"', "[]", "{}", "[[]]", "[1]",
    '[{"r": 0}]', '{"r": NaN}', "[" * 50 + "]" * 50, "[" * 5000 + "]" * 5000,
]  # fmt: skip
_MARK = "@@mutated@@"


def _places(part: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in a document."""
    inner = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    return [path, *(place for key, value in inner for place in _places(value, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> bytes:
    """Return the text of a document after up to three changes: values replaced, removed, given twice, bytes spoilt."""
    document = copy.deepcopy(document)
    replacements = []
    for _ in range(draw(st.integers(1, 3))):
        places = [place for place in _places(document) if place]
        if not places:
            break
        *path, last = draw(st.sampled_from(places))
        holder = document
        for step in path:
            holder = holder[step]
        if draw(st.booleans()) or isinstance(holder, list):
            holder[last] = f"{_MARK}{len(replacements)}"
            replacements.append(draw(st.sampled_from(_VALUES)))
        else:
            del holder[last]
    text = json.dumps(document)
    for number, value in enumerate(replacements):
        text = text.replace(f'"{_MARK}{number}"', value)
    data = bytearray(text.encode())
    if data and draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(data) - 1))
        data[at : at + draw(st.integers(0, 20))] = draw(st.binary(max_size=5))
    return bytes(data)
