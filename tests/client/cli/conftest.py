from pathlib import Path

import pytest
from PIL import Image

from tests.client.peer import Peer


@pytest.fixture(autouse=True)
def target(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOME_TARGET", peer.target)


@pytest.fixture
def image(tmp_path: Path) -> str:
    file = tmp_path / "image.png"
    Image.new("RGB", (28, 28), "navy").save(file)
    return str(file)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of eight files that the peer tells apart: the image n has 10 + n bytes."""
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for number in range(8):
        place = folder / "below" if number % 2 else folder
        (place / f"{number}.jpg").write_bytes(b"." * (10 + number))
    (folder / "notes.txt").write_text("no image")
    return folder
