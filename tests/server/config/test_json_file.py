import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tome_server.config.json_file import JsonObject, read_json, shown

DOCUMENT = {
    "share": 0.5,
    "count": 3,
    "on": True,
    "name": "a",
    "sizes": [1, 2],
    "rows": [[1, 2.5], [3, 4]],
    "inner": {"count": 1},
    "many": [{"count": 1}, {"count": "b"}],
}


@pytest.fixture
def document(tmp_path: Path) -> JsonObject:
    (tmp_path / "file").write_text(json.dumps(DOCUMENT))
    return read_json(tmp_path / "file")


def test_fields_are_read_as_what_they_are(document: JsonObject) -> None:
    assert document.number("share", 0, 1) == 0.5
    assert document.number("count", 0, 3) == 3.0
    assert document.whole("count", 0, 3) == 3
    assert document.truth("on")
    assert document.text("name") == "a"
    assert document.wholes("sizes", 1, 2, 2) == (1, 2)
    assert document.table("rows", 1, 4, 2) == ((1.0, 2.5), (3.0, 4.0))
    assert document.numbers("inner", 0, 1) == {"count": 1.0}
    assert document.objects("many", 2)[0].whole("count", 1, 1) == 1
    assert document.holds("share")
    assert not document.holds("other")


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda it: it.number("share", 0, 0.4), "share must be a number of 0 to 0.4, not 0.5"),
        (lambda it: it.number("name", 0, 1), "name must be a number of 0 to 1, not a"),
        (lambda it: it.number("on", 0, 1), "on must be a number of 0 to 1, not True"),
        (lambda it: it.number("gone", 0, 1), "gone is missing"),
        (lambda it: it.whole("share", 0, 1), "share must be a whole number of 0 to 1, not 0.5"),
        (lambda it: it.whole("on", 0, 1), "on must be a whole number of 0 to 1, not True"),
        (lambda it: it.whole("count", 4, 10_000), "count must be a whole number of 4 to 10,000, not 3"),
        (lambda it: it.truth("count"), "count must be true or false, not 3"),
        (lambda it: it.text("count"), "count must be text, not 3"),
        (lambda it: it.wholes("sizes", 1, 1, 2), r"sizes\[1\] must be a whole number of 1 to 1, not 2"),
        (lambda it: it.wholes("sizes", 1, 2, 1), "sizes has 2 items; at most 1 are accepted"),
        (lambda it: it.wholes("name", 1, 2, 1), "name must be a list, not a"),
        (lambda it: it.table("rows", 1, 3, 2), r"rows\[1\]\[1\] must be a number of 1 to 3, not 4"),
        (lambda it: it.table("sizes", 1, 3, 2), r"sizes\[0\] must be a list, not 1"),
        (lambda it: it.numbers("inner", 2, 3), r"inner\.count must be a number of 2 to 3, not 1"),
        (lambda it: it.object("name"), "name must be an object"),
        (lambda it: it.objects("many", 1), "many has 2 items"),
        (lambda it: it.objects("many", 2)[1].whole("count", 0, 1), r"many\[1\]\.count must be a whole .*, not b"),
        (lambda it: it.objects("sizes", 2), r"sizes\[0\] must be an object"),
    ],
)
def test_a_field_out_of_its_bounds_is_named_with_its_value(
    document: JsonObject, read: Callable[[JsonObject], Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        read(document)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is no JSON"),
        (b"{", "it is no JSON"),
        (b"[1]", "the file must be an object"),
        (b"null", "the file must be an object"),
        (b'{"a": NaN}', "it holds NaN, which is no number"),
        (b'{"a": -Infinity}', "it holds -Infinity, which is no number"),
        (b'{"a": 1e400}', "it holds 1e400, which is larger than any number"),
        (b'{"a": [{"b": 1, "b": 2}]}', "b is given twice"),
        (b'{"a": ' + b"[" * 100_000, "it is nested too deeply"),
        (b'{"a": ' + b'{"a": ' * 100_000, "it is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"a": "\xff"}', "line 1 is not UTF-8"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_holds_no_sound_object_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_json(tmp_path / "file")


def test_a_value_is_shown_in_one_short_line_whatever_it_is() -> None:
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    for value in (deep, "a" * 10_000, ["a" * 10_000] * 1000, 10**4000, "\ud800", "a\nb", {"a": deep}):
        assert len(shown(value)) <= 61
        assert shown(value).isprintable()
        shown(value).encode()


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,0123456789eE+-.NaInftyrul \\', max_size=200).map(str.encode))
def test_no_content_ends_in_anything_but_an_object_or_the_documented_error(content: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        with contextlib.suppress(ValueError):
            assert isinstance(read_json(Path(file.name)), JsonObject)
