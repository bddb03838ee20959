"""Histogram buckets, each with the reason for it, which docs/metrics.md repeats."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Buckets:
    """Upper bounds, ascending, without +Inf."""

    bounds: tuple[float, ...]
    reason: str


SECONDS = Buckets(
    (
        0.001, 0.0015, 0.0025, 0.004, 0.006, 0.01, 0.015, 0.025, 0.04, 0.06,
        0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 1.5, 2.5, 4.0, 6.0, 10.0,
    ),
    "A tiny model on a GPU takes about a millisecond; no service promises a latency beyond ten seconds. A factor of "
    "about 1.5 between neighbours keeps an interpolated p99 within a quarter of the truth.",
)  # fmt: skip

BATCH = Buckets(
    (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128),
    "Powers of two, as batches are sized, and the sizes between that a half-full server sees.",
)

MERGE_R = Buckets(
    (0, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64),
    "Each model's own r grid, and the largest r that a request may name: what is chosen is counted exactly. These are "
    "ViT-B/16's at 224 and beyond, for a model that was never announced.",
)

SLACK = Buckets(
    (0.0, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    "What is left of budgets of 10 ms to seconds. Below 0 the answer was late, which a deadline's end mostly prevents.",
)

RATIO = Buckets(
    (0.5, 0.67, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0),
    "Even in factors around 1, where a good prediction is; 2 is a batch that was stalled for as long as it ran.",
)

SPEEDUP = Buckets(
    (0.5, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.25, 2.5, 3.0, 4.0),
    "The r grid ends near half of the work, so 2 is about the most; below 1 merging cost more than it saved. A request "
    "may name an r beyond the grid.",
)

QUALITY = Buckets(
    (0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995, 0.999, 1.0, 1.05),
    "r is capped where models lose a few hundredths at most; services promise quality in hundredths and thousandths.",
)
