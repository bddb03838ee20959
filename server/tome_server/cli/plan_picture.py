"""Draws a plan. Needs matplotlib, which the extra `plots` brings and nothing else here uses."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tome_server.simulation.capacity import Point

FORMATS = (".png", ".svg", ".pdf")


def draw_plan(points: Mapping[str, Sequence[Point]], asked: float, attainment: float, path: Path) -> None:
    """Draw attainment and effective accuracy against rate, a line for each policy, in the format that `path` ends in.

    `asked` is the rate planned for, `attainment` what is to be attained; both are marked. Raises OSError if it can't be
    written.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    shares, quality = figure.subplots(1, 2)
    for policy, line in points.items():
        rates = [point.rate for point in line]
        shares.plot(rates, [100 * point.result.attainment for point in line], marker=".", label=policy)
        quality.plot(rates, [100 * point.result.effective_accuracy for point in line], marker=".", label=policy)
    shares.axhline(100 * attainment, color="grey", linewidth=0.8, linestyle="--")
    shares.set_ylabel("answered in time, %")
    quality.set_ylabel("effective accuracy, %")
    for axes in (shares, quality):
        axes.axvline(asked, color="grey", linewidth=0.8, linestyle="--")
        axes.set_xlabel("requests per second, all replicas")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    shares.legend()
    replicas = next(iter(points.values()))[0].replicas
    figure.suptitle(f"{replicas} replica{'' if replicas == 1 else 's'}")
    figure.savefig(path, dpi=150)
