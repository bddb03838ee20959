"""A model's own settings, and among them those that take the place of the server's."""

from typing import Annotated

from pydantic import Field

from tome_server.config.dtypes import DtypeSetting
from tome_server.config.settings import BatchSize, Budget, Count, Duration, Policy, Size, Strict


class BatchingOverrides(Strict):
    """How its requests wait; what is left out is as the server's `batching` says."""

    max_batch: BatchSize | None = None
    """Images of this model in a batch."""
    max_delay: Duration | None = None
    """How long an idle device waits for batch-mates of one of its requests."""
    max_pending: Count | None = None
    """Its requests held at once, within what the server holds of all."""


class LimitsOverrides(Strict):
    """What one image may cost; what is left out is as the server's `limits` say."""

    max_image_bytes: Size | None = None
    """Encoded image, or data of a tensor; at most what the server's `limits` take."""
    max_image_pixels: Count | None = None
    """Width × height of the image, and of what resizing would make of a long and thin one."""


class ModelOverrides(Strict):
    """How a model is served where that isn't as the server's settings say, and the defaults of its requests."""

    default_min_r: Annotated[int, Field(ge=0, strict=True)] | None = None
    """The min_r of requests that set none of r, min_r, max_r and min_quality."""
    default_max_r: Annotated[int, Field(ge=0, strict=True)] | None = None
    """The max_r of those."""
    default_min_quality: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    """The min_quality of those."""
    policy: Policy | None = None
    """What chooses r for it; by default the server's `policy`."""
    batching: BatchingOverrides = BatchingOverrides()
    limits: LimitsOverrides = LimitsOverrides()


class ModelSettings(ModelOverrides):
    """What may be set for a model, in the server's settings and in a model's own file alike."""

    default_budget: Budget | None = None
    """Latency budget of requests that set none; `none` for no deadline; by default 1s, or ten images' time if more."""
    proportional_attention: bool | None = None
    """Weigh tokens by the patches they stand for; by default on, except for MAE weights."""
    dtype: DtypeSetting = "auto"
    """Of weights and activations: float32, bfloat16, float16; auto is bfloat16 where that agrees and is faster here."""
    description: str = ""
    """Told to clients."""

    @property
    def overrides(self) -> ModelOverrides | None:
        """The overrides among the settings, None if none is set."""
        overrides = ModelOverrides(**{name: getattr(self, name) for name in ModelOverrides.model_fields})
        return None if overrides == ModelOverrides() else overrides
