"""The command `tome-client load`."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tome_client.arguments import add_merging_arguments, duration, error_text, merging_options, share
from tome_client.connection import connection
from tome_client.json_text import json_text
from tome_client.load.arrivals import Trace, parse_arrivals
from tome_client.load.driver import LoadResult, Progress, event_loop, run_load
from tome_client.load.images import read_samples
from tome_client.load.plan import LoadPlan, parse_budgets
from tome_client.load.record import run_fields, search_fields
from tome_client.load.search import Criterion, Probe, SearchResult, parse_criterion, search_rate
from tome_client.load.summary import LoadSummary, summarize
from tome_client.load.text import lag_warning, probe_text, progress_text, search_text, summary_text

_DESCRIPTION = """\
Sends images at times fixed beforehand, whether or not the earlier ones are answered (an open loop), each with a
budget, and measures what became of them. Latency counts from the time a request was meant to be sent.
"""

_EXAMPLES = """\
examples:
  tome-client load --images DIR --rate 40 --budget 100ms
  tome-client load --images DIR --rate 40 --budget mix:50ms,200ms --arrivals gamma:4 --report out
  tome-client load --images DIR --rate 10 --budget 100ms --duration 10s --search p99

Exits with 0 after a run, 1 if nothing was answered, 2 if the command line is wrong, 3 if attainment is below
--fail-under, 130 if it was interrupted; what was measured until then is shown.
"""

_DEFAULT_DURATION = 30.0

_DEFAULT_RESOLUTION = 0.05

# 5,000 photographs are half a gigabyte.
_DEFAULT_MOST_IMAGES = 5_000

_BELOW = 3
_INTERRUPTED = 130

# Back to the start of the terminal's line, which is cleared.
_ERASE = "\r\x1b[K"


def add_load_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], parent: argparse.ArgumentParser
) -> None:
    """Adds the command to those of `tome-client`; what it parses has the command as `run`.

    Args:
        commands: What ArgumentParser.add_subparsers returned.
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
    command.add_argument("--images", type=Path, required=True, metavar="DIR", help="images to send, and those below")
    command.add_argument(
        "--labels", type=Path, metavar="FILE", help="JSON: image to label (default: names of the subfolders of DIR)"
    )
    command.add_argument(
        "--most-images",
        type=_count,
        default=_DEFAULT_MOST_IMAGES,
        metavar="N",
        help="of more, send so many, drawn by --seed (default: %(default)s)",
    )
    command.add_argument("--rate", type=float, metavar="N", help="requests a second; with --search, the first tried")
    command.add_argument(
        "--arrivals",
        default="poisson",
        metavar="KIND",
        help="poisson, constant, gamma:CV2 for gaps of that squared coefficient of variation, or trace:FILE with a "
        "line for each request: its seconds since the start and perhaps its budget (default: %(default)s)",
    )
    command.add_argument(
        "--budget", metavar="TIME", help="such as 100ms; or mix:50ms,200ms; or mix:50ms=3,200ms=1, three of four 50 ms"
    )
    command.add_argument(
        "--duration",
        type=duration,
        metavar="TIME",
        help=f"how long to measure (default: {_DEFAULT_DURATION:g}s, or all of the trace)",
    )
    command.add_argument(
        "--warmup", type=_warmup, default=2.0, metavar="TIME", help="send as long before that (default: 2s; 0 for none)"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default: %(default)s)")
    command.add_argument(
        "--connections", type=_count, default=1, metavar="N", help="to the server (default: %(default)s)"
    )
    command.add_argument(
        "--deadline-only", action="store_true", help="send the budget as the gRPC deadline, and no latency budget"
    )
    add_merging_arguments(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write index.html, report.json and requests.csv there. Needs matplotlib: "
        "pip install 'tome-serving[plots]'",
    )
    command.add_argument(
        "--fail-under", type=share, metavar="SHARE", help="exit with 3 if a smaller share was answered in time"
    )
    command.add_argument(
        "--search",
        metavar="CRITERION",
        help="find the highest rate at which p99 is within the budget (p99), or 0.99 of all are answered in time "
        "(attainment:0.99), by runs of --duration",
    )
    command.add_argument(
        "--resolution", type=_resolution, metavar="SHARE", help="how finely --search goes (default: 0.05, that is 5 %%)"
    )


def _run(command: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Runs the load that the arguments ask for; returns the exit status."""
    try:
        plan = _plan(args)
        criterion = _criterion(args)
        connected = connection(args)
        if args.report:
            args.report.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        command.error(error_text(error))
    if args.report:
        # Here because matplotlib, which it imports, is not part of the plain install; and not after the run.
        import tome_client.load.report  # noqa: F401

    async def measure() -> int:
        stop = _stopped_by_ctrl_c()

        async def run(one: LoadPlan) -> LoadResult:
            with _progress_line() as progress:
                return await run_load(args.target, one, **connected, progress=progress, stop=stop)

        if criterion is None:
            return _report_run(args, await run(plan))
        resolution = _DEFAULT_RESOLUTION if args.resolution is None else args.resolution
        found = await search_rate(plan, criterion, run, resolution=resolution, tell=_tell_probe(args))
        return _report_search(args, found)

    with asyncio.Runner(loop_factory=event_loop) as runner:
        return runner.run(measure())


def _plan(args: argparse.Namespace) -> LoadPlan:
    arrivals = parse_arrivals(args.arrivals, args.rate)
    if args.search and isinstance(arrivals, Trace):
        raise ValueError("--search changes the rate, and a trace has its own")
    until_the_end = arrivals.duration if isinstance(arrivals, Trace) else _DEFAULT_DURATION
    return LoadPlan(
        samples=read_samples(args.images, args.labels, most=args.most_images, seed=args.seed),
        arrivals=arrivals,
        budgets=parse_budgets(args.budget) if args.budget else (),
        duration=args.duration or until_the_end,
        warmup=args.warmup,
        seed=args.seed,
        options=merging_options(args),
        deadline_only=args.deadline_only,
        connections=args.connections,
    )


def _criterion(args: argparse.Namespace) -> Criterion | None:
    if args.search is None:
        if args.resolution is not None:
            raise ValueError("--resolution is --search's: there is none")
        return None
    if args.fail_under is not None:
        raise ValueError("--fail-under judges one run, and --search makes many")
    return parse_criterion(args.search)


def _stopped_by_ctrl_c() -> asyncio.Event:
    """Returns what the first Ctrl-C sets. The second ends the command as it would have without."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop.set()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    return stop


@contextmanager
def _progress_line() -> Iterator[Callable[[Progress], None] | None]:
    """Yields what writes a run's progress over itself, for people who watch; nothing to a file."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        yield lambda progress: print(f"{_ERASE}{progress_text(progress)}", end="", file=sys.stderr, flush=True)
    finally:
        print(_ERASE, end="", file=sys.stderr, flush=True)


def _tell_probe(args: argparse.Namespace) -> Callable[[Probe], None]:
    # Standard output is for what was found, where that is JSON.
    stream = sys.stderr if args.json else sys.stdout
    return lambda probe: print(probe_text(probe), file=stream, flush=True)


def _report_run(args: argparse.Namespace, result: LoadResult) -> int:
    summary = summarize(result)
    _warn(lag_warning(summary))
    if args.json:
        print(json_text(run_fields(result, summary)))
    else:
        print(summary_text(summary))
    _write_report(args, result, summary)
    if result.stopped:
        return _INTERRUPTED
    if not summary.total.answered:
        _warn("nothing was answered" if summary.total.sent else "no request fell into so short a run")
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
        return _INTERRUPTED
    return 0 if any(probe.summary.total.answered for probe in found.probes) else 1


def _write_report(args: argparse.Namespace, result: LoadResult, summary: LoadSummary) -> None:
    if args.report:
        from tome_client.load.report import write_report

        index = write_report(args.report, result, summary, args.target)
        print(f"report: {index}", file=sys.stderr)


def _warn(text: str | None) -> None:
    if text:
        print(f"tome-client: {text}", file=sys.stderr)


def _warmup(text: str) -> float:
    return 0.0 if text.strip() in ("0", "0s", "0ms") else duration(text)


def _resolution(text: str) -> float:
    value = share(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"not a share above 0: {text!r}")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"not a number above 0: {text!r}")
    return int(text)
