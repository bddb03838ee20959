from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import trustme
from PIL import Image

from tests.client.peer import Failure, Health, Peer, answer
from tome_api.v1 import inference_pb2
from tome_client import __version__
from tome_client.cli import argument_parser, main


@pytest.fixture
def image(tmp_path: Path) -> str:
    file = tmp_path / "image.png"
    Image.new("RGB", (28, 28), "navy").save(file)
    return str(file)


@pytest.fixture(autouse=True)
def target(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOME_TARGET", peer.target)


def usage_error(*argv: str) -> None:
    with pytest.raises(SystemExit) as exited:
        main(argv)
    assert exited.value.code == 2


def test_the_target_is_localhost_the_environments_or_the_one_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOME_TARGET")
    assert argument_parser().parse_args(["models"]).target == "localhost:8500"
    monkeypatch.setenv("TOME_TARGET", "vision:1")
    assert argument_parser().parse_args(["models"]).target == "vision:1"
    assert argument_parser().parse_args(["--target", "a:2", "models"]).target == "a:2"
    assert argument_parser().parse_args(["models", "--target", "a:3"]).target == "a:3"


def test_the_connections_options_may_stand_before_and_after_the_command() -> None:
    for argv in (["--tls", "--ca", "f", "models"], ["models", "--tls", "--ca", "f"]):
        args = argument_parser().parse_args(argv)
        assert (args.tls, args.ca) == (True, Path("f"))
    assert argument_parser().parse_args(["models"]).tls is False


def test_health_checks_are_made_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    health = Health()
    with Peer(health=health) as peer:
        target = ["--target", peer.target, "--health-checks"]
        assert main(["models", *target]) == 0
        health.serving = False
        assert main(["models", *target]) == 1
    assert "no server there is serving" in capsys.readouterr().err


def test_predictions_are_shown_as_a_table(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", image]) == 0
    out, err = capsys.readouterr()
    header, line = out.splitlines()
    assert header.split()[:3] == ["image", "r", "tokens"]
    assert line.startswith(f"{image}    0    197 → 101")
    assert line.endswith("  Coat 0.75, Trouser 0.25")
    assert err == ""


def test_options_reach_the_request(image: str, peer: Peer) -> None:
    argv = ["predict", image, "--budget", "50ms", "--r", "8", "--min-r", "2", "--max-r", "9"]
    assert main([*argv, "--min-quality", "0.99", "--top-k", "1", "--model", "m"]) == 0
    request = peer.calls[0].request
    assert request.image == Path(image).read_bytes()
    assert request.latency_budget.ToMilliseconds() == 50
    assert (request.r, request.min_r, request.max_r) == (8, 2, 9)
    assert (request.min_quality, request.top_k, request.model) == (0.99, 1, "m")


def test_what_is_not_given_is_left_to_the_server(image: str, peer: Peer) -> None:
    main(["predict", image])
    request = peer.calls[0].request
    assert [field.name for field, _ in request.ListFields()] == ["image", "top_k"]
    assert request.top_k == 3


def lines(text: str) -> list[dict]:
    """Returns the objects of JSON lines."""
    return [json.loads(line) for line in text.splitlines()]


def test_json_is_a_line_for_each_image_that_is_answered_or_fails(
    image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", image, "nowhere.png", image, "--json"]) == 1
    out, err = capsys.readouterr()
    second, first, third = sorted(lines(out), key=lambda one: one["error"] is None)
    assert first["image"] == third["image"] == image
    assert second["image"] == "nowhere.png"
    assert first["result"]["predictions"][0] == {"class_id": 4, "label": "Coat", "score": 0.75}
    assert first["error"] is None
    assert first["round_trip"] > 0
    assert second["result"] is None
    assert second["error"]["code"] == "INVALID_ARGUMENT"
    assert "nowhere.png: INVALID_ARGUMENT: " in err


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_null_in_json(
    image: str, score: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(request: inference_pb2.PredictRequest) -> inference_pb2.PredictResponse:
        response = answer(request)
        response.predictions[0].score = score
        return response

    monkeypatch.setattr(f"{Peer.__module__}.answer", damaged)
    assert main(["predict", image, "--json"]) == 0
    out = capsys.readouterr().out
    assert "NaN" not in out
    assert "Infinity" not in out
    assert [one["score"] for one in lines(out)[0]["result"]["predictions"]] == [None, 0.25]


def test_each_failure_is_one_line_and_the_rest_are_answered(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", image, "nowhere.png"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err == (
        "tome-client: nowhere.png: INVALID_ARGUMENT: the file can't be read: No such file or directory\n"
        "tome-client: 1 of 2 images failed: 1 INVALID_ARGUMENT\n"
    )


def test_a_refused_image_names_code_and_message(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", image, "--model", "missing"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"tome-client: {image}: NOT_FOUND: no such model\n")


def test_a_broken_stream_is_one_line_however_many_images_it_held(
    image: str, peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    peer.failures.append(Failure(grpc.StatusCode.INTERNAL, "the stream\nbroke"))
    assert main(["predict", image, image]) == 1
    line = "tome-client: 2 of 2 images have no answer: INTERNAL: the stream broke\n"
    assert capsys.readouterr().err == line
    peer.failures.extend([None, Failure(grpc.StatusCode.INTERNAL, "the stream broke")])
    assert main(["predict", "--json", image, image, image]) == 1
    out, err = capsys.readouterr()
    assert [one["error"] for one in lines(out)] == [None]
    assert err == "tome-client: 2 of 3 images have no answer: INTERNAL: the stream broke\n"


def test_a_stream_that_ends_early_is_a_failure(image: str, peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", image, image, "--model", "end"]) == 1
    line = f"UNKNOWN: {peer.target} ended the stream before it had answered every item"
    assert capsys.readouterr() == ("", f"tome-client: 2 of 2 images have no answer: {line}\n")


def test_a_dead_server_is_one_line_with_the_way_out(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--target", "localhost:1", *[image] * 20]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("tome-client: 20 of 20 images have no answer: UNAVAILABLE: localhost:1 is unavailable: ")
    assert "; is a server running there?" in err


def test_one_image_has_the_models_default_budget_and_several_have_no_deadline(
    image: str, peer: Peer, tmp_path: Path
) -> None:
    for argv in ([image], [image, image], [str(tmp_path)], [image, "--budget", "none"]):
        assert main(["predict", *argv]) == 0
    assert [call.request.no_deadline for call in peer.calls] == [False, True, True, True, True]
    assert not any(call.request.HasField("latency_budget") for call in peer.calls)
    assert main(["predict", image, image, "--budget", "50ms"]) == 0
    assert {call.request.latency_budget.ToMilliseconds() for call in peer.calls[5:]} == {50}
    assert not any(call.request.no_deadline for call in peer.calls[5:])


def test_a_folder_is_the_images_in_it(image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, empty = tmp_path / "folder", tmp_path / "empty"
    (folder / "below").mkdir(parents=True)
    empty.mkdir()
    for name in ("b.PNG", "below/a.jpg", "notes.txt"):
        (folder / name).write_bytes(b"image")
    assert main(["predict", str(folder), image, "--json"]) == 0
    named = [one["image"] for one in lines(capsys.readouterr().out)]
    assert named == [str(folder / "b.PNG"), str(folder / "below/a.jpg"), image]
    assert main(["predict", str(empty), image]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err == f"tome-client: {empty}: there is no JPEG, PNG, WebP or BMP file in this folder\n"
    assert main(["predict", str(empty)]) == 1


def run_command(*argv: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tome_client", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
        env=os.environ | environment,
    )


def test_each_result_is_printed_as_soon_as_it_is_there(image: str, peer: Peer) -> None:
    """The peer answers the second image only after the line of the first was read."""
    peer.free = 1
    peer.hold.clear()
    running = run_command("predict", image, image)
    assert running.stdout is not None
    header, first = running.stdout.readline(), running.stdout.readline()
    assert header.startswith("image")
    assert first.startswith(image)
    peer.hold.set()
    out, err = running.communicate(timeout=60)
    assert out.startswith(image)
    assert (err, running.returncode) == ("", 0)


def test_ctrl_c_keeps_what_was_answered(image: str, peer: Peer) -> None:
    peer.free = 1
    peer.hold.clear()
    running = run_command("predict", image, image, image)
    assert running.stdout is not None
    assert running.stdout.readline().startswith("image")
    assert running.stdout.readline().startswith(image)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (out, err) == ("", "tome-client: interrupted; 2 of 3 images have no answer\n")
    assert running.returncode == 130


def test_ctrl_c_ends_json_too(image: str, peer: Peer) -> None:
    peer.hold.clear()
    running = run_command("predict", "--json", image, image)
    assert peer.called.wait(60)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (out, err) == ("", "tome-client: interrupted; 2 of 2 images have no answer\n")
    assert running.returncode == 130


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
@pytest.mark.parametrize("name", ["größe→.png".encode(), b"latin-\xe9.png"])
def test_results_are_printed_on_terminals_of_any_encoding(
    name: bytes, environment: dict[str, str], image: str, tmp_path: Path
) -> None:
    file = os.fsencode(tmp_path) + b"/" + name
    shutil.copyfile(image, file)
    for flags in ([], ["--json"]):
        running = run_command("predict", *flags, image, os.fsdecode(file), f"{os.fsdecode(file)}x", **environment)
        out, err = running.communicate(timeout=60)
        assert running.returncode == 1
        assert "Traceback" not in err
        assert "1 of 3 images failed: 1 INVALID_ARGUMENT" in err
        if flags:
            assert sorted(one["error"] is None for one in lines(out)) == [False, True, True]
        else:
            assert len(out.splitlines()) == 3
            assert "197 -> 101" in out
    helping = run_command("load", "--help", **environment)
    helping.communicate(timeout=60)
    assert helping.returncode == 0


def test_without_a_standard_output_the_status_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["models"]) == 0


def test_a_pipe_that_is_closed_ends_the_command_without_a_word(image: str) -> None:
    running = run_command("predict", *[image] * 50)
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    assert running.wait(60) == 141
    assert running.stderr.read() == ""
    running.stderr.close()


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["fashion", "vit_tiny", "yes", "Clothes"]
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "fashion"


def test_one_model_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "fashion"]) == 0
    assert "GMACs" in capsys.readouterr().out
    assert main(["models", "fashion", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["r_grid"][0]["top1"] == 0.91


def test_a_picture_is_drawn(image: str, peer: Peer, tmp_path: Path, capsys) -> None:
    picture = tmp_path / "out.png"
    assert main(["visualize", image, "--r", "8", "-o", str(picture)]) == 0
    assert peer.calls[0].request.return_token_map
    assert peer.calls[0].request.r == 8
    with Image.open(picture) as drawn:
        assert drawn.size == (2 * 448 + 8, 448)
    assert capsys.readouterr().out == (f"{picture}: Coat 0.75; r 8, 197 → 101 tokens, 40.0% of FLOPs saved\n")


def test_a_failed_call_is_one_line(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    peer.failures.append(Failure(grpc.StatusCode.NOT_FOUND, "no such model"))
    assert main(["models", "x"]) == 1
    assert capsys.readouterr().err == "tome-client: NOT_FOUND: no such model\n"


NO_SERVER = "; is a server running there? tome-server serve starts one, --target names another\n"
NO_TARGET = "; --target names the server, as HOST:PORT\n"


@pytest.mark.parametrize(
    ("target", "way_out"), [("localhost:1", NO_SERVER), ("nowhere.invalid:1", NO_TARGET), ("ipv4:127.1:1", NO_TARGET)]
)
@pytest.mark.parametrize("command", ["predict", "predict several", "embed", "models", "visualize", "load", "wait"])
def test_where_no_connection_can_be_made_the_way_out_is_said(
    command: str, target: str, way_out: str, image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {
        "predict": [image],
        "predict several": [image, image],
        "embed": [image, "-o", str(tmp_path / "out.npy")],
        "models": [],
        "wait": ["--timeout", "1ms"],
        "visualize": [image, "-o", str(tmp_path / "out.png")],
        "load": ["--images", str(Path(image).parent), "--rate", "10", "--budget", "100ms"],
    }
    assert main([command.split()[0], *arguments[command], "--target", target]) == 1
    err = capsys.readouterr().err
    assert err.endswith(way_out)
    assert err.count(way_out) == 1


def test_tls_and_plain_text_that_meet_are_told_apart(peer: Peer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--target", peer.target, "--tls"]) == 1
    assert capsys.readouterr().err.endswith("; the server there speaks plain text: leave out --tls and --ca\n")
    certificate = trustme.CA().issue_cert("localhost")
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
    with Peer(grpc.ssl_server_credentials([pair])) as secure:
        assert main(["models", "--target", secure.target]) == 1
    assert capsys.readouterr().err.endswith("; the server there speaks TLS: add --tls\n")


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNKNOWN])
def test_what_a_server_refuses_gets_no_hint_whatever_it_says(
    code: grpc.StatusCode, peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    peer.failures.extend([Failure(code, "Failed to connect: DNS resolution failed")] * 5)
    assert main(["models"]) == 1
    assert capsys.readouterr().err.endswith("DNS resolution failed\n")


def test_a_missing_certificate_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--ca", "nowhere.pem"]) == 1
    assert "nowhere.pem: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["guess"],
        ["predict"],
        ["predict", "a.png", "--r", "many"],
        ["visualize", "a.png"],
        ["predict", "a.png", "--budget", "soon"],
        ["predict", "a.png", "--budget", "500"],
        ["predict", "a.png", "--budget", "0"],
        ["predict", "a.png", "--min-quality", "99"],
    ],
)
def test_a_wrong_command_line_exits_with_2(argv: list[str]) -> None:
    usage_error(*argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["predct", "a.png"], "did you mean 'predict'?"),
        (["lod"], "did you mean 'load'?"),
        (["predict", "a.png", "--budjet", "50ms"], "there is no flag --budjet; did you mean '--budget'?"),
        (["predict", "a.png", "--min_r=3"], "there is no flag --min_r; did you mean '--min-r'?"),
        (["load", "--images", "x", "--warm-up", "2s"], "did you mean '--warmup'?"),
        (["models", "--tsl"], "did you mean '--tls'?"),
    ],
)
def test_a_name_that_does_not_exist_is_answered_with_the_nearest(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    usage_error(*argv)
    error, _ = capsys.readouterr().err.splitlines()
    assert error.endswith(said)


def test_an_unknown_flag_is_answered_by_its_command_with_the_way_to_its_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage_error("predict", "a.png", "--0123456789")
    assert capsys.readouterr().err.splitlines() == [
        "tome-client predict: there is no flag --0123456789",
        "tome-client predict --help lists what it takes",
    ]


def test_a_budget_without_a_unit_is_answered_with_both_ways_to_write_it(capsys: pytest.CaptureFixture[str]) -> None:
    usage_error("predict", "a.png", "--budget", "500")
    error, _ = capsys.readouterr().err.splitlines()
    assert error.endswith("argument --budget: 500 needs a unit: 500ms or 500s")


def test_a_wrong_budget_names_the_forms_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    usage_error("predict", "a.png", "--budget", "soon")
    assert "--budget: 'soon' is not a duration; write for example 50ms, 1.5s or 2m" in capsys.readouterr().err


def test_help_has_examples_and_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--help"])
    assert exited.value.code == 0
    out = capsys.readouterr().out
    assert "tome-client predict shirt.png" in out
    assert "Exits with 0" in out


@pytest.mark.parametrize("command", ["predict", "embed", "models", "visualize", "load", "wait"])
def test_a_commands_help_begins_with_its_own_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert len(out.partition("\n\n")[0].splitlines()) == 1
    assert out.index("--model" if command != "models" else "--json") < out.index("connection:") < out.index("--tls")


def test_the_package_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "tome_client", "predict"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "tome-client predict: the following arguments are required: IMAGE" in done.stderr


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"tome-client {__version__}\n"


@pytest.mark.parametrize("command", [["predict", "{image}"], ["models"]])
def test_ctrl_c_ends_with_one_line_and_130(command: list[str], image: str, peer: Peer) -> None:
    peer.hold.clear()
    running = subprocess.Popen(
        [sys.executable, "-c", "import sys; from tome_client.cli import main; sys.exit(main())"]
        + [word.format(image=image) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert peer.called.wait(60)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert out == ""
    assert err.startswith("tome-client: interrupted")
    assert len(err.splitlines()) == 1
    assert running.returncode == 130


def test_a_token_comes_from_a_file_or_the_environment(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image: str
) -> None:
    """And never from the command line, which others on the machine can read."""
    file = tmp_path / "token"
    # With the byte order mark that some editors write.
    file.write_bytes(b"\xef\xbb\xbfof-the-file\r\n")
    main(["models"])
    monkeypatch.setenv("TOME_TOKEN", "of-the-environment")
    main(["models"])
    main(["--token-file", str(file), "models"])
    main(["predict", image, "--token-file", str(file)])
    assert [call.metadata.get("authorization") for call in peer.calls] == [
        None,
        "Bearer of-the-environment",
        "Bearer of-the-file",
        "Bearer of-the-file",
    ]


def test_a_token_file_that_is_no_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "token"
    file.write_text("a-token", encoding="utf-16")
    assert main(["--token-file", str(file), "models"]) == 1
    assert capsys.readouterr().err == f"tome-client: {file}: the file is not UTF-8 text: invalid start byte\n"


def test_certificates_come_from_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ca = trustme.CA()
    server, mine = ca.issue_cert("localhost"), ca.issue_cert("client")
    files = {name: tmp_path / name for name in ("ca", "certificate", "key")}
    files["ca"].write_bytes(b"\xef\xbb\xbf" + ca.cert_pem.bytes())
    files["certificate"].write_bytes(mine.cert_chain_pems[0].bytes())
    files["key"].write_bytes(b"\xef\xbb\xbf" + mine.private_key_pem.bytes())
    pair = (server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())
    with Peer(grpc.ssl_server_credentials([pair], ca.cert_pem.bytes(), require_client_auth=True)) as peer:
        monkeypatch.setenv("TOME_TARGET", peer.target)
        shown = [argument for name in ("certificate", "key") for argument in (f"--{name}", str(files[name]))]
        assert main(["models", "--ca", str(files["ca"]), *shown]) == 0
        assert main(["models", "--ca", str(files["ca"])]) == 1
        assert main(["models", "--ca", str(files["ca"]), *shown[:2]]) == 1
    assert len(peer.calls) == 1
