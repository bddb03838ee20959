"""Tables that commands print, as lines of text that end in a newline."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from tome_api.tables import table
from tome_server.calibration.tuning import Kept, Tuned
from tome_server.scheduling.profile import Profile
from tome_server.simulation.capacity import Plan, Point


def profile_table(profile: Profile) -> str:
    """Return p50 and p95 in milliseconds and images per second, by batch size and r."""
    rows = []
    for size, p50, p95 in zip(profile.sizes, profile.p50, profile.p95, strict=True):
        rows += [
            (f"{size}", "p50 ms", *(f"{seconds * 1e3:.1f}" for seconds in p50)),
            ("", "p95 ms", *(f"{seconds * 1e3:.1f}" for seconds in p95)),
            ("", "images/s", *(f"{size / seconds:.1f}" for seconds in p50)),
        ]
    header = ("batch", "", *(f"r={r}" for r in profile.rs))
    lines = [table(header, rows, right=[0, *range(2, len(header))])]
    if any(more == less for row in profile.p50 for less, more in pairwise(row)):
        lines.append(
            "where neighbours are equal, the larger r was no faster, and is predicted to take as long as the smaller"
        )
    if profile.one_call:
        more = f"{profile.extra_group * 1e3:.1f} ms"
        lines.append(f"batches of several r are faster packed; each further r adds {more}")
    else:
        lines.append("batches of several r are faster split, one call for each r")
    if profile.provisional:
        lines.append(f"{profile.measured}; it will be measured again")
    return "\n".join(lines) + "\n"


def tuning_table(found: Sequence[Tuned]) -> str:
    """Return two lines for each r: r in every block, and the schedule that was found."""
    if not found:
        return "no schedule takes as little work in so few blocks\n"
    top1 = ("top-1",) if all(each.tuned.top1 is not None for each in found) else ()
    header = ("r", "GMACs", "shifted", "agreement", *top1, "tokens merged by block")
    rows = []
    for each in found:
        schedule = " ".join(map(str, each.schedule))
        rows.append((f"{each.r}", *_tuning_cells(each.constant_macs, each.constant), "r in every block"))
        rows.append(("", *_tuning_cells(each.macs, each.tuned), f"{schedule}   {_verdict(each)}"))
    return (
        f"{table(header, rows, right=range(len(header) - 1))}\n"
        "shifted: mean probability that goes to other classes than at r = 0; on images that weren't searched on\n"
        "±: by how much a schedule shifts more than its r in all blocks, and the standard error of that\n"
    )


def _tuning_cells(macs: int, kept: Kept) -> Sequence[str]:
    top1 = () if kept.top1 is None else (f"{kept.top1:.4f}",)
    return (f"{macs / 1e9:.3f}", f"{kept.shifted:.5f}", f"{kept.agreement:.4f}", *top1)


def _verdict(each: Tuned) -> str:
    difference = f"{each.difference:+.5f} ± {each.standard_error:.5f}"
    if each.better:
        return difference
    return f"{difference}, left out: {'it shifts more' if each.difference > 0 else 'that may be chance'}"


def quality_table(levels: Sequence[Mapping[str, Any]]) -> str:
    """Return work and quality at each r, a line for each, as a quality report has them under `levels`."""
    unmerged = levels[0]["macs"]
    rows = [
        (
            f"{level['r']}",
            f"{level['macs'] / 1e9:.3f}",
            f"{1 - level['macs'] / unmerged:.1%}",
            *(f"{level[key]:.4f}" if level[key] is not None else "-" for key in ("top1", "agreement")),
        )
        for level in levels
    ]
    header = ("r", "GMACs", "saved", "top-1", "agreement")
    return table(header, rows, right=range(len(header))) + "\n"


def plan_table(plan: Plan) -> str:
    """Return a plan in words, and as a table of the numbers of replicas around the one that is enough."""
    question, enough = plan.question, plan.fewest(plan.question.policy)
    budgets = ", ".join(f"{1e3 * budget:g} ms" for budget in sorted(set(question.budgets)))
    goal = f"{question.attainment:.4g} of {question.rate:g} requests/s within {budgets}, CV² {question.cv2:g}"
    if enough is None:
        lines = [f"{goal}: no number of replicas does that; an all but idle one answers {plan.best_attainment:.3%}"]
    else:
        best = plan.point(question.policy, enough).result
        lines = [
            f"{goal}: {_replicas(enough)}, at effective accuracy {100 * best.effective_accuracy:.2f} "
            f"(mean r {best.mean_r:.1f}; {100 * max(plan.quality):.2f} is the most)",
            "",
            _points_table(plan.around(enough), enough),
        ]
    lines.append("")
    for policy in plan.policies[1:]:
        needed = plan.fewest(policy)
        if needed is None:
            lines.append(f"{policy}: no number of replicas does that")
        else:
            result = plan.point(policy, needed).result
            lines.append(f"{policy}: {_replicas(needed)}, at effective accuracy {100 * result.effective_accuracy:.2f}")
    return "\n".join(lines) + "\n"


def _points_table(points: Sequence[Point], enough: int) -> str:
    rows = [
        (
            f"{point.replicas}",
            f"{point.rate / point.replicas:.1f}",
            f"{point.result.attainment:.3%}",
            f"{100 * point.result.effective_accuracy:.2f}",
            f"{point.result.mean_r:.1f}",
            f"{1e3 * point.result.p50:.1f}",
            f"{1e3 * point.result.p99:.1f}",
            f"{point.result.busy:.0%}",
            "<" if point.replicas == enough else "",
        )
        for point in points
    ]
    header = (
        "replicas",
        "requests/s each",
        "attainment",
        "effective accuracy",
        "mean r",
        "p50 ms",
        "p99 ms",
        "busy",
        "",
    )
    return table(header, rows, right=range(len(header)))


def _replicas(number: int) -> str:
    return "1 replica" if number == 1 else f"{number} replicas"
