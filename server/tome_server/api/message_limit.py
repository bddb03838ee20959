"""The largest message that either protocol accepts."""

# Room for what goes with an image of the largest size, so that one somewhat above it gets our own, clearer refusal.
MESSAGE_SLACK = 2


def message_limit(max_image_bytes: int) -> int:
    """Return the most bytes of a message, given the most bytes of an image."""
    return MESSAGE_SLACK * max_image_bytes
