"""A model in service: its profile on this machine, its scheduler, and what a request's settings allow."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from tome_server.config.model_overrides import ModelOverrides
from tome_server.errors import ConfigError, InvalidRequestError
from tome_server.models.model_info import ModelInfo
from tome_server.scheduling.policy import policy_named
from tome_server.scheduling.policy.view import Policy
from tome_server.scheduling.profile import Latency, Profile
from tome_server.scheduling.scheduler import Scheduler

T = TypeVar("T")

log = logging.getLogger(__name__)

# The default budget of a model whose settings have none: so many seconds, or what so many images take if that is more.
LEAST_DEFAULT_BUDGET = 1.0
IMAGES_IN_DEFAULT_BUDGET = 10
FIXED = "fixed:"
_NONE = ModelOverrides()


@dataclass(frozen=True)
class Bounds:
    """What a request allows: levels of the r grid, or one r that need not be in it."""

    low: int
    high: int
    exact: int | None = None
    """The r to run at; `low` and `high` are then the level that costs about as much."""


class ServedModel(Generic[T]):
    """A model in service, with its profile, scheduler and defaults."""

    def __init__(
        self,
        model: ModelInfo,
        profile: Profile,
        policy: str,
        key: str | None = None,
        overrides: ModelOverrides = _NONE,
        file: Path | None = None,
    ) -> None:
        """`policy` is the server's; `overrides`, which `file` holds, take the place of that and of others.

        Raises ConfigError if there is no such policy, or if the policy or a default doesn't fit the model.
        """
        self.model = model
        self.key = key or model.name
        """Identifies it on the device. A model that replaces another of its name has a key of its own."""
        self.overrides = overrides
        self._file = file
        self.policy = overrides.policy or policy
        self.rs = profile.rs
        if model.relative_quality is None:
            log.warning("the quality of %s was never measured: see tome-server evaluate", model.name)
        self.scheduler: Scheduler[T] = Scheduler(Latency(profile), self._decided_by(profile))
        self._predict_by(profile)
        self.pending = 0
        """Requests for it in the server that aren't answered yet."""
        # With a fixed policy every request runs at that level if its bounds allow it, so admission must count on it.
        fixed = self.policy.startswith(FIXED)
        self._fixed_level = self.rs.index(int(self.policy.removeprefix(FIXED))) if fixed else None
        try:
            self._default = self._allowed(
                None, overrides.default_min_r, overrides.default_max_r, overrides.default_min_quality
            )
        except InvalidRequestError as error:
            raise self._fault(f"default_{error.field}", error.description) from error

    def adopt(self, profile: Profile, latency: Latency) -> None:
        """Use another profile of the same sizes and r from now on; queued requests stay queued.

        `latency` is made from it, and may already have learned what batches take now.
        """
        latency.allow(self.scheduler.latency.max_batch)
        self.scheduler.decide_by(latency, self._decided_by(profile))
        self._predict_by(profile)

    def _predict_by(self, profile: Profile) -> None:
        self.profile = profile
        self.default_budget = self.model.default_budget or max(
            LEAST_DEFAULT_BUDGET, IMAGES_IN_DEFAULT_BUDGET * profile.p95[0][0]
        )
        """Seconds for a request that sets neither budget nor deadline; infinite for no deadline."""

    def _decided_by(self, profile: Profile) -> Policy:
        """Return the policy for a profile. Raises ConfigError if the name is no policy's, or its r not in the grid."""
        try:
            return policy_named(self.policy, profile, self.model.assumed_quality)
        except ValueError as error:
            if self.overrides.policy:
                raise self._fault("policy", error) from error
            raise ConfigError(f"policy, for model {self.model.name}: {error}") from error

    def _fault(self, setting: str, what: object) -> ConfigError:
        """Return the error that says what is wrong with one of the model's own settings, and where it is set."""
        return ConfigError(f"{self._file or f'model {self.model.name}'}: {setting}: {what}")

    def bounds(
        self, r: int | None = None, min_r: int | None = None, max_r: int | None = None, min_quality: float | None = None
    ) -> Bounds:
        """Return the levels that a request's settings allow; without any settings, those of the model's defaults.

        Raises InvalidRequestError for settings that are out of range or conflict.
        """
        if r is None and min_r is None and max_r is None and min_quality is None:
            return self._default
        return self._allowed(r, min_r, max_r, min_quality)

    def _allowed(self, r: int | None, min_r: int | None, max_r: int | None, min_quality: float | None) -> Bounds:
        least, most = self._range_of_r(r, min_r, max_r)
        most = min(most, self._largest_r_keeping(min_quality))
        if least > most:
            raise InvalidRequestError("min_quality", f"is {min_quality:g}, which needs r ≤ {most}; asked is ≥ {least}")
        within = [level for level, value in enumerate(self.rs) if least <= value <= most]
        if r is not None or not within:
            level = self.profile.level_of(least)
            return Bounds(level, level, least)
        low, high = within[0], within[-1]
        if self._fixed_level is not None:
            low = high = min(max(self._fixed_level, low), high)
        return Bounds(low, high)

    def _range_of_r(self, r: int | None, min_r: int | None, max_r: int | None) -> tuple[int, int]:
        """Return the least and the largest r that a request's r, min_r and max_r allow."""
        largest = self.model.largest_r
        for name, value in (("r", r), ("min_r", min_r), ("max_r", max_r)):
            if value is not None and not 0 <= value <= largest:
                raise InvalidRequestError(name, f"must lie in 0..{largest} for {self.model.name}, and is {value}")
        least = min_r or 0
        most = max(self.rs[-1], least) if max_r is None else max_r
        if least > most:
            raise InvalidRequestError("min_r", f"is {least}, more than max_r, which is {most}")
        if r is None:
            return least, most
        if not least <= r <= (largest if max_r is None else most):
            raise InvalidRequestError("r", f"is {r}, outside of min_r..max_r, which is {least}..{most}")
        return r, r

    def _largest_r_keeping(self, min_quality: float | None) -> int:
        """Return the largest r up to which every r of the grid keeps `min_quality`."""
        if min_quality is None:
            return self.model.largest_r
        if not 0 < min_quality <= 1:
            raise InvalidRequestError("min_quality", f"must lie above 0 and up to 1, and is {min_quality:g}")
        quality = self.model.relative_quality
        if quality is None:
            raise InvalidRequestError("min_quality", f"the quality of {self.model.name} was never measured")
        good = 0
        while good + 1 < len(quality) and quality[good + 1] >= min_quality:
            good += 1
        return self.rs[good]
