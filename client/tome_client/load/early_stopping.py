"""How many requests it takes to be sure that few enough are late: MLPerf Inference's early stopping.

Of n requests t were late. If more than 1 - percentile of all possible requests were late, t or fewer late ones in n
would have the probability P(X <= t), with X binomial, n draws of 1 - percentile + tolerance. The claim "at most
1 - percentile are late" holds with the wanted confidence once that is no more than 1 - confidence. The published rule
writes the same as a regularised incomplete beta function. (MLPerf Inference Rules, "Early Stopping Criterion". With its
values, percentile 0.99, confidence 0.99 and tolerance 0, no late request takes 459 requests in all, one takes 662.)
"""

from __future__ import annotations

import math


def enough(sent: int, late: int, *, percentile: float = 0.99, confidence: float = 0.99, tolerance: float = 0.0) -> bool:
    """Whether `late` of `sent` requests prove, with `confidence`, that at most 1 - `percentile` of all are late."""
    return _at_most(late, sent, 1 - percentile + tolerance) <= 1 - confidence


def least_sent(late: int, *, percentile: float = 0.99, confidence: float = 0.99, tolerance: float = 0.0) -> int:
    """Returns the fewest requests, late ones included, for which `enough` holds with `late` late ones."""

    def passes(sent: int) -> bool:
        return enough(sent, late, percentile=percentile, confidence=confidence, tolerance=tolerance)

    fails, passing = late, 2 * late + 1
    while not passes(passing):
        fails, passing = passing, 2 * passing
    while passing - fails > 1:
        middle = (fails + passing) // 2
        fails, passing = (fails, middle) if passes(middle) else (middle, passing)
    return passing


def _at_most(most: int, draws: int, probability: float) -> float:
    """Returns P(X <= most) of a binomial X, exact where it is small.

    The sum begins with the largest term: below the mean each is smaller than the one before, by a growing factor.
    """
    if most >= draws * probability:
        return 1.0  # At or above the mean it is about a half or more, too much for any confidence.
    term = math.exp(
        math.lgamma(draws + 1)
        - math.lgamma(most + 1)
        - math.lgamma(draws - most + 1)
        + most * math.log(probability)
        + (draws - most) * math.log1p(-probability)
    )
    total = 0.0
    for successes in range(most, -1, -1):
        total += term
        if term < total * 1e-17:
            break
        term *= successes * (1 - probability) / ((draws - successes + 1) * probability)
    return total
