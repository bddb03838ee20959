"""Wires the server together, and is the only module that knows all of its parts."""

import asyncio
import json
import logging
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tome_server.timm_import  # noqa: F401  isort: skip

import torch

from tome_server.config import ModelConfig, ServerConfig
from tome_server.engine import Engine
from tome_server.errors import ConfigError
from tome_server.hosting import Hosting
from tome_server.models.datasets import load_labelled
from tome_server.models.loading import load
from tome_server.models.repository import Repository
from tome_server.models.spec import BUNDLED_PREFIX, ModelSpec, bundled_spec
from tome_server.observability.logs import Summary, log_request
from tome_server.observability.metrics import Metrics
from tome_server.oip.service import OpenInference
from tome_server.rest.server import HttpServer
from tome_server.rpc.server import RpcServer, RpcSettings
from tome_server.rpc.tls import TlsFiles
from tome_server.rpc.tokens import Tokens
from tome_server.runtime.device import Device
from tome_server.runtime.evaluation import evaluate, quality_report
from tome_server.runtime.profile_store import ProfileKey, keep_profile, profile_key
from tome_server.runtime.profiling import measure
from tome_server.runtime.threads import available_cpus, choose_threads
from tome_server.scheduling.profile import Profile

if TYPE_CHECKING:
    # Not part of every installation, and nothing is imported of it where no traces are asked for.
    from tome_server.observability.traces import Traces

log = logging.getLogger(__name__)


async def serve(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is in flight and return.

    Prints one line of JSON to standard output once ready: the addresses and what start-up took. Raises ConfigError,
    ModelLoadError or PortInUseError, in words for the operator, if it can't start.
    """
    began = time.monotonic()
    stopping = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stopping.set)

    specs = model_specs(config)
    batching, decode_threads = config.batching, available_cpus()
    # Images are prepared in several threads, each of which would have as many again.
    torch.set_num_threads(1)
    async with AsyncExitStack() as stack:
        # Room for images that wait, and for those whose callers have gone while they are decoded or run.
        slots = batching.max_pending + decode_threads + batching.max_batch
        device = Device(str(choose_device(config.device)), slots)
        stack.push_async_callback(device.kill)
        metrics = Metrics()
        engine = Engine(
            device=device,
            metrics=metrics,
            max_delay=batching.max_delay,
            max_pending=batching.max_pending,
            reply_margin=config.reply_margin,
            decode_threads=decode_threads,
            names=[spec.name for spec in specs],
            max_client_requests=config.limits.max_client_requests,
            observers=[log_request, summary := Summary()],
        )
        stack.callback(summary.write)
        if config.traces:
            traces = _traces(config.traces)
            engine.observers = [*engine.observers, traces]
            stack.push_async_callback(asyncio.to_thread, traces.close)
        stack.callback(engine.close)
        service, settings = OpenInference(engine), _rpc_settings(config)
        rpc = RpcServer(engine, service, settings)
        http = _http_server(config, service, settings.tokens)
        metrics_url = f"http://{http.address}/metrics" if http else None
        if http:
            stack.push_async_callback(http.stop)
            await http.start()
        await rpc.start()
        log.info("listening on %s, loading %s", rpc.address, ", ".join(engine.names))
        loading = asyncio.create_task(Hosting(device, engine, config).start(specs))
        dispatching = asyncio.create_task(engine.run())
        ends = [asyncio.create_task(stopping.wait()), asyncio.create_task(device.ended())]
        try:
            await _first(loading, dispatching, *ends)
            if loading.done():
                rpc.ready()
                ready = {"grpc": rpc.address, "metrics": metrics_url, "seconds": round(time.monotonic() - began, 3)}
                print(json.dumps({"ready": ready}), flush=True)
                await _first(dispatching, *ends)
            log.info("stopping; answering what is in flight, for at most %.0f s", config.drain_timeout)
        finally:
            loading.cancel()
            answered = [rpc.stop(config.drain_timeout)] + ([http.drain(config.drain_timeout)] if http else [])
            await asyncio.gather(*answered)
            dispatching.cancel()
            for end in ends:
                end.cancel()
            await asyncio.gather(loading, dispatching, *ends, return_exceptions=True)
        await device.close()
    log.info("stopped")


def model_specs(config: ServerConfig) -> list[ModelSpec]:
    """Return what to load: the configured models, then those of the repository in order of name.

    Raises ConfigError if two have the same name, or the repository holds none or one that can't be loaded.
    """
    specs = [_spec(model) for model in config.models]
    if config.repository:
        stored = Repository(config.repository).scan()
        if not stored:
            raise ConfigError(f"repository {config.repository} holds no models; tome-server models add makes one")
        specs += stored
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two models are named {name!r}; give one another `name`")
    return specs


def choose_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu", "cuda" or "cuda:N". Raises ConfigError if it isn't there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is none of auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: torch {torch.__version__} sees no CUDA device")
    return device


def _spec(model: ModelConfig) -> ModelSpec:
    given = model.model_dump(exclude_unset=True, exclude={"source"})
    if model.source.startswith(BUNDLED_PREFIX):
        allowed = {"name", "default_budget", "description"}
        if extra := sorted(given.keys() - allowed):
            raise ConfigError(f"model {model.source} is complete as it is; {', '.join(extra)} can't be set")
        spec = bundled_spec(model.source.removeprefix(BUNDLED_PREFIX))
        return ModelSpec(**{**spec.__dict__, **given})
    return ModelSpec(architecture=model.source, **{"name": model.source.split(".")[0], **given})


def _rpc_settings(config: ServerConfig) -> RpcSettings:
    """Raises ConfigError for tokens that can't be read."""
    tls, auth, connections = config.tls, config.auth, config.connections
    if auth and not tls:
        log.warning("tokens are asked for over plain text, which whoever is between can read: set tls")
    return RpcSettings(
        address=config.listen,
        max_image_bytes=config.limits.max_image_bytes,
        tls=TlsFiles(tls.certificate, tls.key, tls.client_ca) if tls else None,
        tokens=Tokens(auth.tokens) if auth else None,
        max_concurrent_streams=connections.max_concurrent_streams,
        max_age=connections.max_age,
        max_age_grace=connections.max_age_grace,
        reflection=config.reflection,
    )


def _traces(endpoint: str) -> "Traces":
    """Raises ConfigError if what sends traces isn't installed."""
    try:
        from tome_server.observability.traces import Traces, otlp_processor
    except ModuleNotFoundError as error:
        raise ConfigError(f"traces: {error}; they need: pip install 'tome-serving[tracing]'") from error
    return Traces(otlp_processor(endpoint))


def _http_server(config: ServerConfig, service: OpenInference, tokens: Tokens | None) -> HttpServer | None:
    if config.metrics is None:
        return None
    return HttpServer(
        service,
        config.metrics,
        max_image_bytes=config.limits.max_image_bytes,
        protocol=config.tls is None if config.rest is None else config.rest,
        tokens=tokens,
    )


async def _first(*tasks: "asyncio.Task[Any]") -> None:
    """Wait for the first of several tasks. Raises what it raised: a part that dies takes the server with it, loudly."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


def evaluate_model(
    config: ServerConfig, data: Path, *, limit: int | None = None, grid: Sequence[int] | None = None
) -> dict[str, object]:
    """Evaluate the first configured model on the images at `data`; returns the report that quality.json holds.

    Raises ConfigError, ModelLoadError or DatasetError, in words for the operator.
    """
    images = load_labelled(data)
    # An old report must not keep the model from being measured anew.
    spec = replace(model_specs(config)[0], quality=None)
    device = choose_device(config.device)
    torch.set_num_threads(config.threads or available_cpus())
    model = load(spec, device)
    levels = evaluate(
        model, images, grid or [level.r for level in model.grid], device, limit=limit, progress=sys.stderr.isatty()
    )
    return quality_report(spec, model, levels, data.name, min(limit or len(images), len(images)), device)


def profile_model(
    config: ServerConfig, *, budget: float, progress: bool = False
) -> tuple[str, ProfileKey, Profile, Path | None]:
    """Measure for `budget` seconds how long batches of the first configured model take, and keep that for the server.

    Returns the model's name, what the profile holds for, the profile, and where it is kept: None if it can't be, which
    is logged. Raises ConfigError or ModelLoadError, in words for the operator.
    """
    spec = model_specs(config)[0]
    device = choose_device(config.device)
    torch.set_num_threads(config.threads or available_cpus())
    model = load(spec, device)
    max_batch = config.batching.max_batch
    if config.threads is None and device.type == "cpu":
        choose_threads([model], max_batch, device)
    key = profile_key(model, spec.checkpoint, device, max_batch)
    profile = measure(model, device, max_batch=max_batch, budget=budget, progress=progress)
    return model.name, key, profile, keep_profile(config.profiles, model.name, key, profile)
