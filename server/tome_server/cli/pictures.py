"""Draws profiles and plans. Needs matplotlib, which the extra `plots` brings."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from tome_server.scheduling.profile import Profile
from tome_server.simulation.capacity import Point

FORMATS = (".png", ".svg", ".pdf")


def draw_profile(profile: Profile, title: str, path: Path) -> None:
    """Draw latency and throughput by batch size and r. The suffix of `path`, one of FORMATS, is the format.

    Raises OSError if it can't be written.
    """
    wide = 2.4 + 0.62 * len(profile.rs)
    figure = Figure(figsize=(2 * wide, 1.9 + 0.45 * len(profile.sizes)), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    seconds = np.array(profile.p50)
    _heat_map(latency, profile, seconds * 1e3, "latency of a batch, p50, ms", "magma_r")
    _heat_map(throughput, profile, np.array(profile.sizes)[:, None] / seconds, "images per second", "viridis")
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def _heat_map(axes: Axes, profile: Profile, values: np.ndarray, title: str, colours: str) -> None:
    # Latencies of batches of 1 and of 32 are far apart: on a linear scale the effect of r would not be seen.
    norm = LogNorm(values.min(), max(values.max(), 1.01 * values.min()))
    image = axes.imshow(values, cmap=colours, norm=norm, aspect="auto")
    axes.set_title(title)
    axes.set_xlabel("r")
    axes.set_ylabel("batch size")
    axes.set_xticks(range(len(profile.rs)), [str(r) for r in profile.rs])
    axes.set_yticks(range(len(profile.sizes)), [str(size) for size in profile.sizes])
    lightness = image.cmap(norm(values)) @ (0.3, 0.6, 0.1, 0)
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if lightness[row, column] < 0.5 else "black"
        axes.text(column, row, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=9)


def draw_plan(points: Mapping[str, Sequence[Point]], planned: float, attainment: float, path: Path) -> None:
    """Draw attainment and effective accuracy against rate, a line for each policy. The suffix of `path` is the format.

    Args:
        points: By policy.
        planned: The rate planned for, which is marked.
        attainment: The share of requests to be answered in time, which is marked.
        path: The file, whose suffix is one of FORMATS.

    Raises:
        OSError: The file can't be written.
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
        axes.axvline(planned, color="grey", linewidth=0.8, linestyle="--")
        axes.set_xlabel("requests per second, all replicas")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    shares.legend()
    replicas = next(iter(points.values()))[0].replicas
    figure.suptitle(f"{replicas} replica{'' if replicas == 1 else 's'}")
    figure.savefig(path, dpi=150)
