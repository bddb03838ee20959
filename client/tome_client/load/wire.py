"""What the load generator needs of a protocol: how requests are written in it, and how its answers are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tome_client.errors import TomeError
from tome_client.load.images import Sample
from tome_client.results import Merging, ModelInfo, Timing

CONNECT_TIMEOUT = 20.0
"""Seconds that the server may take to describe its model, before the run."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one answer says; see Outcome."""

    merging: Merging | None
    timing: Timing | None
    right: bool | None


class Wire(Protocol):
    """A protocol, for one model of one server. It does not hold the plan, since processes send it to each other.

    In protobuf's encoding, concatenated messages are one message. So a request is its options followed by its image,
    and each image is held once, not once for each budget.
    """

    @property
    def method(self) -> str:
        """Path of the gRPC method."""

    @property
    def model(self) -> ModelInfo:
        """The model, as far as the server described it."""

    def options(self, budget: float) -> bytes:
        """Returns the message of a request with that budget, without its image."""

    def image(self, sample: Sample) -> bytes:
        """Returns the message that holds an image alone.

        Raises:
            ValueError: The image cannot be made into what the model takes.
        """

    def judged(self, sample: Sample) -> bool:
        """Whether an answer can be compared with the image's label."""

    def read(self, answer: bytes, sample: Sample) -> Answer:
        """Reads an answer."""

    def ending(self, error: TomeError) -> tuple[str, str | None]:
        """Returns the code and the reason that a failure counts under."""
