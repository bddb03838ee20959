"""Tables that commands print."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tome_server.calibration.tuning import Kept, Tuned
from tome_server.scheduling.profile import Profile


def profile_table(profile: Profile) -> str:
    """Return p50 and p95 in milliseconds and images per second, by batch size and r, as lines of text."""
    lines = ["batch".ljust(19) + "".join(f"r={r}".rjust(8) for r in profile.rs)]
    for size, p50, p95 in zip(profile.sizes, profile.p50, profile.p95, strict=True):
        lines += [
            _profile_line(f"{size:>5}  p50 ms", (seconds * 1e3 for seconds in p50)),
            _profile_line("       p95 ms", (seconds * 1e3 for seconds in p95)),
            _profile_line("       images/s", (size / seconds for seconds in p50)),
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


def _profile_line(head: str, values: Iterable[float]) -> str:
    return head.ljust(19) + "".join(f"{value:8.1f}" for value in values)


def tuning_table(found: Sequence[Tuned]) -> str:
    """Return two lines for each r: r in every block, and the schedule that was found."""
    if not found:
        return "no schedule takes as little work in so few blocks\n"
    top1 = all(each.tuned.top1 is not None for each in found)
    lines = [
        f"{'r':>4}  {'GMACs':>7}  {'shifted':>8}  {'agreement':>9}{'   top-1' if top1 else ''}  tokens merged by block"
    ]
    for each in found:
        lines.append(_tuning_line(f"{each.r}", each.constant_macs, each.constant, "r in every block"))
        lines.append(_tuning_line("", each.macs, each.tuned, f"{' '.join(map(str, each.schedule))}   {_verdict(each)}"))
    lines.append(
        "shifted: mean probability that goes to other classes than at r = 0; on images that weren't searched on\n"
        "±: by how much a schedule shifts more than its r in all blocks, and the standard error of that"
    )
    return "\n".join(lines) + "\n"


def _tuning_line(r: str, macs: int, kept: Kept, what: str) -> str:
    top1 = "" if kept.top1 is None else f"  {kept.top1:.4f}"
    return f"{r:>4}  {macs / 1e9:>7.3f}  {kept.shifted:>8.5f}  {kept.agreement:>9.4f}{top1}  {what}"


def _verdict(each: Tuned) -> str:
    difference = f"{each.difference:+.5f} ± {each.standard_error:.5f}"
    if each.better:
        return difference
    return f"{difference}, left out: {'it shifts more' if each.difference > 0 else 'that may be chance'}"


def quality_table(levels: Sequence[Mapping[str, Any]]) -> str:
    """Return work and quality at each r, a line for each, as a quality report has them under `levels`."""
    most = levels[0]["macs"]
    lines = [f"{'r':>4}  {'GMACs':>7}  {'saved':>6}  {'top-1':>6}  {'agreement':>9}"]
    for level in levels:
        top1, agreement = (f"{level[key]:.4f}" if level[key] is not None else "-" for key in ("top1", "agreement"))
        saved = f"{1 - level['macs'] / most:.1%}"
        lines.append(f"{level['r']:>4}  {level['macs'] / 1e9:>7.3f}  {saved:>6}  {top1:>6}  {agreement:>9}")
    return "\n".join(lines) + "\n"
