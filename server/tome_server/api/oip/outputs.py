"""Converts the engine's replies to output tensors, and to the parameters that say what was done for them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tome_server.api.embeddings import embeddings
from tome_server.api.oip.messages import BYTES, DTYPES, MOST_TYPED, AsBytes, Parameter, RequestedOutput, Tensor, shown
from tome_server.api.oip.parameters import Terms
from tome_server.errors import InvalidRequestError, TooLargeError
from tome_server.models.model_info import ModelInfo
from tome_server.serving.requests import Reply

CLASSIFICATION = "classification"
FEATURES = ("features", "patch_features")
# Bytes of a response's tensors: protobuf's limit is 2 GiB, and several copies exist on the way.
MOST_BYTES = 2**28
_AS_BYTES = "come over gRPC if the image is in raw_input_contents, over HTTP if the output is asked for by binary_data"


@dataclass(frozen=True)
class Output:
    """An output that a model has."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    """The shape for one image."""
    by_name: bool = False
    """Whether it is returned only if a request names it: it costs the device more, and is large."""


@dataclass(frozen=True)
class Wanted:
    """An output that is returned, and how."""

    output: Output
    classes: int | None = None
    """For a classification, the number of best classes that are returned as text; None for the tensor itself."""
    normalize: bool = False
    """Whether features are divided by their length."""


def outputs_of(model: ModelInfo) -> dict[str, Output]:
    """Return the outputs that a model has, by name."""
    found = []
    if model.num_classes:
        found += [
            Output("logits", "FP32", (model.num_classes,)),
            Output("probabilities", "FP32", (model.num_classes,)),
            Output("class_id", "INT64", (1,)),
        ]
    if model.labels:
        found.append(Output("label", BYTES, (1,)))
    patches = model.patch_grid[0] * model.patch_grid[1]
    found += [
        Output("features", "FP32", (model.feature_dim,)),
        Output("patch_features", "FP32", (patches, model.feature_dim), by_name=True),
        Output("token_map", "INT32", (patches,), by_name=True),
    ]
    return {output.name: output for output in found}


def wanted_of(model: ModelInfo, requested: Sequence[RequestedOutput], terms: Terms, as_bytes: AsBytes) -> list[Wanted]:
    """Return the outputs that a request names, or the default ones if it names none.

    Raises InvalidRequestError for an output that the model doesn't have, that is named twice, or that can't be written
    in the response's form, and for an unknown parameter.
    """
    wanted = [_as_asked(one, terms) for one in _named(outputs_of(model), requested)]
    for one in wanted:
        if one.output.datatype == "FP16" and not as_bytes.wanted(one.output.name):
            raise InvalidRequestError(
                "parameters.float16_features",
                f"{one.output.name} can't come as FP16 here, which travels as bytes alone: those {_AS_BYTES}",
            )
    return wanted


def check_size(wanted: Sequence[Wanted], images: int, as_bytes: AsBytes) -> None:
    """Raise TooLargeError if the tensors for this many images exceed what a response carries."""
    numbers = [one.output for one in wanted if one.classes is None and one.output.datatype != BYTES]
    size = images * sum(math.prod(output.dims) * DTYPES[output.datatype].itemsize for output in numbers)
    typed = images * sum(math.prod(output.dims) for output in numbers if not as_bytes.wanted(output.name))
    if size > MOST_BYTES:
        text = f"an answer holds at most {MOST_BYTES:,}; send fewer images, or ask for less of them"
        raise TooLargeError(f"the outputs of {images:,} images would take {size:,} bytes; {text}")
    if typed > MOST_TYPED:
        text = f"at most {MOST_TYPED:,} are given other than as bytes, which {_AS_BYTES}"
        raise TooLargeError(f"the outputs of {images:,} images have {typed:,} elements; {text}")


def _named(known: Mapping[str, Output], requested: Sequence[RequestedOutput]) -> list[Wanted]:
    if not requested:
        return [Wanted(output) for output in known.values() if not output.by_name]
    wanted: dict[str, Wanted] = {}
    for request in requested:
        name = request.name
        if name not in known:
            raise InvalidRequestError("outputs", f"{shown(name)} is none of {', '.join(known)}")
        if name in wanted:
            raise InvalidRequestError("outputs", f"{name} is asked for twice")
        wanted[name] = Wanted(known[name], _classes(request, known[name]))
    return list(wanted.values())


def _as_asked(wanted: Wanted, terms: Terms) -> Wanted:
    output = wanted.output
    if output.name not in FEATURES:
        return wanted
    if terms.float16_features:
        output = replace(output, datatype="FP16")
    return replace(wanted, output=output, normalize=terms.normalize_features)


def is_wanted(wanted: Sequence[Wanted], *names: str) -> bool:
    """Return whether any of these outputs is wanted."""
    return any(one.output.name in names for one in wanted)


def tensors_of(replies: Sequence[Reply], wanted: Sequence[Wanted]) -> list[Tensor]:
    """Return the wanted outputs for a request's images."""
    return [_tensor(replies, one) for one in wanted]


def parameters_of(replies: Sequence[Reply]) -> dict[str, Parameter]:
    """Return what was done for a request's images: the largest r, totals of tokens and operations, the longest times.

    `slack_us` is the time that was left when the last image was ready. It is omitted if there was no deadline.
    """
    slacks = [reply.timing.slack for reply in replies if reply.timing.slack is not None]
    return {
        "r": max(reply.r for reply in replies),
        "tokens_in": sum(reply.cost.tokens_in for reply in replies),
        "tokens_out": sum(reply.cost.tokens[-1] for reply in replies),
        "flops": sum(reply.flops for reply in replies),
        "flops_saved": sum(reply.flops_saved for reply in replies),
        "queue_us": _microseconds(max(reply.timing.queue for reply in replies)),
        "compute_us": _microseconds(max(reply.timing.compute for reply in replies)),
        **({"slack_us": _microseconds(min(slacks))} if slacks else {}),
    }


def _classes(request: RequestedOutput, output: Output) -> int | None:
    for name in request.parameters:
        if name != CLASSIFICATION:
            text = f"{shown(name)} is not supported; an output takes {CLASSIFICATION} alone"
            raise InvalidRequestError(f"outputs.{output.name}.parameters", text)
    classes = request.parameters.get(CLASSIFICATION)
    if classes is None:
        return None
    field = f"outputs.{output.name}.parameters.{CLASSIFICATION}"
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
        raise InvalidRequestError(field, "must be an integer of at least 1")
    if output.name not in ("logits", "probabilities"):
        raise InvalidRequestError(field, f"{output.name} can't be ranked; logits and probabilities can")
    return min(classes, output.dims[0])


def _tensor(replies: Sequence[Reply], wanted: Wanted) -> Tensor:
    output, count = wanted.output, len(replies)
    if output.name == "label":
        labels = [reply.model.labels[reply.result.class_ids[0]].encode() for reply in replies]
        return Tensor(output.name, BYTES, (count, 1), labels)
    values = _VALUES[output.name](replies)
    if wanted.classes is not None:
        ranked = [_ranked(row, wanted.classes, reply.model.labels) for row, reply in zip(values, replies, strict=True)]
        return Tensor(output.name, BYTES, (count, wanted.classes), [text for row in ranked for text in row])
    if output.name in FEATURES:
        values = embeddings(values, normalize=wanted.normalize, float16=output.datatype == "FP16")
    data = values.astype(DTYPES[output.datatype], copy=False).tobytes()
    return Tensor(output.name, output.datatype, (count, *output.dims), data)


def _logits(replies: Sequence[Reply]) -> np.ndarray:
    return _rows([reply.result.logits for reply in replies])


def _probabilities(replies: Sequence[Reply]) -> np.ndarray:
    logits = _logits(replies)
    with np.errstate(invalid="ignore"):  # an infinite logit gives NaN, as on the device
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return shares


def _class_ids(replies: Sequence[Reply]) -> np.ndarray:
    return np.array([reply.result.class_ids[:1] for reply in replies])


def _features(replies: Sequence[Reply]) -> np.ndarray:
    return _rows([reply.result.features for reply in replies])


def _patch_features(replies: Sequence[Reply]) -> np.ndarray:
    dim = replies[0].model.feature_dim
    return _rows([reply.result.patches for reply in replies]).reshape(len(replies), -1, dim)


def _token_map(replies: Sequence[Reply]) -> np.ndarray:
    return _rows([reply.result.token_map for reply in replies], "<i4")


def _rows(parts: Sequence[bytes | None], dtype: str = "<f4") -> np.ndarray:
    """Return one array of each reply as rows, [N, …]."""
    return np.frombuffer(b"".join(part or b"" for part in parts), dtype).reshape(len(parts), -1)


_VALUES: dict[str, Callable[[Sequence[Reply]], np.ndarray]] = {
    "logits": _logits,
    "probabilities": _probabilities,
    "class_id": _class_ids,
    "features": _features,
    "patch_features": _patch_features,
    "token_map": _token_map,
}


def _ranked(values: np.ndarray, classes: int, labels: Sequence[str]) -> list[bytes]:
    """Return the best classes in the form of Triton's classification extension: value:index:label, or value:index."""
    best = np.argsort(-values, kind="stable")[:classes]
    texts = [f"{values[i]:f}:{i}" + (f":{labels[i]}" if labels else "") for i in best]
    return [text.encode() for text in texts]


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
