from pathlib import Path

import pytest
from PIL import Image

from tome_server.scheduling.profile import Profile

picture = pytest.importorskip("tome_server.cli.pictures", exc_type=ImportError)

PROFILES = {
    "usual": Profile(
        (1, 2, 4), (0, 4, 8), ((0.02, 0.01, 0.01), (0.04, 0.02, 0.01), (0.4, 0.2, 0.1)), ((1.0,) * 3,) * 3, 0.001
    ),
    "one cell": Profile((1,), (0,), ((0.5,),), ((0.5,),)),
    "flat": Profile((1, 8), (0, 4), ((0.5, 0.5),) * 2, ((0.5, 0.5),) * 2),
}


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("suffix", picture.FORMATS)
def test_a_picture_is_drawn_in_the_format_that_its_name_says(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"profile{suffix}"
    picture.draw_profile(PROFILES[name], "a model on a device", path)
    assert path.read_bytes()[:5] == {".png": b"\x89PNG\r", ".svg": b"<?xml", ".pdf": b"%PDF-"}[suffix]
    if suffix == ".png":
        with Image.open(path) as image:
            assert len(image.convert("L").getcolors(2**16) or ()) > 10


def test_a_picture_names_what_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "profile.svg"
    picture.draw_profile(PROFILES["usual"], "a model on a device", path)
    text = path.read_text()
    for words in ("a model on a device", "latency of a batch, p50, ms", "images per second", "batch size"):
        assert words in text
