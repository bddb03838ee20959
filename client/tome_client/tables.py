"""Results as the text that the command line prints."""

from __future__ import annotations

from collections.abc import Iterable

from tome_api.durations import NO_DEADLINE, duration_text
from tome_api.tables import table
from tome_client.results import ModelInfo, ModelSummary, Prediction, PredictResult

_UNMEASURED = "-"


def prediction_header(width: int) -> str:
    """Returns the header of the lines that `prediction_line` returns."""
    return _prediction_row(width, "image", "r", "tokens", "FLOPs saved", "server", "round trip", "predictions")


def prediction_line(width: int, name: str, result: PredictResult, round_trip: float) -> str:
    """Returns a line for one image, which can be printed before the next result arrives.

    Args:
        width: The length of the longest name.
        name: The image's name.
        result: The answer.
        round_trip: Seconds from sending to answer.
    """
    merging = result.merging
    return _prediction_row(
        width,
        name,
        str(merging.r),
        f"{merging.tokens_in} → {merging.tokens_out}",
        f"{merging.saved_share:.1%}",
        milliseconds(result.timing.total),
        milliseconds(round_trip),
        ", ".join(prediction_text(one) for one in result.predictions),
    )


def _prediction_row(width: int, image: str, r: str, tokens: str, saved: str, server: str, trip: str, best: str) -> str:
    return f"{image:<{width}}  {r:>3}  {tokens:>11}  {saved:>11}  {server:>10}  {trip:>10}  {best}".rstrip()


def milliseconds(seconds: float) -> str:
    """Returns a measured time for a table, such as "12.3 ms"."""
    return f"{seconds * 1e3:.1f} ms"


def prediction_text(prediction: Prediction) -> str:
    """Returns a class and its probability, such as "Coat 0.93"."""
    return f"{prediction.label or f'#{prediction.class_id}'} {prediction.score:.2f}"


def model_table(models: Iterable[ModelSummary]) -> str:
    """Returns a line for each hosted model."""
    rows = [(one.name, one.architecture, "yes" if one.ready else "loading", one.description) for one in models]
    return table(("name", "architecture", "ready", "description"), rows)


def model_details(model: ModelInfo) -> str:
    """Returns everything about one model, its r grid as a table."""
    expects = model.input
    facts = (
        ("name", model.summary.name),
        ("architecture", model.summary.architecture),
        ("description", model.summary.description),
        ("ready", "yes" if model.summary.ready else "loading"),
        (
            "input",
            f"{expects.channels} channels, {expects.height} high, {expects.width} wide; "
            f"{expects.interpolation}, {expects.crop_mode} crop {expects.crop_pct:.4g}",
        ),
        ("classes", _classes(model)),
        ("features", str(model.feature_dim)),
        ("dtype", model.dtype or _UNMEASURED),
        ("policy", model.policy),
        ("default budget", NO_DEADLINE if model.default_budget is None else duration_text(model.default_budget)),
    )
    levels = [
        (
            str(level.r),
            f"{level.macs / 1e9:.3f}",
            str(level.tokens_out),
            _UNMEASURED if level.latency is None else milliseconds(level.latency),
            _share(level.top1),
            _share(level.agreement),
        )
        for level in model.r_grid
    ]
    header = ("r", "GMACs", "tokens", "latency", "top-1", "agreement")
    return f"{table((), facts)}\n\n{table(header, levels, right=range(len(header)))}"


def _classes(model: ModelInfo) -> str:
    shown = ", ".join(model.labels[:10])
    more = ", …" if len(model.labels) > 10 else ""
    return f"{model.num_classes} ({shown}{more})" if shown else str(model.num_classes)


def _share(measured: float | None) -> str:
    return _UNMEASURED if measured is None else f"{measured:.2%}"
