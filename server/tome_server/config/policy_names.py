"""The names of policies in settings; `scheduling.policy` has the policies."""

import re

from tome_api.nearest import meant

NAMES = ("price", "fixed:R", "max_accuracy", "max_batch", "slackfit")
PATTERN = "|".join(NAMES).replace(":R", ":[0-9]+")


def parse_policy(value: object) -> object:
    """Return the name of a policy. Raises ValueError for text that is none."""
    if isinstance(value, str) and not re.fullmatch(PATTERN, value):
        raise ValueError(f"{value!r} is no policy; there are {', '.join(NAMES)}{meant(value, NAMES)}")
    return value
