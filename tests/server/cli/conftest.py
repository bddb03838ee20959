"""Commands set what is logged; no test finds what another's command has set."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    logger = logging.getLogger("tome_server")
    level = logger.level
    yield
    logger.setLevel(level)
