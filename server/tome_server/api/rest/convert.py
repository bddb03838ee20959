"""Converts HTTP bodies, which are JSON followed by binary tensors, to the protocol's requests, and responses back."""

import base64
import binascii
import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from tome_server.api.oip.images import INPUT
from tome_server.api.oip.messages import (
    BYTES,
    DTYPES,
    MOST_NAMED,
    MUCH,
    AsBytes,
    InferRequest,
    InferResponse,
    Parameter,
    RequestedOutput,
    Tensor,
    check_count,
    check_datatype,
    excerpt,
    shown,
    split,
)
from tome_server.api.reading import FEW
from tome_server.api.rest.request_json import NumbersText, parse
from tome_server.errors import InvalidRequestError

M = TypeVar("M", bound=BaseModel)

CONTENT_TYPE = "content_type"
BASE64 = "base64"
_SIZE = "binary_data_size"
_BINARY = "binary_data"
_ALL_BINARY = "binary_data_output"


def _few(given: object, info: ValidationInfo) -> object:
    """Refuse a collection of too many members before an error is made for each of them."""
    if isinstance(given, dict | list):
        check_count(info.field_name or "request", len(given), MOST_NAMED)
    return given


def _one_input(given: object) -> object:
    if isinstance(given, list) and len(given) != 1:
        raise InvalidRequestError("inputs", f"must be one tensor, image; {len(given):,} are given")
    return given


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _few_members(cls, given: object, info: ValidationInfo) -> object:
        return _few(given, info)


# As wide as gRPC's. Python's own have no bound, and can neither become a float nor text beyond some.
_Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Parameters = Annotated[dict[str, bool | _Integer | float | str], Field(default_factory=dict), BeforeValidator(_few)]


class _Input(_Strict):
    name: str
    datatype: str
    shape: Annotated[list[_Integer], FailFast(), BeforeValidator(_few)]
    parameters: _Parameters
    data: Any = None


class _Output(_Strict):
    name: str
    parameters: _Parameters


class _Request(_Strict):
    id: str = ""
    model_name: str = ""
    """Not part of the protocol: KServe's client repeats the name in the path here."""
    parameters: _Parameters
    inputs: Annotated[list[_Input], BeforeValidator(_one_input)]
    outputs: Annotated[list[_Output], FailFast(), BeforeValidator(_few)] = []


class _Index(_Strict):
    ready: bool = False


def takes_long_to_read(body: bytes, json_length: int | None) -> bool:
    """Return whether `request_from` has so much text to read that it belongs in the reader's thread."""
    return (len(body) if json_length is None else json_length) > FEW


def request_from(body: bytes, json_length: int | None, model: str, version: str) -> InferRequest:
    """Return the request that a body describes.

    The first `json_length` bytes are JSON, and the elements of the input follow. None means that all is JSON, 0 that
    the body is an encoded image. Raises a RequestError if the body contradicts itself.
    """
    if json_length == 0:
        image = Tensor(INPUT, BYTES, (1,), [body])
        return InferRequest(model, image, version)
    if json_length is not None and not 0 < json_length <= len(body):
        raise InvalidRequestError("Inference-Header-Content-Length", f"must lie in 0..{len(body)}, the body's length")
    text, behind = (body, b"") if json_length is None else (body[:json_length], body[json_length:])
    request, numbers = _parse(text, _Request)
    if request.model_name not in ("", model):
        raise InvalidRequestError("model_name", f"is {shown(request.model_name)}, and the path says {shown(model)}")
    every = request.parameters.pop(_ALL_BINARY, False)
    as_bytes = AsBytes(
        _flag("parameters", _ALL_BINARY, every),
        {
            output.name: _flag(f"outputs.{shown(output.name)}", _BINARY, output.parameters.pop(_BINARY))
            for output in request.outputs
            if _BINARY in output.parameters
        },
    )
    return InferRequest(
        model=model,
        version=version,
        id=request.id,
        parameters=request.parameters,
        input=_tensor(request.inputs[0], numbers, behind),
        outputs=[RequestedOutput(output.name, output.parameters) for output in request.outputs],
        as_bytes=as_bytes,
    )


def response_to(response: InferResponse, as_bytes: AsBytes) -> tuple[bytes, int | None]:
    """Return the body, and the length of the JSON in it, or None if all is JSON.

    Raises InvalidRequestError if an output in JSON holds infinities or NaN.
    """
    described, behind = [], []
    for tensor in response.outputs:
        output: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if as_bytes.wanted(tensor.name):
            behind.append(tensor.raw)
            described.append(_json({**output, "parameters": {_SIZE: len(behind[-1])}}))
        else:
            _check_finite(tensor)
            described.append(f'{_json(output)[:-1]},"data":[{",".join(_parts(tensor))}]}}')
    answer: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    if response.id:
        answer["id"] = response.id
    text = f'{_json({**answer, "parameters": response.parameters})[:-1]},"outputs":[{",".join(described)}]}}'.encode()
    return b"".join([text, *behind]), len(text) if behind else None


def takes_long(response: InferResponse) -> bool:
    """Return whether `response_to` has so much to write that it belongs in a thread."""
    return sum(len(tensor.data) for tensor in response.outputs) > MUCH


def _check_finite(tensor: Tensor) -> None:
    if isinstance(tensor.data, bytes) and DTYPES[tensor.datatype].kind == "f":
        finite = np.isfinite(np.frombuffer(tensor.data, DTYPES[tensor.datatype])).reshape(tensor.shape[0], -1).all(1)
        if not finite.all():
            text = "holds infinities or NaN, which JSON can't; ask for it by binary_data, or for other outputs"
            raise InvalidRequestError(f"outputs.{tensor.name}", f"of image {finite.argmin()} {text}")


def _parts(tensor: Tensor) -> Iterator[str]:
    for part in tensor.parts():
        yield _json([element.decode() for element in part] if tensor.datatype == BYTES else part)[1:-1]


def _json(value: object) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def ready_only(body: bytes) -> bool:
    """Return whether a body, which may be empty, asks only for models that are ready."""
    return _parse(body, _Index)[0].ready if body else False


def _parse(body: bytes, kind: type[M]) -> tuple[M, NumbersText | None]:
    described, numbers = parse(body)
    try:
        return kind.model_validate(described), numbers
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidRequestError(excerpt(where) or "request", first["msg"]) from error


def _flag(where: str, name: str, value: Parameter) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequestError(where, f"{name} must be true or false")
    return value


def _tensor(given: _Input, numbers: NumbersText | None, behind: bytes) -> Tensor:
    in_text = given.data is not None or numbers is not None
    check_datatype(given.datatype)
    for name in given.parameters:
        if name not in (_SIZE, CONTENT_TYPE):
            text = f"{shown(name)} is not supported; an input takes {_SIZE} and {CONTENT_TYPE}"
            raise InvalidRequestError("inputs.parameters", text)
    size, shape = given.parameters.get(_SIZE), tuple(given.shape)
    if (size or 0) != len(behind):
        text = f"{_SIZE} is {excerpt(str(size or 0))}, and {len(behind):,} bytes follow the JSON"
        raise InvalidRequestError("inputs.parameters", text)
    if not in_text and size is None:
        raise InvalidRequestError("inputs.data", f"is missing; send it, or {_SIZE} and binary data")
    if in_text and size is not None:
        raise InvalidRequestError("inputs.data", "is given, and so is binary data; send one")
    encoding = given.parameters.get(CONTENT_TYPE)
    if encoding is not None and (encoding != BASE64 or given.datatype != BYTES or not in_text):
        text = f"{CONTENT_TYPE} can be {BASE64}, of {BYTES} in JSON, and nothing else"
        raise InvalidRequestError("inputs.parameters", text)
    data: bytes | Sequence[bytes]
    if given.datatype == BYTES and in_text:
        data = _strings(given.data, encoding is not None)
    elif given.datatype == BYTES:
        data = split(behind, shape[0] if shape else 0)
    elif numbers is not None:
        data = numbers.read(given.datatype, shape)
    elif in_text:
        raise InvalidRequestError("inputs.data", f"of {given.datatype} must be numbers of that type")
    else:
        data = behind
    return Tensor(given.name, given.datatype, shape, data)


def _strings(data: object, encoded: bool) -> list[bytes]:
    """Return the elements of BYTES in JSON, [N] or [N, 1] strings."""
    rows = data if isinstance(data, list) else None
    flat = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in rows or [None]]
    if not all(isinstance(text, str) for text in flat):
        raise InvalidRequestError("inputs.data", "of BYTES must be a list of strings")
    try:
        return [base64.b64decode(text, validate=True) if encoded else text.encode() for text in flat]
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError("inputs.data", f"is not {BASE64 if encoded else 'text'}: {error}"[:200]) from error
