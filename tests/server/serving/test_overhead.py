import pytest
from hypothesis import given
from hypothesis import strategies as st

from tome_server.serving.overhead import FRESH, REPLIES_REMEMBERED, DecodeTimes, Margin


def test_the_margin_is_enough_for_most_of_the_latest_replies_and_never_less_than_the_least() -> None:
    margin = Margin(0.002)
    assert margin.at(0.0) == 0.002
    for _ in range(REPLIES_REMEMBERED):
        margin.add(0.0, 0.001)
    assert margin.at(0.0) == 0.002
    for _ in range(4):
        margin.add(0.0, 1.0)
    assert margin.at(0.0) == 0.002
    margin.add(0.0, 0.5)  # now more than one in twenty took so long
    assert margin.at(0.0) == 0.5
    for _ in range(REPLIES_REMEMBERED):
        margin.add(0.0, 0.001)
    assert margin.at(0.0) == 0.002


@given(slow=st.integers(1, 200), seconds=st.floats(0.01, 100.0))
def test_however_many_replies_were_slow_the_margin_is_back_once_they_are_stale(slow: int, seconds: float) -> None:
    margin = Margin(0.001)
    for _ in range(slow):
        margin.add(10.0, seconds)
    assert margin.at(10.0) == seconds
    assert margin.at(10.0 + FRESH + 0.001) == 0.001


def test_decode_time_is_learned_by_kind_and_megapixel() -> None:
    times = DecodeTimes()
    assert times.seconds(0.0, "JPEG", 12.0) == 0
    for _ in range(9):
        times.add(0.0, "JPEG", 12.0, 0.12, 0.12)
        times.add(0.0, "16-bit PNG", 49.0, 5.0, 5.0)
    assert times.seconds(0.0, "JPEG", 12.0) == pytest.approx(0.12)
    assert times.seconds(0.0, "JPEG", 1.0) == pytest.approx(0.12 * 1.1 / 12.1)
    assert times.seconds(0.0, "16-bit PNG", 49.0) == pytest.approx(5.0)
    assert times.seconds(0.0, "tensor", 0.0) == 0


def test_a_single_odd_image_changes_nothing_and_a_machine_that_is_busy_now_does() -> None:
    times = DecodeTimes()
    for _ in range(9):
        times.add(0.0, "JPEG", 1.0, 0.01, 0.01)
    usual = times.seconds(0.0, "JPEG", 1.0)
    times.add(0.0, "JPEG", 1.0, 5.0, 5.0)
    assert times.seconds(0.0, "JPEG", 1.0) == usual
    for _ in range(9):
        times.add(1.0, "JPEG", 1.0, 0.01, 0.03)
    assert times.seconds(1.0, "JPEG", 1.0) == pytest.approx(3 * usual)


@given(images=st.integers(1, 50), stopped=st.floats(0.1, 60.0))
def test_a_process_that_was_stopped_while_it_decoded_does_not_make_images_dear(images: int, stopped: float) -> None:
    times = DecodeTimes()
    for _ in range(images):
        times.add(0.0, "JPEG", 1.0, 0.01, 0.01 + stopped)
    assert times.seconds(FRESH + 0.001, "JPEG", 1.0) == pytest.approx(0.01, rel=0.01)


@given(images=st.integers(1, 50), seconds=st.floats(0.001, 0.25))
def test_an_estimate_that_nothing_confirms_is_soon_forgotten(images: int, seconds: float) -> None:
    times = DecodeTimes()
    for _ in range(images):
        times.add(0.0, "JPEG", 1.0, seconds, seconds)
    assert times.seconds(5.0, "JPEG", 1.0) < seconds / 7


def test_a_dear_kind_is_tried_again_in_proportion_to_what_that_costs() -> None:
    times = DecodeTimes()
    times.add(0.0, "16-bit PNG", 49.0, 5.0, 5.0)
    assert times.seconds(10.0, "16-bit PNG", 49.0) > 3.0
    assert times.seconds(120.0, "16-bit PNG", 49.0) < 1.0
