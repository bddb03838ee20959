from __future__ import annotations

import asyncio
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from tests.client.load.outcomes import answered, result
from tests.client.oip_peer import OipPeer
from tests.client.peer import Failure, Peer
from tests.server_process import ServerProcess
from tome_api.traces import Arrival
from tome_client import PredictOptions, TomeError
from tome_client.cli import main
from tome_client.load import (
    Arrivals,
    LoadPlan,
    OpenInference,
    Progress,
    Renewal,
    Sample,
    Trace,
    event_loop,
    parse_budgets,
    run_load,
    summarize,
)

SAMPLES = [Sample("a.png", b"first", "Coat"), Sample("b.png", b"second", "Trouser"), Sample("c.png", b"third", "Coat")]
PLAN = LoadPlan(SAMPLES, Renewal(100, cv2=0), parse_budgets("mix:20s,30s"), duration=0.5, seed=7, processes=3)


def children(parent: int) -> list[int]:
    """The load generator's processes that a process has started and that still run."""
    running = (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal())
    return [pid for pid in running if is_worker(pid, parent)]


def is_worker(pid: int, parent: int) -> bool:
    try:
        state, ppid, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        argv = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # It has ended meanwhile.
        return False
    return int(ppid) == parent and state != "Z" and b"tome_client.load.worker" in argv


@pytest.mark.parametrize(
    "arrivals",
    [
        Renewal(100, cv2=0),
        Renewal(100),
        Renewal(100, cv2=4),
        Trace(tuple(Arrival(number / 50, 20.0 if number % 2 else None) for number in range(20))),
    ],
)
async def test_processes_together_send_the_requests_of_one(arrivals: Arrivals, peer: Peer) -> None:
    plan = replace(PLAN, arrivals=arrivals, warmup=0.2)
    run = await run_load(peer.target, plan)
    schedule = [one for one in plan.schedule() if one.at >= 0]
    planned = [(one.at, one.budget, SAMPLES[one.sample].name) for one in schedule]
    assert sorted((one.at, one.budget, one.image) for one in run.outcomes) == sorted(planned)
    counts = Counter(one.process for one in run.outcomes)
    assert set(counts) == {0, 1, 2}
    assert max(counts.values()) - min(counts.values()) <= 1
    images = Counter(call.request.image for call in peer.calls if hasattr(call.request, "image"))
    assert images == Counter(SAMPLES[one.sample].data for one in plan.schedule())
    assert (run.duration, run.stopped) == (plan.duration, False)
    assert all(one.answered and one.attained and one.lag >= 0 for one in run.outcomes)
    ends = [one.at + one.latency for one in run.outcomes]
    assert ends == sorted(ends)
    assert not children(os.getpid())


async def test_more_processes_than_requests_send_them_all(peer: Peer) -> None:
    run = await run_load(peer.target, replace(PLAN, arrivals=Renewal(4, cv2=0), processes=4))
    assert len(run.outcomes) == 2


async def test_each_process_has_its_own_connections(peer: Peer) -> None:
    await run_load(peer.target, replace(PLAN, connections=2))
    assert len({call.peer for call in peer.calls}) == 6


async def test_failures_are_summed(peer: Peer) -> None:
    # The first three calls ask what is served.
    peer.failures.extend([None, None, None, *[Failure(grpc.StatusCode.RESOURCE_EXHAUSTED)] * 7])
    summary = summarize(await run_load(peer.target, PLAN))
    assert {one.code: one.count for one in summary.endings} == {"OK": 43, "RESOURCE_EXHAUSTED": 7}


async def test_the_other_protocol_is_spoken_by_several_processes_too() -> None:
    plan = replace(PLAN, options=PredictOptions(model="m"), oip=OpenInference())
    with OipPeer([("a", "BYTES", [-1])]) as peer:
        run = await run_load(peer.target, plan)
        assert len(peer.calls) == len(run.outcomes) == 50
    assert all(one.answered for one in run.outcomes)


async def test_progress_is_that_of_all(peer: Peer) -> None:
    seen: list[Progress] = []
    await run_load(peer.target, replace(PLAN, warmup=0.5, duration=1.5), progress=seen.append)
    assert seen[0].at < 0
    assert max(one.sent for one in seen) > 150 / 3
    assert all(one.sent >= one.ended >= one.judged >= one.attained for one in seen)


async def test_it_stops_when_told_and_keeps_what_all_have_measured(peer: Peer) -> None:
    stop = asyncio.Event()

    def after_some(progress: Progress) -> None:
        if progress.ended >= 20:
            stop.set()

    run = await run_load(peer.target, replace(PLAN, duration=60), progress=after_some, stop=stop)
    assert run.stopped
    assert {one.process for one in run.outcomes} == {0, 1, 2}
    assert 0 < run.duration < 60
    assert not children(os.getpid())


async def test_it_can_be_stopped_while_it_waits_for_the_server(peer: Peer) -> None:
    peer.hold.clear()
    stop = asyncio.Event()
    running = asyncio.create_task(run_load(peer.target, PLAN, stop=stop))
    await asyncio.to_thread(peer.called.wait, 60)
    stop.set()
    with pytest.raises(TomeError, match="CANCELLED: stopped before the run began"):
        await running
    assert not children(os.getpid())


async def test_cancelling_it_ends_its_processes(peer: Peer) -> None:
    peer.called.clear()
    running = asyncio.create_task(run_load(peer.target, replace(PLAN, duration=60)))
    await asyncio.to_thread(peer.called.wait, 60)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not children(os.getpid())


@pytest.mark.parametrize("measuring", [True, False])
async def test_a_process_that_dies_fails_the_run_with_a_sentence(measuring: bool, peer: Peer) -> None:
    if not measuring:
        peer.hold.clear()
    calls = 10 if measuring else 3
    running = asyncio.create_task(run_load(peer.target, replace(PLAN, duration=60)))
    await asyncio.to_thread(called, peer, calls)
    os.kill(children(os.getpid())[0], signal.SIGKILL)
    expected = r"^process [123] of 3 of the load generator was ended by SIGKILL before its requests ended"
    with pytest.raises(ChildProcessError, match=expected):
        await running
    assert not children(os.getpid())


async def test_errors_before_the_run_are_those_of_one_process(peer: Peer) -> None:
    with pytest.raises(TomeError, match="UNAVAILABLE: localhost:1 is unavailable") as raised:
        await run_load("localhost:1", PLAN)
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(ValueError, match=r"a\.png is labelled 'Hat', which is neither"):
        await run_load(peer.target, replace(PLAN, samples=[Sample("a.png", b"", "Hat")]))
    with pytest.raises(ValueError, match="give the certificates instead, or use one process"):
        await run_load(peer.target, PLAN, tls=grpc.local_channel_credentials())
    assert not children(os.getpid())


def test_its_event_loop_runs_several_processes(peer: Peer) -> None:
    with asyncio.Runner(loop_factory=event_loop) as runner:
        assert len(runner.run(run_load(peer.target, PLAN)).outcomes) == 50


def test_the_lag_is_that_of_the_worst_process() -> None:
    prompt = [replace(answered(lag=0.001), process=0) for _ in range(1000)]
    late = [replace(answered(lag=0.5), process=1) for _ in range(5)]
    summary = summarize(result([*prompt, *late]))
    assert summary.lag.p50 == 0.5
    assert not summary.kept_schedule


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes(name.encode())
    return tmp_path / "images"


def test_the_command_makes_one_report(
    images: Path, peer: Peer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs the report extra")
    argv = f"--target {peer.target} load --images {images} --rate 50 --arrivals constant --duration 0.4s".split()
    argv += ["--warmup", "0", "--budget", "5s", "--processes", "2", "--json", "--report", str(tmp_path / "out")]
    assert main(argv) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["plan"]["processes"] == 2
    assert fields["summary"]["total"]["sent"] == fields["summary"]["total"]["answered"] == 20
    with (tmp_path / "out" / "requests.csv").open(newline="") as stream:
        assert [row["process"] for row in csv.DictReader(stream)] == ["0", "1"] * 10


def test_a_search_runs_in_several_processes(images: Path, peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    argv = f"--target {peer.target} load --images {images} --rate 50 --duration 0.4s --warmup 0 --processes 2".split()
    assert main([*argv, "--budget", "0.001ms", "--search", "attainment:0.5"]) == 0
    assert "no rate keeps attainment:0.5" in capsys.readouterr().out


def test_no_processes_are_refused(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["load", "--images", str(images), "--rate", "9", "--budget", "1s", "--processes", "0"])
    assert "argument --processes: '0' is not a whole number above 0" in capsys.readouterr().err


def command(images: Path, peer: Peer) -> subprocess.Popen[str]:
    """A load of a minute in three processes, which has begun."""
    code = "import sys; from tome_client.cli import main; sys.exit(main())"
    load = (
        f"--target {peer.target} load --images {images} --rate 50 --budget 5s --duration 60s --warmup 0 --processes 3"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", code, *load.split(), "--processes", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    called(peer, 20)
    return running


def called(peer: Peer, times: int) -> None:
    """Waits until the peer has been called so often."""
    while len(peer.calls) < times:
        assert peer.called.wait(60)
        peer.called.clear()


def test_ctrl_c_ends_the_run_and_shows_what_all_have_measured(images: Path, peer: Peer) -> None:
    running = command(images, peer)
    # A terminal sends it to every process of the session.
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert re.search(r"^sent +\d+ in [\d.]+ s", out, re.MULTILINE)
    assert "INVALID: the run was stopped early" in out
    assert err.endswith("tome-client: interrupted; the figures are of what was measured until then\n")
    assert "Traceback" not in err


def test_a_command_that_is_killed_leaves_no_process_behind(images: Path, peer: Peer) -> None:
    running = command(images, peer)
    workers = children(running.pid)
    assert len(workers) == 3
    running.kill()
    running.communicate(timeout=60)
    while any(is_worker(pid, parent_of(pid)) for pid in workers):
        time.sleep(0.05)


def parent_of(pid: int) -> int:
    """Another process takes over those whose parent has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_a_process_that_dies_is_a_sentence_and_status_1(images: Path, peer: Peer) -> None:
    running = command(images, peer)
    os.kill(children(running.pid)[0], signal.SIGTERM)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (1, "")
    assert re.fullmatch(r"tome-client: process [123] of 3 of the load generator was ended by SIGTERM .*\n", err)


def test_processes_import_neither_torch_nor_numpy() -> None:
    code = "import sys, tome_client.load.worker; print({'torch', 'numpy', 'PIL', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_real_server_gives_the_figures_of_one_process(
    server: ServerProcess, samples: dict[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    images = min(samples).parent
    argv = f"--target {server.target} load --images {images} --labels {images}/labels.json --rate 10 --json".split()
    argv += ["--budget", "30s", "--duration", "2s", "--warmup", "0", "--r", "0"]
    one, two = (
        json.loads(capsys.readouterr().out)["summary"] for number in "12" if main([*argv, "--processes", number]) == 0
    )
    assert one["endings"] == two["endings"]
    assert one["total"]["effective_accuracy"] == two["total"]["effective_accuracy"]
