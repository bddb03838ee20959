"""An upper bound on the effective accuracy of any policy, even one that knows all arrivals and deadlines beforehand.

Scheduling batches with a choice of r is hard even with foresight, so the bound relaxes it until it is easy, each step
in the scheduler's favour:

1. An image costs what it costs in the batch size that is best for its level, whatever batch it is really in.
2. The device may divide its time between requests as it likes (preemption, at no cost): a batch that ran from s to e
   becomes a sequence of its members' shares within [s, e], all of which lie between their arrivals and deadlines.
3. A request may be given part of the work of a level, for that part of the gain: its quality is the concave hull of
   (0, 0) and the levels' (seconds, quality). It starts with the best quality for its seconds, and flattens from there.
4. m replicas are one device m times as fast, which may put all of that into a single request.

What is left is: give each request i an amount x_i of device time between its arrival and deadline, so that the sum of
the concave gains g(x_i) is greatest. Which (x_i) can be scheduled is a polymatroid: for each set of requests, the time
during which at least one of it may run bounds their sum. On a polymatroid a separable concave sum is greatest for what
a greedy choice finds, steepest piece first (Edmonds 1970; Federgruen and Groenevelt 1986); and since every request has
the same hull, after its first k pieces that choice has scheduled W(c_k): the most work possible if no request may have
more than c_k, the end of piece k. So

    bound = sum over pieces k of slope_k * (W(c_k) - W(c_(k-1)))

and W is what preemptive earliest-deadline-first does when every request asks for c_k and is dropped at its deadline:
the greedy maximum matching of a convex bipartite graph, units of work to moments of time (Glover 1967).

True times are the profile's medians here; where a simulation adds jitter, luck may lift a result above the bound by a
fraction of the jitter, for a few requests.
"""

from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import pairwise

from tome_server.scheduling.profile import Profile
from tome_server.simulation.workload import Arrival


def clairvoyant_bound(
    arrivals: Sequence[Arrival], profile: Profile, quality: Sequence[float], *, replicas: int = 1
) -> float:
    """Return an effective accuracy that no policy exceeds on these arrivals, which are in order of time.

    `quality` is by level of the profile. Takes O(levels * n log n).
    """
    if not arrivals:
        return 0.0
    total = done = 0.0
    for (start, low), (end, high) in pairwise(_hull(profile, quality)):
        most = _most_work(arrivals, end / replicas) * replicas
        total += (most - done) * (high - low) / (end - start)
        done = most
    return total / len(arrivals)


def _hull(profile: Profile, quality: Sequence[float]) -> list[tuple[float, float]]:
    """Return the corners of the concave hull of (0, 0) and each level's (seconds, quality), where it rises.

    Between two measured sizes a batch's time is linear, so its time per image is least at one of them.
    """
    levels = [
        (min(row[level] / size for row, size in zip(profile.p50, profile.sizes, strict=True)), worth)
        for level, worth in enumerate(quality)
    ]
    hull = [(0.0, 0.0)]
    for seconds, worth in sorted(levels):
        if worth <= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], (seconds, worth)):
            hull.pop()
        if seconds > hull[-1][0]:
            hull.append((seconds, worth))
        else:  # as fast as the last corner, and better
            hull[-1] = (seconds, worth)
    return hull


def _slope(first: tuple[float, float], second: tuple[float, float]) -> float:
    run = second[0] - first[0]
    return (second[1] - first[1]) / run if run else float("inf")


def _most_work(arrivals: Sequence[Arrival], each: float) -> float:
    """Return the most seconds of work a device can do by all deadlines if each request takes up to `each`."""
    done = now = 0.0
    waiting: list[tuple[float, float]] = []  # deadline, seconds left
    nexts = iter(arrivals[1:])
    for at, budget in arrivals:
        heappush(waiting, (at + budget, each))
        following = next(nexts, None)
        until = following.at if following else float("inf")
        now = max(now, at)
        while waiting and now < until:
            deadline, left = heappop(waiting)
            work = min(left, deadline - now, until - now)
            if work <= 0:
                continue
            now += work
            done += work
            if work < left and now < deadline:
                heappush(waiting, (deadline, left - work))
    return done
