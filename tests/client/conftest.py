from collections.abc import Iterator

import pytest

from .peer import Peer


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer() as running:
        yield running
