"""Counts requests by status code, for both protocols."""

from collections.abc import Iterator
from contextlib import contextmanager

from tome_server.api.status import code_name, status_of
from tome_server.serving.engine import Engine


@contextmanager
def counted(engine: Engine, model: str) -> Iterator[None]:
    """Count the status with which the block ends."""
    code = "CANCELLED"
    try:
        yield
        code = "OK"
    except Exception as error:
        code = code_name(status_of(error))
        raise
    finally:
        count(engine, model, code)


def count(engine: Engine, model: str, code: str) -> None:
    """Count a response. A name that no model has is the caller's text, and must not become a label."""
    registry = engine.registry
    name = model or registry.default_name
    engine.metrics.requests.labels(name if name in registry.names else "unknown", code).inc()
