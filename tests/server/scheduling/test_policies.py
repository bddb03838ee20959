"""What holds for every policy, whatever waits."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.server.scheduling.cases import ADAPTIVE, NAMES, QUALITY, RS, Asked, asked, assert_fits, device, profiles
from tome_server.config.policy_names import NAMES as ALL_NAMES
from tome_server.scheduling.policy import policy_named
from tome_server.scheduling.policy.price import Price
from tome_server.scheduling.policy.published import Fixed, SlackFit, max_accuracy, max_batch
from tome_server.scheduling.policy.view import Traffic, View
from tome_server.scheduling.profile import Latency, Profile
from tome_server.scheduling.queue import Waiting

traffics = st.builds(
    lambda rate, dispersion, budgets: Traffic(
        rate, dispersion, tuple((budget, (part + 1) / len(budgets)) for part, budget in enumerate(sorted(budgets)))
    ),
    st.one_of(st.just(0.0), st.floats(1e-3, 1e4)),
    st.floats(1, 16),
    st.sets(st.one_of(st.floats(1e-3, 10), st.just(math.inf)), max_size=4),
)


def view(profile: Profile, requests: list[Asked], traffic: Traffic, now: float = 5.0) -> View:
    latency = Latency(profile)
    waiting = [one.at(item, now, latency) for item, one in enumerate(requests)]
    return View(now, sorted(waiting, key=lambda request: request.deadline), latency, traffic)


@pytest.mark.parametrize("name", NAMES)
@given(profiles(), st.lists(asked(), min_size=1, max_size=40), traffics)
def test_decisions_keep_to_the_bounds(name: str, profile: Profile, requests: list[Asked], traffic: Traffic) -> None:
    seen = view(profile, requests, traffic)
    assert_fits(policy_named(name, profile, QUALITY)(seen), seen)


@pytest.mark.parametrize("name", NAMES)
@given(profiles(), st.lists(asked(), min_size=1, max_size=40), traffics)
def test_a_decision_is_the_same_twice(name: str, profile: Profile, requests: list[Asked], traffic: Traffic) -> None:
    policy, seen = policy_named(name, profile, QUALITY), view(profile, requests, traffic)
    assert policy(seen) == policy(seen)


@pytest.mark.parametrize("name", ADAPTIVE)
@given(profiles(), asked(), traffics)
def test_a_request_that_is_alone_and_feasible_runs_in_time(
    name: str, profile: Profile, request_: Asked, traffic: Traffic
) -> None:
    seen = view(profile, [request_], traffic)
    decision = policy_named(name, profile, QUALITY)(seen)
    assert decision.batch == [seen.waiting[0]]
    assert seen.now + seen.latency.of_batch(decision.levels, promised=True) <= seen.waiting[0].deadline


# Two in a batch, one of whom forbids merging, just miss what two merged the most would make.
NEARLY_FLAT = (
    (0.0440625, 0.0440625, 0.0440625, 0.0440625, 0.0428125),
    (0.0490625, 0.0490625, 0.0490625, 0.0490625, 0.0465625),
)


@example(
    Profile(sizes=(1, 2), rs=(0, 4, 8, 12, 16), p50=NEARLY_FLAT, p95=NEARLY_FLAT),
    [Asked(3.0, 0, 4), Asked(1.109375, 0, 4), Asked(2.0, 0, 0)],
    Traffic(),
)
@given(profiles(), st.lists(asked(), min_size=1, max_size=40), traffics)
def test_price_runs_nobody_too_late(profile: Profile, requests: list[Asked], traffic: Traffic) -> None:
    seen = view(profile, requests, traffic)
    decision = policy_named("price", profile, QUALITY)(seen)
    if len({*decision.levels}) == 1 or profile.one_call:
        ends = seen.now + seen.latency.of_batch(decision.levels, promised=True)
        assert all(ends <= request.deadline for request in decision.batch)


@given(profiles(), st.lists(asked(), min_size=1, max_size=40), traffics, st.sampled_from(RS))
def test_fixed_gives_up_only_whom_its_r_can_not_make(
    profile: Profile, requests: list[Asked], traffic: Traffic, r: int
) -> None:
    seen, level = view(profile, requests, traffic), RS.index(r)
    decision = policy_named(f"fixed:{r}", profile, QUALITY)(seen)
    for request in decision.shed:
        own = min(max(level, request.low), request.high)
        assert seen.now + seen.latency.promised(1, own) > request.deadline
    for request, chosen in zip(decision.batch, decision.levels, strict=True):
        assert chosen == min(max(level, request.low), request.high)


def only(slack: float, waiting: int = 1, traffic: Traffic | None = None) -> View:
    """So many requests that may be merged at will and that are all due in `slack` seconds."""
    requests = [Waiting(item, 0.0, slack, 0, len(RS) - 1) for item in range(waiting)]
    return View(0.0, requests, Latency(device(largest=8)), traffic or Traffic(50.0, 1.0, ((slack, 1.0),)))


def test_max_accuracy_merges_as_little_as_the_deadline_allows() -> None:
    assert list(max_accuracy(only(0.036)).levels) == [0]
    assert list(max_accuracy(only(0.036, waiting=20)).levels) == [0] * 8
    # 3 ms make one image at level 3, and not two.
    assert list(max_accuracy(only(0.0034, waiting=20)).levels) == [2]


def test_max_batch_merges_only_for_the_largest_batch() -> None:
    assert list(max_batch(only(0.036, waiting=20)).levels) == [0] * 8
    assert list(max_batch(only(0.0088, waiting=20)).levels) == [2] * 8
    assert len(max_batch(only(0.005, waiting=20)).batch) == 4


def test_slackfit_takes_the_bucket_that_the_slack_allows() -> None:
    assert list(SlackFit()(only(0.036, waiting=20)).levels) == [0] * 8
    tight = SlackFit()(only(0.0085, waiting=20))
    latency = Latency(device(largest=8))
    assert 0.9 * 0.0085 < latency.of_batch(tight.levels, promised=True) <= 0.0085


def test_slackfit_has_one_bucket_where_all_batches_take_the_same() -> None:
    profile = Profile((1,), (0,), ((0.01,),), ((0.01,),))
    seen = View(0.0, [Waiting(0, 0.0, math.inf, 0, 0)], Latency(profile), Traffic())
    assert list(SlackFit()(seen).levels) == [0]


def test_fixed_runs_as_many_as_are_in_time_together() -> None:
    assert len(Fixed(0)(only(0.0085, waiting=20)).batch) == 5
    assert list(Fixed(4)(only(0.0085, waiting=20)).levels) == [4] * 8


def test_bounds_are_kept_member_by_member() -> None:
    latency = Latency(device(largest=8))
    members = [Waiting(0, 0.0, 1.0, 0, 0), Waiting(1, 0.0, 1.1, 3, 4), Waiting(2, 0.0, 1.2, 0, 4)]
    for name, levels in (("fixed:8", [0, 3, 2]), ("price", [0, 3, 0]), ("max_batch", [0, 3, 0])):
        seen = View(0.0, members, latency, Traffic(1.0, 1.0, ((1.0, 1.0),)))
        assert policy_named(name, latency.profile, QUALITY)(seen).levels == levels


def test_every_policy_has_a_name() -> None:
    profile = device()
    assert ALL_NAMES == ("price", "fixed:R", "max_accuracy", "max_batch", "slackfit")
    assert isinstance(policy_named("price", profile, QUALITY), Price)
    assert policy_named("fixed:8", profile, QUALITY) == Fixed(2)
    assert policy_named("max_accuracy", profile, QUALITY) is max_accuracy
    assert policy_named("max_batch", profile, QUALITY) is max_batch
    assert policy_named("slackfit", profile, QUALITY) == SlackFit()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("best", "'best' is no policy; there are price, fixed:R"),
        ("", "'' is no policy"),
        ("price:1", "is no policy"),
        ("fixed", "is no policy"),
        ("fixed:", "is no policy"),
        ("fixed:-4", "is no policy"),
        ("fixed:3", "fixed:3: the model is served at r = 0, 4, 8, 12, 16"),
    ],
)
def test_other_names_are_refused(name: str, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        policy_named(name, device(), QUALITY)
    assert says in str(caught.value)
