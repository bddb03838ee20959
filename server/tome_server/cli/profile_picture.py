"""Draws a profile. Needs matplotlib, which the extra `plots` brings and nothing else here uses."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from tome_server.scheduling.profile import Profile

FORMATS = (".png", ".svg", ".pdf")


def draw(profile: Profile, title: str, path: Path) -> None:
    """Draw latency and throughput by batch size and r, in the format, of FORMATS, that `path` ends in.

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
    # Batches of 1 and of 32 are far apart; what r does to each would drown on a linear scale.
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
