"""A light client of tome-serving: images and a deadline in, predictions and their cost out.

from tome_client import Client

with Client("localhost:8500") as client:
    result = client.predict("shirt.png", budget=0.05)
    print(result.predictions[0].label, result.merging.r, result.timing.total)
"""

from tome_client.aio import AsyncClient
from tome_client.client import Client
from tome_client.errors import FieldViolation, TomeError
from tome_client.inputs import Image
from tome_client.requests import PredictOptions, StreamItem
from tome_client.results import (
    ImageInput,
    MergeLevel,
    Merging,
    ModelInfo,
    ModelSummary,
    Prediction,
    PredictResult,
    StreamResult,
    Timing,
    TokenMap,
)
from tome_client.version import __version__

__all__ = [
    "AsyncClient",
    "Client",
    "FieldViolation",
    "Image",
    "ImageInput",
    "MergeLevel",
    "Merging",
    "ModelInfo",
    "ModelSummary",
    "PredictOptions",
    "PredictResult",
    "Prediction",
    "StreamItem",
    "StreamResult",
    "Timing",
    "TokenMap",
    "TomeError",
    "__version__",
]
