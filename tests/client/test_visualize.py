import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tome_client.results import ImageInput, TokenMap
from tome_client.visualize import merged_patches, model_view, picture_of, side_by_side

RED, BLUE, GREY = (200, 0, 0), (0, 0, 100), (80, 80, 80)
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def expects(**changed: object) -> ImageInput:
    fields = {
        "channels": 3,
        "height": 8,
        "width": 8,
        "mean": (1.0, 0.5, 0.0),
        "std": (1.0, 1.0, 1.0),
        "interpolation": "nearest",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    return ImageInput(**(fields | changed))


def quarters(*colours: tuple[int, int, int], side: int = 16) -> Image.Image:
    """Four squares: top left, top right, bottom left, bottom right."""
    image = Image.new("RGB", (2, 2))
    image.putdata(colours)
    return image.resize((2 * side, 2 * side), Image.Resampling.NEAREST)


IMAGE = quarters(RED, BLUE, GREY, GREY)


def test_patches_of_one_token_take_their_mean_colour_wherever_they_lie() -> None:
    # Top left and bottom right became one token.
    merged = merged_patches(IMAGE, TokenMap(2, 2, (5, 1, 2, 5)))
    assert merged.size == IMAGE.size
    assert merged.getpixel((4, 4)) == (140, 40, 40)
    assert merged.getpixel((28, 28)) == (140, 40, 40)
    assert merged.getpixel((28, 4)) == BLUE
    assert merged.getpixel((4, 28)) == GREY


def test_lines_lie_between_tokens_and_only_there() -> None:
    # The lower two patches became one token.
    merged = merged_patches(IMAGE, TokenMap(2, 2, (0, 1, 2, 2)))
    assert merged.getpixel((16, 4)) == WHITE
    assert merged.getpixel((4, 16)) == merged.getpixel((28, 16)) == WHITE
    assert merged.getpixel((16, 28)) == GREY
    assert merged.getpixel((15, 4)) == RED
    assert merged.getpixel((17, 4)) == BLUE


def test_lines_are_black_between_bright_tokens() -> None:
    merged = merged_patches(quarters(WHITE, WHITE, WHITE, WHITE), TokenMap(2, 2, (0, 1, 2, 3)))
    assert merged.getpixel((16, 4)) == BLACK


def test_one_token_for_all_leaves_no_lines() -> None:
    merged = merged_patches(IMAGE, TokenMap(2, 2, (0, 0, 0, 0)))
    assert len(merged.getcolors()) == 1


def test_unmerged_patches_keep_their_mean() -> None:
    ramp = Image.new("RGB", (2, 1))
    ramp.putdata([(0, 0, 0), (200, 200, 200)])
    merged = merged_patches(ramp.resize((4, 2), Image.Resampling.NEAREST), TokenMap(1, 1, (0,)), 4)
    assert merged.size == (16, 8)
    assert merged.getpixel((1, 1)) == (100, 100, 100)


def test_a_grid_that_does_not_divide_the_picture_is_drawn_to_its_edges() -> None:
    merged = merged_patches(IMAGE.resize((31, 17)), TokenMap(3, 3, tuple(range(9))))
    assert merged.size == (31, 17)
    assert merged.getpixel((30, 16)) == GREY


@pytest.mark.parametrize(("side", "shown"), [(28, 448), (224, 448), (448, 448), (518, 518)])
def test_small_inputs_are_enlarged_and_shown_beside_their_tokens(side: int, shown: int) -> None:
    image = IMAGE.resize((side, side), Image.Resampling.NEAREST)
    picture = side_by_side(image, TokenMap(2, 2, (0, 0, 1, 1)))
    assert picture.size == (2 * shown + 8, shown)
    assert picture.getpixel((10, 10)) == RED
    assert picture.getpixel((shown + 4, 10)) == WHITE
    assert picture.getpixel((shown + 18, 10)) == (100, 0, 50)


def test_the_models_view_is_the_middle_of_the_image() -> None:
    wide = Image.new("RGB", (24, 8), RED)
    wide.paste(BLUE, (8, 0, 16, 8))
    view = model_view(wide, expects())
    assert view.size == (8, 8)
    assert view.getcolors() == [(64, BLUE)]


def test_the_crop_keeps_the_share_that_the_server_keeps() -> None:
    image = Image.new("RGB", (16, 16), RED)
    image.paste(BLUE, (4, 4, 12, 12))
    assert model_view(image, expects(crop_pct=0.5)).getcolors() == [(64, BLUE)]


def test_squashing_keeps_the_whole_image() -> None:
    tall = Image.new("RGB", (4, 16), RED)
    tall.paste(BLUE, (0, 8, 4, 16))
    view = model_view(tall, expects(crop_mode="squash"))
    assert view.getpixel((0, 0)) == RED
    assert view.getpixel((7, 7)) == BLUE


def test_bordering_pads_with_the_models_mean() -> None:
    view = model_view(Image.new("RGB", (16, 8), BLUE), expects(crop_mode="border"))
    assert view.getpixel((4, 4)) == BLUE
    assert view.getpixel((4, 0)) == (255, 128, 0)


def test_a_model_of_one_channel_sees_grey() -> None:
    view = model_view(Image.new("RGB", (8, 8), RED), expects(channels=1, mean=(0.5,)))
    red, green, blue = view.getpixel((0, 0))
    assert red == green == blue


def test_an_unknown_filter_does_not_matter() -> None:
    assert model_view(IMAGE, expects(interpolation="random")).size == (8, 8)


def test_a_file_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    stored = Image.new("RGB", (8, 8), RED)
    stored.paste(BLUE, (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # Upside down.
    stored.save(tmp_path / "turned.png", exif=exif)
    picture = picture_of(tmp_path / "turned.png", expects(), TokenMap(1, 1, (0,)))
    assert picture.getpixel((0, 0)) == RED


def test_without_pillow_the_extra_is_named() -> None:
    script = """
import sys
sys.modules["PIL"] = None
from tome_client.cli import main
raise SystemExit(main(["visualize", "image.png", "-o", "out.png"]))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == ("tome-client: drawing needs Pillow: pip install 'tome-serving[visualize]'\n")
