import json
from functools import partial

import pytest
from benchmarks import sharing
from benchmarks.devices import Device
from benchmarks.sharing import pair, serve

from tome_server.scheduling.policy import policy_named
from tome_server.scheduling.profile import Profile
from tome_server.simulation.simulator import Cluster, simulate

P50 = ((0.012, 0.007), (0.042, 0.022))
DEVICE = Device("gpu", Profile((1, 4), (0, 8), P50, P50), (90.0, 80.0), slo=0.2)


def test_every_request_ends_once_and_the_same_again() -> None:
    models = pair(DEVICE, 1.2, 7, 5.0)
    for together in (False, True):
        result = serve(models, "price", together=together)
        assert result.requests == sum(len(model.arrivals) for model in models)
        assert result.in_time + result.refused + result.shed <= result.requests
        assert serve(models, "price", together=together) == result


@pytest.mark.parametrize("together", [False, True])
def test_one_model_fares_as_in_the_simulator(together: bool) -> None:
    model = pair(DEVICE, 1.2, 7, 5.0)[0]
    cluster = Cluster(model.profile, model.quality, partial(policy_named, "price"), jitter=0.0)
    theirs, ours = simulate(model.arrivals, cluster), serve([model], "price", together=together)
    assert (ours.requests, ours.refused, ours.shed) == (theirs.requests, theirs.refused, theirs.shed)
    assert ours.in_time == theirs.in_time
    assert ours.effective_accuracy == pytest.approx(theirs.effective_accuracy)


def test_more_promises_are_kept_where_all_requests_are_reckoned_with() -> None:
    models = pair(DEVICE, 1.4, 7, 20.0)
    assert serve(models, "price", together=True).kept > serve(models, "price", together=False).kept


def test_the_command_prints_a_table_or_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sharing, "devices", lambda: [DEVICE])
    assert sharing.main(["--seeds", "1", "--seconds", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(sharing.LOADS)
    assert sharing.main(["--seeds", "1", "--seconds", "2", "--json"]) == 0
    assert [row["load"] for row in json.loads(capsys.readouterr().out)] == list(sharing.LOADS)
