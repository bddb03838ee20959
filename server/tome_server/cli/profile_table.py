"""A profile as a table to read."""

from collections.abc import Iterable
from itertools import pairwise

from tome_server.scheduling.profile import Profile


def table(profile: Profile) -> str:
    """Return p50 and p95 in milliseconds and images per second, by batch size and r, as lines of text."""
    lines = ["batch".ljust(19) + "".join(f"r={r}".rjust(8) for r in profile.rs)]
    for size, p50, p95 in zip(profile.sizes, profile.p50, profile.p95, strict=True):
        lines += [
            _line(f"{size:>5}  p50 ms", (seconds * 1e3 for seconds in p50)),
            _line("       p95 ms", (seconds * 1e3 for seconds in p95)),
            _line("       images/s", (size / seconds for seconds in p50)),
        ]
    if any(more == less for row in profile.p50 for less, more in pairwise(row)):
        lines.append(
            "where neighbours are equal, the larger r was no faster, and is predicted to take as long as the smaller"
        )
    if profile.packed:
        more = f"{profile.extra_group * 1e3:.1f} ms"
        lines.append(f"batches of several r are faster packed; each further r adds {more}")
    else:
        lines.append("batches of several r are faster split, one call for each r")
    if profile.provisional:
        lines.append(f"{profile.measured}; it will be measured again")
    return "\n".join(lines) + "\n"


def _line(head: str, values: Iterable[float]) -> str:
    return head.ljust(19) + "".join(f"{value:8.1f}" for value in values)
