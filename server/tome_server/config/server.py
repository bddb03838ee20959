"""The server's settings, which a file or flags of `tome-server serve` give."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from tome_api.nearest import meant
from tome_server.config.model_overrides import ModelSettings
from tome_server.config.settings import BatchSize, Count, Duration, Policy, Size, SizeOrZero, Strict, read_settings


def parse_address(value: object) -> object:
    """Turn "off", which YAML reads as false, into None. Raises ValueError for other text that is no host:port."""
    if value is False or value == "off":
        return None
    if isinstance(value, str):
        found = re.fullmatch(r"\S+:([0-9]{1,5})", value)
        if not found or int(found[1]) > 65535:
            raise ValueError(f"{value!r} is no address; write for example 0.0.0.0:8500")
    return value


_DEVICE = r"auto|cpu|cuda(:[0-9]{1,3})?"
# The JSON Schema checks these patterns; the server itself calls the functions.
_AddressText = Annotated[str, Field(pattern=r"^\S+:[0-9]{1,5}$")]
Address = Annotated[str, BeforeValidator(parse_address, json_schema_input_type=_AddressText)]
_DeviceText = Annotated[str, Field(pattern=f"^({_DEVICE})$")]
AddressOrOff = Annotated[
    str | None, BeforeValidator(parse_address, json_schema_input_type=_AddressText | Literal["off", False] | None)
]


def parse_device(value: object) -> object:
    """Return the name of a device. Raises ValueError for text that is none; the device need not exist."""
    if isinstance(value, str) and not re.fullmatch(_DEVICE, value):
        raise ValueError(f"{value!r} is none of auto, cpu, cuda, cuda:N{meant(value, ('auto', 'cpu', 'cuda'))}")
    return value


class _Source(Strict):
    """Where a model to host is."""

    source: str = "bundled:fashion"
    """bundled:NAME, or a timm architecture"""
    name: str | None = None
    """What requests call it; by default the source's own name."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of timm's create_model."""
    checkpoint: Path | None = None
    """Local weights, .safetensors or .pth; by default the pretrained ones from the hub."""
    labels: Path | None = None
    """A file with one class name a line."""
    quality: Path | None = None
    """What `tome-server evaluate` wrote."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Overrides of timm's data config."""


class ModelConfig(ModelSettings, _Source):
    """One model to host."""


class BatchingConfig(Strict):
    """How requests wait."""

    max_batch: BatchSize = 8
    """Images in a batch."""
    max_delay: Duration = 0.0
    """How long an idle device waits for batch-mates; 0 leaves it to the policy. While it is busy, batches form."""
    max_pending: Count = 256
    """Requests held at once; more are refused with RESOURCE_EXHAUSTED."""


class LimitsConfig(Strict):
    """What one image may cost, and how many requests one client may have."""

    max_image_bytes: Size = 16 * 2**20
    """Encoded image, or data of a tensor."""
    max_image_pixels: Count = 50_000_000
    """Width × height of the image, and of what resizing would make of a long and thin one."""
    decode_memory: Size = 512 * 2**20
    """Memory that decoding may take, for all images together; images wait for it in the order of their deadlines."""
    body_memory: Size = 256 * 2**20
    """What the bodies of HTTP requests may hold of memory together; more get 429. At least one body is accepted."""
    max_client_requests: Count | None = None
    """Requests held at once for one client, by its token or else its address; by default as many as for all."""


class TlsConfig(Strict):
    """PEM files: the server's identity, and the authorities of its clients. A changed file serves new connections."""

    certificate: Path
    """The certificate, and those between it and its root authority."""
    key: Path
    """The private key of the certificate."""
    client_ca: Path | None = None
    """Authorities that clients' certificates must come from (mTLS); by default clients need no certificate."""


class AuthConfig(Strict):
    """Which clients may call."""

    tokens: Path
    """Bearer tokens, one a line; read again when the file changes."""


class ConnectionsConfig(Strict):
    """What one client's connection may do."""

    max_concurrent_streams: Count = 1024
    """Calls at once on one connection, a Watch of its health included; a client's further calls wait."""
    max_connections: Count | None = None
    """gRPC connections at once; more are closed as they come. By default as many as open files allow."""
    compression: bool = Field(default=False, strict=True)
    """Take gRPC messages that come compressed, which gRPC inflates whole, to any size, before it limits their bytes."""
    max_http_connections: Count = 1024
    """Connections to the address of metrics and REST at once; more get 503 and are closed."""
    max_http_connections_per_address: Count = 512
    """Those of one address, so that no client keeps metrics and probes out; behind a proxy all have the proxy's."""
    max_age: Annotated[Duration, Field(gt=0)] | None = None
    """Age at which a client has to reconnect, give or take a tenth, so that balancers can move it; by default never."""
    max_age_grace: Duration = 30.0
    """How long calls on such a connection, streams included, may take to end."""


class ServerConfig(Strict):
    """All settings of a server."""

    listen: Address = "0.0.0.0:8500"
    """gRPC host:port; port 0 takes a free one."""
    metrics: AddressOrOff = "0.0.0.0:8501"
    """Prometheus host:port; off or null serves none."""
    rest: bool | None = None
    """Whether REST requests are answered there as well; by default unless `tls` is set, for it is plain text."""
    repository: Path | None = None
    """Folder of models, each in a folder of its own, which are served beside `models`."""
    models: tuple[ModelConfig, ...] = (ModelConfig(),)
    """The first answers requests that name no model. Where there is a repository, none by default."""
    memory_budget: Size | None = None
    """Memory for the weights of all models together; a model that needs more isn't loaded. By default no limit."""
    device: Annotated[str, BeforeValidator(parse_device, json_schema_input_type=_DeviceText)] = "auto"
    """auto, cpu, cuda or cuda:N"""
    cuda_graph_memory: SizeOrZero = 2**30
    """GPU memory that the CUDA graphs of one model may take; 0 for no graphs."""
    threads: Count | None = None
    """CPU threads for the model; by default one, or as many as the process may use CPUs, as measured at start."""
    policy: Policy = "price"
    """What chooses r: price, fixed:R, max_accuracy, max_batch or slackfit."""
    profiles: Path | None = None
    """Folder of measured latencies; by default one in the user's cache."""
    profile_time: Annotated[Duration, Field(gt=0)] = 5.0
    """How long to measure a model's latencies at start where no profile fits."""
    batching: BatchingConfig = BatchingConfig()
    limits: LimitsConfig = LimitsConfig()
    tls: TlsConfig | None = None
    """Serve over TLS; by default plain text."""
    auth: AuthConfig | None = None
    """Accept only calls with a bearer token; by default all calls."""
    connections: ConnectionsConfig = ConnectionsConfig()
    reflection: bool = Field(default=True, strict=True)
    """Serve gRPC reflection, by which clients learn the services and messages."""
    model_control: bool = Field(default=False, strict=True)
    """Let clients load and unload models."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """Format of log lines: json, text, or auto, which is text at a terminal and json elsewhere."""
    traces: Annotated[str, Field(pattern="^https?://[^/]+$")] | None = None
    """OTLP collector that receives traces over gRPC, such as http://localhost:4317; by default there are no traces."""
    reply_margin: Duration = 0.001
    """The least time kept back from each deadline for the answer's way to the client; more where that is measured."""
    drain_timeout: Duration = 30.0
    """How long requests in flight may take after SIGTERM."""
    hung_device_timeout: Duration = 20.0
    """How long a device may hang, with the server NOT_SERVING, until its process is killed and the server ends."""

    @model_validator(mode="before")
    @classmethod
    def _only_the_repository(cls, given: Any) -> Any:
        return {"models": (), **given} if isinstance(given, dict) and given.get("repository") else given

    @field_validator("models")
    @classmethod
    def _something_to_serve(cls, models: tuple[ModelConfig, ...], info: ValidationInfo) -> tuple[ModelConfig, ...]:
        if not models and not info.data.get("repository"):
            raise ValueError("there must be one, or a repository")
        return models


def read_config(path: Path) -> ServerConfig:
    """Read a YAML file; relative paths in it count from its folder.

    Raises ConfigError with file, line and, for an unknown key, the nearest valid one.
    """
    return _beside(read_settings(path, ServerConfig), path.parent)


def _beside(config: ServerConfig, folder: Path) -> ServerConfig:
    def resolve(part: Any) -> Any:
        changes: dict[str, Any] = {}
        for name in part.model_fields_set:
            value = getattr(part, name)
            if isinstance(value, Path):
                changes[name] = folder / value
            elif isinstance(value, BaseModel):
                changes[name] = resolve(value)
            elif isinstance(value, tuple):
                changes[name] = tuple(resolve(item) for item in value)
        return part.model_copy(update=changes)

    resolved: ServerConfig = resolve(config)
    return resolved
