"""The command `tome-client load`."""

from __future__ import annotations

import argparse
import asyncio
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tome_api.parser import Parser
from tome_client.arguments import (
    Commands,
    add_merging_arguments,
    budgets,
    duration,
    duration_or_zero,
    error_text,
    merging_options,
    share,
    warn,
)
from tome_client.connection import connection
from tome_client.errors import TomeError
from tome_client.json_text import json_text
from tome_client.load.arrivals import Trace, parse_arrivals
from tome_client.load.driver import event_loop, run_load
from tome_client.load.images import read_samples
from tome_client.load.open_inference import DATATYPES
from tome_client.load.outcome import LoadResult, Progress
from tome_client.load.plan import LoadPlan, OpenInference
from tome_client.load.record import run_fields, search_fields
from tome_client.load.search import Criterion, Probe, SearchResult, parse_criterion, search_rate
from tome_client.load.summary import LoadSummary, summarize
from tome_client.load.text import lag_warning, probe_text, progress_text, search_text, summary_text

_DESCRIPTION = """\
Sends images at times fixed in advance, whether or not earlier ones are answered (an open loop). Each request has a
budget, and its latency counts from the time at which it was meant to be sent.
"""

_EXAMPLES = """\
examples:
  tome-client load --images DIR --rate 40 --budget 100ms
  tome-client load --images DIR --rate 40 --budget mix:50ms,200ms --arrivals gamma:4 --report out
  tome-client load --images DIR --rate 40 --budget mix:50ms=3,none=1    one request in four has no deadline
  tome-client load --images DIR --rate 10 --budget 100ms --duration 10s --search p99
  tome-client load --images DIR --rate 9000 --budget 20ms --processes 4
  tome-client load --images DIR --rate 40 --budget 100ms --protocol oip --model NAME    also for other servers

Exits with 0 after a run, 1 if nothing was answered, 2 if the command line is wrong, 3 if attainment is below
--fail-under. Ctrl-C ends the run, shows what was measured until then, and exits with 130.
"""

_DEFAULT_DURATION = 30.0

_DEFAULT_RESOLUTION = 0.05

# 5,000 photographs are half a gigabyte.
_DEFAULT_MOST_IMAGES = 5_000

_BELOW = 3
_INTERRUPTED = 130

# Clears the terminal's line.
_ERASE = "\r\x1b[K"


def add_load_command(commands: Commands, parent: Parser) -> None:
    """Adds the command; the namespace that it parses has the function to run as `run`.

    Args:
        commands: The commands of `tome-client`.
        parent: The arguments of all commands that connect.
    """
    command = commands.add_parser(
        "load",
        parents=[parent],
        usage="%(prog)s --images DIR --rate N --budget TIME [options]",
        help="measure a server under load",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=partial(_run, command))
    _add_requests(command)
    _add_run(command)
    _add_findings(command)


def _add_requests(command: Parser) -> None:
    """Adds what is sent, and when."""
    command.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="folder of images to send, with its subfolders"
    )
    command.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="JSON object that maps each image to its label (default: the names of DIR's subfolders)",
    )
    command.add_argument(
        "--most-images",
        type=_count,
        default=_DEFAULT_MOST_IMAGES,
        metavar="N",
        help="if the folder has more images than this, send N of them, chosen at random (default: %(default)s)",
    )
    command.add_argument(
        "--rate", type=float, metavar="N", help="requests a second; with --search, the first rate to try"
    )
    command.add_argument(
        "--arrivals",
        default="poisson",
        metavar="KIND",
        help="poisson; constant; gamma:CV2, whose gaps have the squared coefficient of variation CV2; or trace:FILE, "
        "with a line for each request: seconds since the start and, optionally, its budget (default: %(default)s)",
    )
    command.add_argument(
        "--budget",
        type=budgets,
        default=(),
        metavar="TIME",
        help="such as 100ms, or none for no deadline; or a mix such as mix:50ms,200ms, or mix:50ms=3,200ms=1, in which "
        "three of four requests have 50 ms",
    )


def _add_run(command: Parser) -> None:
    """Adds how long it is sent, and how."""
    command.add_argument(
        "--duration",
        type=duration,
        metavar="TIME",
        help=f"how long to measure (default: {_DEFAULT_DURATION:g}s, or the whole trace)",
    )
    command.add_argument(
        "--warmup",
        type=duration_or_zero,
        default=2.0,
        metavar="TIME",
        help="how long to send requests before measuring (default: 2s; 0 for none)",
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of all random choices (default: %(default)s)"
    )
    command.add_argument(
        "--connections",
        type=_count,
        default=1,
        metavar="N",
        help="connections to the server, of each process (default: %(default)s)",
    )
    command.add_argument(
        "--processes",
        type=_count,
        default=1,
        metavar="N",
        help="processes that share the requests; one sends a few thousand a second (default: %(default)s)",
    )
    command.add_argument(
        "--deadline-only", action="store_true", help="send each budget as the gRPC deadline, without a latency budget"
    )
    add_merging_arguments(command)
    _add_protocol(command)


def _add_protocol(command: Parser) -> None:
    """Adds which protocol is spoken, and what the images are sent as in it."""
    command.add_argument(
        "--protocol",
        choices=("tome", "oip"),
        default="tome",
        help="tome, or oip for the Open Inference Protocol, which Triton, OpenVINO Model Server and KServe also speak; "
        "budgets are then sent as gRPC deadlines (default: %(default)s)",
    )
    # None where they are left out: without oip, they would be ignored.
    command.add_argument(
        "--input", metavar="NAME", help="with oip: the model's input that takes the image (default: its only one)"
    )
    command.add_argument(
        "--datatype",
        choices=DATATYPES,
        help="with oip: send encoded files, pixels or normalised pixels (default: what the model's metadata says; "
        "files to tome-serving). Pixels need Pillow: pip install 'tome-serving[visualize]'",
    )
    command.add_argument(
        "--mean",
        type=_numbers,
        metavar="N[,N...]",
        help="with FP32: mean to subtract from pixels scaled to [0, 1], one for all channels or one for each "
        "(default: 0)",
    )
    command.add_argument(
        "--std", type=_numbers, metavar="N[,N...]", help="with FP32: standard deviation to divide by (default: 1)"
    )


def _add_findings(command: Parser) -> None:
    """Adds what is done with the measurements."""
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write index.html, report.json and requests.csv to this folder. Needs matplotlib: "
        "pip install 'tome-serving[plots]'",
    )
    command.add_argument(
        "--fail-under",
        type=share,
        metavar="SHARE",
        help="exit with 3 if a smaller share of the requests was answered in time",
    )
    command.add_argument(
        "--search",
        metavar="CRITERION",
        help="find the highest rate that meets a criterion, by runs of --duration: p99, if the 99th percentile of "
        "latency is within the budget, or attainment:0.99, if that share of requests is answered in time",
    )
    command.add_argument(
        "--resolution",
        type=_resolution,
        metavar="SHARE",
        help="how closely --search encloses that rate (default: 0.05, that is 5 %%)",
    )


def _run(command: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Runs the load that the arguments describe; returns the exit status."""
    try:
        plan = _plan(args)
        criterion = _criterion(args)
        connected = connection(args)
        if args.report:
            args.report.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        command.error(error_text(error))
    if args.report:
        # Imported here because the plain install lacks matplotlib, and before the run so that the error comes first.
        import tome_client.load.report  # noqa: F401

    async def measure() -> int:
        stop = _stopped_by_ctrl_c()
        before: LoadResult | None = None

        async def run(one: LoadPlan) -> LoadResult:
            nonlocal before
            try:
                with _progress_line() as progress:
                    before = await run_load(args.target, one, **connected, progress=progress, stop=stop)
            except TomeError:
                if before is None or not stop.is_set():
                    raise
                # Ctrl-C came between two runs of a search, which has something to report.
                return LoadResult(one, before.model, (), duration=0.0, stopped=True)
            return before

        try:
            if criterion is None:
                return _report_run(args, await run(plan))
            resolution = _DEFAULT_RESOLUTION if args.resolution is None else args.resolution
            found = await search_rate(plan, criterion, run, resolution=resolution, tell=_tell_probe(args))
            return _report_search(args, found)
        except TomeError:
            if not stop.is_set():
                raise
            warn("interrupted before anything was measured")
            return _INTERRUPTED

    with asyncio.Runner(loop_factory=event_loop) as runner:
        return runner.run(measure())


def _plan(args: argparse.Namespace) -> LoadPlan:
    arrivals = parse_arrivals(args.arrivals, args.rate)
    if args.search and isinstance(arrivals, Trace):
        raise ValueError("--search changes the rate, and a trace has its own")
    until_the_end = arrivals.duration if isinstance(arrivals, Trace) else _DEFAULT_DURATION
    plan = LoadPlan(
        samples=read_samples(args.images, args.labels, most=args.most_images, seed=args.seed),
        arrivals=arrivals,
        budgets=args.budget,
        duration=args.duration or until_the_end,
        warmup=args.warmup,
        seed=args.seed,
        options=merging_options(args),
        deadline_only=args.deadline_only,
        connections=args.connections,
        processes=args.processes,
        oip=_open_inference(args),
    )
    for flag in ("fail_under", "search"):
        if getattr(args, flag) is not None and not any(map(math.isfinite, plan.possible_budgets())):
            raise ValueError(f"--{flag.replace('_', '-')} needs requests with a deadline, and --budget gives none")
    return plan


def _open_inference(args: argparse.Namespace) -> OpenInference | None:
    given = {name: value for name in ("input", "datatype", "mean", "std") if (value := getattr(args, name)) is not None}
    if args.protocol == "oip":
        return OpenInference(**given)
    if given:
        raise ValueError(f"--{next(iter(given))} is for --protocol oip, which is not given")
    return None


def _criterion(args: argparse.Namespace) -> Criterion | None:
    if args.search is None:
        if args.resolution is not None:
            raise ValueError("--resolution is for --search, which is not given")
        return None
    if args.fail_under is not None:
        raise ValueError("--fail-under judges one run, and --search makes several")
    return parse_criterion(args.search)


def _stopped_by_ctrl_c() -> asyncio.Event:
    """Returns an event that the first Ctrl-C sets. The second Ctrl-C ends the command at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop.set()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    return stop


@contextmanager
def _progress_line() -> Iterator[Callable[[Progress], None] | None]:
    """Yields a function that shows a run's progress on one line of a terminal; None where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        yield lambda progress: print(f"{_ERASE}{progress_text(progress)}", end="", file=sys.stderr, flush=True)
    finally:
        print(_ERASE, end="", file=sys.stderr, flush=True)


def _tell_probe(args: argparse.Namespace) -> Callable[[Probe], None]:
    # With --json, standard output is for the result alone.
    stream = sys.stderr if args.json else sys.stdout
    return lambda probe: print(probe_text(probe), file=stream, flush=True)


def _report_run(args: argparse.Namespace, result: LoadResult) -> int:
    summary = summarize(result)
    if warning := lag_warning(summary):
        warn(warning)
    if args.json:
        print(json_text(run_fields(result, summary)))
    else:
        print(summary_text(summary))
    _write_report(args, result, summary)
    if result.stopped:
        warn("interrupted; the figures are of what was measured until then")
        return _INTERRUPTED
    if not summary.total.answered:
        warn("nothing was answered" if summary.total.sent else "the run was too short for a single request")
        return 1
    return _BELOW if args.fail_under is not None and summary.total.attainment.share < args.fail_under else 0


def _report_search(args: argparse.Namespace, found: SearchResult) -> int:
    best = found.best and summarize(found.best)
    if args.json:
        print(json_text(search_fields(found)))
    else:
        print(f"\n{search_text(found)}")
    if found.best and best:
        if not args.json:
            print(f"\n{summary_text(best)}")
        _write_report(args, found.best, best)
    if found.stopped:
        warn("interrupted; the search was not finished")
        return _INTERRUPTED
    return 0 if any(probe.summary.total.answered for probe in found.probes) else 1


def _write_report(args: argparse.Namespace, result: LoadResult, summary: LoadSummary) -> None:
    if args.report:
        from tome_client.load.report import write_report

        index = write_report(args.report, result, summary, args.target)
        print(f"report: {index}", file=sys.stderr)


def _resolution(text: str) -> float:
    value = share(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(one) for one in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or several with commas between") from None
