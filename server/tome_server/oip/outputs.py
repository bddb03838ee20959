"""From the engine's replies to output tensors, and to the parameters that say what was done for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tome_server.engine import Reply
from tome_server.errors import InvalidRequestError
from tome_server.models.hosted import HostedModel
from tome_server.oip.messages import BYTES, DTYPES, Parameter, RequestedOutput, Tensor, shown

CLASSIFICATION = "classification"


@dataclass(frozen=True)
class Output:
    """What a model can be asked for."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    """Of one image."""


@dataclass(frozen=True)
class Wanted:
    """An output that is to be returned."""

    output: Output
    classes: int | None = None
    """Of a classification: as the best so many classes, in text; None for the tensor itself."""


def outputs_of(model: HostedModel) -> dict[str, Output]:
    """Return what a model can be asked for, by name."""
    found = []
    if model.num_classes:
        found += [
            Output("logits", "FP32", (model.num_classes,)),
            Output("probabilities", "FP32", (model.num_classes,)),
            Output("class_id", "INT64", (1,)),
        ]
    if model.labels:
        found.append(Output("label", BYTES, (1,)))
    found.append(Output("features", "FP32", (model.feature_dim,)))
    return {output.name: output for output in found}


def wanted_of(model: HostedModel, requested: Sequence[RequestedOutput]) -> list[Wanted]:
    """Return what a request wants; all of the model's outputs if it names none.

    Raises InvalidRequestError for an output that the model doesn't have, or is asked for twice, and for a parameter
    that it doesn't take.
    """
    known = outputs_of(model)
    if not requested:
        return [Wanted(output) for output in known.values()]
    wanted: dict[str, Wanted] = {}
    for request in requested:
        name = request.name
        if name not in known:
            raise InvalidRequestError("outputs", f"{shown(name)} is none of {', '.join(known)}")
        if name in wanted:
            raise InvalidRequestError("outputs", f"{name} is asked for twice")
        wanted[name] = Wanted(known[name], _classes(request, known[name]))
    return list(wanted.values())


def needs_logits(wanted: Sequence[Wanted]) -> bool:
    """Return whether the engine must be asked for the logits of all classes."""
    return any(one.output.name in ("logits", "probabilities") for one in wanted)


def needs_features(wanted: Sequence[Wanted]) -> bool:
    """Return whether the engine must be asked for the features."""
    return any(one.output.name == "features" for one in wanted)


def tensors_of(replies: Sequence[Reply], wanted: Sequence[Wanted]) -> list[Tensor]:
    """Return the wanted outputs of a request's images."""
    return [_tensor(replies, one) for one in wanted]


def parameters_of(replies: Sequence[Reply]) -> dict[str, Parameter]:
    """Return what was done for a request's images: the largest r, totals of tokens and operations, the longest times.

    `slack_us` is what was left of the deadline when the last was ready.
    """
    return {
        "r": max(reply.r for reply in replies),
        "tokens_in": sum(reply.cost.tokens_in for reply in replies),
        "tokens_out": sum(reply.cost.tokens[-1] for reply in replies),
        "flops": sum(reply.flops for reply in replies),
        "flops_saved": sum(reply.flops_saved for reply in replies),
        "queue_us": _microseconds(max(reply.timing.queue for reply in replies)),
        "compute_us": _microseconds(max(reply.timing.compute for reply in replies)),
        "slack_us": _microseconds(min(reply.timing.slack for reply in replies)),
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
    data = values.astype(DTYPES[output.datatype]).tobytes()
    return Tensor(output.name, output.datatype, (count, *output.dims), data)


def _logits(replies: Sequence[Reply]) -> np.ndarray:
    return np.array([reply.result.logits for reply in replies], np.float32)


def _probabilities(replies: Sequence[Reply]) -> np.ndarray:
    logits = _logits(replies)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return shares


def _class_ids(replies: Sequence[Reply]) -> np.ndarray:
    return np.array([reply.result.class_ids[:1] for reply in replies])


def _features(replies: Sequence[Reply]) -> np.ndarray:
    return np.array([reply.result.features for reply in replies], np.float32)


_VALUES: dict[str, Callable[[Sequence[Reply]], np.ndarray]] = {
    "logits": _logits,
    "probabilities": _probabilities,
    "class_id": _class_ids,
    "features": _features,
}


def _ranked(values: np.ndarray, classes: int, labels: Sequence[str]) -> list[bytes]:
    """Write the best classes as Triton's classification extension does: value:index:label, or without a label."""
    best = np.argsort(-values, kind="stable")[:classes]
    texts = [f"{values[i]:f}:{i}" + (f":{labels[i]}" if labels else "") for i in best]
    return [text.encode() for text in texts]


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)
