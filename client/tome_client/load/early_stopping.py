"""How many requests it takes to trust that few enough were late: MLPerf Inference's early stopping.

Of n requests t were late. If more than 1 - percentile of all requests there could be were late, seeing t or fewer
in n has the probability P(X <= t), X binomial with n draws of 1 - percentile + tolerance. The claim "at most
1 - percentile are late" may be made once that is no more than 1 - confidence; the published rule writes the same
as a regularised incomplete beta function. (MLPerf Inference Rules, "Early Stopping Criterion"; with its values,
percentile 0.99, confidence 0.99 and tolerance 0, no late request needs 459 in all, one 662.)
"""

from __future__ import annotations

import math


def enough(sent: int, late: int, *, percentile: float = 0.99, confidence: float = 0.99, tolerance: float = 0.0) -> bool:
    """Whether `late` of `sent` requests prove, with `confidence`, that at most 1 - `percentile` of all are late."""
    return _at_most(late, sent, 1 - percentile + tolerance) <= 1 - confidence


def least_sent(late: int, *, percentile: float = 0.99, confidence: float = 0.99, tolerance: float = 0.0) -> int:
    """Returns the fewest requests, late ones included, that `late` late ones may be among for `enough`."""

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
    """Returns P(X <= most) of a binomial X, exactly enough where it is small.

    From the largest term down: below the mean each is smaller than the one before, by a growing factor.
    """
    if most >= draws * probability:
        return 1.0  # At or above the mean it is about a half or more, which no confidence takes.
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
