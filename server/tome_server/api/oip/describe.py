"""Descriptions of models and server, as plain values: gRPC's messages and HTTP's JSON have the same fields."""

import importlib.metadata
import math
from typing import Any

from tome_server.api.oip.images import INPUT
from tome_server.api.oip.outputs import outputs_of
from tome_server.observability.metrics import Metrics
from tome_server.serving.batcher import Served
from tome_server.serving.engine import Engine

NAME = "tome-serving"
PLATFORM = "timm_pytorch"
# As Triton names them.
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)
_CONFIG_TYPES = {"FP32": "TYPE_FP32", "INT64": "TYPE_INT64", "BYTES": "TYPE_STRING"}


def server_metadata() -> dict[str, Any]:
    """Return ServerMetadataResponse."""
    return {"name": NAME, "version": importlib.metadata.version(NAME), "extensions": list(EXTENSIONS)}


def version_of(served: Served) -> str:
    """Return the version of a model that is in service, which is one at a time."""
    return str(served.model.version)


def model_metadata(served: Served) -> dict[str, Any]:
    """Return ModelMetadataResponse.

    Of the input's datatypes it names FP32, which clients can fill by themselves. It names only the outputs that come by
    default, because some clients request every output that is named here.
    """
    model = served.model
    return {
        "name": model.name,
        "versions": [version_of(served)],
        "platform": PLATFORM,
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *model.preprocess.settings.input_size]}],
        "outputs": [
            {"name": output.name, "datatype": output.datatype, "shape": [-1, *output.dims]}
            for output in outputs_of(model).values()
            if not output.by_name
        ],
    }


def model_config(served: Served, engine: Engine) -> dict[str, Any]:
    """Return ModelConfig, with the limits and defaults of this model."""
    model, overrides, limits = served.model, served.overrides, served.model.preprocess.limits
    about = {
        "architecture": model.architecture,
        "dtype": model.dtype,
        "default_budget_ms": "none" if math.isinf(served.default_budget) else f"{served.default_budget * 1e3:g}",
        "image_datatypes": "FP32 [N, C, H, W], UINT8 [N, H, W, 3], BYTES [N]",
        "max_image_bytes": str(limits.max_bytes),
        "max_image_pixels": str(limits.max_pixels),
        "max_pending": str(engine.max_pending_of(served)),
        "outputs_by_name": ", ".join(
            f"{output.name} {output.datatype} [{', '.join(map(str, ('N', *output.dims)))}]"
            for output in outputs_of(model).values()
            if output.by_name
        ),
        "patch_grid": "{}, {}".format(*model.patch_grid),
        "policy": served.policy,
        "priority": "taken and ignored: the earliest deadline goes first",
        "r_grid": ", ".join(map(str, served.rs)),
    }
    if model.division:
        about["threads_divide"] = model.division
    defaults = {name: getattr(overrides, name) for name in ("default_min_r", "default_max_r", "default_min_quality")}
    about |= {name: f"{value:g}" for name, value in defaults.items() if value is not None}
    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": NAME,
        "max_batch_size": served.scheduler.latency.max_batch,
        "input": [
            {
                "name": INPUT,
                "data_type": "TYPE_FP32",
                "format": "FORMAT_NCHW",
                "dims": list(model.preprocess.settings.input_size),
            }
        ],
        "output": [
            {"name": output.name, "data_type": _CONFIG_TYPES[output.datatype], "dims": list(output.dims)}
            for output in outputs_of(model).values()
            if not output.by_name
        ],
        "dynamic_batching": {"max_queue_delay_microseconds": round(engine.max_delay_of(served) * 1e6)},
        "parameters": {name: {"string_value": value} for name, value in about.items()},
        "model_transaction_policy": {"decoupled": False},
    }


def repository_index(engine: Engine, ready_only: bool) -> list[dict[str, Any]]:
    """Return the models of RepositoryIndexResponse. The version of a model that is loading isn't known yet."""
    states = {(served.model.name, version_of(served)): "UNLOADING" for served in engine.registry.leaving}
    for name in engine.registry.names:
        served = engine.registry.models.get(name)
        states[name, version_of(served) if served else ""] = "READY" if served else "LOADING"
    return [
        {"name": name, "version": version, "state": state, "reason": ""}
        for (name, version), state in states.items()
        if state == "READY" or not ready_only
    ]


def model_statistics(metrics: Metrics, served: Served, last_inference: int) -> dict[str, Any]:
    """Return ModelStatistics over both protocols. `last_inference` is in milliseconds since the epoch.

    Each image of a request counts as one success, and a failed request as one failure. Earlier versions of the model
    are included.
    """
    name = served.model.name

    def total(metric: Any, suffix: str, **labels: str) -> float:
        labels["model"] = name
        return math.fsum(
            sample.value
            for family in metric.collect()
            for sample in family.samples
            if sample.name == family.name + suffix and labels.items() <= sample.labels.items()
        )

    def times(metric: Any, **labels: str) -> dict[str, int]:
        seconds = total(metric, "_sum", **labels)
        return {"count": round(total(metric, "_count", **labels)), "ns": round(seconds * 1e9)}

    requests = round(total(metrics.requests, "_total"))
    good = round(total(metrics.requests, "_total", code="OK"))
    images = times(metrics.request_duration)
    stage = metrics.stage_duration
    return {
        "name": name,
        "version": version_of(served),
        "last_inference": last_inference,
        "inference_count": images["count"],
        "execution_count": round(total(metrics.batch_size, "_count")),
        "inference_stats": {
            "success": images,
            "fail": {"count": requests - good, "ns": 0},
            "queue": times(stage, stage="queue"),
            "compute_input": times(stage, stage="decode"),
            "compute_infer": times(stage, stage="compute"),
            "compute_output": times(stage, stage="reply"),
        },
    }
