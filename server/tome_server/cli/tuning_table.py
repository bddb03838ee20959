"""What tuning found, as text."""

from collections.abc import Sequence

from tome_server.calibration.tuning import Kept, Tuned


def table(found: Sequence[Tuned]) -> str:
    """Return two lines for each r: r in every block, and the schedule that was found."""
    if not found:
        return "no schedule takes as little work in so few blocks\n"
    top1 = all(each.tuned.top1 is not None for each in found)
    lines = [
        f"{'r':>4}  {'GMACs':>7}  {'shifted':>8}  {'agreement':>9}{'   top-1' if top1 else ''}  tokens merged by block"
    ]
    for each in found:
        lines.append(_line(f"{each.r}", each.constant_macs, each.constant, "r in every block"))
        lines.append(_line("", each.macs, each.tuned, f"{' '.join(map(str, each.schedule))}   {_verdict(each)}"))
    lines.append(
        "shifted: mean probability that goes to other classes than at r = 0; on images that weren't searched on\n"
        "±: by how much a schedule shifts more than its r in all blocks, and the standard error of that"
    )
    return "\n".join(lines) + "\n"


def _line(r: str, macs: int, kept: Kept, what: str) -> str:
    top1 = "" if kept.top1 is None else f"  {kept.top1:.4f}"
    return f"{r:>4}  {macs / 1e9:>7.3f}  {kept.shifted:>8.5f}  {kept.agreement:>9.4f}{top1}  {what}"


def _verdict(each: Tuned) -> str:
    difference = f"{each.difference:+.5f} ± {each.standard_error:.5f}"
    if each.better:
        return difference
    return f"{difference}, left out: {'it shifts more' if each.difference > 0 else 'that may be chance'}"
