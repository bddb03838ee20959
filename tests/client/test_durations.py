import pytest

from tome_client.durations import milliseconds, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("50ms", 0.05),
        ("0.2s", 0.2),
        ("1.5s", 1.5),
        ("2", 2.0),
        (".5", 0.5),
        ("1.", 1.0),
        (" 12.5 ms ", 0.0125),
        ("2m", 120.0),
        ("250us", 0.00025),
    ],
)
def test_durations_have_units_or_are_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "ms", "fast", "50 min", "1h", "-1s", "0", "0ms", "1e3", "nan", "inf", "9" * 400])
def test_anything_else_is_refused_with_the_forms_accepted(text: str) -> None:
    with pytest.raises(ValueError, match=r"like 50ms, 0\.2s, or 1\.5 for seconds, above 0"):
        parse_duration(text)


def test_a_duration_is_shown_in_milliseconds() -> None:
    assert milliseconds(0.01234) == "12.3 ms"
