from tome_server.overhead import REPLIES_REMEMBERED, Overhead


def test_the_margin_is_enough_for_most_of_the_latest_replies_and_never_less_than_the_least() -> None:
    overhead = Overhead(0.002)
    assert overhead.margin == 0.002
    for _ in range(REPLIES_REMEMBERED):
        overhead.replied(0.001)
    assert overhead.margin == 0.002
    for _ in range(4):
        overhead.replied(1.0)
    assert overhead.margin == 0.002
    overhead.replied(0.5)  # now more than one in twenty took so long
    assert overhead.margin == 0.5
    for _ in range(REPLIES_REMEMBERED):
        overhead.replied(0.001)
    assert overhead.margin == 0.002


def test_decoding_is_estimated_from_the_latest_images() -> None:
    overhead = Overhead(0.0)
    assert overhead.decoding == 0
    for _ in range(100):
        overhead.decoded(0.02)
    assert 0.0199 < overhead.decoding <= 0.02
    overhead.decoded(0.12)
    assert 0.029 < overhead.decoding < 0.031
