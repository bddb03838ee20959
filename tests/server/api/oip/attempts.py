"""For tests of input that may be right by chance."""

from collections.abc import Callable
from typing import TypeVar

from tome_server.errors import RequestError

T = TypeVar("T")


def attempt(call: Callable[[], T]) -> tuple[T | None, RequestError | None]:
    """Return what `call` returns, or what it is refused with."""
    try:
        return call(), None
    except RequestError as error:
        return None, error
