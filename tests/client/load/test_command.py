from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from tests.client.peer import Failure, Peer
from tests.server_process import ServerProcess
from tome_client.cli import main
from tome_client.load import Progress
from tome_client.load.text import progress_text


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name in ("Coat/a.png", "Trouser/b.png"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.fixture
def short(images: Path, peer: Peer) -> list[str]:
    """A command line that sends 20 requests in 0.4 s."""
    return (
        f"--target {peer.target} load --images {images} --rate 50 --arrivals constant --duration 0.4s --warmup 0"
    ).split()


def usage_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exited:
        main(argv)
    assert exited.value.code == 2
    return capsys.readouterr().err


def test_a_run_is_shown_in_figures(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*short, "--budget", "5s"]) == 0
    out, err = capsys.readouterr()
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    assert lines["sent"] == "20 in 0.4 s, 50.0/s; 20 answered"
    assert lines["attainment"].startswith("100.00% answered within their budget (95 % interval 83.89% to 100.00%)")
    assert lines["merging"] == "r 0.00 on average; 48.73% of tokens and 40.00% of FLOPs saved"
    assert lines["accuracy"].startswith("50.00% effective")
    assert lines["verdict"].startswith("INVALID: ")
    assert "with 0 missed 459 are needed, and 20 were sent" in lines["verdict"]
    assert "\r" not in err


def test_a_mix_is_shown_by_budget_and_failures_by_code(
    short: list[str], peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first call asks what is served.
    peer.failures.extend([None, Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")])
    assert main([*short, "--budget", "mix:2s,5s"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ *budget +sent +answered +attainment", out, re.MULTILINE)
    assert re.search(r"^ *2s +\d+ ", out, re.MULTILINE)
    assert re.search(r"^ *5s +\d+ ", out, re.MULTILINE)
    assert re.search(r"^RESOURCE_EXHAUSTED +1$", out, re.MULTILINE)


def test_json_holds_every_figure(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*short, "--budget", "5s", "--json", "--r", "8", "--min-quality", "0.9", "--seed", "4"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["summary"]["total"]["mean_r"] == 8
    assert fields["summary"]["total"]["effective_accuracy"] == 0.5
    assert fields["plan"]["options"] == {"model": "", "r": 8, "min_quality": 0.9}
    assert fields["plan"]["seed"] == 4


def test_options_reach_the_requests(short: list[str], peer: Peer) -> None:
    argv = [*short, "--budget", "5s", "--model", "m", "--min-r", "2", "--max-r", "9", "--min-quality", "0.9"]
    assert main([*argv, "--deadline-only", "--connections", "2"]) == 0
    request = peer.calls[-1].request
    assert (request.model, request.min_r, request.max_r, request.min_quality) == ("m", 2, 9, 0.9)
    assert not request.HasField("latency_budget")
    assert len({call.peer for call in peer.calls}) == 2


def test_a_token_goes_with_every_request(short: list[str], peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOME_TOKEN", "a-secret-token")
    assert main([*short, "--budget", "5s"]) == 0
    assert {call.metadata.get("authorization") for call in peer.calls} == {"Bearer a-secret-token"}


def test_a_trace_is_sent_as_it_is(images: Path, peer: Peer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace").write_text("0.0 2s\n0.1 3s\n0.1 3s\n")
    argv = f"--target {peer.target} load --images {images} --arrivals trace:{tmp_path}/trace --warmup 0 --json".split()
    assert main(argv) == 0
    budgets = json.loads(capsys.readouterr().out)["summary"]["budgets"]
    assert [(one["budget"], one["sent"]) for one in budgets] == [(2, 1), (3, 2)]


def test_requests_without_a_deadline_do_not_count_for_attainment(
    short: list[str], peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*short, "--budget", "mix:0.001ms,none", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    late, bulk = summary["budgets"]
    assert (late["budget"], bulk["budget"]) == (1e-6, None)
    assert late["sent"] + bulk["sent"] == 20
    assert summary["total"]["attainment"]["of"] == late["sent"] == late["attainment"]["of"]
    assert (bulk["answered"], bulk["attainment"]["of"], bulk["mean_r"]) == (bulk["sent"], 0, 0)
    requests = [call.request for call in peer.calls[1:]]
    assert sum(one.no_deadline for one in requests) == bulk["sent"]
    assert all(one.no_deadline != one.HasField("latency_budget") for one in requests)


def test_a_load_without_any_deadline_is_measured_without_a_verdict(
    short: list[str], peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*short, "--budget", "none"]) == 0
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["sent"] == "20 in 0.4 s, 50.0/s; 20 answered"
    assert lines["attainment"] == "- (no request had a deadline)"
    assert lines["goodput"] == "-"
    assert lines["verdict"].startswith("INVALID: ")
    assert "no request had a deadline" in lines["verdict"]
    assert all((call.time_remaining or 1e9) > 1e6 for call in peer.calls[1:])


def test_a_trace_or_labels_with_a_byte_order_mark_are_read(
    images: Path, peer: Peer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trace").write_bytes(b"\xef\xbb\xbf0.0 2s\n")
    (tmp_path / "labels").write_bytes(b'\xef\xbb\xbf{"a.png": "Coat", "b.png": "Coat"}')
    argv = f"--target {peer.target} load --images {images} --labels {tmp_path}/labels --warmup 0 --json".split()
    assert main([*argv, "--arrivals", f"trace:{tmp_path}/trace"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["total"]["effective_accuracy"] == 1


def test_a_report_is_written(short: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs the report extra")
    assert main([*short, "--budget", "5s", "--report", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.endswith(f"report: {tmp_path / 'out' / 'index.html'}\n")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"index.html", "report.json", "requests.csv"}


def test_a_report_without_matplotlib_is_refused_before_the_run(
    short: list[str], peer: Peer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "tome_client.load.report", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*short, "--budget", "5s", "--report", str(tmp_path / "out")]) == 1
    assert "pip install 'tome-serving[plots]'" in capsys.readouterr().err
    assert peer.calls == []


def test_too_small_a_share_in_time_is_status_3(short: list[str]) -> None:
    assert main([*short, "--budget", "5s", "--fail-under", "0.99"]) == 0
    assert main([*short, "--budget", "0.001ms", "--fail-under", "0.01"]) == 3


def test_no_answer_at_all_is_status_1(short: list[str], images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--target", "localhost:1", "load", "--images", str(images), "--rate", "50", "--budget", "1s"]
    assert main(argv) == 1
    assert "UNAVAILABLE: localhost:1 is unavailable" in capsys.readouterr().err
    assert main([*short, "--budget", "1s", "--model", "missing"]) == 1
    out, err = capsys.readouterr()
    assert re.search(r"^NOT_FOUND +20$", out, re.MULTILINE)
    assert err.endswith("tome-client: nothing was answered\n")


def test_a_search_tells_its_probes_and_what_it_found(short: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    # No rate does: what is asked for is faster than light.
    assert main([*short, "--budget", "0.001ms", "--search", "attainment:0.5"]) == 0
    *probes, last = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(probes) == 2
    assert all(re.match(r" *[\d.]+/s +\d+ sent +0\.00% in time .*failed", line) for line in probes)
    assert last == "no rate keeps attainment:0.5; the lowest rate tried was 25.00/s"


def test_a_search_in_json_keeps_its_probes_off_standard_output(
    short: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*short, "--budget", "0.001ms", "--search", "p99", "--json"]) == 0
    out, err = capsys.readouterr()
    fields = json.loads(out)
    assert (fields["criterion"], fields["rate"], len(fields["probes"])) == ("p99", None, 2)
    assert len(err.splitlines()) >= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--budget", "soon"], "argument --budget: 'soon' is not a duration"),
        (["--budget", "500"], "argument --budget: 500 needs a unit: 500ms or 500s"),
        (["--budget", "mix:50,1s"], "argument --budget: 50 needs a unit"),
        (["--budget", "1s", "--duration", "30"], "argument --duration: 30 needs a unit"),
        (["--budget", "1s", "--warmup", "2"], "argument --warmup: 2 needs a unit"),
        (["--budget", "none", "--deadline-only"], "requests without a deadline have none"),
        (["--budget", "none", "--fail-under", "0.9"], "--fail-under needs requests with a deadline"),
        (["--budget", "none", "--search", "p99"], "--search needs requests with a deadline"),
        ([], "every request needs a budget"),
        (["--budget", "mix:1s,"], "'mix:1s,' is not a budget; write for example"),
        (["--budget", "1s", "--rate", "0"], "above 0; got 0"),
        (["--budget", "1s", "--arrivals", "sometimes"], "not arrivals: 'sometimes'"),
        (["--budget", "1s", "--arrivals", "trace:nowhere"], "a trace has its own rate"),
        (["--budget", "1s", "--images", "nowhere"], "nowhere: No such file or directory"),
        (["--budget", "1s", "--labels", "nowhere"], "nowhere: No such file or directory"),
        (["--budget", "1s", "--connections", "0"], "'0' is not a whole number above 0"),
        (["--budget", "1s", "--duration", "0"], "'0' must be above 0"),
        (["--budget", "1s", "--warmup", "soon"], "'soon' is not a duration"),
        (["--budget", "1s", "--fail-under", "99"], "'99' is not a share from 0 to 1"),
        (["--budget", "1s", "--search", "best"], "not a criterion: 'best'"),
        (["--budget", "1s", "--search", "p99", "--resolution", "0"], "'0' is not a share above 0"),
        (["--budget", "1s", "--search", "p99", "--fail-under", "0.9"], "--fail-under judges one run"),
        (["--budget", "1s", "--resolution", "0.1"], "--resolution is for --search"),
        (["--budget", "1s", "--ca", "nowhere.pem"], "nowhere.pem: No such file or directory"),
        (["--budget", "1s", "--report", "{images}/Coat/a.png"], "File exists"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(
    change: list[str], message: str, short: list[str], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*short, *(word.format(images=images) for word in change)]
    assert message in usage_error(argv, capsys)


def test_a_search_of_a_trace_is_refused(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace").write_text("0 1s\n")
    argv = ["load", "--images", str(images), "--arrivals", f"trace:{tmp_path}/trace", "--search", "p99"]
    assert "--search changes the rate, and a trace has its own" in usage_error(argv, capsys)


def test_ctrl_c_ends_the_run_and_shows_what_was_measured(images: Path, peer: Peer) -> None:
    code = "import sys; from tome_client.cli import main; sys.exit(main())"
    load = f"--target {peer.target} load --images {images} --rate 50 --budget 5s --duration 60s --warmup 0"
    running = subprocess.Popen(
        [sys.executable, "-c", code, *load.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while len(peer.calls) < 20:
        assert peer.called.wait(60)
        peer.called.clear()
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert re.search(r"^sent +\d+ in [\d.]+ s", out, re.MULTILINE)
    assert "INVALID: the run was stopped early" in out
    # On a busy machine a line before it says that the generator lagged.
    assert err.endswith("tome-client: interrupted; the figures are of what was measured until then\n")
    assert "Traceback" not in err


def test_ctrl_c_before_the_run_begins_does_not_wait_for_the_server(images: Path, peer: Peer) -> None:
    peer.hold.clear()
    code = "import sys; from tome_client.cli import main; sys.exit(main())"
    load = f"--target {peer.target} load --images {images} --rate 50 --budget 5s".split()
    running = subprocess.Popen(
        [sys.executable, "-c", code, *load], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert peer.called.wait(60)
    running.send_signal(signal.SIGINT)
    # The peer answers nothing as long as this waits.
    assert running.communicate(timeout=60) == ("", "tome-client: interrupted before anything was measured\n")
    assert running.returncode == 130


def test_progress_is_a_line() -> None:
    assert progress_text(Progress(-1.6, 30, 0, 0, 0, 0)) == "warming up, 2 s to go"
    assert progress_text(Progress(0.1, 30, 1, 0, 0, 0)) == "0 of 30 s: 1 sent, 1 waiting, - in time"
    assert progress_text(Progress(15, 30, 1200, 1190, 100, 90)) == "15 of 30 s: 1,200 sent, 10 waiting, 90.0% in time"


def test_the_real_server_under_a_light_load(
    server: ServerProcess, samples: dict[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = min(samples).parent
    argv = f"--target {server.target} load --images {folder} --labels {folder}/labels.json --rate 8".split()
    assert main([*argv, "--budget", "mix:2s,5s", "--duration", "2s", "--warmup", "0.5s", "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    total = fields["summary"]["total"]
    assert fields["model"] == "fashion"
    assert total["sent"] > 5
    assert total["answered"] / total["sent"] > 0.5
    assert total["answered_accuracy"] > 0.6
    assert 0 <= total["flops_saved"] < 1
