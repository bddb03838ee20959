import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from tome_api.v1.inference_pb2 import Tensor
from tome_client.inputs import image_input

PIXELS = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)


def test_a_path_is_read_and_sent_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "image.jpg"
    file.write_bytes(b"encoded")
    assert image_input(file) == b"encoded"
    assert image_input(str(file)) == b"encoded"


def test_a_missing_file_is_the_callers_to_handle() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        image_input("nowhere.png")


@pytest.mark.parametrize(
    "image", [b"encoded", bytearray(b"encoded"), memoryview(b"encoded"), np.frombuffer(b"encoded", np.uint8)]
)
def test_one_dimension_of_bytes_is_an_encoded_image(image: object) -> None:
    assert image_input(image) == b"encoded"


def test_a_pillow_image_becomes_rgb_pixels_row_by_row() -> None:
    tensor = image_input(Image.fromarray(PIXELS))
    assert tensor == Tensor(data_type=Tensor.DATA_TYPE_UINT8, shape=[2, 4, 3], data=PIXELS.tobytes())


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_a_pillow_image_of_any_mode_is_converted(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    tensor = image_input(image)
    assert list(tensor.shape) == [2, 4, 3]
    assert tensor.data == image.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), "black")
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert image_input(image.convert(mode)).data == bytes([0, 0, 0, 255, 255, 255])


def test_a_transparent_colour_is_laid_on_white() -> None:
    image = Image.new("RGB", (1, 1), "black")
    image.info["transparency"] = (0, 0, 0)
    assert image_input(image).data == bytes([255, 255, 255])


@pytest.mark.parametrize("mode", ["I", "I;16", "F"])
def test_a_pillow_image_of_more_than_8_bits_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"scale an image of mode {mode}"):
        image_input(Image.new(mode, (1, 1)))


@given(
    arrays.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6), st.just(3))),
    st.sampled_from([1, 2, -1]),
    st.sampled_from([1, 3, -2]),
)
def test_pixels_are_sent_in_c_order_however_they_lie(pixels: np.ndarray, down: int, right: int) -> None:
    view = pixels[::down, ::right]
    tensor = image_input(view)
    assert tensor.data_type == Tensor.DATA_TYPE_UINT8
    assert np.array_equal(np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape), view)


def test_float_input_is_sent_as_float32() -> None:
    normalised = np.linspace(-2, 2, 24, dtype=np.float32).reshape(2, 4, 3).transpose(2, 0, 1)
    tensor = image_input(normalised)
    assert tensor.data_type == Tensor.DATA_TYPE_FLOAT32
    assert list(tensor.shape) == [3, 2, 4]
    assert np.array_equal(np.frombuffer(tensor.data, "<f4").reshape(3, 2, 4), normalised)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (PIXELS.astype(np.float64), r"got shape \[2, 4, 3\] of element type 'd'"),
        (PIXELS.astype(">f4"), "element type '>f'"),
        (PIXELS.astype(np.int8), "element type 'b'"),
        (PIXELS[..., 0], r"got shape \[2, 4\]"),
        (PIXELS[None], r"got shape \[1, 2, 4, 3\]"),
        (PIXELS.transpose(2, 0, 1), r"uint8 array must be \[height, width, 3\]"),
        (np.uint8(1), r"got shape \[\]"),
        (np.zeros(3, np.float32), r"got shape \[3\]"),
    ],
)
def test_an_array_of_another_kind_is_refused_by_its_shape_and_type(array: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        image_input(array)


class Exposed:
    """An array that only numpy's array interface gives access to."""

    def __init__(self, interface: dict) -> None:
        self.__array_interface__ = interface


def test_an_array_interface_over_memory_is_read() -> None:
    tensor = image_input(Exposed(PIXELS.__array_interface__))
    assert list(tensor.shape) == [2, 4, 3]
    assert tensor.data == PIXELS.tobytes()


def test_an_array_interface_over_a_buffer_is_read() -> None:
    floats = PIXELS.astype(np.float32)
    interface = {"typestr": "<f4", "shape": (2, 4, 3), "data": floats.tobytes(), "version": 3}
    assert image_input(Exposed(interface)).data == floats.tobytes()


def test_an_array_interface_with_strides_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        image_input(Exposed(PIXELS[::-1].__array_interface__))


@pytest.mark.parametrize("image", [None, 3, [[1, 2]], object()])
def test_what_is_no_image_is_refused_by_its_type(image: object) -> None:
    with pytest.raises(TypeError, match=f"an image is a path.*got {type(image).__name__}"):
        image_input(image)


def test_the_client_imports_neither_numpy_nor_pillow_nor_torch() -> None:
    script = """
import sys
import numpy
array = numpy.zeros((2, 4, 3), numpy.uint8)
for heavy in [name for name in sys.modules if name.partition(".")[0] == "numpy"]:
    sys.modules[heavy] = None
sys.modules["PIL"] = sys.modules["torch"] = None  # None makes an import fail.

import tome_client, tome_client.cli
from tome_client.requests import predict_request
assert predict_request(array, {}).tensor.shape == [2, 4, 3]
"""
    subprocess.run([sys.executable, "-c", script], check=True)
