def directions(
    keys: int, out: int, shape: tuple[int, int, int, int], strides: tuple[int, int, int], bf16: bool, /
) -> None: ...
def match(
    similarity: int, order: int, merged: int, into: int, shape: tuple[int, int, int], r: int, prefix: int, /
) -> None: ...
def combine(
    x: int,
    size: int,
    order: int,
    merged: int,
    into: int,
    out: int,
    size_out: int,
    left: int,
    merges: int,
    channels: int,
    bf16: bool,
    /,
) -> None: ...
