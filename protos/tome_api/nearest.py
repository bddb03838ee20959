"""The nearest known name to one that is misspelt."""

import difflib
from collections.abc import Iterable


def meant(given: str, names: Iterable[str], most: int = 1) -> str:
    """Returns "; did you mean X?" with at most `most` of the nearest `names`; an empty text if none is near."""
    close = difflib.get_close_matches(given, list(names), most, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
