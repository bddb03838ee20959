"""How many replicas a load needs, and at what quality: what `tome-server plan` computes, by simulation.

One replica is simulated, with its share of the requests, which reach it at random and in bursts as strong as those of
the whole load. That errs on the safe side: a balancer that sends each request to the least busy replica does better,
and bursts that are spread over many replicas are weaker in each of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tome_server.calibration.profile_key import ProfileKey
from tome_server.calibration.profile_store import ProfileError, default_folder, read_profile
from tome_server.errors import ConfigError, ModelLoadError
from tome_server.models.bundled import BUNDLED
from tome_server.models.quality_report import QualityReport, read_report
from tome_server.models.spec import QUALITY, quality_beside
from tome_server.scheduling.policy import policy_named
from tome_server.scheduling.profile import Profile
from tome_server.simulation.simulator import Cluster, Result, simulate
from tome_server.simulation.workload import Steady, draw

BUNDLED_NAME = "fashion"
# If a replica is busy for less than this share of the time, more replicas won't help.
IDLE = 0.01
# Numbers of replicas to show, as multiples of the number that is enough; rates to plot, of the rate asked about.
AROUND = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
RATES = (0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6, 2.0)


@dataclass(frozen=True)
class Question:
    """What is to be served, and how well."""

    rate: float
    """Requests a second, of all replicas together."""
    budgets: tuple[float, ...]
    """Seconds."""
    attainment: float
    """Share of all requests to be answered within their budgets."""
    cv2: float = 1.0
    """Squared coefficient of variation of the gaps between one replica's requests."""
    overhead: float = 0.001
    """Seconds from the end of a batch until the client has the answer."""
    requests: int = 20_000
    """How many to simulate for each figure."""
    policy: str = "price"
    weights: tuple[float, ...] = ()
    """How often each budget occurs, relative to the others; equally often if empty."""


@dataclass(frozen=True)
class Point:
    """How a number of replicas serve a load."""

    policy: str
    replicas: int
    rate: float
    """Requests a second, of all replicas together."""
    result: Result

    def fields(self) -> dict[str, Any]:
        """Return the point for JSON."""
        values = {name: value for name, value in asdict(self.result).items() if name != "requests"}
        return {
            "policy": self.policy,
            "replicas": self.replicas,
            "rate": self.rate,
            "attainment": self.result.attainment,
            **{name: None if value != value else value for name, value in values.items()},  # NaN is no JSON
        }


class Plan:
    """Answers one question for one kind of replica. Simulates when needed, and each combination once."""

    def __init__(
        self,
        question: Question,
        profile: Profile,
        quality: Sequence[float],
        on_progress: Callable[[], object] = lambda: None,
    ) -> None:
        """`quality` is by level of the profile; `on_progress` is called after each simulation.

        Raises ConfigError if there is no such policy for the profile.
        """
        self.question = question
        self.profile = profile
        self.quality = quality
        self._on_progress = on_progress
        self._points: dict[tuple[str, int, float], Point] = {}
        try:
            policy_named(question.policy, profile, quality)
        except ValueError as error:
            raise ConfigError(f"--policy: {error}") from error

    @cached_property
    def policies(self) -> tuple[str, ...]:
        """The policy asked about and those to compare it with: no merging, and the most merging."""
        return tuple(dict.fromkeys((self.question.policy, "fixed:0", f"fixed:{self.profile.rs[-1]}")))

    def point(self, policy: str, replicas: int, rate: float | None = None, requests: int | None = None) -> Point:
        """Return how so many replicas serve the load asked about, or the same load at another rate."""
        question = self.question
        rate = question.rate if rate is None else rate
        key = (policy, replicas, rate)
        if key not in self._points:
            share = rate / replicas
            seconds = (requests or question.requests) / share
            arrivals = draw(Steady(share, seconds), question.budgets, weights=question.weights, cv2=question.cv2)
            made = partial(policy_named, policy)
            result = simulate(arrivals, Cluster(self.profile, self.quality, made, reply=question.overhead))
            self._points[key] = Point(policy, replicas, rate, result)
            self._on_progress()
        return self._points[key]

    def fewest(self, policy: str) -> int | None:
        """Return how many replicas answer enough of the requests in time; None if no number does."""
        question, fastest = self.question, self.profile.p50[-1][-1] / self.profile.max_batch
        enough = max(1, math.ceil(question.rate * fastest))
        short = 0
        while self.point(policy, enough).result.attainment < question.attainment:
            if question.rate / enough * self.profile.p50[0][0] < IDLE:
                return None
            short, enough = enough, math.ceil(1.5 * enough)
        while enough - short > 1:
            middle = (short + enough) // 2
            if self.point(policy, middle).result.attainment < question.attainment:
                short = middle
            else:
                enough = middle
        return enough

    @property
    def best_attainment(self) -> float:
        """The largest attainment of the policy asked about, in all simulations so far."""
        points = self._points.values()
        return max(point.result.attainment for point in points if point.policy == self.question.policy)

    def around(self, replicas: int) -> list[Point]:
        """Return how fewer and more replicas than this number do, and this number."""
        numbers = {max(1, round(share * replicas)) for share in AROUND} | {replicas}
        return [self.point(self.question.policy, number) for number in sorted(numbers)]

    def against_rate(self, replicas: int) -> dict[str, list[Point]]:
        """Return, for the plot, how each of the policies does with so many replicas as the rate grows."""
        fewer = min(self.question.requests, 8_000)
        return {
            policy: [self.point(policy, replicas, share * self.question.rate, fewer) for share in RATES]
            for policy in self.policies
        }


def load_replica(profile: Path | None, quality: Path | None) -> tuple[ProfileKey, Profile, tuple[float, ...]]:
    """Read a replica's profile, and the quality at each of its r, as a share of images.

    Without files, these are the bundled model's, as last measured on this machine. Raises ConfigError, saying which
    command writes a file that is missing.
    """
    path = profile or _latest()
    try:
        key, measured = read_profile(path)
    except ProfileError as error:
        raise ConfigError(f"{error}; tome-server profile --output FILE writes one") from error
    shipped = quality_beside(BUNDLED / BUNDLED_NAME / QUALITY, key.dtype)
    return key, measured, _quality(quality or shipped, key, given=quality is not None)


def _latest() -> Path:
    """Return the path of the bundled model's latest profile."""
    try:
        found = list(default_folder().glob(f"{BUNDLED_NAME}-????????.json"))
    except ProfileError as error:
        raise ConfigError(f"--profile is needed: {error}") from error
    if not found:
        raise ConfigError(
            "the bundled model hasn't been profiled on this machine: run tome-server profile, or name with --profile "
            "what tome-server profile --output FILE wrote for your model"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def _quality(path: Path, key: ProfileKey, *, given: bool) -> tuple[float, ...]:
    """Return top-1 accuracy by r of the profile; agreement with r = 0 if any r lacks top-1."""
    try:
        report = read_report(path)
    except ModelLoadError as error:
        raise ConfigError(f"--quality: {error}") from error
    labelled = all(quality.top1 is not None for quality in report.levels.values())
    worth = {r: (quality.top1 if labelled else None) or quality.agreement for r, quality in report.levels.items()}
    if not _same_weights(report, key):
        needed = "was measured on other weights than the profile" if given else "is for the bundled model alone"
        raise ConfigError(f"--quality: {path} {needed}; tome-server evaluate --output FILE measures it for {key.model}")
    if missing := [r for r in key.rs if not worth.get(r, 0) > 0]:
        raise ConfigError(f"--quality: {path} lacks r = {', '.join(map(str, missing))}, which the profile has")
    return tuple(worth[r] for r in key.rs)


def _same_weights(report: QualityReport, key: ProfileKey) -> bool:
    return key.weights == (report.weights or f"hub:{report.architecture}")


def answer_fields(plan: Plan) -> dict[str, Any]:
    """Return the plan for JSON."""
    enough = {policy: plan.fewest(policy) for policy in plan.policies}
    chosen = enough[plan.question.policy]
    return {
        "question": asdict(plan.question),
        "replicas": chosen,
        "answer": None if chosen is None else plan.point(plan.question.policy, chosen).fields(),
        "table": [] if chosen is None else [point.fields() for point in plan.around(chosen)],
        "others": [
            {"policy": policy, "replicas": number, **({} if number is None else plan.point(policy, number).fields())}
            for policy, number in enough.items()
            if policy != plan.question.policy
        ],
    }
