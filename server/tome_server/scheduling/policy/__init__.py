"""Policies: which requests run next, together, and at which r."""

from collections.abc import Sequence

from tome_server.config.policy_names import NAMES
from tome_server.scheduling.policy.price import Price
from tome_server.scheduling.policy.published import Fixed, SlackFit, max_accuracy, max_batch
from tome_server.scheduling.policy.view import Policy
from tome_server.scheduling.profile import Profile


def policy_named(name: str, profile: Profile, quality: Sequence[float]) -> Policy:
    """Return the policy that settings call `name`; "fixed:8" is r = 8 for all. `quality` is by level of the profile.

    Raises ValueError if there is no policy of that name, or if the fixed r isn't in the profile's grid.
    """
    match name.partition(":"):
        case ("price", "", ""):
            return Price(profile, quality)
        case ("fixed", _, r) if r.isdecimal():
            if int(r) not in profile.rs:
                raise ValueError(f"fixed:{r}: the model is served at r = {', '.join(map(str, profile.rs))}")
            return Fixed(profile.rs.index(int(r)))
        case ("max_accuracy", "", ""):
            return max_accuracy
        case ("max_batch", "", ""):
            return max_batch
        case ("slackfit", "", ""):
            return SlackFit()
    raise ValueError(f"{name!r} is no policy; there are {', '.join(NAMES)}")
