"""Reads quality reports (quality.json): the quality measured at each r, for which weights and dtype, and schedules."""

import logging
from dataclasses import dataclass
from pathlib import Path

from tome_server.config.json_file import JsonObject, read_json, shown
from tome_server.errors import ModelLoadError
from tome_server.models.model_info import Quality
from tome_server.models.spec import ModelSpec, weights_digest

log = logging.getLogger(__name__)

# Share of images that must get the same class as in float32. A dtype that keeps fewer is warned of, and never chosen by
# the server itself.
LEAST_AGREEMENT = 0.995
# More than any report has. Shares are of images, so the least one above 0 is of one image.
MOST_IMAGES = 10**9
_MOST_LEVELS = _MOST_R = 2**14
_MOST_BLOCKS = 1000


@dataclass(frozen=True)
class QualityReport:
    """What `tome-server evaluate` or `tome-server tune` wrote."""

    architecture: str | None
    """timm's name, if the report says it."""
    weights: str | None
    """SHA-256 of the checkpoint; None for timm's pretrained weights."""
    dtype: str
    images: int | None
    """How many images were compared, if the report says it."""
    levels: dict[int, Quality]
    """The quality measured, by r."""
    schedules: dict[int, tuple[int, ...]]
    """By r, the tokens merged in each block, for those r that have a schedule."""

    def is_of_weights(self, spec: ModelSpec) -> bool:
        """Return whether it was measured on the spec's weights. Raises ModelLoadError if they can't be read."""
        if spec.checkpoint is not None:
            return self.weights == weights_digest(spec.checkpoint)
        return self.weights is None and self.architecture == spec.architecture


def recorded_agreement(spec: ModelSpec) -> tuple[float, int]:
    """Return the share of images that get the same class at r = 0 as in float32, and how many were compared.

    Raises ModelLoadError if the quality report can't be read, or was measured on other weights or in another dtype than
    the spec's.
    """
    report = _own_report(spec)
    if report.images is None:
        raise ModelLoadError(f"quality report {spec.quality}: images is missing")
    if 0 not in report.levels:
        raise ModelLoadError(f"quality report {spec.quality}: levels has none of r = 0")
    return report.levels[0].agreement, report.images


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
    """Read a quality report. Raises ModelLoadError, naming file, field and value, if it can't be read."""
    try:
        return _report(read_json(path))
    except OSError as error:
        raise ModelLoadError(f"quality report {path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelLoadError(f"quality report {path} can't be read: {error}") from error


def _report(document: JsonObject) -> QualityReport:
    """Return the report in a document. Raises ValueError for a field that isn't as it must be."""
    levels: dict[int, Quality] = {}
    schedules: dict[int, tuple[int, ...]] = {}
    for level in document.objects("levels", _MOST_LEVELS):
        r = level.whole("r", 0, _MOST_R)
        if r in levels:
            raise ValueError(f"{level.place}.r is {r}, as that of another level")
        levels[r] = Quality(_share(level, "agreement"), _share(level, "top1") if level.holds("top1") else None)
        if "schedule" in level.values:
            schedules[r] = level.wholes("schedule", 0, _MOST_R, _MOST_BLOCKS)
    return QualityReport(
        architecture=document.text("model") if document.holds("model") else None,
        weights=document.text("weights_sha256") if document.holds("weights_sha256") else None,
        dtype=document.text("dtype") if "dtype" in document.values else "float32",
        images=document.whole("images", 1, MOST_IMAGES) if document.holds("images") else None,
        levels=levels,
        schedules=schedules,
    )


def _own_report(spec: ModelSpec) -> QualityReport:
    """Return the spec's report. Raises ModelLoadError unless it is of the spec's weights and dtype."""
    assert spec.quality is not None
    report = read_report(spec.quality)
    if not report.is_of_weights(spec):
        raise ModelLoadError(
            f"quality report {spec.quality} was measured on other weights than "
            f"{spec.checkpoint or spec.architecture}; run tome-server evaluate again"
        )
    if report.dtype != spec.dtype:
        raise ModelLoadError(
            f"quality report {spec.quality} was measured in {shown(report.dtype)}, not {spec.dtype}; "
            "run tome-server evaluate again"
        )
    return report


def _share(level: JsonObject, name: str) -> float:
    """Return a share of images. Raises ValueError for one that no number of images gives."""
    share = level.number(name, 0, 1)
    if 0 < share < 1 / MOST_IMAGES:
        raise ValueError(f"{level.place}.{name} must be 0 or at least {1 / MOST_IMAGES:g}, not {share:g}")
    return share
