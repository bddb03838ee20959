"""Reads quality reports (quality.json): the quality measured at each r, for which weights and dtype, and schedules."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tome_server.config.text_file import read_text
from tome_server.errors import ModelLoadError
from tome_server.models.model_info import Quality
from tome_server.models.spec import ModelSpec, weights_digest

log = logging.getLogger(__name__)

# Share of images that must get the same class as in float32. A dtype that keeps fewer is warned of, and never chosen by
# the server itself.
LEAST_AGREEMENT = 0.995


@dataclass(frozen=True)
class QualityReport:
    """What `tome-server evaluate` or `tome-server tune` wrote."""

    document: Mapping[str, Any]
    """The whole report."""
    levels: dict[int, Quality]
    """The quality measured, by r."""
    schedules: dict[int, tuple[int, ...]]
    """By r, the tokens merged in each block, for those r that have a schedule."""

    def is_of_weights(self, spec: ModelSpec) -> bool:
        """Return whether it was measured on the spec's weights. Raises ModelLoadError if they can't be read."""
        if spec.checkpoint is not None:
            return self.document.get("weights_sha256") == weights_digest(spec.checkpoint)
        return self.document.get("weights_sha256") is None and self.document.get("model") == spec.architecture


def recorded_agreement(spec: ModelSpec) -> tuple[float, int]:
    """Return the share of images that get the same class at r = 0 as in float32, and how many were compared.

    Raises ModelLoadError if the quality report can't be read, or was measured on other weights or in another dtype than
    the spec's.
    """
    report = _own_report(spec)
    try:
        return report.levels[0].agreement, int(report.document["images"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelLoadError(f"quality report {spec.quality} can't be read: {error!r}") from error


def stored_schedules(spec: ModelSpec) -> dict[int, tuple[int, ...]]:
    """Return the schedules in the model's quality report; none if it is unreadable or of other weights."""
    if spec.quality is None:
        return {}
    try:
        report = read_report(spec.quality)
    except ModelLoadError:
        return {}
    return report.schedules if report.is_of_weights(spec) else {}


def measured_quality(spec: ModelSpec) -> tuple[dict[int, Quality], dict[int, tuple[int, ...]]]:
    """Return the quality and the schedules in the model's report, by r; none if the spec names no report.

    Raises ModelLoadError if the report can't be read, or was measured on other weights or in another dtype than the
    spec's.
    """
    if spec.quality is None:
        return {}, {}
    report = _own_report(spec)
    if spec.dtype != "float32" and 0 in report.levels and report.levels[0].agreement < LEAST_AGREEMENT:
        log.warning("%s in %s agrees with float32 on only %.2f %% of the images it was evaluated on",
                    spec.name, spec.dtype, 100 * report.levels[0].agreement)  # fmt: skip
    return report.levels, report.schedules


def read_report(path: Path) -> QualityReport:
    """Read a quality report. Raises ModelLoadError if it can't be read."""
    try:
        document = json.loads(read_text(path))
        levels = {int(level["r"]): _level_quality(level) for level in document["levels"]}
        schedules = {int(level["r"]): tuple(level["schedule"]) for level in document["levels"] if "schedule" in level}
        return QualityReport(document, levels, schedules)
    except OSError as error:
        raise ModelLoadError(f"quality report {path} can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ModelLoadError(f"quality report {path} can't be read: {error!r}") from error


def _own_report(spec: ModelSpec) -> QualityReport:
    """Return the spec's report. Raises ModelLoadError unless it is of the spec's weights and dtype."""
    assert spec.quality is not None
    report = read_report(spec.quality)
    if not report.is_of_weights(spec):
        raise ModelLoadError(
            f"quality report {spec.quality} was measured on other weights than "
            f"{spec.checkpoint or spec.architecture}; run tome-server evaluate again"
        )
    if (measured := report.document.get("dtype", "float32")) != spec.dtype:
        raise ModelLoadError(
            f"quality report {spec.quality} was measured in {measured}, not {spec.dtype}; "
            "run tome-server evaluate again"
        )
    return report


def _level_quality(level: Mapping[str, Any]) -> Quality:
    top1 = level.get("top1")
    return Quality(_share(level["agreement"]), None if top1 is None else _share(top1))


def _share(value: Any) -> float:
    share = float(value)
    if not 0 <= share <= 1:
        raise ValueError(f"{value!r} is no share of images")
    return share
