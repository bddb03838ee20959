"""Quality reports: whatever a file holds, reading it gives a sound record or the documented error."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from tests.server.json_mutations import mutated
from tome_server.errors import ModelLoadError
from tome_server.models.quality_report import QualityReport, read_report

REPORT: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "weights_sha256": "ab" * 32,
    "data": "images",
    "images": 500,
    "dtype": "float32",
    "levels": [
        {"r": 0, "macs": 1000, "top1": 0.8, "agreement": 1.0},
        {"r": 4, "macs": 800, "top1": None, "agreement": 0.9, "schedule": [4, 4]},
    ],
}


def read(content: bytes) -> QualityReport:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "quality.json")
        path.write_bytes(content)
        return read_report(path)


def test_what_a_report_holds_is_read() -> None:
    report = read(json.dumps(REPORT).encode())
    assert (report.architecture, report.weights, report.dtype, report.images) == (
        "vit_tiny_patch16_224",
        "ab" * 32,
        "float32",
        500,
    )
    assert {r: (quality.agreement, quality.top1) for r, quality in report.levels.items()} == {
        0: (1.0, 0.8),
        4: (0.9, None),
    }
    assert report.schedules == {4: (4, 4)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"levels": [{"r": 0, "agreement": 95.2}]}, r"levels\[0\]\.agreement must be a number of 0 to 1, not 95.2"),
        ({"levels": [{"r": 0, "agreement": 1e-12}]}, r"levels\[0\]\.agreement must be 0 or at least 1e-09, not 1e-12"),
        ({"levels": [{"r": 0, "agreement": True}]}, r"levels\[0\]\.agreement must be a number"),
        ({"levels": [{"r": 1e308, "agreement": 1}]}, r"levels\[0\]\.r must be a whole number .*, not 1e\+308"),
        ({"levels": [{"r": 0, "agreement": 1}] * 2}, r"levels\[1\]\.r is 0, as that of another level"),
        ({"levels": [{"agreement": 1}]}, r"levels\[0\]\.r is missing"),
        ({"images": 0}, "images must be a whole number of 1 to 1,000,000,000, not 0"),
        ({"dtype": None}, "dtype must be text, not None"),
        ({"weights_sha256": 3}, "weights_sha256 must be text, not 3"),
    ],
)
def test_a_field_out_of_its_bounds_is_named_with_file_and_value(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"quality report .*quality\.json can't be read: {says}"):
        read(json.dumps(REPORT | change).encode())


@given(mutated(REPORT))
def test_a_mutated_report_ends_in_a_sound_record_or_the_documented_error(content: bytes) -> None:
    try:
        report = read(content)
    except ModelLoadError as error:
        assert "quality.json can't be read: " in str(error)  # noqa: PT017
        str(error).encode()
        return
    for r, quality in report.levels.items():
        assert type(r) is int
        for share in (quality.agreement, quality.top1):
            assert share is None or share == 0 or 1e-9 <= share <= 1
    for per_block in report.schedules.values():
        assert all(type(tokens) is int and 0 <= tokens <= 2**14 for tokens in per_block)
