"""What tests of the HTTP face share: requests as any client sends them."""

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 100.0
JSON_LENGTH = "Inference-Header-Content-Length"
INFER = "/v2/models/fashion/infer"


@dataclass(frozen=True)
class Answer:
    """A status, headers by lower-case name, and a body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])


def connect(base: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(base).netloc, timeout=PATIENCE)


def ask(
    base: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    method: str | None = None,
) -> Answer:
    """Send a request, GET without a body and POST with one, over a connection of its own."""
    connection = connect(base)
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, headers, response.read())
    finally:
        connection.close()


def infer(base: str, message: Any, headers: Mapping[str, str] | None = None, path: str = INFER) -> Answer:
    """Send JSON."""
    return ask(base, path, json.dumps(message).encode(), headers)


def images(data: Any, datatype: str, shape: list[int], **parameters: Any) -> dict[str, Any]:
    """Return a request of JSON alone."""
    return {"inputs": [{"name": "image", "datatype": datatype, "shape": shape, "parameters": parameters, "data": data}]}


def outputs(answer: Answer) -> dict[str, Any]:
    """Return the outputs' data by name."""
    assert answer.status == 200, answer.body
    return {output["name"]: output["data"] for output in answer.json["outputs"]}
