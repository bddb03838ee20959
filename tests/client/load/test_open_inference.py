from __future__ import annotations

import io
import json
import re
import struct
from array import array
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from PIL import Image

from tests.client.oip_peer import OipPeer
from tests.client.peer import Failure, Peer
from tests.server_process import ServerProcess
from tome_client import PredictOptions, TomeError
from tome_client.cli import main
from tome_client.load import LoadPlan, OpenInference, Renewal, Sample, parse_budgets, run_load, summarize


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (6, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


RED = Sample("red.png", picture((255, 0, 51)), "1")
BLUE = Sample("blue.png", picture((0, 0, 255)), "2")
PLAN = LoadPlan(
    [RED, BLUE],
    Renewal(50, cv2=0),
    parse_budgets("20s"),
    duration=0.2,
    options=PredictOptions(model="m"),
    oip=OpenInference(),
)


def sent(peer: OipPeer, sample: Sample = RED, *, size: int) -> bytes:
    """The tensor that was sent for an image that is red, known by its first element."""
    contents = [call.request.raw_input_contents[0] for call in peer.calls]
    assert {len(one) for one in contents} == {size}
    return max(contents) if sample is RED else min(contents)


async def test_every_request_is_an_inference_with_the_budget_as_its_grpc_deadline() -> None:
    with OipPeer([("input", "BYTES", [-1, 1])]) as peer:
        result = await run_load(peer.target, PLAN, metadata=[("authorization", "Bearer x")])
    assert len(peer.calls) == len(result.outcomes) == 10
    assert {one.code for one in result.outcomes} == {"OK"}
    assert all(one.attained for one in result.outcomes)
    assert (result.model.summary.name, result.model.summary.architecture) == ("m", "onnxruntime_onnx")
    assert result.model.num_classes == 3
    for call in peer.calls:
        # gRPC rounds deadlines up on the wire, by about 1 %. No grace is added.
        assert 0 < call.time_remaining <= 20.3
        assert call.metadata["authorization"] == "Bearer x"
        assert call.request.model_name == "m"
        assert not call.request.parameters
        assert not call.request.outputs


async def test_without_a_deadline_a_call_has_none() -> None:
    with OipPeer([("input", "BYTES", [-1])]) as peer:
        result = await run_load(peer.target, replace(PLAN, budgets=parse_budgets("none")))
    assert all(one.answered for one in result.outcomes)
    assert all((call.time_remaining or 1e9) > 1e6 for call in peer.calls)


@pytest.mark.parametrize("shape", [[-1], [1], [-1, 1], [-1, -1]])
async def test_a_model_that_takes_bytes_gets_the_file(shape: list[int]) -> None:
    with OipPeer([("input", "BYTES", shape)]) as peer:
        await run_load(peer.target, PLAN)
    tensors = {call.request.raw_input_contents[0] for call in peer.calls}
    assert tensors == {struct.pack("<I", len(one.data)) + one.data for one in (RED, BLUE)}
    (tensor,) = peer.calls[0].request.inputs
    assert (tensor.name, tensor.datatype, tensor.shape) == ("input", "BYTES", [1] * len(shape))


@pytest.mark.parametrize(
    ("shape", "sent_shape", "pixels"),
    [
        ([-1, 2, 2, 3], [1, 2, 2, 3], bytes([255, 0, 51] * 4)),
        ([-1, -1, -1, 3], [1, 4, 6, 3], bytes([255, 0, 51] * 24)),
        ([2, 2, 3], [2, 2, 3], bytes([255, 0, 51] * 4)),
        ([1, 3, 2, 2], [1, 3, 2, 2], bytes([255] * 4 + [0] * 4 + [51] * 4)),
        ([-1, 1, 2, 2], [1, 1, 2, 2], bytes([82] * 4)),
    ],
)
async def test_a_model_that_takes_pixels_gets_them_in_its_size_and_order(
    shape: list[int], sent_shape: list[int], pixels: bytes
) -> None:
    with OipPeer([("pixels", "UINT8", shape)]) as peer:
        await run_load(peer.target, PLAN)
    assert sent(peer, size=len(pixels)) == pixels
    (tensor,) = peer.calls[0].request.inputs
    assert (tensor.name, tensor.datatype, tensor.shape) == ("pixels", "UINT8", sent_shape)


@pytest.mark.parametrize(
    ("shape", "values"), [([-1, 3, 1, 2], [1, 1, -1, -1, -0.2, -0.2]), ([-1, 2, 1, 3], [1, -1, -0.2, 1, -1, -0.2])]
)
async def test_floats_are_scaled_and_normalised(shape: list[int], values: list[float]) -> None:
    settings = OpenInference(mean=(0.5, 0.5, 0.3), std=(0.5,))
    with OipPeer([("input", "FP32", shape)]) as peer:
        await run_load(peer.target, replace(PLAN, samples=[RED], oip=settings))
    assert array("f", peer.calls[0].request.raw_input_contents[0]) == pytest.approx(values, abs=1e-6)


async def test_answers_are_judged_by_the_largest_score_raw_or_typed() -> None:
    for typed in (False, True):
        with OipPeer([("input", "BYTES", [-1])], typed=typed) as peer:
            result = await run_load(peer.target, PLAN)
        assert all(one.right == (one.image == "red.png") for one in result.outcomes)


async def test_what_a_peer_does_not_report_is_left_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    samples = [replace(RED, label="Coat"), BLUE]
    with OipPeer([("input", "BYTES", [-1])]) as peer:
        result = await run_load(peer.target, replace(PLAN, samples=samples, budgets=parse_budgets("mix:20s,30s")))
        # An answer says an index, and nothing about names.
        assert {one.right for one in result.outcomes if one.image == "red.png"} == {None}
        assert {(one.merging, one.timing) for one in result.outcomes} == {(None, None)}
        total = summarize(result).total
        assert (total.answered, total.mean_r, total.tokens_saved) == (10, None, None)


async def test_endings_of_other_servers_count_under_our_codes() -> None:
    failures = [
        Failure(grpc.StatusCode.UNAVAILABLE, "[request id: 7] Request timeout expired"),
        Failure(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size"),
        Failure(grpc.StatusCode.UNAVAILABLE, "loading"),
        Failure(grpc.StatusCode.INTERNAL, "broken"),
    ]
    with OipPeer([("input", "BYTES", [-1])]) as peer:
        peer.failures.extend(failures)
        result = await run_load(peer.target, PLAN)
    failed = sorted((one.code, one.reason) for one in result.outcomes if not one.answered)
    assert failed == [
        ("DEADLINE_EXCEEDED", "EXPIRED"),
        ("INTERNAL", None),
        ("RESOURCE_EXHAUSTED", None),
        ("UNAVAILABLE", None),
    ]
    assert {one.right for one in result.outcomes if not one.answered} == {False}


@pytest.mark.parametrize(
    ("inputs", "settings", "message"),
    [
        ([("a", "BYTES", [-1]), ("b", "BYTES", [-1])], OpenInference(), "has several inputs: choose one of a, b with"),
        ([("a", "BYTES", [-1])], OpenInference(input="x"), "m has no input 'x'; it has a: see --input"),
        ([], OpenInference(), "m has no input ''; it has none"),
        ([("a", "FP16", [-1, 3, 2, 2])], OpenInference(), "takes FP16; an image can be sent as BYTES, UINT8 or FP32"),
        ([("a", "BYTES", [4])], OpenInference(), r"has the shape \[4\], which takes no single image as BYTES"),
        ([("a", "FP32", [8, 3, 2, 2])], OpenInference(), r"has the shape \[8, 3, 2, 2\], which takes no single image"),
        ([("a", "FP32", [-1, 7, 7, 7])], OpenInference(), "takes no single image as FP32"),
        ([("a", "FP32", [-1, 784])], OpenInference(), "takes no single image as FP32"),
        ([("a", "UINT8", [-1, 2, 8, 8])], OpenInference(), "takes no single image as UINT8"),
        ([("a", "FP32", [-1, 3, 2, 2])], OpenInference(mean=(1, 2)), "one for each of the 3 channels"),
    ],
)
async def test_an_input_that_no_image_can_be_sent_to_ends_it_before_it_begins(
    inputs: list, settings: OpenInference, message: str
) -> None:
    with OipPeer(inputs) as peer:
        with pytest.raises(ValueError, match=message):
            await run_load(peer.target, replace(PLAN, oip=settings))
        assert not peer.calls


async def test_an_input_is_chosen_by_its_name() -> None:
    with OipPeer([("a", "BYTES", [-1]), ("b", "BYTES", [-1])]) as peer:
        await run_load(peer.target, replace(PLAN, oip=OpenInference(input="b")))
    assert {call.request.inputs[0].name for call in peer.calls} == {"b"}


async def test_a_file_that_is_no_image_is_named() -> None:
    plan = replace(PLAN, samples=[Sample("a.png", b"no image")])
    with (
        OipPeer([("a", "UINT8", [-1, 2, 2, 3])]) as peer,
        pytest.raises(ValueError, match=r"a\.png can't be decoded: "),
    ):
        await run_load(peer.target, plan)


async def test_a_model_that_is_not_named_or_not_there_is_an_error_with_a_way_out() -> None:
    with OipPeer([("a", "BYTES", [-1])]) as peer:
        with pytest.raises(TomeError, match="must not be empty; name the model with --model"):
            await run_load(peer.target, replace(PLAN, options=PredictOptions()))
        with pytest.raises(TomeError, match=r"NOT_FOUND: unknown model missing$"):
            await run_load(peer.target, replace(PLAN, options=PredictOptions(model="missing")))


async def test_a_server_that_does_not_speak_the_protocol_is_an_error(peer: Peer) -> None:
    with pytest.raises(TomeError, match="does not speak the Open Inference Protocol over gRPC"):
        await run_load(peer.target, PLAN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for one in (RED, BLUE):
        (tmp_path / "images" / str(one.label)).mkdir(parents=True)
        (tmp_path / "images" / str(one.label) / one.name).write_bytes(one.data)
    return tmp_path / "images"


def test_the_command_speaks_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs the report extra")
    with OipPeer([("a", "FP32", [-1, 3, 2, 2]), ("b", "BYTES", [-1])]) as peer:
        argv = f"--target {peer.target} load --protocol oip --model m --images {folder} --rate 50 --warmup 0".split()
        argv += ["--arrivals", "constant", "--duration", "0.4s", "--budget", "mix:20s,30s", "--input", "a"]
        argv += ["--mean", "0.5", "--std", "0.5,0.5,0.5"]
        assert main([*argv, "--report", str(tmp_path / "out")]) == 0
        out = capsys.readouterr().out
        assert re.search(r"^accuracy +\d", out, re.MULTILINE)
        assert "merging" not in out
        assert "mean r" not in out
        assert {call.request.inputs[0].name for call in peer.calls} == {"a"}
    page = (tmp_path / "out" / "index.html").read_text()
    assert "onnxruntime_onnx" in page
    assert "Tokens merged" not in page
    assert "policy" not in page
    fields = json.loads((tmp_path / "out" / "report.json").read_text())
    assert fields["plan"]["protocol"] == "oip"
    assert fields["plan"]["oip"] == {"input": "a", "datatype": "", "mean": [0.5], "std": [0.5, 0.5, 0.5]}
    assert fields["policy"] is None
    assert fields["summary"]["total"]["mean_r"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--input a", "--input is for --protocol oip, which is not given"),
        ("--mean 0.5", "--mean is for --protocol oip"),
        ("--protocol oip --std 0.5,0", "a standard deviation is above 0: --std; got 0.0"),
        ("--protocol oip --mean nan", "a mean is a finite number: --mean"),
        ("--protocol oip --mean x", "'x' is not a number"),
        ("--protocol rest", "'rest' is none of tome, oip"),
        ("--protocol oip --datatype FP16", "'FP16' is none of BYTES, UINT8, FP32"),
    ],
)
def test_flags_that_do_not_fit_say_so(
    flags: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["load", "--images", str(folder), "--rate", "9", "--budget", "1s", *flags.split()])
    assert exited.value.code == 2
    assert message in capsys.readouterr().err


def test_our_own_server_gives_the_same_figures_over_both_protocols(
    server: ServerProcess, samples: dict[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    images = min(samples).parent
    argv = f"--target {server.target} load --images {images} --labels {images}/labels.json --rate 10 --json".split()
    argv += ["--budget", "mix:30s,none", "--duration", "2s", "--warmup", "0", "--r", "4"]
    native, oip, pixels, normalised = (
        json.loads(capsys.readouterr().out)["summary"]
        for flags in (
            "",
            "--protocol oip",
            "--protocol oip --datatype UINT8",
            "--protocol oip --datatype FP32 --mean 0.2860 --std 0.3530",
        )
        if main([*argv, *flags.split()]) == 0
    )
    for other in (oip, pixels):
        assert other["endings"] == native["endings"]
        assert [(one["sent"], one["answered"]) for one in other["budgets"]] == [
            (one["sent"], one["answered"]) for one in native["budgets"]
        ]
        for figure in ("mean_r", "tokens_saved", "flops_saved", "effective_accuracy", "answered_accuracy"):
            assert other["total"][figure] == native["total"][figure]
    assert normalised["total"]["answered"] == native["total"]["answered"]
    assert normalised["total"]["answered_accuracy"] > 0.6


def test_a_deadline_that_our_server_refuses_is_the_same_ending_over_both_protocols(
    server: ServerProcess, samples: dict[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = f"--target {server.target} load --images {min(samples).parent} --rate 10 --json".split()
    argv += ["--budget", "0.01ms", "--duration", "1s", "--warmup", "0"]
    endings = []
    for flags in ([], ["--protocol", "oip"]):
        assert main([*argv, *flags]) == 1
        endings.append({one["code"] for one in json.loads(capsys.readouterr().out)["summary"]["endings"]})
    assert endings == [{"DEADLINE_EXCEEDED"}] * 2
