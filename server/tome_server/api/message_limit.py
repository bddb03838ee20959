"""How long a message may be, by whichever protocol it comes."""

# Room for what goes with an image of the largest size, so that one somewhat above it gets our own, clearer refusal.
MESSAGE_SLACK = 2


def message_limit(max_image_bytes: int) -> int:
    """Return the most bytes of a message, where an image may have so many."""
    return MESSAGE_SLACK * max_image_bytes
