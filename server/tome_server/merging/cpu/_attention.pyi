def supported() -> tuple[bool, bool]: ...
def attend(
    queries: int,
    keys: int,
    values: int,
    bias: int,
    out: int,
    shape: tuple[int, int, int, int, int],
    query_strides: tuple[int, ...],
    key_strides: tuple[int, ...],
    value_strides: tuple[int, ...],
    scale: float,
    bf16: bool,
    /,
) -> None: ...
