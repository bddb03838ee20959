"""What a model's own settings may say in the place of the server's: sections as the server's settings have them."""

from tome_server.settings import Count, Duration, Size, Strict


class OwnBatching(Strict):
    """How its requests wait; what is left out is as the server's `batching` says."""

    max_batch: Count | None = None
    """Images of this model in a batch."""
    max_delay: Duration | None = None
    """How long an idle device waits for batch-mates of one of its requests."""
    max_pending: Count | None = None
    """Its requests held at once, within what the server holds of all."""


class OwnLimits(Strict):
    """What one image may cost; what is left out is as the server's `limits` say."""

    max_image_bytes: Size | None = None
    """Encoded image, or data of a tensor; at most what the server's `limits` take."""
    max_image_pixels: Count | None = None
    """Width × height of the image, and of what resizing would make of a long and thin one."""
