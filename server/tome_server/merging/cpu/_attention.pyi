def supported() -> tuple[bool, bool]: ...
def attend(
    queries: int,
    keys: int,
    values: int,
    bias: int,
    out: int,
    shape: tuple[int, int, int, int, int],
    queries_apart: tuple[int, ...],
    keys_apart: tuple[int, ...],
    values_apart: tuple[int, ...],
    scale: float,
    bf16: bool,
    /,
) -> None: ...
