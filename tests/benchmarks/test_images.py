import json
from pathlib import Path

import pytest
from benchmarks import images


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("JPEG, progressive, 4:4:4", 1),
        ("PNG, 8-bit RGBA, sideways", 1),
        ("one colour transparent", 2),
        ("WebP, lossless", 1),
        ("BMP, RLE8", 1),
    ],
)
def test_no_picture_takes_more_memory_than_its_header_foretold(
    kind: str, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of memory can't be reset here")
    images.main(["--kind", kind, "--megapixels", "12", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == count
    for row in rows:
        assert 0 < row["peak"] < row["foretold"] < 320
        assert row["cpu_seconds"] > 0
