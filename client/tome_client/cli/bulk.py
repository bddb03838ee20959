"""Many images over one stream: what became of each, and how the command that sent them ends."""

from __future__ import annotations

import argparse
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tome_client.arguments import error_text, merging_options, warn
from tome_client.cli.connecting import connect, hint
from tome_client.cli.images import NamedImages
from tome_client.cli.progress import ProgressLine
from tome_client.cli.statuses import INTERRUPTED
from tome_client.client import Client
from tome_client.errors import TomeError
from tome_client.requests import PredictOptions, StreamItem, unsendable
from tome_client.results import PredictResult

# How far images may overtake the oldest one without an answer. It bounds what waits for its turn in memory.
_AHEAD = 256


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one image of the command line: it has a result or an error."""

    image: str
    result: PredictResult | None
    error: TomeError | None
    round_trip: float
    """Seconds from sending to the result or error."""

    def fields(self) -> dict[str, Any]:
        """Returns it for JSON."""
        return {
            "image": self.image,
            "result": asdict(self.result) if self.result else None,
            "error": _error_fields(self.error) if self.error else None,
            "round_trip": self.round_trip,
        }


def options_of(args: argparse.Namespace) -> PredictOptions:
    """Returns the options that the arguments set; a budget that is left out differs from `none`."""
    options = merging_options(args)
    if "budget" in args:
        options["budget"] = args.budget
    return options


def run(
    args: argparse.Namespace,
    images: NamedImages,
    options: PredictOptions,
    take: Callable[[Outcome], None],
    *,
    in_order: bool = False,
    progress: bool,
) -> int:
    """Sends the images, and calls `take` with each outcome as soon as it arrives.

    An image that fails is one line of standard error. A server that is lost is one line, however many images it
    leaves without an answer.

    Args:
        args: The command line.
        images: What to send. A single image is sent with Predict, so that it gets the model's default budget. Others
            share a stream, so that they can share batches, and have no deadline unless the options set one.
        options: The options of every request.
        take: Receives the outcomes.
        in_order: Whether `take` is called in the order of the images, instead of that of completion.
        progress: Whether to show how many are done.

    Returns:
        The exit status.
    """
    for problem in images.problems:
        warn(problem)
    total = len(images.names)
    answered = 0
    failed: Counter[str] = Counter()
    lost: TomeError | None = None
    interrupted = False
    start = time.perf_counter()

    def done() -> str:
        count = answered + failed.total()
        return f"{count:,} of {total:,} images, {count / (time.perf_counter() - start):.0f}/s"

    with ProgressLine(done, shown=progress) as line:
        try:
            with connect(args) as client:
                if images.alone:
                    outcomes = iter([_predicted(client, images, options)])
                else:
                    outcomes = _streamed(client, images, options, in_order=in_order)
                for one in outcomes:
                    if one.error:
                        failed[one.error.code.name] += 1
                        # Errors of a stream's items come from a server, so it was reached.
                        advised = hint(one.error, args) if images.alone else ""
                        with line.erased():
                            warn(f"{one.image}: {error_text(one.error)}{advised}")
                    else:
                        answered += 1
                    take(one)
        except TomeError as error:
            lost = error
        except KeyboardInterrupt:
            interrupted = True
    if failed and total > 1:
        how = ", ".join(f"{count} {code}" for code, count in failed.most_common())
        warn(f"{failed.total()} of {total} images failed: {how}")
    without = f"{total - answered - failed.total()} of {total} images have no answer"
    if interrupted:
        warn(f"interrupted; {without}")
        return INTERRUPTED
    if lost:
        warn(f"{without}: {error_text(lost)}{hint(lost, args)}")
    return int(bool(images.problems or lost or failed))


def _streamed(client: Client, images: NamedImages, options: PredictOptions, *, in_order: bool) -> Iterator[Outcome]:
    """Yields what became of each image.

    Raises:
        TomeError: The stream as a whole failed.
    """
    if not images.names:
        return
    sent: dict[int, float] = {}
    room = threading.Semaphore(_AHEAD)
    closed = threading.Event()

    def items() -> Iterator[StreamItem]:
        for number in range(len(images.names)):
            if in_order:
                room.acquire()
            if closed.is_set():
                return
            sent[number] = time.perf_counter()
            yield StreamItem(str(number), images.image(number), options)

    early: dict[int, Outcome] = {}
    due = 0
    try:
        for one in client.predict_stream(items()):
            now, number = time.perf_counter(), int(one.id)
            outcome = Outcome(images.names[number], one.result, one.error, now - sent.pop(number, now))
            if not in_order:
                yield outcome
                continue
            early[number] = outcome
            while due in early:
                yield early.pop(due)
                room.release()
                due += 1
    finally:
        closed.set()
        room.release()


def _predicted(client: Client, images: NamedImages, options: PredictOptions) -> Outcome:
    start = time.perf_counter()
    result, error = None, None
    try:
        result = client.predict(images.image(0), **options)
    except TomeError as refused:
        error = refused
    except (OSError, ValueError) as unreadable:
        error = unsendable(unreadable)
    return Outcome(images.names[0], result, error, time.perf_counter() - start)


def _error_fields(error: TomeError) -> dict[str, Any]:
    return {
        "code": error.code.name,
        "message": error.message,
        "field_violations": [asdict(violation) for violation in error.field_violations],
        "reason": error.reason,
        "metadata": dict(error.metadata),
        "smallest_latency": error.smallest_latency,
        "retry_delay": error.retry_delay,
    }
