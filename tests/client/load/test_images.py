from __future__ import annotations

import json
from pathlib import Path

import pytest

from tome_client.load import Sample, read_samples


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())


def test_images_are_read_from_the_folder_and_those_in_it(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.JPEG", "notes.txt", "more/c.webp")
    assert read_samples(tmp_path) == [
        Sample("a.png", b"a.png"),
        Sample("b.JPEG", b"b.JPEG"),
        Sample("more/c.webp", b"more/c.webp"),
    ]


def test_subfolders_are_labels_where_every_image_lies_in_one(tmp_path: Path) -> None:
    write(tmp_path, "Coat/a.png", "Dress/b.png")
    assert [one.label for one in read_samples(tmp_path)] == ["Coat", "Dress"]
    write(tmp_path, "c.png")
    assert [one.label for one in read_samples(tmp_path)] == [None, None, None]


def test_labels_are_found_by_path_or_name(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "more/b.png")
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"a.png": "T-shirt/top", "b.png": 3}))
    assert [one.label for one in read_samples(tmp_path, labels)] == ["T-shirt/top", "3"]
    labels.write_text(json.dumps({"a.png": "Coat", "b.png": "Dress", "more/b.png": "Shirt"}))
    assert [one.label for one in read_samples(tmp_path, labels)] == ["Coat", "Shirt"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [("{", "not JSON"), ("[]", "must be a JSON object"), ('{"b.png": "Coat"}', "no label for a.png")],
)
def test_wrong_labels_are_refused(tmp_path: Path, labels: str, message: str) -> None:
    write(tmp_path, "a.png")
    (tmp_path / "labels.json").write_text(labels)
    with pytest.raises(ValueError, match=rf"labels\.json: {message}"):
        read_samples(tmp_path, tmp_path / "labels.json")


def test_of_many_as_many_as_asked_for_are_drawn_by_the_seed(tmp_path: Path) -> None:
    write(tmp_path, *(f"{number}.png" for number in range(50)))
    drawn = read_samples(tmp_path, most=10, seed=1)
    assert len({one.name for one in drawn}) == 10
    assert drawn == read_samples(tmp_path, most=10, seed=1)
    assert drawn != read_samples(tmp_path, most=10, seed=2)


def test_a_folder_without_images_or_none_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no JPEG, PNG, WebP or BMP image in "):
        read_samples(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_samples(tmp_path / "nowhere")
