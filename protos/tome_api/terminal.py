"""Output for any terminal: characters that its encoding lacks are replaced."""

from __future__ import annotations

import codecs
import io
import sys

_HANDLER = "tome_api.terminal"

_INSTEAD = {"→": "->", "…": "...", "×": "x", "−": "-", "²": "2"}


def never_refuse() -> None:
    """Lets standard output and standard error take any text, whatever their encoding is.

    Without this, a label or a file name that is not ASCII would end the command under `LANG=C`, and so would a file
    name that is not in the terminal's encoding.
    """
    codecs.register_error(_HANDLER, _replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def _replaced(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    shown = (_INSTEAD.get(one, one).encode("ascii", "backslashreplace").decode() for one in lacking)
    return "".join(shown), error.end
