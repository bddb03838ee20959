"""Counts requests by how they ended, whatever protocol they came by."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from tome_server.api.status import code_name, status_of
from tome_server.errors import RequestError
from tome_server.serving.engine import Engine

log = logging.getLogger(__name__)


@contextmanager
def counted(engine: Engine, model: str) -> Iterator[None]:
    """Count how answering a request for `model` ended. An error that isn't the request's is logged."""
    code = "CANCELLED"
    try:
        yield
        code = "OK"
    except Exception as error:
        code = code_name(status_of(error))
        if not isinstance(error, RequestError):
            log.exception("unexpected error")
        raise
    finally:
        count(engine, model, code)


def count(engine: Engine, model: str, code: str) -> None:
    """Count an answer. A model's name is the caller's text until it is known, and no label for metrics."""
    registry = engine.registry
    name = model or registry.default_name
    engine.metrics.requests.labels(name if name in registry.names else "unknown", code).inc()
