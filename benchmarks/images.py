"""The cost of one picture: the most expensive files known of each format that the server accepts.

Each file has the most pixels that are accepted of its kind, within 16 MiB. A process of its own decodes and prepares
it. Its CPU time is measured, and its peak memory: the most that was resident, less what was resident before. `foretold`
is the memory that the server reckons with when it has read the first bytes of the file.
"""

import argparse
import io
import json
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tome_server.errors import InvalidRequestError
from tome_server.models.images.bare_image import MOST_CHUNKS, MOST_SCANS
from tome_server.models.images.image_header import ImageHeader, read_header
from tome_server.models.preprocess import Limits, Preprocess
from tome_server.models.transform import ImageSettings

LIMITS = Limits()


@dataclass(frozen=True)
class Row:
    """One file. Memory in MiB."""

    name: str
    width: int
    height: int
    encoded: float
    cpu_seconds: float
    peak: float
    foretold: float


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    preprocess = Preprocess(
        ImageSettings((3, args.side, args.side), (0.0,) * 3, (1.0,) * 3, "bicubic", 0.9, "center"), LIMITS
    )
    if args.measured is not None:
        print(json.dumps(_cost(args.measured.read_bytes(), preprocess)))
        return
    kinds = {name: make for name, make in KINDS.items() if args.kind in name}
    rows = [_measure(name, make, preprocess, args) for name, make in tqdm(kinds.items(), unit="file", leave=False)]
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        _print_table(rows)


def _measure(name: str, make: "Make", preprocess: Preprocess, args: argparse.Namespace) -> Row:
    width, height = _largest(make, preprocess, args.megapixels)
    data = make(width, height)
    foretold = read_header(data).decode_bytes(preprocess.shortest)
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        command = [sys.executable, "-m", "benchmarks.images", "--side", str(args.side), "--measured", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    cost = json.loads(done.stdout)
    mib = 2**20
    return Row(name, width, height, len(data) / mib, cost["cpu_seconds"], cost["peak"] / mib, foretold / mib)


def _cost(data: bytes, preprocess: Preprocess) -> dict[str, float]:
    for kind in ("JPEG", "PNG", "WEBP", "BMP"):  # libraries are loaded at their first use
        preprocess.encoded(_saved(Image.new("RGBA" if kind == "PNG" else "RGB", (300, 300)), kind))
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before, started = _resident("VmHWM"), time.process_time()
    preprocess.encoded(data)
    return {"cpu_seconds": time.process_time() - started, "peak": _resident("VmHWM") - before}


def _resident(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def _largest(make: "Make", preprocess: Preprocess, most: int) -> tuple[int, int]:
    """Return the largest size of this kind, to a megapixel, that is accepted by its header."""
    header = read_header(make(64, 64))
    for megapixels in range(most, 0, -1):
        side = int((megapixels * 1e6) ** 0.5)
        if _accepted(replace(header, width=side, height=side, encoded_bytes=LIMITS.max_bytes), preprocess):
            return side, side
    raise ValueError("no size is accepted")


def _accepted(header: ImageHeader, preprocess: Preprocess) -> bool:
    try:
        preprocess.check(header)
    except InvalidRequestError:
        return False
    return header.format != "BMP" or "RLE" in header.kind or header.width * header.height * 3 < LIMITS.max_bytes


# ---- the files ----

Make = Callable[[int, int], bytes]
"""A file of this width and height."""


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _picture(mode: str, width: int, height: int) -> Image.Image:
    """A few shapes and some noise, again and again: what doesn't compress to nothing, and fits."""
    tile = np.random.default_rng(0).normal(128, 6, (256, 256, 4)).clip(0, 255).astype(np.uint8)
    tile[64:128, 64:128] = (200, 40, 90, 128)
    image = Image.fromarray(tile, "RGBA").convert("RGB" if mode == "P" else mode)
    whole = Image.new(image.mode, (width, height))
    for top in range(0, height, 256):
        for left in range(0, width, 256):
            whole.paste(image, (left, top))
    return whole.quantize(256) if mode == "P" else whole


def _jpeg(mode: str = "RGB", **options: object) -> Make:
    return lambda width, height: _saved(_picture(mode, width, height), "JPEG", quality=30, **options)


def _many_scans(width: int, height: int) -> bytes:
    """A progressive JPEG whose last scan, with a bit more of each pixel, comes again as often as is accepted."""
    data = _saved(_picture("RGB", width, height), "JPEG", quality=5, progressive=True, subsampling=0)
    scans = data.count(b"\xff\xda")
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    room = (LIMITS.max_bytes - len(data)) // (end - last)
    return data[:end] + data[last:end] * min(MOST_SCANS - scans, room) + data[end:]


def _without_end(width: int, height: int) -> bytes:
    return _jpeg(subsampling=0)(width, height)[:-2]


def _png(depth: int, colour: int, *chunks: tuple[bytes, bytes], interlaced: bool = False, idat: int = 65536) -> Make:
    """PNG of one filter type, Paeth's, which takes the longest, and values that repeat."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]

    def make(width: int, height: int) -> bytes:
        def lines(w: int, h: int) -> bytes:
            return (b"\4" + (bytes(range(7)) * (w * channels * depth // 56 + 2))[: (w * channels * depth + 7) // 8]) * h

        passes = [(width, height)]
        if interlaced:
            steps = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
            passes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in steps]
        packed = zlib.compress(b"".join(lines(w, h) for w, h in passes if w > 0), 1)
        header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
        pieces = [(b"IDAT", packed[at : at + idat]) for at in range(0, len(packed), idat)]
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            for name, body in [(b"IHDR", header), *chunks, *pieces, (b"IEND", b"")]
        )

    return make


def _webp(mode: str, *, lossless: bool) -> Make:
    return lambda width, height: _saved(
        _picture(mode, width, height), "WEBP", lossless=lossless, quality=0 if lossless else 10, method=0
    )


def _bmp(width: int, height: int) -> bytes:
    return _saved(_picture("RGB", width, height), "BMP")


def _rle_bmp(bits: int) -> Make:
    """Runs of one pixel each, as far as they fit; the rest is filled up."""

    def make(width: int, height: int) -> bytes:
        runs = (b"\1\x21" * width + b"\0\0") * height
        header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, {8: 1, 4: 2}[bits], 0, 0, 0, 0, 0)
        palette = bytes(range(4)) * 2**bits
        offset = 14 + len(header) + len(palette)
        return b"BM" + struct.pack("<IHHI", 0, 0, 0, offset) + header + palette + runs + b"\0\1"

    return make


_TURNED = (b"eXIf", b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")
_PALETTE = (b"PLTE", bytes(range(256)) * 3)

KINDS: dict[str, Make] = {
    "JPEG": _jpeg(subsampling=0),
    "JPEG, grey": _jpeg("L"),
    "JPEG, CMYK": _jpeg("CMYK"),
    "JPEG without its end": _without_end,
    "JPEG, progressive": _jpeg(progressive=True),
    "JPEG, progressive, 4:4:4": _jpeg(progressive=True, subsampling=0),
    "JPEG, progressive, CMYK": _jpeg("CMYK", progressive=True),
    f"JPEG of {MOST_SCANS} scans": _many_scans,
    "PNG, 8-bit RGB": _png(8, 2),
    "PNG, 8-bit RGBA": _png(8, 6),
    "PNG, 8-bit RGBA, sideways": _png(8, 6, _TURNED),
    "PNG, 8-bit RGB, one colour transparent": _png(8, 2, (b"tRNS", bytes(6))),
    "PNG, palette, translucent": _png(8, 3, _PALETTE, (b"tRNS", bytes(range(256)))),
    "PNG, 1-bit grey, sideways": _png(1, 0, _TURNED),
    "PNG, 16-bit grey": _png(16, 0, (b"tRNS", bytes(2))),
    "PNG, 16-bit RGB": _png(16, 2),
    "PNG, 16-bit RGB, one colour transparent": _png(16, 2, (b"tRNS", bytes(6))),
    "PNG, 16-bit RGBA": _png(16, 6),
    "PNG, 16-bit RGBA, interlaced": _png(16, 6, interlaced=True),
    f"PNG of {MOST_CHUNKS - 9:,} text chunks": _png(8, 6, *[(b"tEXt", b"")] * (MOST_CHUNKS - 9), idat=2**24),
    "WebP": _webp("RGB", lossless=False),
    "WebP with alpha": _webp("RGBA", lossless=False),
    "WebP, lossless": _webp("RGBA", lossless=True),
    "BMP": _bmp,
    "BMP, RLE8": _rle_bmp(8),
    "BMP, RLE4": _rle_bmp(4),
}


# ---- the report ----


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images", description=__doc__)
    parser.add_argument("--kind", default="", help="only the kinds of file with this in their name")
    parser.add_argument("--megapixels", type=int, default=50, help="at most so large (%(default)s)")
    parser.add_argument("--side", type=int, default=224, help="pixels of a side of the model's input (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--measured", type=Path, help=argparse.SUPPRESS)
    return parser


def _print_table(rows: Sequence[Row]) -> None:
    print("| file | size | MiB | CPU seconds | peak memory, MiB | estimate, MiB |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.name} | {row.width}×{row.height} | {row.encoded:.1f} | {row.cpu_seconds:.2f} | {row.peak:.0f} "
            f"| {row.foretold:.0f} |"
        )


if __name__ == "__main__":
    main()
