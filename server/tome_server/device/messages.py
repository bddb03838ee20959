"""What the server and the device's process send each other: a record for each call, and what answers it.

Both sides are typed by these: `Device` awaits a `Call[R]` as R, and `DeviceProcess` handles it by a function that takes
that call and returns R.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from logging import LogRecord
from pathlib import Path
from typing import Generic, NamedTuple, Self, TypeAlias, TypeVar

from tome_server.device.shared_images import Place
from tome_server.execution.batch import BatchItem, BatchResult
from tome_server.models.model_info import ModelInfo
from tome_server.models.preprocess import Limits
from tome_server.models.spec import ModelSpec, Outline
from tome_server.scheduling.profile import Profile

R = TypeVar("R")


class Call(Generic[R]):
    """A request to the device's process, which it answers with an R or with an error."""

    def handled_by(self, handler: Callable[[Self], R]) -> Callable[[], R]:
        """Return a function that handles this call."""
        return partial(handler, self)


@dataclass(frozen=True)
class OpenDevice(Call[str]):
    """Use a device. The answer is its name as torch has it."""

    name: str
    """auto, cpu, cuda or cuda:N"""


@dataclass(frozen=True)
class SetThreads(Call[None]):
    """Use a number of CPU threads."""

    threads: int


@dataclass(frozen=True)
class ChooseThreads(Call[int]):
    """Choose the number of CPU threads that runs some models fastest, and use it. The answer is that number."""

    models: Sequence[tuple[ModelSpec, int]]
    """Each with its largest batch."""
    folder: Path | None
    """Where measurements are kept; None: the default folder."""


@dataclass(frozen=True)
class OutlineModel(Call[Outline]):
    """Find out what can be known of a model without its weights."""

    spec: ModelSpec


@dataclass(frozen=True)
class LoadModel(Call[ModelInfo]):
    """Load a model, and run it once."""

    key: str
    """What calls name the model by from then on."""
    spec: ModelSpec
    limits: Limits
    max_batch: int
    folder: Path | None
    """Where measurements are kept; None: the default folder."""


@dataclass(frozen=True)
class MapImages(Call[None]):
    """Map the memory that a model's images are put into. Its file descriptor follows this message."""

    key: str
    shape: tuple[int, ...]
    """[C, H, W] of one image."""
    slots: int
    """How many images it holds."""


@dataclass(frozen=True)
class UnloadModel(Call[None]):
    """Forget a model."""

    key: str


@dataclass(frozen=True)
class RecordGraphs(Call[None]):
    """Record CUDA graphs of a model; on a CPU, do nothing."""

    key: str
    max_batch: int
    memory: int
    """The most bytes of the device's memory that the graphs may take."""


@dataclass(frozen=True)
class ObtainProfile(Call[Profile]):
    """Read a model's stored profile, or measure and store one."""

    key: str
    spec: ModelSpec
    """What the model was loaded by."""
    max_batch: int
    budget: float
    """Seconds to measure for."""
    folder: Path | None
    """Where profiles are kept; None: the default folder."""


@dataclass(frozen=True)
class MeasureAgain(Call[Profile | None]):
    """Measure a model that has a profile again. The answer is None if the new profile is no better.

    Any later call but Probe ends this one, with InterruptedError.
    """

    key: str
    budget: float
    """Seconds to measure for."""


@dataclass(frozen=True)
class WarmUp(Call[None]):
    """Run a batch of every size at every r, the quickest first, until the time is up."""

    key: str
    max_batch: int
    seconds: float


@dataclass(frozen=True)
class Probe(Call[float]):
    """Run one empty image. The answer is the seconds it took."""

    key: str
    r: int


@dataclass(frozen=True)
class RunBatch(Call[BatchResult]):
    """Run a batch whose images lie in the model's shared memory."""

    key: str
    batch: Sequence[BatchItem[Place]]
    rs: Sequence[int]
    """The r of each image."""
    packed: bool
    """Whether images of different r share one call of the model."""


@dataclass(frozen=True)
class PrefetchImage:
    """Begin to copy an image to a GPU ahead of its batch. There is no answer."""

    key: str
    place: Place


AnyCall: TypeAlias = (
    OpenDevice
    | SetThreads
    | ChooseThreads
    | OutlineModel
    | LoadModel
    | MapImages
    | UnloadModel
    | RecordGraphs
    | ObtainProfile
    | MeasureAgain
    | WarmUp
    | Probe
    | RunBatch
)
"""Every call: the process must handle each."""

ToProcess: TypeAlias = tuple[int, AnyCall] | tuple[None, PrefetchImage]
"""A message to the device's process: a call with the ticket that its answer will carry."""


# Tuples, since one comes with every batch: they are unpickled in C, on the event loop.
class Returned(NamedTuple):
    """What a call was answered with."""

    ticket: int
    value: object
    """The call's R."""


class Raised(NamedTuple):
    """The error that a call ended with."""

    ticket: int
    error: Exception


FromProcess: TypeAlias = Returned | Raised | LogRecord
"""A message from the device's process. A line of its log is written by the server."""
