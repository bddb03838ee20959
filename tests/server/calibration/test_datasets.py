import gzip
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from tome_server.calibration.datasets import DatasetError, load_labelled, read_idx


def idx(values: npt.NDArray[np.uint8], code: int = 0x08) -> bytes:
    header = bytes([0, 0, code, values.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


def counting(*shape: int) -> npt.NDArray[np.uint8]:
    return np.arange(math.prod(shape), dtype=np.uint8).reshape(shape)


def save_grey(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 3), level).save(path)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 28, 28)])
def test_an_idx_file_is_read_as_the_array_that_was_written(tmp_path, pack, shape):
    path = tmp_path / "values"
    path.write_bytes(pack(idx(counting(*shape))))
    values = read_idx(path)
    assert values.dtype == np.uint8
    np.testing.assert_array_equal(values, counting(*shape))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not an idx file"),
        (b"\x89PNG\r\n\x1a\n", "not an idx file"),
        (idx(counting(2, 2), code=0x0D), "type 0x0d"),
        (b"\0\0\x08\0", "0 dimensions"),
        (b"\0\0\x08\x03\0\0\0\x01", "inside its idx header"),
        (idx(counting(2, 3))[:-1], r"declares shape \(2, 3\), 6 bytes, but holds 5"),
        (idx(counting(2, 3)) + b"!", "but holds 7"),
        (gzip.compress(idx(counting(2, 3)), mtime=0)[:-9], "cannot be read"),
        (b"\x1f\x8b but no gzip", "cannot be read"),
    ],
)
def test_a_broken_idx_file_is_refused_with_its_name_and_what_is_wrong(tmp_path, content, complaint):
    path = tmp_path / "broken-file"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=f"broken-file.*{complaint}"):
        read_idx(path)


def test_a_shape_too_large_for_any_integer_type_is_refused(tmp_path):
    path = tmp_path / "huge"
    path.write_bytes(b"\0\0\x08\x03" + b"\xff" * 12)
    with pytest.raises(DatasetError, match="but holds 0"):
        read_idx(path)


def test_a_missing_idx_file_is_a_dataset_error(tmp_path):
    with pytest.raises(DatasetError, match="cannot be read"):
        read_idx(tmp_path / "absent")


def test_a_folder_of_class_folders_is_labelled_by_sorted_class_name(tmp_path):
    save_grey(tmp_path / "dog" / "b.png", 30)
    save_grey(tmp_path / "dog" / "a.PNG", 20)
    save_grey(tmp_path / "cat" / "z.png", 10)
    data = load_labelled(tmp_path)
    assert len(data) == 3
    assert data.classes == ("cat", "dog")
    assert [(image.getpixel((0, 0)), label) for image, label in data] == [(10, 0), (20, 1), (30, 1)]


def test_a_folder_of_images_is_unlabelled(tmp_path):
    save_grey(tmp_path / "2.png", 2)
    save_grey(tmp_path / "1.png", 1)
    data = load_labelled(tmp_path)
    assert data.classes == ()
    assert [(image.getpixel((0, 0)), label) for image, label in data] == [(1, None), (2, None)]


def test_other_files_and_hidden_names_are_passed_over(tmp_path):
    save_grey(tmp_path / "1.png", 1)
    save_grey(tmp_path / ".2.png", 2)
    save_grey(tmp_path / ".cache" / "3.png", 3)
    (tmp_path / "labels.json").write_text("{}")
    assert len(load_labelled(tmp_path)) == 1


def test_images_beside_class_folders_are_refused_as_ambiguous(tmp_path):
    save_grey(tmp_path / "1.png", 1)
    save_grey(tmp_path / "cat" / "2.png", 2)
    with pytest.raises(DatasetError, match="both images and subfolders"):
        load_labelled(tmp_path)


def test_a_folder_or_class_without_images_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="holds no images"):
        load_labelled(tmp_path)
    save_grey(tmp_path / "cat" / "1.png", 1)
    (tmp_path / "dog").mkdir()
    with pytest.raises(DatasetError, match=r"class folder .*dog holds no images"):
        load_labelled(tmp_path)


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        load_labelled(tmp_path / "absent")


def test_images_are_decoded_only_when_asked_for(tmp_path):
    save_grey(tmp_path / "1.png", 1)
    (tmp_path / "2.png").write_bytes(b"not an image")
    data = load_labelled(tmp_path)
    assert data[0][0].size == (4, 3)
    with pytest.raises(DatasetError, match=r"2\.png cannot be decoded"):
        data[1]


@pytest.mark.parametrize("index", [-1, 1])
def test_an_index_outside_the_data_set_is_an_index_error(tmp_path, index):
    save_grey(tmp_path / "1.png", 1)
    with pytest.raises(IndexError):
        load_labelled(tmp_path)[index]


@pytest.mark.parametrize("images_end", ["", ".gz"])
@pytest.mark.parametrize("labels_end", ["", ".gz"])
def test_idx_images_take_their_labels_from_the_file_beside_them(tmp_path, images_end, labels_end):
    images, labels = counting(3, 2, 4), np.array([1, 0, 2], np.uint8)
    for name, values, end in (("images-idx3", images, images_end), ("labels-idx1", labels, labels_end)):
        pack = gzip.compress if end else bytes
        (tmp_path / f"t10k-{name}-ubyte{end}").write_bytes(pack(idx(values)))
    data = load_labelled(tmp_path / f"t10k-images-idx3-ubyte{images_end}")
    assert len(data) == 3
    assert data.classes == ("0", "1", "2")
    assert [label for _, label in data] == [1, 0, 2]
    for (image, _), expected in zip(data, images, strict=True):
        assert image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", "pictures"])
def test_idx_images_without_a_labels_file_are_unlabelled(tmp_path, name):
    (tmp_path / name).write_bytes(idx(counting(2, 2, 2)))
    data = load_labelled(tmp_path / name)
    assert data.classes == ()
    assert [label for _, label in data] == [None, None]


def test_idx_labels_that_do_not_fit_the_images_are_refused(tmp_path):
    (tmp_path / "images-idx3").write_bytes(idx(counting(2, 2, 2)))
    (tmp_path / "labels-idx1").write_bytes(idx(counting(3)))
    with pytest.raises(DatasetError, match=r"shape \(3,\).*holds 2 images"):
        load_labelled(tmp_path / "images-idx3")


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2, 3), (0, 28, 28)])
def test_an_idx_file_that_holds_no_grey_images_is_refused(tmp_path, shape):
    (tmp_path / "labels-idx1").write_bytes(idx(counting(*shape)))
    with pytest.raises(DatasetError, match="not \\[images, height, width\\]"):
        load_labelled(tmp_path / "labels-idx1")


def test_a_part_of_the_images_keeps_labels_and_classes(tmp_path):
    for i in range(6):
        save_grey(tmp_path / ("cat", "dog")[i % 2] / f"{i}.png", i)
    images = load_labelled(tmp_path)
    assert images.labels == (0, 0, 0, 1, 1, 1)
    part = images.subset([5, 0])
    assert len(part) == 2
    assert part.labels == (1, 0)
    assert part.classes == ("cat", "dog")
    assert [(image.getpixel((0, 0)), label) for image, label in part] == [(5, 1), (0, 0)]
    assert part.subset([1]).labels == (0,)


def test_of_each_class_the_same_share_is_held_out(tmp_path):
    for i in range(40):
        save_grey(tmp_path / ("cat" if i < 8 else "dog") / f"{i:02}.png", i)
    images = load_labelled(tmp_path)
    kept, held = images.split(0.25, seed=3)
    assert sorted(kept + held) == list(range(40))
    assert sum(index < 8 for index in held) == 2
    assert len(held) == 10
    assert images.split(0.25, seed=3) == (kept, held)
    assert images.split(0.25, seed=4) != (kept, held)


def test_images_without_labels_cannot_be_split(tmp_path):
    save_grey(tmp_path / "1.png", 1)
    images = load_labelled(tmp_path)
    assert images.labels is None
    with pytest.raises(DatasetError, match="no labels: put those of each class into a folder of their own"):
        images.split(0.5, seed=0)
