"""Bearer tokens (RFC 6750) from a file that may be exchanged while the server runs."""

import hashlib
import hmac
import logging
import re
from pathlib import Path

from tome_server.api.watched_file import MOST_BYTES, state
from tome_server.config.text_file import read_text
from tome_server.errors import ConfigError

log = logging.getLogger(__name__)

# Shorter ones can be guessed.
LEAST_LENGTH = 16
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_SCHEME = "bearer "
# Digits of a token's digest that name its holder: enough to tell a few thousand apart, too few to recover the token.
_NAMED = 8


class Tokens:
    """The tokens of a file, one on each line. Empty lines and lines that start with # are skipped.

    Each lookup checks whether the file has changed, and reads it again if so. If the new contents can't be used, that
    is logged and the previous tokens stay valid. A file without tokens leaves none valid. Raises ConfigError if the
    file holds no tokens at first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._said = ""
        try:
            self._seen = state(path)
            self._digests = _read(path)
        except OSError as error:
            raise ConfigError(f"auth.tokens: {path}: {error.strerror}") from error
        except ValueError as error:  # a path that no file can have
            raise ConfigError(f"auth.tokens: {error}") from error
        if not self._digests:
            raise ConfigError(f"auth.tokens: {path} holds no tokens, so every call would be refused")

    def holder(self, authorization: str | bytes | None) -> str | None:
        """Return a short name for the holder of the token in an authorization header, None if the token is unknown."""
        self._follow()
        header = authorization.decode("latin-1") if isinstance(authorization, bytes) else authorization or ""
        if header[: len(_SCHEME)].lower() != _SCHEME:
            return None
        given = _digest(header[len(_SCHEME) :].strip())
        # Every token is compared, each in constant time, so that the time taken reveals nothing.
        found = [digest for digest in self._digests if hmac.compare_digest(digest, given)]
        return f"token-{found[0].hex()[:_NAMED]}" if found else None

    def _follow(self) -> None:
        """Read the file again if it has changed."""
        try:
            now = state(self._path)
            if now == self._seen:
                return
            found = _read(self._path)
        except (ConfigError, OSError) as error:
            self._say(f"the tokens were not exchanged, those before stay valid: {error}")
            return
        self._said = ""
        self._seen, self._digests = now, found
        log.info("%d tokens read anew from %s", len(found), self._path)

    def _say(self, what: str) -> None:
        if what != self._said:
            self._said = what
            log.error(what)


def _read(path: Path) -> list[bytes]:
    """Return the digests of a file's tokens. The tokens themselves are not kept, so they can't be logged.

    Raises ConfigError, whose text doesn't repeat them either.
    """
    digests = []
    try:
        text = read_text(path, MOST_BYTES)
    except ValueError as error:
        raise ConfigError(f"auth.tokens: {path}: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if not _TOKEN.fullmatch(token):
            raise ConfigError(f"auth.tokens: {path}:{number}: a token is letters, digits and -._~+/, with = at its end")
        if len(token) < LEAST_LENGTH:
            raise ConfigError(f"auth.tokens: {path}:{number}: a token has at least {LEAST_LENGTH} characters")
        digests.append(_digest(token))
    return digests


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
