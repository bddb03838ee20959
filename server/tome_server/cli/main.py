"""The `tome-server` command."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tome_api.parser import Parser
from tome_api.terminal import never_refuse
from tome_server.cli.arguments import budgets, positive, positive_number, r_values, seconds, share, time
from tome_server.cli.model_arguments import add_models_commands, add_tuning
from tome_server.errors import ConfigError, DatasetError, DeviceDiedError, ModelLoadError, PortInUseError
from tome_server.signals import interruptible, stopping_at_once

# torch and timm take seconds to import, so each command imports what it needs when it runs.
if TYPE_CHECKING:
    from tome_server.config.server import ServerConfig

EPILOG = """examples:
  tome-server serve                                     the bundled model, on port 8500
  tome-server serve --model vit_base_patch16_224 --default-budget 200ms
  tome-server serve --config server.yaml
  tome-server demo                                      see it work
  tome-server evaluate --data images/ --output quality.json
  tome-server tune --data images/ --output quality.json how much each block should merge
  tome-server profile --picture profile.png             how long batches take at each r
  tome-server plan --rate 200 --budget 150ms            how many replicas that takes, and at what quality
"""

# oneDNN keeps 1,024, fewer than a model has in batches of 1 to 8 at the r of its grid (about 1,400), and makes those
# that it dropped anew: some 25 ms a batch of the bundled model, twice what a single image takes.
KERNELS_KEPT = "8192"

PLAN_EPILOG = """examples:
  tome-server plan --rate 200 --budget 150ms --attainment 0.999
  tome-server plan --rate 10000 --budget mix:50ms=3,200ms=1 --cv2 4 --profile gpu.json --quality quality.json
  tome-server plan --rate 200 --budget 150ms --plot plan.svg

Without --profile and --quality, replicas are like this machine serving the bundled model: tome-server profile measures
that once. One replica is simulated with its share of the requests; see docs/scheduling.md.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Exits with 0, 1 for a failure (said on standard error), 2 for wrong usage, or 130 if Ctrl-C ended it.
    """
    never_refuse()
    with interruptible():
        sys.exit(_run(argv))


def _run(argv: Sequence[str] | None) -> int | str:
    """Run the command; returns its exit status, or why it failed."""
    args = _parser().parse_args(argv)
    # Before torch is imported: its idle threads would otherwise spin, and starve whatever shares the CPU.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # And before any kernel is made: each is for one number of tokens, and batch sizes times r make thousands.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS_KEPT)
    try:
        status: int = args.run(args)
    except (ConfigError, DatasetError, DeviceDiedError, ModelLoadError, PortInUseError) as error:
        return f"tome-server: {error}"
    except ModuleNotFoundError as error:
        # The plain install is the client alone, and still has this command.
        return f"tome-server: {error}; the server needs: pip install 'tome-serving[server]'"
    except OSError as error:
        if error.filename is None:
            raise
        return f"tome-server: {error.filename}: {error.strerror}"
    return status


def _serve(args: argparse.Namespace) -> int:
    with stopping_at_once():  # before anything is imported that takes long
        import asyncio

        config = _config(args)
        # The C core of gRPC writes lines of its own among ours, about connections that end and handshakes that fail.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        from tome_server.app import serve
        from tome_server.observability import logs

        logs.configure(args.log_level, config.log_format)
        return asyncio.run(serve(config))


def _demo(args: argparse.Namespace) -> int:
    from tome_server.cli.demo import run

    return run(as_json=args.json)


def _evaluate(args: argparse.Namespace) -> int:
    _check_place("--output", args.output, args.overwrite)
    config = _servable(args)
    from tome_server.cli.offline import evaluate_model

    report = evaluate_model(config, args.data, limit=args.limit, grid=args.r)
    text = json.dumps(report, indent=2) + "\n"
    if args.output:
        _write(args.output, text)
    else:
        sys.stdout.write(text)
    return 0


def _tune(args: argparse.Namespace) -> int:
    _check_place("--output", args.output, args.overwrite)
    config = _servable(args)
    from tome_server.cli.offline import Tuning, tune_model
    from tome_server.cli.tuning_table import table

    tuning = Tuning(args.r, args.target_macs, args.images, args.held_out, args.trials, args.blocks, args.seed)
    report, found = tune_model(config, args.data, tuning)
    text = json.dumps(report, indent=2) + "\n"
    if args.output:
        _write(args.output, text)
        sys.stdout.write(table(found))
    else:
        sys.stdout.write(text)
    return 0


def _profile(args: argparse.Namespace) -> int:
    _check_place("--output", args.output, args.overwrite)
    drawing = ("tome_server.cli.profile_picture", "--picture", args.picture, args.overwrite)
    picture = _drawing(*drawing) if args.picture else None
    config = _servable(args)
    from tome_server.calibration.profile_store import profile_text
    from tome_server.cli.offline import profile_model
    from tome_server.cli.profile_table import table

    name, key, profile, kept = profile_model(config, budget=args.seconds, progress=sys.stderr.isatty())
    text = profile_text(key, profile)
    sys.stdout.write(text if args.json else table(profile))
    if args.output:
        _write(args.output, text)
    if picture:
        picture.draw(profile, f"{name} on {key.device}, {key.dtype}", args.picture)
    print(f"measured {name} in {key.dtype}", file=sys.stderr)
    if kept:
        print(f"kept for the server in {kept}", file=sys.stderr)
    return 0


def _settings(args: argparse.Namespace) -> int:
    from tome_server.cli.settings_reference import settings_schema, settings_table

    sys.stdout.write(json.dumps(settings_schema(), indent=2) + "\n" if args.schema else settings_table())
    return 0


def _plan(args: argparse.Namespace) -> int:
    picture = _drawing("tome_server.cli.plan_picture", "--plot", args.plot, args.overwrite) if args.plot else None
    from tqdm import tqdm

    from tome_server.simulation.capacity import Plan, Question, answer_fields, answer_lines, load_replica

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
        fields, lines = answer_fields(plan), answer_lines(plan)
        replicas = fields["replicas"]
        if picture and replicas:
            picture.draw_plan(plan.against_rate(replicas), question.rate, question.attainment, args.plot)
    print(json.dumps(fields, indent=2) if args.json else "\n".join(lines))
    return 0 if replicas else 1


def _servable(args: argparse.Namespace) -> "ServerConfig":
    """Return the configuration. What is wrong with its models is said before torch is imported, as far as it can be."""
    from tome_server.serving.model_manager import find_models

    config = _config(args)
    for name, fault in find_models(config).faults.items():
        print(f"tome-server: {name} can't be loaded: {fault}", file=sys.stderr)
    return config


def _check_place(flag: str, path: Path | None, overwrite: bool) -> None:
    """Raises ConfigError for a file that can't be written where it is wanted, before the work that fills it.

    Nor does a command replace a file unless it is told to.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise ConfigError(f"{flag}: there is no folder {path.parent}")
    if path.is_dir():
        raise ConfigError(f"{flag}: {path} is a folder; name a file in it")
    if path.is_file() and not overwrite:
        raise ConfigError(f"{flag}: {path} exists; --overwrite replaces it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{flag}: {path} can't be written")


def _write(path: Path, text: str) -> None:
    """Write what may have taken long to find; raises ConfigError if it can't be, and leaves it on standard output."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        sys.stdout.write(text)
        raise ConfigError(f"--output: {path}: {error.strerror}; what it was to hold is printed instead") from error


def _drawing(module: str, flag: str, path: Path, overwrite: bool) -> ModuleType:
    """Import what draws the picture at `path`: before the work, so that none is done for one that can't be drawn."""
    _check_place(flag, path, overwrite)
    try:
        drawing = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{flag}: {error}; it needs: pip install 'tome-serving[plots]'") from error
    if path.suffix not in drawing.FORMATS:
        raise ConfigError(f"{flag}: {path} must end in one of {', '.join(drawing.FORMATS)}")
    return drawing


def _config(args: argparse.Namespace) -> "ServerConfig":
    """Return the configuration file's settings, overridden by flags."""
    from pydantic import ValidationError

    from tome_server.config.server import ServerConfig, read_config
    from tome_server.config.settings import faults

    config = read_config(args.config) if args.config else ServerConfig()
    given = {name: value for name, value in vars(args).items() if value is not None}
    top = ["repository", "listen", "metrics", "device", "threads", "policy", "profiles", "profile_time"]
    top += ["log_format", "drain_timeout"]
    changes: dict[str, Any] = {name: given[name] for name in top if name in given}
    batching = {name: given[name] for name in ("max_batch", "max_delay", "max_pending") if name in given}
    model = {
        name: given[name] for name in ("checkpoint", "labels", "quality", "default_budget", "dtype") if name in given
    }
    settings = config.model_dump()
    settings["batching"] |= batching
    # A repository takes the place of the default.
    configured = config.models if "models" in config.model_fields_set or "repository" not in given else ()
    if "model" in given:
        changes["models"] = [{"source": given["model"]} | model]
    elif model and not configured:
        raise ConfigError(
            f"--{next(iter(model)).replace('_', '-')} is for one of `models` or --model, and there is none"
        )
    else:
        first = [configured[0].model_dump(exclude_unset=True) | model] if model else configured[:1]
        changes["models"] = [*first, *configured[1:]]
    try:
        return ServerConfig.model_validate(settings | changes)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(f"--{str(location[-1]).replace('_', '-')}: {what}" for location, what in faults(error))
        ) from error


class _Version(argparse.Action):
    """Prints the version, which takes longer to look up than all flags to read."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:  # noqa: A002 (argparse's name)
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"tome-serving {version('tome-serving')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tome-server",
        description="Serves Vision Transformers over gRPC, merging tokens (ToMe) as far as each deadline asks.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        usage="%(prog)s [options]",
        help="serve models until SIGTERM",
        description="Serve models until SIGTERM: the bundled one unless told otherwise. A line of JSON on standard "
        "output says when it is ready, and at which addresses. What has no flag is set in --config's file, see "
        "tome-server settings.",
    )
    _add_model_flags(serve)
    serve.add_argument("--listen", metavar="HOST:PORT", help="gRPC address (default: 0.0.0.0:8500; port 0: a free one)")
    serve.add_argument("--metrics", metavar="HOST:PORT", help="Prometheus address (default: 0.0.0.0:8501), or off")
    serve.add_argument("--max-batch", type=int, metavar="N", help="images in a batch (default: 8)")
    serve.add_argument("--max-delay", metavar="TIME", help="wait for batch-mates on an idle device (default: 0ms)")
    serve.add_argument("--max-pending", type=int, metavar="N", help="requests held at once (default: 256)")
    serve.add_argument("--policy", metavar="NAME", help="price (default), fixed:R, max_accuracy, max_batch or slackfit")
    serve.add_argument("--profiles", type=Path, metavar="DIR", help="where measured latencies are kept")
    serve.add_argument("--profile-time", metavar="TIME", help="how long to measure them if none fit (default: 5s)")
    serve.add_argument("--drain-timeout", metavar="TIME", help="time for calls in flight after SIGTERM (default: 30s)")
    serve.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"], help="info (default)"
    )
    serve.add_argument("--log-format", choices=["auto", "json", "text"], help="auto (default): text at a terminal")
    serve.set_defaults(run=_serve)

    demo = commands.add_parser(
        "demo",
        help="serve the bundled model and send it its sample images",
        description="Start a server of the bundled model, send it its sample images at several r, show what came back.",
    )
    demo.add_argument("--json", action="store_true", help="print JSON instead of a table")
    demo.set_defaults(run=_demo)

    evaluate = commands.add_parser(
        "evaluate",
        usage="%(prog)s --data PATH [options]",
        help="measure top-1 and agreement with r = 0 at each r",
        description="Measure top-1 (where images are labelled) and agreement with r = 0 at each r of a model's grid.",
    )
    _add_model_flags(evaluate)
    evaluate.add_argument(
        "--data", type=Path, required=True, metavar="PATH",
        help="folder of images, folder of one subfolder a class, or idx file of images",
    )  # fmt: skip
    evaluate.add_argument("--r", type=r_values, metavar="R,R,…", help="r values, besides 0 (default: the model's grid)")
    evaluate.add_argument("--limit", type=positive, metavar="N", help="only the first N images")
    evaluate.add_argument("--output", type=Path, metavar="FILE", help="where to write JSON (default: standard output)")
    _add_overwrite(evaluate)
    evaluate.set_defaults(run=_evaluate)

    tune = commands.add_parser(
        "tune",
        usage="%(prog)s --data PATH [options]",
        help="find how much each block should merge at each r",
        description="Search how many tokens each block should merge at each r, so that answers stay nearer to those at "
        "r = 0 than with r in every block, for no more work. Half of the images are searched on, the others measured "
        "on. A schedule is kept if on those it shifts less probability to other classes than r in every block, by at "
        "least two standard errors of the difference; of schedules that are no better, one in forty does so by chance. "
        "What is written serves as a quality report, and has the schedules that were kept.",
    )
    _add_model_flags(tune)
    add_tuning(tune)
    tune.add_argument("--output", type=Path, metavar="FILE", help="where to write JSON (default: standard output)")
    _add_overwrite(tune)
    tune.set_defaults(run=_tune)

    profile = commands.add_parser(
        "profile",
        usage="%(prog)s [options]",
        help="measure how long batches take at each r",
        description="Measure how long batches of each size take at each r of a model's grid, and keep that where the "
        "server looks for it at its start.",
    )
    _add_model_flags(profile)
    profile.add_argument("--max-batch", type=int, metavar="N", help="the largest batch (default: 8)")
    profile.add_argument("--seconds", type=seconds, default=40.0, metavar="S", help="how long to measure (default: 40)")
    profile.add_argument("--output", type=Path, metavar="FILE", help="where to write JSON as well")
    profile.add_argument("--picture", type=Path, metavar="FILE", help="where to draw it: .png, .svg or .pdf")
    profile.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _add_overwrite(profile)
    profile.set_defaults(run=_profile)

    settings = commands.add_parser(
        "settings",
        help="list every setting of a configuration file",
        description="List every setting of a configuration file, its default and what it means.",
    )
    settings.add_argument("--schema", action="store_true", help="print a JSON Schema of the file, as editors take it")
    settings.set_defaults(run=_settings)

    add_models_commands(commands.add_parser(
        "models",
        help="make, show and measure the models of a repository",
        description="Make, show, measure and remove the models of a repository: a folder that `tome-server serve "
        "--repository` serves.",
    ))  # fmt: skip
    _add_plan(commands.add_parser(
        "plan",
        usage="%(prog)s --rate N --budget TIME [options]",
        help="how many replicas a load takes, and at what quality",
        description="Say how many replicas it takes to answer a load in time, and at what quality, by simulation;\n"
        "and how many it would take without merging, and merging the most. Exits with 1 if no number does.",
        epilog=PLAN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ))  # fmt: skip
    return parser


def _add_overwrite(command: argparse.ArgumentParser) -> None:
    command.add_argument("--overwrite", action="store_true", help="replace files that are there already")


def _add_plan(plan: argparse.ArgumentParser) -> None:
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
        "--requests",
        type=positive,
        default=20_000,
        metavar="N",
        help="requests to simulate for each figure (default: 20000)",
    )
    plan.add_argument("--plot", type=Path, metavar="FILE", help="where to draw both against rate: .png, .svg or .pdf")
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    _add_overwrite(plan)
    plan.set_defaults(run=_plan)


def _add_model_flags(command: argparse.ArgumentParser) -> None:
    parser = command.add_argument_group("model and device")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML settings; flags override them")
    parser.add_argument("--model", metavar="SOURCE", help="bundled:fashion (default), or timm's name of a model")
    parser.add_argument("--repository", type=Path, metavar="DIR", help="folder of models, each in a folder of its own")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="local weights, .safetensors, .pth or .onnx")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="class names, one a line")
    parser.add_argument(
        "--quality", type=Path, metavar="FILE", help="what tome-server evaluate wrote: what each r is worth"
    )
    parser.add_argument("--default-budget", metavar="TIME", help="budget of requests that set none (default: 1s)")
    parser.add_argument("--dtype", metavar="TYPE", help="auto (default), float32, bfloat16 or float16")
    parser.add_argument("--device", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads for the model (default: measured)")
