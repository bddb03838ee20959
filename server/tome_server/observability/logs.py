"""Logs: a line for each request at debug, a summary of some seconds at info; as JSON, or as text on a terminal."""

import asyncio
import codecs
import logging
import math
import sys
from collections import Counter
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO, TypeAlias

import structlog

from tome_server.errors import InfeasibleError
from tome_server.observability import request_context
from tome_server.observability.request_outcome import RequestOutcome

Format: TypeAlias = Literal["auto", "json", "text"]

SUMMARY_SECONDS = 10.0
# Characters of a requested model's name that a line repeats; the name may be of no model.
NAME_SHOWN = 100
# Of libraries' lines that repeat: how often one is written, how much of it is compared, and how many are remembered.
REPEATED_SECONDS = 1.0
LINE_COMPARED = 200
LINES_REMEMBERED = 100

log: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(__name__)


def configure(level: str, form: Format, stream: TextIO = sys.stderr) -> None:
    """Send the server's logs to `stream`: a line of JSON each; as text if `form` is text, or auto and it is a terminal.

    Libraries log only warnings and errors, each at most once a second.
    """
    terminal = stream.isatty()
    # JSON can escape the letters that the stream's encoding lacks.
    ascii_only = codecs.lookup(stream.encoding or "utf-8").name != "utf-8"
    as_text = form == "text" or (form == "auto" and terminal)
    # Applied to records of structlog's loggers and of the standard library's.
    common: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Plain tracebacks in both: rich ones would show the values of variables, among them images and tokens.
    last: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=structlog.dev.plain_traceback)]
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
    handler.addFilter(Repeated())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("tome_server").setLevel(level.upper())
    logging.captureWarnings(True)


class Repeated(logging.Filter):
    """Drops a library's line if the same was written within a second: some write one for each connection."""

    def __init__(self) -> None:
        super().__init__()
        # When each line was last written, by logger and beginning; what follows may name a socket.
        self._written: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to write a line."""
        if record.name.partition(".")[0] == "tome_server":
            return True
        line = record.name, record.getMessage().partition("\n")[0][:LINE_COMPARED]
        if record.created - self._written.get(line, -math.inf) < REPEATED_SECONDS:
            return False
        if len(self._written) >= LINES_REMEMBERED:
            self._written.clear()
        self._written[line] = record.created
        return True


def _first_keys(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Put the keys that every line has before those that only some have."""
    first = ("timestamp", "level", "logger", "event")
    return {key: event[key] for key in first if key in event} | {k: v for k, v in event.items() if k not in first}


def log_request(outcome: RequestOutcome) -> None:
    """Write a line about a request, at debug."""
    if not logging.getLogger(__name__).isEnabledFor(logging.DEBUG):
        return
    facts: dict[str, object] = {"model": outcome.model[:NAME_SHOWN], "client": request_context.client.get()}
    if trace := request_context.trace.get():
        facts["traceparent"] = trace.traceparent
    if outcome.budget is not None:
        facts["budget_ms"] = _ms(outcome.budget) if math.isfinite(outcome.budget) else None
    facts["total_ms"] = _ms(outcome.seconds)
    if reply := outcome.reply:
        timing = reply.timing
        facts |= {
            "outcome": outcome_word(outcome),
            "r": reply.r,
            "tokens_in": reply.cost.tokens_in,
            "tokens_out": reply.cost.tokens[-1],
            "batch_size": timing.batch_size,
            "decode_ms": _ms(timing.decode),
            "queue_ms": _ms(timing.queue),
            "compute_ms": _ms(timing.compute),
        }
        if timing.slack is not None:
            facts["slack_ms"] = _ms(timing.slack)
    else:
        facts |= {"outcome": outcome_word(outcome), "why": str(outcome.error)}
        if isinstance(outcome.error, InfeasibleError):
            facts["smallest_latency_ms"] = outcome.error.smallest_ms
    log.debug("request", **facts)


def outcome_word(outcome: RequestOutcome) -> str:
    """Return how a request ended in a word: answered, cancelled, or its error's, such as infeasible."""
    if outcome.reply:
        return "answered"
    if isinstance(outcome.error, asyncio.CancelledError):
        return "cancelled"
    name = type(outcome.error).__name__.removesuffix("Error")
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


class Summary:
    """Sums up, at info, the requests that ended in some seconds from the first one on; silent if there are none."""

    def __init__(self, seconds: float = SUMMARY_SECONDS) -> None:
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._sums = _Sums()

    def __call__(self, outcome: RequestOutcome) -> None:
        """Count a request."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self.write)
        self._sums.add(outcome)

    def write(self) -> None:
        """Write the line if a request ended since the last one, and start anew."""
        if self._timer is None:
            return
        self._timer.cancel()
        sums, self._sums, self._timer = self._sums, _Sums(), None
        log.info("served", **sums.facts())


@dataclass
class _Sums:
    """What a summary says. Sums only: replies hold what was asked for, and errors the frames with each image."""

    totals: list[float] = field(default_factory=list)
    """Seconds from arrival to answer, of each request answered."""
    late: int = 0
    batches: float = 0.0
    r: int = 0
    flops: int = 0
    flops_saved: int = 0
    others: Counter[str] = field(default_factory=Counter)
    """How many ended otherwise, by how."""

    def add(self, outcome: RequestOutcome) -> None:
        reply = outcome.reply
        if reply is None:
            self.others[outcome_word(outcome)] += 1
            return
        timing = reply.timing
        self.totals.append(timing.total)
        self.late += timing.slack is not None and timing.slack < 0
        self.batches += 1 / timing.batch_size  # a batch of three has three members, each of which adds a third
        self.r += reply.r
        self.flops += reply.flops
        self.flops_saved += reply.flops_saved

    def facts(self) -> dict[str, object]:
        """Return the line's keys and values."""
        answered = len(self.totals)
        facts: dict[str, object] = {"requests": answered + self.others.total(), "answered": answered}
        if answered:
            totals = sorted(self.totals)
            facts |= {
                "late": self.late,
                "batches": round(self.batches),
                "mean_batch": round(answered / self.batches, 2),
                "mean_r": round(self.r / answered, 2),
                "flops_saved_share": round(self.flops_saved / (self.flops + self.flops_saved), 4),
                "p50_ms": _ms(_percentile(totals, 50)),
                "p99_ms": _ms(_percentile(totals, 99)),
            }
        return {**facts, **self.others}


def _percentile(ascending: Sequence[float], percent: int) -> float:
    """Return the least value that `percent` % of all do not exceed, the load generator's definition."""
    return ascending[-(-percent * len(ascending) // 100) - 1]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
