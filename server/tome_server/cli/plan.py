"""`tome-server plan`: how many replicas a load takes, and at what quality."""

import argparse
import json
import sys
from pathlib import Path

from tome_server.cli.flags import Commands, add_json, add_overwrite, budgets, positive, positive_number, share, time
from tome_server.cli.output import drawing

EPILOG = """examples:
  tome-server plan --rate 200 --budget 150ms --attainment 0.999
  tome-server plan --rate 10000 --budget mix:50ms=3,200ms=1 --cv2 4 --profile gpu.json --quality quality.json
  tome-server plan --rate 200 --budget 150ms --picture plan.svg

Without --profile and --quality, replicas are like this machine serving the bundled model: tome-server profile measures
that once. One replica is simulated with its share of the requests; see docs/scheduling.md.
"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    plan = commands.add_parser(
        "plan",
        usage="%(prog)s --rate N --budget TIME [options]",
        help="how many replicas a load takes, and at what quality",
        description="Say how many replicas it takes to answer a load in time, and at what quality, by simulation;\n"
        "and how many it would take without merging, and merging the most. Exits with 1 if no number does.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.add_argument("--rate", type=positive_number, required=True, metavar="N", help="requests a second, in all")
    plan.add_argument(
        "--budget", type=budgets, required=True, metavar="TIME",
        help="what an answer may take: 50ms, or mix:50ms,200ms, or mix:50ms=3,200ms=1 for three of four 50 ms",
    )  # fmt: skip
    plan.add_argument(
        "--attainment", type=share, default=0.99, metavar="SHARE",
        help="share of requests to be answered in time (default: 0.99)",
    )  # fmt: skip
    plan.add_argument(
        "--cv2", type=positive_number, default=1.0, metavar="N",
        help="squared coefficient of variation of the gaps between requests: 1 for a Poisson process (default), more "
        "for bursts",
    )  # fmt: skip
    plan.add_argument("--profile", type=Path, metavar="FILE", help="what `tome-server profile --output` wrote")
    plan.add_argument("--quality", type=Path, metavar="FILE", help="what `tome-server evaluate --output` wrote")
    plan.add_argument("--policy", default="price", help="price (default), fixed:R, max_accuracy, max_batch or slackfit")
    plan.add_argument(
        "--overhead", type=time, default=0.001, metavar="TIME",
        help="time from the end of a batch until the client has the answer (default: 1ms)",
    )  # fmt: skip
    plan.add_argument(
        "--requests", type=positive, default=20_000, metavar="N",
        help="requests to simulate for each figure (default: 20000)",
    )  # fmt: skip
    plan.add_argument(
        "--picture", type=Path, metavar="FILE", help="where to draw both against rate: .png, .svg or .pdf"
    )
    plan.add_old_name("--plot", "--picture")
    add_json(plan)
    add_overwrite(plan)
    plan.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan, and print the answer; returns 1 if no number of replicas is enough."""
    pictures = drawing("--picture", args.picture, args.overwrite) if args.picture else None
    from tqdm import tqdm

    from tome_server.cli.tables import plan_table
    from tome_server.simulation.capacity import Plan, Question, answer_fields, load_replica

    key, profile, quality = load_replica(args.profile, args.quality)
    print(f"replicas as measured: {key.model} in {key.dtype} on {key.device}", file=sys.stderr)
    question = Question(
        rate=args.rate,
        budgets=tuple(one.budget for one in args.budget),
        weights=tuple(one.weight for one in args.budget),
        attainment=args.attainment,
        cv2=args.cv2,
        overhead=args.overhead,
        requests=args.requests,
        policy=args.policy,
    )
    with tqdm(desc="simulating", unit="run", disable=not sys.stderr.isatty(), leave=False) as progress:
        plan = Plan(question, profile, quality, progress.update)
        fields, text = answer_fields(plan), plan_table(plan)
        replicas = fields["replicas"]
        if pictures and replicas:
            pictures.draw_plan(plan.against_rate(replicas), question.rate, question.attainment, args.picture)
    sys.stdout.write(json.dumps(fields, indent=2) + "\n" if args.json else text)
    return 0 if replicas else 1
