"""Logs: a line a request at debug, a summary of some seconds at info; as JSON, or as text for people at a terminal."""

import asyncio
import codecs
import logging
import math
import sys
from collections import Counter
from collections.abc import MutableMapping, Sequence
from typing import Any, Literal, TextIO, TypeAlias

import structlog

from tome_server.errors import InfeasibleError
from tome_server.observability import request_context
from tome_server.observability.ended import Answered, RequestOutcome

Format: TypeAlias = Literal["auto", "json", "text"]

SUMMARY_SECONDS = 10.0
# Characters of a model's name that was asked for and isn't there.
NAME_SHOWN = 100

log: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(__name__)


def configure(level: str, form: Format, stream: TextIO = sys.stderr) -> None:
    """Send the server's logs to `stream`: JSON, a line each, unless `form` is text, or auto and a person is watching.

    Libraries say only what is wrong.
    """
    watched = stream.isatty()
    # Where a stream can't hold other letters, JSON has a way to write them that its readers undo.
    ascii_only = codecs.lookup(stream.encoding or "utf-8").name != "utf-8"
    as_text = form == "text" or (form == "auto" and watched)
    # What both structlog's loggers and the standard library's go through.
    common: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Plain tracebacks in both: others show the values of variables, images and tokens among them.
    last: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=watched, exception_formatter=structlog.dev.plain_traceback)]
        if as_text
        else [
            structlog.processors.format_exc_info,
            _first_keys,
            structlog.processors.JSONRenderer(ensure_ascii=ascii_only),
        ]
    )
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *common, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=common, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("tome_server").setLevel(level.upper())
    logging.captureWarnings(True)


def _first_keys(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Put what every line has before what only some have."""
    first = ("timestamp", "level", "logger", "event")
    return {key: event[key] for key in first if key in event} | {k: v for k, v in event.items() if k not in first}


def log_request(ended: RequestOutcome) -> None:
    """Write a line about a request, at debug."""
    if not logging.getLogger(__name__).isEnabledFor(logging.DEBUG):
        return
    facts: dict[str, object] = {"model": ended.model[:NAME_SHOWN], "client": request_context.client.get()}
    if traceparent := request_context.traceparent.get():
        facts["traceparent"] = traceparent
    if ended.budget is not None:
        facts["budget_ms"] = _ms(ended.budget) if math.isfinite(ended.budget) else None
    facts["total_ms"] = _ms(ended.seconds)
    if answer := ended.answer:
        facts |= {
            "outcome": "answered",
            "r": answer.r,
            "tokens_in": answer.tokens_in,
            "tokens_out": answer.tokens_out,
            "batch_size": answer.batch_size,
            "decode_ms": _ms(answer.decode),
            "queue_ms": _ms(answer.queue),
            "compute_ms": _ms(answer.compute),
        }
        if answer.slack is not None:
            facts["slack_ms"] = _ms(answer.slack)
    else:
        facts |= {"outcome": outcome(ended), "why": str(ended.error)}
        if isinstance(ended.error, InfeasibleError):
            facts["smallest_latency_ms"] = ended.error.smallest_ms
    log.debug("request", **facts)


def outcome(ended: RequestOutcome) -> str:
    """Return how a request ended in a word: answered, cancelled, or its error's, such as infeasible."""
    if ended.answer:
        return "answered"
    if isinstance(ended.error, asyncio.CancelledError):
        return "cancelled"
    name = type(ended.error).__name__.removesuffix("Error")
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


class Summary:
    """Sums up what was answered since the first request after the last summary, at info; silent when nobody asks."""

    def __init__(self, seconds: float = SUMMARY_SECONDS) -> None:
        self._seconds = seconds
        self._answers: list[Answered] = []
        # How many ended otherwise. Not the errors: they hold the frames, and these the image, of each request.
        self._others: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def __call__(self, ended: RequestOutcome) -> None:
        """Count a request."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self.write)
        if ended.answer:
            self._answers.append(ended.answer)
        else:
            self._others[outcome(ended)] += 1

    def write(self) -> None:
        """Write the line, if there is anything to tell, and begin anew."""
        if self._timer is None:
            return
        self._timer.cancel()
        answers, others = self._answers, self._others
        self._answers, self._others, self._timer = [], Counter(), None
        facts: dict[str, object] = {"requests": len(answers) + others.total(), "answered": len(answers)}
        if answers:
            # A batch of three is told of by three members, each of whom makes a third of it.
            batches = sum(1 / answer.batch_size for answer in answers)
            done, saved = sum(answer.flops for answer in answers), sum(answer.flops_saved for answer in answers)
            totals = sorted(answer.total for answer in answers)
            facts |= {
                "late": sum(answer.slack is not None and answer.slack < 0 for answer in answers),
                "batches": round(batches),
                "mean_batch": round(len(answers) / batches, 2),
                "mean_r": round(sum(answer.r for answer in answers) / len(answers), 2),
                "flops_saved_share": round(saved / (done + saved), 4),
                "p50_ms": _ms(_percentile(totals, 50)),
                "p99_ms": _ms(_percentile(totals, 99)),
            }
        log.info("served", **facts, **others)


def _percentile(ascending: Sequence[float], percent: int) -> float:
    """Return the least value that `percent` % of all do not exceed, as the load generator reckons it."""
    return ascending[-(-percent * len(ascending) // 100) - 1]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
