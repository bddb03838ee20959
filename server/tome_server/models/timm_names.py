"""timm's names of architectures, read from its source, since importing timm and with it torch takes seconds."""

import difflib
import importlib.util
import re
from functools import cache
from pathlib import Path

from tome_server.errors import ModelLoadError

_REGISTERED = re.compile(r"^@register_model\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
_DEPRECATED = re.compile(r"^register_model_deprecations\(__name__, \{(.*?)^\}", re.MULTILINE | re.DOTALL)
_KEY = re.compile(r"^\s*['\"]([\w.]+)['\"]\s*:", re.MULTILINE)
# Fewer names mean that this timm registers its models in another way.
_LEAST = 500
# How many names an error suggests.
_SUGGESTED = 3


@cache
def architectures() -> frozenset[str]:
    """Return all names that the installed timm knows, without tags; none if they can't be read from its source."""
    found: set[str] = set()
    spec = importlib.util.find_spec("timm")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for file in Path(place, "models").glob("*.py"):
            text = file.read_text(encoding="utf-8")
            found.update(_REGISTERED.findall(text))
            for names in _DEPRECATED.findall(text):
                found.update(name.partition(".")[0] for name in _KEY.findall(names))
    return frozenset(found if len(found) >= _LEAST else ())


def check_architecture(architecture: str) -> None:
    """Raises ModelLoadError, with the nearest names, for a name that timm doesn't know. The tag isn't checked."""
    name, known = architecture.split(".")[0], architectures()
    if not known or name in known:
        return
    longer = [other for other in sorted(known) if name and other.startswith(name)]
    close = longer[:_SUGGESTED] or difflib.get_close_matches(name, sorted(known), _SUGGESTED)
    hint = f"did you mean {' or '.join(close)}?" if close else "tome-server models supported lists those there are"
    raise ModelLoadError(f"timm has no model named {architecture!r}; {hint}")
