"""What somebody meant who misspelt a name."""

import difflib
from collections.abc import Iterable


def meant(given: str, names: Iterable[str], most: int = 1) -> str:
    """Return "; did you mean X?" with the nearest of `names`, at most so many; nothing where none is near."""
    close = difflib.get_close_matches(given, list(names), most, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
