"""Requests no server may trip over: each is refused by name or answered rightly, and the next one is answered."""

import io
import math
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import tome_server.merging.timm_import  # noqa: F401  isort: skip
import torch
from google.protobuf.duration_pb2 import Duration
from PIL import Image
from timm.data import create_transform

from tests.server.api.rpc.wire import MIB, black_png, chunk, normalised, pixels, refusal, scores, scrape
from tests.server_process import ServerProcess
from tome_api.v1 import inference_pb2 as pb

UINT8, FLOAT32 = pb.Tensor.DATA_TYPE_UINT8, pb.Tensor.DATA_TYPE_FLOAT32
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(autouse=True)
def _still_answers(stub: Any, good: pb.PredictRequest) -> Iterator[None]:
    """After each of these requests the server answers a good one."""
    yield
    assert scores(stub.Predict(good)).sum() == pytest.approx(1, abs=1e-4)


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:  # noqa: A002
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


FRAMES = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
ANIMATED = {"save_all": True, "append_images": FRAMES[1:]}
PHOTO = encode(noise(200, 100), "JPEG")

BAD_IMAGES = {
    "empty": (b"", "is empty"),
    "text": (b"GET / HTTP/1.1\r\n\r\n", "is not a JPEG, PNG, WEBP or BMP image"),
    "zeros": (bytes(1000), "is not a JPEG, PNG, WEBP or BMP image"),
    "only a signature": (b"\x89PNG\r\n\x1a\n", "is cut off: it ends in its header"),
    "half a JPEG": (PHOTO[: len(PHOTO) // 2], "is cut off: it ends before its last pixel"),
    "half a PNG": (encode(noise(200, 100))[:10_000], r"is cut off: it ends where [\d,]+ bytes or more are missing"),
    "half a WebP": (encode(noise(200, 100), "WEBP")[:5_000], r"is cut off: it ends after 5,000 of [\d,]+ bytes"),
    "half a BMP": (encode(noise(200, 100), "BMP")[:10_000], "is cut off: it ends after 10,000 of 60,054 bytes"),
    "a PNG with a wrong checksum": (
        encode(noise(200, 100)).replace(b"IDAT\x78", b"IDAT\x00", 1),
        "is damaged: the check sum of .* IDAT, is wrong",
    ),
    "still GIF": (encode(FRAMES[0], "GIF"), "is a GIF image; accepted are JPEG, PNG, WEBP or BMP"),
    "animated GIF": (encode(FRAMES[0], "GIF", **ANIMATED), "is a GIF"),
    "animated WebP": (encode(FRAMES[0], "WEBP", **ANIMATED), "is animated; send one frame"),
    "animated PNG": (encode(FRAMES[0], "PNG", **ANIMATED), "is animated; send one frame"),
    "TIFF": (encode(FRAMES[0], "TIFF"), "is a TIFF image; accepted are JPEG, PNG, WEBP or BMP"),
    "AVIF": (encode(FRAMES[0], "AVIF"), "is an AVIF image; accepted are"),
    "too many bytes": (PHOTO + bytes(16 * MIB), r"has 16,\d\d\d,\d\d\d bytes; at most 16,777,216 are accepted"),
    "too many pixels": (black_png(20_000, 20_000), "is 20000×20000 pixels; at most 50,000,000 pixels are accepted"),
    "thin": (black_png(1, 1_000_000), "is 1×1000000 pixels, too long and thin"),
    "flat": (black_png(1_000_000, 1), "is 1000000×1 pixels, too long and thin"),
    "no pixels": (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b""),
        "is 0×0 pixels",
    ),
}


@pytest.mark.parametrize(("image", "problem"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_an_image_that_cannot_be_used_is_refused_with_the_reason(stub: Any, image: bytes, problem: str) -> None:
    refused = refusal(lambda: stub.Predict(pb.PredictRequest(image=image)))
    assert refused.code is INVALID
    assert refused.field == "image"
    assert re.match(f"image: {problem}", refused.message)


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(stub: Any, server: ServerProcess) -> None:
    process = Path(f"/proc/{server.process.pid}")
    if not process.exists():
        pytest.skip("needs /proc")

    def peak() -> int:
        (line,) = (line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    image = black_png(20_000, 20_000)
    assert len(image) < MIB
    before = peak()
    refusal(lambda: stub.Predict(pb.PredictRequest(image=image)))
    # Decoded it would take 400 MB.
    assert peak() - before < 100 * MIB


def test_a_message_over_the_limit_is_refused_by_grpc(stub: Any) -> None:
    refused = refusal(lambda: stub.Predict(pb.PredictRequest(image=bytes(33 * MIB))))
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in refused.message


def test_a_request_without_input_is_refused(stub: Any) -> None:
    refused = refusal(lambda: stub.Predict(pb.PredictRequest()))
    assert (refused.code, refused.field) == (INVALID, "image")
    assert refused.message == "image: is missing; send image or tensor"


def with_value(value: float) -> bytes:
    values = np.zeros((3, 28, 28), "<f4")
    values[1, 2, 3] = value
    return values.tobytes()


BAD_TENSORS = {
    "empty": (pb.Tensor(), "data_type"),
    "unspecified type": (pb.Tensor(shape=[28, 28, 3], data=bytes(2352)), "data_type"),
    "unknown type": (pb.Tensor(data_type=77, shape=[28, 28, 3], data=bytes(2352)), "data_type"),
    "no shape": (pb.Tensor(data_type=UINT8, data=bytes(2352)), "shape"),
    "grey": (pb.Tensor(data_type=UINT8, shape=[28, 28], data=bytes(784)), "shape"),
    "channels first": (pb.Tensor(data_type=UINT8, shape=[3, 28, 28], data=bytes(2352)), "shape"),
    "a batch": (pb.Tensor(data_type=UINT8, shape=[1, 28, 28, 3], data=bytes(2352)), "shape"),
    "too short": (pb.Tensor(data_type=UINT8, shape=[28, 28, 3], data=bytes(2351)), "data"),
    "too long": (pb.Tensor(data_type=UINT8, shape=[28, 28, 3], data=bytes(2353)), "data"),
    "no data": (pb.Tensor(data_type=UINT8, shape=[28, 28, 3]), "data"),
    "too many bytes": (pb.Tensor(data_type=UINT8, shape=[2400, 2400, 3], data=bytes(17_280_000)), "data"),
    "no height": (pb.Tensor(data_type=UINT8, shape=[0, 28, 3]), "shape"),
    "no width": (pb.Tensor(data_type=UINT8, shape=[28, 0, 3]), "shape"),
    "negative": (pb.Tensor(data_type=UINT8, shape=[-28, -28, 3], data=bytes(2352)), "shape"),
    "thin": (pb.Tensor(data_type=UINT8, shape=[1, 1_000_000, 3], data=bytes(3_000_000)), "shape"),
    # Their products are 0, 12 and 2352 in 64 bits.
    "overflow to nothing": (pb.Tensor(data_type=UINT8, shape=[2**62, 4, 3]), "data"),
    "overflow to little": (pb.Tensor(data_type=UINT8, shape=[2**62 + 1, 4, 3], data=bytes(12)), "data"),
    "overflow to fit": (pb.Tensor(data_type=UINT8, shape=[2**60 + 28, 28, 3], data=bytes(2352)), "data"),
    "huge": (pb.Tensor(data_type=UINT8, shape=[2**63 - 1, 2**63 - 1, 3], data=bytes(3)), "data"),
    "as many dimensions as bytes": (pb.Tensor(data_type=UINT8, shape=[1] * 100_000, data=b"\0"), "shape"),
    "float, empty": (pb.Tensor(data_type=FLOAT32), "shape"),
    "float, channels last": (pb.Tensor(data_type=FLOAT32, shape=[28, 28, 3], data=bytes(9408)), "shape"),
    "float, larger": (pb.Tensor(data_type=FLOAT32, shape=[3, 56, 56], data=bytes(37_632)), "shape"),
    "float, negative": (pb.Tensor(data_type=FLOAT32, shape=[3, -28, -28], data=bytes(9408)), "shape"),
    "float, dimensions": (pb.Tensor(data_type=FLOAT32, shape=[1] * 100_000, data=bytes(4)), "shape"),
    "float, too short": (pb.Tensor(data_type=FLOAT32, shape=[3, 28, 28], data=bytes(2352)), "data"),
    "float, odd": (pb.Tensor(data_type=FLOAT32, shape=[3, 28, 28], data=bytes(9407)), "data"),
    "NaN": (pb.Tensor(data_type=FLOAT32, shape=[3, 28, 28], data=with_value(math.nan)), "data"),
    "infinity": (pb.Tensor(data_type=FLOAT32, shape=[3, 28, 28], data=with_value(math.inf)), "data"),
    "minus infinity": (pb.Tensor(data_type=FLOAT32, shape=[3, 28, 28], data=with_value(-math.inf)), "data"),
}


@pytest.mark.parametrize(("tensor", "field"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_a_tensor_that_cannot_be_used_is_refused_with_the_field(stub: Any, tensor: pb.Tensor, field: str) -> None:
    refused = refusal(lambda: stub.Predict(pb.PredictRequest(tensor=tensor)))
    assert (refused.code, refused.field) == (INVALID, f"tensor.{field}")
    assert len(refused.message) < 200


LARGEST = 98  # half of the 196 patches
BAD_SETTINGS = {
    "r negative": ({"r": -1}, "r", f"must lie in 0..{LARGEST} .*is -1"),
    "r huge": ({"r": 2**31 - 1}, "r", f"must lie in 0..{LARGEST} .*is 2147483647"),
    "r one too large": ({"r": LARGEST + 1}, "r", f"must lie in 0..{LARGEST}"),
    "min_r negative": ({"min_r": -(2**31)}, "min_r", "must lie in"),
    "max_r huge": ({"max_r": 1000}, "max_r", "must lie in"),
    "bounds crossed": ({"min_r": 5, "max_r": 4}, "min_r", "is 5, more than max_r, which is 4"),
    "min_quality zero": ({"min_quality": 0.0}, "min_quality", "must lie above 0 and up to 1, and is 0"),
    "min_quality negative": ({"min_quality": -1e300}, "min_quality", "must lie above 0 and up to 1, and is -1e"),
    "min_quality above 1": ({"min_quality": 99.0}, "min_quality", "must lie above 0 and up to 1, and is 99"),
    "min_quality not a number": ({"min_quality": float("nan")}, "min_quality", "must lie above 0 .*is nan"),
    "min_quality infinite": ({"min_quality": float("inf")}, "min_quality", "must lie above 0 .*is inf"),
    "min_quality against min_r": ({"min_quality": 0.9, "min_r": 15}, "min_quality", "is 0.9, which needs r ≤ 14; "),
    "min_quality against r": (
        {"min_quality": 1.0, "r": 14},
        "min_quality",
        r"is 1, which needs r ≤ \d+; asked is ≥ 14",
    ),
    "r below": ({"r": 2, "min_r": 4}, "r", "is 2, outside of"),
    "r above": ({"r": 8, "max_r": 4}, "r", "is 8, outside of"),
    "top_k zero": ({"top_k": 0}, "top_k", "must be at least 1, and is 0"),
    "top_k negative": ({"top_k": -5}, "top_k", "must be at least 1, and is -5"),
    "no budget": ({"latency_budget": Duration()}, "latency_budget", "must be a positive duration"),
    "negative budget": ({"latency_budget": Duration(seconds=-1)}, "latency_budget", "must be a positive duration"),
    "negative nanos": ({"latency_budget": Duration(nanos=-1)}, "latency_budget", "must be a positive duration"),
    # These are no durations as protobuf defines them.
    "mixed signs": ({"latency_budget": Duration(seconds=1, nanos=-500_000_000)}, "latency_budget", "nanos"),
    "mixed signs, negative": ({"latency_budget": Duration(seconds=-1, nanos=500_000_000)}, "latency_budget", ""),
    "too many nanos": ({"latency_budget": Duration(nanos=1_000_000_000)}, "latency_budget", "nanos"),
    "beyond a duration": ({"latency_budget": Duration(seconds=315_576_000_001)}, "latency_budget", "at most"),
    "the most seconds": ({"latency_budget": Duration(seconds=2**63 - 1, nanos=2**31 - 1)}, "latency_budget", ""),
    "the least seconds": ({"latency_budget": Duration(seconds=-(2**63), nanos=-(2**31))}, "latency_budget", ""),
}


@pytest.mark.parametrize(("settings", "field", "problem"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_a_setting_out_of_range_is_refused_with_the_field(
    stub: Any, file: Path, settings: dict[str, Any], field: str, problem: str
) -> None:
    refused = refusal(lambda: stub.Predict(pb.PredictRequest(image=file.read_bytes(), **settings)))
    assert (refused.code, refused.field) == (INVALID, field)
    assert re.match(f"{field}: .*{problem}", refused.message)


def test_the_longest_duration_is_a_budget(stub: Any, file: Path) -> None:
    longest = Duration(seconds=315_576_000_000)
    response = stub.Predict(pb.PredictRequest(image=file.read_bytes(), latency_budget=longest))
    assert response.timing.slack.seconds == pytest.approx(longest.seconds, rel=1e-6)


def test_a_budget_that_is_over_on_arrival_is_refused_in_words_that_make_sense(stub: Any, file: Path) -> None:
    request = pb.PredictRequest(image=file.read_bytes(), latency_budget=Duration(nanos=1))
    refused = refusal(lambda: stub.Predict(request))
    assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert re.fullmatch(r"the deadline can't be met; the smallest latency possible now is [0-9]+ ms", refused.message)
    assert refused.details["ErrorInfo"].reason == "INFEASIBLE"


def test_top_k_is_at_most_the_number_of_classes(stub: Any, file: Path, model: pb.Model) -> None:
    response = stub.Predict(pb.PredictRequest(image=file.read_bytes(), top_k=2**31 - 1))
    assert sorted(one.class_id for one in response.predictions) == list(range(model.num_classes))


@pytest.mark.parametrize(
    "name", ["nothing", "Fashion", "../fashion", "x\0\n\u2028é", "x" * 100_000], ids=lambda n: n[:9]
)
def test_an_unknown_model_is_not_found_and_its_name_stays_out_of_the_metrics(
    stub: Any, server: ServerProcess, file: Path, name: str
) -> None:
    before = scrape(server.metrics_url)
    for call in (
        lambda: stub.Predict(pb.PredictRequest(model=name, image=file.read_bytes())),
        lambda: stub.GetModel(pb.GetModelRequest(model=name)),
    ):
        refused = refusal(call)
        assert refused.code is grpc.StatusCode.NOT_FOUND
        assert re.fullmatch(r"no model is named '.*'; this server hosts fashion", refused.message)
        assert refused.details["ResourceInfo"].resource_type == "model"
        assert name.startswith(refused.details["ResourceInfo"].resource_name.removesuffix("…"))
        assert len(refused.message) < 500
    after = scrape(server.metrics_url)
    counted = {"model": "unknown", "code": "NOT_FOUND"}
    assert after.total("tome_requests_total", **counted) == before.total("tome_requests_total", **counted) + 1
    assert {dict(labels).get("model") for _, labels in after} <= {None, "fashion", "unknown"}


def test_good_requests_beside_bad_ones_are_answered(stub: Any, good: pb.PredictRequest) -> None:
    alone = scores(stub.Predict(good))
    bad = [
        *(pb.PredictRequest(image=image) for image, _ in BAD_IMAGES.values() if len(image) < MIB),
        *(pb.PredictRequest(tensor=tensor) for tensor, _ in BAD_TENSORS.values() if len(tensor.data) < MIB),
    ]
    calls = [(stub.Predict.future(good), stub.Predict.future(request)) for request in bad]
    for answered, refused in calls:
        assert scores(answered.result()) == pytest.approx(alone, abs=1e-3)
        assert refusal(refused.result).code is INVALID


# What is accepted gives the right answer.


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def on_white(grey: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.where(alpha == 0, 255, grey).astype(np.uint8)


@pytest.fixture(scope="module")
def alpha(grey: np.ndarray) -> np.ndarray:
    """[28, 28]: the lower half opaque, the upper one not there."""
    alpha = np.zeros_like(grey)
    alpha[14:] = 255
    return alpha


def palette_with_hole(grey: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """Return a palette image whose most frequent colour is transparent, and the pixels that are."""
    hole = np.bincount(grey.ravel()).argmax()
    image = Image.fromarray(grey).convert("P")
    image.info["transparency"] = int(hole)
    return image, np.where(grey == hole, 0, 255)


def assert_same(stub: Any, image: bytes, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Assert that an encoded image is answered as the pixels are that it stands for."""
    given = stub.Predict(pb.PredictRequest(image=image, r=0, top_k=10))
    wanted = stub.Predict(pixels(expected, r=0, top_k=10))
    assert scores(given) == pytest.approx(scores(wanted), abs=tolerance)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_lossless_image_is_answered_as_its_pixels_are(stub: Any, grey: np.ndarray, kind: str, mode: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert_same(stub, encode(Image.fromarray(grey).convert(mode), kind, **options), rgb(grey))


def test_colours_are_kept_in_order(stub: Any) -> None:
    image = noise(28, 28)
    assert_same(stub, encode(image), np.asarray(image))
    assert_same(stub, encode(image, "BMP"), np.asarray(image))


def test_a_16_bit_grey_png_is_scaled_not_clipped(stub: Any, grey: np.ndarray) -> None:
    assert_same(stub, encode(Image.fromarray(grey.astype(np.uint16) * 257)), rgb(grey))


def test_a_1_bit_png_is_black_and_white(stub: Any, grey: np.ndarray) -> None:
    assert_same(stub, encode(Image.fromarray(grey > 100)), rgb(np.where(grey > 100, 255, 0)))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_lies_on_white(stub: Any, grey: np.ndarray, alpha: np.ndarray, mode: str, kind: str) -> None:
    layer = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha))).convert(mode)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert_same(stub, encode(layer, kind, **options), rgb(on_white(grey, alpha)))


def test_half_transparency_is_mixed_with_white(stub: Any, grey: np.ndarray) -> None:
    layer = Image.merge("LA", (Image.fromarray(grey), Image.new("L", (28, 28), 128)))
    mixed = np.round(grey * (128 / 255) + 255 * (127 / 255))
    assert_same(stub, encode(layer), rgb(mixed), tolerance=0.01)


def test_a_palette_with_transparency_lies_on_white(stub: Any, grey: np.ndarray) -> None:
    image, opaque = palette_with_hole(grey)
    assert_same(stub, encode(image), rgb(on_white(grey, opaque)))


def test_a_grey_png_with_a_transparent_shade_lies_on_white(stub: Any, grey: np.ndarray) -> None:
    shade = int(np.bincount(grey.ravel()).argmax())
    assert_same(
        stub, encode(Image.fromarray(grey), transparency=shade), rgb(on_white(grey, np.where(grey == shade, 0, 255)))
    )


@pytest.fixture(scope="module")
def photo(samples: dict[Path, str]) -> Image.Image:
    """Four garments in a picture larger than the model's input, which looks different from every side."""
    photo = Image.new("RGB", (128, 120))
    corners = [(0, 0), (64, 0), (0, 60), (64, 60)]
    for file, corner, size in zip(sorted(samples)[1:], corners, [60, 48, 36, 24], strict=False):
        with Image.open(file) as image:
            photo.paste(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC), corner)
    return photo


@pytest.fixture(scope="module")
def views(stub: Any, photo: Image.Image) -> list[np.ndarray]:
    """Features of the photo, first upright, then turned in each way."""
    turned = [photo, *(photo.transpose(turn) for turn in Image.Transpose)]
    return [features(stub, pixels(np.asarray(view))) for view in turned]


def features(stub: Any, request: pb.PredictRequest) -> np.ndarray:
    request.return_features = True
    return np.array(stub.Predict(request).features)


def assert_is_the_photo(stub: Any, image: bytes, views: list[np.ndarray]) -> None:
    """Assert that an image is to the model what the upright photo is, but for what JPEG loses.

    A JPEG is also decoded straight to a smaller size, whose pixels aren't quite those of decoding first.
    """
    given = features(stub, pb.PredictRequest(image=image))
    upright, *turned = (np.linalg.norm(given - view) for view in views)
    assert upright < 0.4 * min(turned)


JPEG = {"quality": 98, "subsampling": 0}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_a_jpeg_is_answered_as_its_pixels_are(
    stub: Any, photo: Image.Image, views: list[np.ndarray], mode: str, progressive: bool
) -> None:
    image = encode(photo.convert(mode), "JPEG", progressive=progressive, **JPEG)
    assert_is_the_photo(stub, image, views)


# The turn that each EXIF orientation asks the viewer for, undone.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_honoured(
    stub: Any, photo: Image.Image, views: list[np.ndarray], orientation: int, kind: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = STORED[orientation]
    image = encode(photo if turn is None else photo.transpose(turn), kind, exif=exif, **JPEG)
    assert_is_the_photo(stub, image, views)


def test_damaged_exif_does_not_matter(stub: Any, photo: Image.Image, views: list[np.ndarray]) -> None:
    image = encode(photo, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff", **JPEG)
    assert_is_the_photo(stub, image, views)


def test_the_first_frame_of_a_multi_picture_jpeg_is_the_photo(
    stub: Any, photo: Image.Image, views: list[np.ndarray]
) -> None:
    preview = Image.new("RGB", photo.size, "white")
    image = encode(photo, "MPO", save_all=True, append_images=[preview], **JPEG)
    with Image.open(io.BytesIO(image)) as opened:
        assert opened.format == "MPO"
    assert_is_the_photo(stub, image, views)


def test_a_float_tensor_is_the_models_input_as_preprocessing_makes_it(
    stub: Any, photo: Image.Image, model: pb.Model
) -> None:
    prepare = create_transform(
        input_size=(model.input.channels, model.input.height, model.input.width),
        is_training=False,
        interpolation=model.input.interpolation,
        mean=tuple(model.input.mean),
        std=tuple(model.input.std),
        crop_pct=model.input.crop_pct,
        crop_mode=model.input.crop_mode,
    )
    prepared = prepare(photo)
    assert isinstance(prepared, torch.Tensor)
    given = stub.Predict(normalised(prepared.numpy(), r=0, top_k=10))
    wanted = stub.Predict(pb.PredictRequest(image=encode(photo), r=0, top_k=10))
    assert scores(given) == pytest.approx(scores(wanted), abs=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (28, 28), (3000, 2000)], ids=str)
def test_any_sensible_size_is_answered(stub: Any, size: tuple[int, int]) -> None:
    response = stub.Predict(pb.PredictRequest(image=black_png(*size), top_k=10))
    assert scores(response).sum() == pytest.approx(1, abs=1e-4)


def test_bytes_that_are_no_message_end_their_stream_after_the_answers_due(
    server: ServerProcess, good: pb.PredictRequest
) -> None:
    first = pb.PredictStreamRequest(id="first", request=good).SerializeToString()
    with grpc.insecure_channel(server.target) as channel:
        stream = channel.stream_stream(
            "/tome_api.v1.Inference/PredictStream", response_deserializer=pb.PredictStreamResponse.FromString
        )
        call = stream(iter([first, b"\xff\xff\xff"]))
        answer = next(call)
        assert (answer.id, answer.WhichOneof("result")) == ("first", "response")
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "can't be read" in caught.value.details()
