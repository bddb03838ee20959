import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.api.oip.attempts import attempt
from tome_server.api.oip.messages import MOST_ELEMENTS, joined, shown, split
from tome_server.errors import InvalidRequestError, TooLargeError


@given(st.lists(st.binary(max_size=50), max_size=20))
def test_elements_come_back_as_they_went(elements: list[bytes]) -> None:
    assert split(joined(elements), len(elements)) == elements


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=20), st.data())
def test_what_is_cut_off_is_refused_or_shorter(elements: list[bytes], data: st.DataObject) -> None:
    whole = joined(elements)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    found, error = attempt(lambda: split(cut, len(elements)))
    if found is None:
        assert isinstance(error, InvalidRequestError)
    else:
        assert found == elements[: len(found)]
        assert len(found) < len(elements)


def test_elements_beyond_the_shape_are_refused_without_reading_them() -> None:
    with pytest.raises(InvalidRequestError, match="more than the 2 elements"):
        split(joined([b""] * 1_000_000), 2)


def test_more_elements_than_anybody_may_send_are_refused_before_any_is_read() -> None:
    with pytest.raises(TooLargeError):
        split(b"", MOST_ELEMENTS + 1)


def test_a_callers_text_is_shortened() -> None:
    assert shown("a\n") == r"'a\n'"
    assert len(shown("x" * 10_000)) < 100
