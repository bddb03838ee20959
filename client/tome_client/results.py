"""The server's answers as plain values: frozen dataclasses, and how each is read from its message.

Durations are in seconds. Counts of operations are computed by the server, not measured.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from tome_api.v1 import inference_pb2
from tome_client.errors import TomeError, error_from_status


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class and how probable it is."""

    class_id: int
    label: str
    """Empty for a model without labels."""
    score: float
    """Softmax probability."""


@dataclass(frozen=True, slots=True)
class Merging:
    """What merging did to one image."""

    r: int
    """Tokens merged in each block, as the request set it or the server chose it. A tuned model spreads the same work
    over its blocks by its own schedule."""
    tokens_in: int
    """Tokens that entered the first block, prefix tokens included."""
    tokens_out: int
    """Tokens left after the last block."""
    flops: int
    """Floating-point operations done for this image."""
    flops_saved: int
    """Operations that the unmerged model would have done in addition."""

    @property
    def saved_share(self) -> float:
        """Share of the unmerged model's operations that was saved, in [0, 1]."""
        unmerged = self.flops + self.flops_saved
        return self.flops_saved / unmerged if unmerged else 0.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the server spent the request's time, in seconds."""

    decode: float
    """Decoding, resizing and normalising the image."""
    queue: float
    """Waiting for the device and for batch-mates."""
    compute: float
    """The batch on the device."""
    total: float
    """Arrival to answer."""
    slack: float | None
    """From the answer being ready until the deadline; None for a request without a deadline."""
    batch_size: int
    """Images in the batch that this one was part of."""
    predicted: float
    """The value of `compute` that the server had predicted."""


@dataclass(frozen=True, slots=True)
class TokenMap:
    """For each patch of the model's input, the output token that it was merged into."""

    grid_height: int
    grid_width: int
    token: tuple[int, ...]
    """[grid_height * grid_width], row by row."""


@dataclass(frozen=True, slots=True)
class PatchFeatures:
    """The features of each patch of the model's input; a merged patch has those of its token."""

    grid_height: int
    grid_width: int
    dim: int
    values: tuple[float, ...]
    """[grid_height * grid_width * dim], row by row."""


@dataclass(frozen=True, slots=True)
class PredictResult:
    """The answer to one image."""

    model: str
    """The model that answered."""
    predictions: tuple[Prediction, ...]
    """The most probable classes, best first."""
    merging: Merging
    timing: Timing
    features: tuple[float, ...] | None
    """[dim] the pooled features, which enter the classifier; None unless `features` was set."""
    token_map: TokenMap | None
    """None unless `token_map` was set."""
    patch_features: PatchFeatures | None = None
    """None unless `patch_features` was set."""


@dataclass(frozen=True, slots=True)
class StreamResult:
    """The end of one item of a stream: either its result or its error is set."""

    id: str
    """The item's id."""
    result: PredictResult | None = None
    error: TomeError | None = None


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """One line about a hosted model."""

    name: str
    architecture: str
    """timm's name of the architecture."""
    description: str
    ready: bool
    """Whether requests are answered now; False while the model loads."""


@dataclass(frozen=True, slots=True)
class ImageInput:
    """What a model takes, and how the server prepares an encoded image for it."""

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    """One value a channel, for pixels scaled to [0, 1]; likewise `std`."""
    std: tuple[float, ...]
    interpolation: str
    """The filter used for resizing, as timm names it."""
    crop_pct: float
    """Share of the resized image's side that the crop keeps."""
    crop_mode: str
    """How the crop is taken, as timm names it."""


@dataclass(frozen=True, slots=True)
class MergeLevel:
    """One r of a model's grid: its cost, and its measured quality."""

    r: int
    macs: int
    """Multiply-accumulates an image."""
    tokens_out: int
    """Tokens left after the last block."""
    top1: float | None
    """Top-1 accuracy on labelled images, in [0, 1]; None if never measured."""
    agreement: float | None
    """Share of images whose class is that of r = 0, in [0, 1]; None if never measured."""
    latency: float | None
    """Seconds that one image alone takes on the server's device; None if never measured."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A hosted model in full."""

    summary: ModelSummary
    input: ImageInput
    labels: tuple[str, ...]
    """One a class, in order; empty for a model without labels."""
    num_classes: int
    feature_dim: int
    policy: str
    """What chooses r, as the server's settings name it."""
    default_budget: float | None
    """The latency budget, in seconds, of requests that set none; None if those have no deadline."""
    r_grid: tuple[MergeLevel, ...]
    """Ascending, from r = 0."""
    dtype: str = ""
    """Of weights and activations: float32, bfloat16 or float16; empty if the server doesn't say."""


def predict_result(response: inference_pb2.PredictResponse) -> PredictResult:
    """Reads the answer to one image."""
    merging, timing = response.merging, response.timing
    return PredictResult(
        model=response.model,
        predictions=tuple(
            Prediction(class_id=one.class_id, label=one.label, score=one.score) for one in response.predictions
        ),
        merging=Merging(
            r=merging.r,
            tokens_in=merging.tokens_in,
            tokens_out=merging.tokens_out,
            flops=merging.flops,
            flops_saved=merging.flops_saved,
        ),
        timing=Timing(
            decode=_seconds(timing.decode),
            queue=_seconds(timing.queue),
            compute=_seconds(timing.compute),
            total=_seconds(timing.total),
            slack=_seconds(timing.slack) if timing.HasField("slack") else None,
            batch_size=timing.batch_size,
            predicted=_seconds(timing.predicted),
        ),
        features=_values(response.features_float16)
        if response.HasField("features_float16")
        else tuple(response.features) or None,
        token_map=TokenMap(
            grid_height=response.token_map.grid_height,
            grid_width=response.token_map.grid_width,
            token=tuple(response.token_map.token),
        )
        if response.HasField("token_map")
        else None,
        patch_features=_patch_features(response.patch_features) if response.HasField("patch_features") else None,
    )


def stream_result(response: inference_pb2.PredictStreamResponse) -> StreamResult:
    """Reads the end of one item of a stream."""
    if response.HasField("error"):
        return StreamResult(response.id, error=error_from_status(response.error))
    return StreamResult(response.id, result=predict_result(response.response))


def model_summaries(response: inference_pb2.ListModelsResponse) -> tuple[ModelSummary, ...]:
    """Reads the list of hosted models."""
    return tuple(_summary(one) for one in response.models)


def model_info(response: inference_pb2.GetModelResponse) -> ModelInfo:
    """Reads the description of one model."""
    model = response.model
    return ModelInfo(
        summary=_summary(model.summary),
        input=ImageInput(
            channels=model.input.channels,
            height=model.input.height,
            width=model.input.width,
            mean=tuple(model.input.mean),
            std=tuple(model.input.std),
            interpolation=model.input.interpolation,
            crop_pct=model.input.crop_pct,
            crop_mode=model.input.crop_mode,
        ),
        labels=tuple(model.labels),
        num_classes=model.num_classes,
        feature_dim=model.feature_dim,
        policy=model.policy,
        default_budget=_seconds(model.default_budget) if model.HasField("default_budget") else None,
        dtype=model.dtype,
        r_grid=tuple(
            MergeLevel(
                r=level.r,
                macs=level.macs,
                tokens_out=level.tokens_out,
                top1=level.top1 if level.HasField("top1") else None,
                agreement=level.agreement if level.HasField("agreement") else None,
                latency=_seconds(level.latency) if level.HasField("latency") else None,
            )
            for level in model.r_grid
        ),
    )


def _summary(message: inference_pb2.ModelSummary) -> ModelSummary:
    return ModelSummary(
        name=message.name, architecture=message.architecture, description=message.description, ready=message.ready
    )


def _patch_features(tensor: inference_pb2.Tensor) -> PatchFeatures:
    height, width, dim = tensor.shape
    return PatchFeatures(height, width, dim, _values(tensor))


def _values(tensor: inference_pb2.Tensor) -> tuple[float, ...]:
    half = tensor.data_type == inference_pb2.Tensor.DATA_TYPE_FLOAT16
    size = 2 if half else 4
    return struct.unpack(f"<{len(tensor.data) // size}{'e' if half else 'f'}", tensor.data)


def _seconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e9
