"""The one thing that EXIF is read for: which way up an image is.

Pillow reads all of EXIF to answer that, follows each of its offsets, and logs each that leads nowhere.
"""

import struct

_ORIENTATION = 0x0112
_NUMBER = {1: "B", 3: "H", 4: "I"}
_PREFIX = b"Exif\0\0"


def orientation(exif: bytes) -> int:
    """Return EXIF's orientation, 1 to 8. It is 1, upright, if EXIF can't be read or has none."""
    exif = exif.removeprefix(_PREFIX)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return 1
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    if start + 2 > len(exif):
        return 1
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    entries = exif[start + 2 : start + 2 + 12 * count]
    whole = len(entries) // 12 * 12
    for tag, kind, values, value in struct.iter_unpack(f"{order}HHI4s", entries[:whole]):
        if tag == _ORIENTATION:
            if kind not in _NUMBER or values != 1:
                return 1
            (number,) = struct.unpack_from(order + _NUMBER[kind], value)
            return int(number) if 1 <= number <= 8 else 1
    return 1
