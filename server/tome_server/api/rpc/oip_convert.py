"""Converts the Open Inference Protocol's gRPC messages to requests, and responses back."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tome_api.oip import open_inference_pb2 as pb
from tome_server.api.oip.messages import (
    BYTES,
    DTYPES,
    MOST_DIMENSIONS,
    MOST_ELEMENTS,
    MOST_NAMED,
    MOST_TYPED,
    MUCH,
    AsBytes,
    InferRequest,
    InferResponse,
    Parameter,
    RequestedOutput,
    Tensor,
    check_count,
    check_datatype,
    shown,
    split,
)
from tome_server.api.reading import FEW, PART
from tome_server.errors import InvalidRequestError, TooLargeError

# The field that holds the elements of each datatype, unless they are raw.
_CONTENTS = {
    "FP32": "fp32_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    BYTES: "bytes_contents",
}
_SIZE = "binary_data_size"


def request_from(message: pb.ModelInferRequest) -> InferRequest:
    """Return the request that a message describes. Raises a RequestError if it contradicts itself."""
    if len(message.inputs) != 1:
        raise InvalidRequestError("inputs", f"must be one tensor, image; {len(message.inputs)} are given")
    check_count("outputs", len(message.outputs), MOST_NAMED)
    return InferRequest(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        parameters=_parameters(message.parameters, "parameters"),
        input=_input(message.inputs[0], message.raw_input_contents),
        outputs=[
            RequestedOutput(output.name, _parameters(output.parameters, "outputs.parameters"))
            for output in message.outputs
        ],
        as_bytes=AsBytes(every=bool(message.raw_input_contents)),
    )


def takes_long_to_read(message: pb.ModelInferRequest) -> bool:
    """Return whether `request_from` has so many elements to convert that it belongs in the reader's thread."""
    return any(
        max(len(one.contents.fp32_contents), len(one.contents.uint_contents)) > FEW for one in message.inputs[:1]
    )


def takes_long(response: InferResponse, *, raw: bool) -> bool:
    """Return whether `response_to` has so much to write that it belongs in a thread."""
    return not raw and sum(len(tensor.data) for tensor in response.outputs) > MUCH


def response_to(response: InferResponse, *, raw: bool) -> pb.ModelInferResponse:
    """Return the message, with raw or typed elements."""
    message = pb.ModelInferResponse(model_name=response.model, model_version=response.version, id=response.id)
    for name, value in response.parameters.items():
        if isinstance(value, bool):
            message.parameters[name].bool_param = value
        elif isinstance(value, int):
            message.parameters[name].int64_param = value
        else:
            raise TypeError(f"no response parameter is a {type(value)}")
    for tensor in response.outputs:
        output = message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if raw:
            message.raw_output_contents.append(tensor.raw)
        else:
            contents = getattr(output.contents, _CONTENTS[tensor.datatype])
            for part in tensor.parts():
                contents.extend(part)
    return message


def _parameters(given: Mapping[str, pb.InferParameter], field: str) -> dict[str, Parameter]:
    check_count(field, len(given), MOST_NAMED)
    parameters: dict[str, Parameter] = {}
    for name, value in given.items():
        kind = value.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidRequestError(field, f"{shown(name)} has no value")
        parameters[name] = getattr(value, kind)
    return parameters


def _input(tensor: pb.ModelInferRequest.InferInputTensor, raw: Sequence[bytes]) -> Tensor:
    check_datatype(tensor.datatype)
    _check_input_parameters(tensor.parameters, raw)
    given = [field.name for field, _ in tensor.contents.ListFields()]
    if raw and given:
        raise InvalidRequestError("inputs.contents", f"holds {given[0]}, and so does raw_input_contents; send one")
    if len(raw) > 1:
        raise InvalidRequestError("raw_input_contents", f"must be one, for the input image; {len(raw):,} are given")
    expected = _CONTENTS[tensor.datatype]
    if wrong := [name for name in given if name != expected]:
        raise InvalidRequestError("inputs.contents", f"{tensor.datatype} goes into {expected}, not {wrong[0]}")
    check_count("image.shape", len(tensor.shape), MOST_DIMENSIONS)
    check_count("inputs.contents", len(tensor.contents.bytes_contents), MOST_ELEMENTS)
    shape = tuple(tensor.shape)
    data: bytes | Sequence[bytes]
    if tensor.datatype == BYTES:
        # A shape that BYTES can't have is refused later, in `images_of`.
        count = shape[0] if shape else 0
        data = split(raw[0], count) if raw else list(tensor.contents.bytes_contents)
    else:
        data = raw[0] if raw else _typed(tensor)
    return Tensor(tensor.name, tensor.datatype, shape, data)


def _check_input_parameters(given: Mapping[str, pb.InferParameter], raw: Sequence[bytes]) -> None:
    """Refuse parameters other than binary_data_size, which KServe's client sends here as over HTTP."""
    parameters = _parameters(given, "inputs.parameters")
    size = parameters.pop(_SIZE, None)
    if parameters:
        name = shown(next(iter(parameters)))
        raise InvalidRequestError("inputs.parameters", f"{name} is not supported; an input takes no parameters")
    if size is not None and [size] != [len(data) for data in raw]:
        text = f"{_SIZE} is {shown(str(size))}, which is not the length of raw_input_contents"
        raise InvalidRequestError("inputs.parameters", text)


def _typed(tensor: pb.ModelInferRequest.InferInputTensor) -> bytes:
    """Return typed elements as raw bytes."""
    values = getattr(tensor.contents, _CONTENTS[tensor.datatype])
    if len(values) > MOST_TYPED:
        text = f"at most {MOST_TYPED:,} are taken in contents, more in raw_input_contents"
        raise TooLargeError(f"{len(values):,} elements in {_CONTENTS[tensor.datatype]}; {text}")
    starts = range(0, len(values), PART)
    try:
        return b"".join(_as_bytes(values[start : start + PART], tensor.datatype) for start in starts)
    except ValueError:
        raise InvalidRequestError("inputs.contents", "of UINT8 must lie in 0..255") from None


def _as_bytes(values: Sequence[Any], datatype: str) -> bytes:
    return np.array(values, DTYPES["FP32"]).tobytes() if datatype == "FP32" else bytes(values)
