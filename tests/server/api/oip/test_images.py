import numpy as np
import pytest

from tome_server.api.oip.images import images_of
from tome_server.api.oip.messages import Tensor
from tome_server.errors import InvalidRequestError, TooLargeError
from tome_server.serving.requests import EncodedImage, Normalised, Pixels


def test_each_kind_of_tensor_becomes_one_image_for_each_row() -> None:
    floats = np.arange(2 * 3 * 4 * 5, dtype="<f4").reshape(2, 3, 4, 5)
    assert images_of(Tensor("image", "FP32", floats.shape, floats.tobytes()), 8) == [
        Normalised((3, 4, 5), one.tobytes()) for one in floats
    ]
    pixels = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    assert images_of(Tensor("image", "UINT8", pixels.shape, pixels.tobytes()), 8) == [
        Pixels((4, 5, 3), one.tobytes()) for one in pixels
    ]
    for shape in ((2,), (2, 1)):
        assert images_of(Tensor("image", "BYTES", shape, [b"a", b"b"]), 8) == [EncodedImage(b"a"), EncodedImage(b"b")]


def test_a_single_image_is_not_copied() -> None:
    data = bytes(12)
    [image] = images_of(Tensor("image", "FP32", (1, 3, 1, 1), data), 8)
    assert image.data is data


@pytest.mark.parametrize(
    ("tensor", "field"),
    [
        (Tensor("picture", "FP32", (1, 3, 1, 1), bytes(12)), "inputs"),
        (Tensor("image", "FP16", (1, 3, 1, 1), bytes(6)), "image.datatype"),
        (Tensor("image", "FP32", (3, 1, 1), bytes(12)), "image.shape"),
        (Tensor("image", "FP32", (0, 3, 1, 1), b""), "image.shape"),
        (Tensor("image", "FP32", (-1, -3, 1, 1), bytes(12)), "image.shape"),
        (Tensor("image", "FP32", (1,) * 9, bytes(4)), "image.shape"),
        (Tensor("image", "FP32", (2**62, 2**62, 2**62, 2**62), bytes(12)), "image"),
        (Tensor("image", "FP32", (1, 3, 1, 1), bytes(11)), "image"),
        (Tensor("image", "UINT8", (1, 1, 1, 4), bytes(4)), "image.shape"),
        (Tensor("image", "UINT8", (1, 1, 3), bytes(3)), "image.shape"),
        (Tensor("image", "UINT8", (2, 1, 1, 3), bytes(3)), "image"),
        (Tensor("image", "BYTES", (1, 2), [b"a", b"b"]), "image.shape"),
        (Tensor("image", "BYTES", (), [b"a"]), "image.shape"),
        (Tensor("image", "BYTES", (2,), [b"a"]), "image"),
    ],
)
def test_a_tensor_that_is_no_images_is_refused(tensor: Tensor, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        images_of(tensor, 8)
    assert caught.value.field == field
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("image", "FP32", (9, 3, 1, 1), bytes(108)),
        Tensor("image", "UINT8", (9, 1, 1, 3), bytes(27)),
        Tensor("image", "BYTES", (9,), [b""] * 9),
    ],
)
def test_more_images_than_the_server_holds_are_too_large(tensor: Tensor) -> None:
    with pytest.raises(TooLargeError, match="9 images in one request; this server holds at most 8"):
        images_of(tensor, 8)
    assert len(images_of(tensor, 9)) == 9
