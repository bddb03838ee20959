"""KServe's own client, as published, against the real server; in an environment of its own, for it brings much."""

import json
import subprocess
import venv
from pathlib import Path

import pytest

from tests.server_process import ServerProcess

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1200)]

VERSION = "0.21.0"
# Run by that environment: both protocols, both forms of contents; prints what came.
ASKS = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

target, base, file = sys.argv[1:]
zeros = np.zeros((1, 3, 28, 28), np.float32)
image = np.array([open(file, "rb").read()], object)


def request(array, datatype, binary, outputs=(), **parameters):
    given = InferInput("image", list(array.shape), datatype)
    given.set_data_from_numpy(array, binary_data=binary)
    wanted = [RequestedOutput(name) for name in outputs]
    return InferRequest("fashion", [given], parameters=parameters or None, request_outputs=wanted or None)


def told(response):
    return {output.name: [output.datatype, output.shape, output.as_numpy().dtype.name] for output in response.outputs}


async def main():
    grpc, http = InferenceGRPCClient(target), InferenceRESTClient(RESTConfig(protocol="v2"))
    health = [
        await grpc.is_server_live(), await grpc.is_server_ready(), await grpc.is_model_ready("fashion"),
        await http.is_server_live(base), await http.is_server_ready(base), await http.is_model_ready(base, "fashion"),
    ]
    plain = [await grpc.infer(request(zeros, "FP32", binary, r=4)) for binary in (True, False)]
    plain += [await http.infer(base, request(zeros, "FP32", binary, r=4), "fashion") for binary in (True, False)]
    label = await grpc.infer(request(image, "BYTES", True, ["label"]))
    half = {"float16_features": True, "normalize_features": True}
    names = ["features", "patch_features", "token_map"]
    halves = await grpc.infer(request(zeros, "FP32", True, names, **half))
    halves_over_http = await http.infer(
        base, request(zeros, "FP32", True, names, **half, binary_data_output=True), "fashion"
    )
    print(json.dumps({
        "health": health,
        "plain": [told(response) for response in plain],
        "label": label.outputs[0].as_numpy().ravel()[0].decode(),
        "halves": [told(halves), told(halves_over_http)],
    }))


asyncio.run(main())
"""


def test_kserves_client_finds_the_model_and_infers_over_both_protocols(
    server: ServerProcess, samples: dict[Path, str], tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv/bin/python")
    install = [python, "-m", "pip", "install", "--quiet", f"kserve=={VERSION}"]
    if subprocess.run(install, check=False, capture_output=True).returncode:
        pytest.skip("KServe's client can't be had here")
    base = server.metrics_url.removesuffix("/metrics")
    command = [python, "-I", "-c", ASKS, server.target, base, str(min(samples))]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["health"] == [True] * 6
    assert told["label"] == samples[min(samples)]
    assert (
        told["plain"]
        == [
            {
                "logits": ["FP32", [1, 10], "float32"],
                "probabilities": ["FP32", [1, 10], "float32"],
                "class_id": ["INT64", [1, 1], "int64"],
                "label": ["BYTES", [1, 1], "object"],
                "features": ["FP32", [1, 128], "float32"],
            }
        ]
        * 4
    )
    assert (
        told["halves"]
        == [
            {
                "features": ["FP16", [1, 128], "float16"],
                "patch_features": ["FP16", [1, 196, 128], "float16"],
                "token_map": ["INT32", [1, 196], "int32"],
            }
        ]
        * 2
    )
