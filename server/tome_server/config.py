"""The server's settings: a YAML file, checked strictly, with errors that name the line and the nearest valid key."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tome_server.errors import ConfigError
from tome_server.scheduling.policy import NAMES

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
_SIZES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
# Where pydantic's words are about Python.
_WORDS = {
    "model_type": "must be a mapping, `setting: value`",
    "tuple_type": "must be a list",
    "path_type": "must be a path",
    "missing": "is missing",
}


def parse_duration(value: object) -> object:
    """Turn "50ms", "1.5s", "2m" or a number of seconds into seconds. Raises ValueError for other text."""
    if not isinstance(value, str | bool):
        return value
    found = re.fullmatch(r"([0-9]+|[0-9]*\.[0-9]+)\s*(us|ms|s|m)", str(value).strip())
    if not found:
        raise ValueError(f"{value!r} is no duration; write for example 50ms, 1.5s or 2m")
    return float(found[1]) * _UNITS[found[2]]


def parse_size(value: object) -> object:
    """Turn "16MiB" or a number of bytes into bytes. Raises ValueError for other text."""
    if not isinstance(value, str | bool):
        return value
    found = re.fullmatch(r"([0-9]+)\s*(KiB|MiB|GiB)", str(value).strip())
    if not found:
        raise ValueError(f"{value!r} is no size; write for example 512KiB or 16MiB")
    return int(found[1]) * _SIZES[found[2]]


def parse_address(value: object) -> object:
    """Turn "off", and YAML's reading of it, into None. Raises ValueError for text that is no host:port."""
    if value is False or value == "off":
        return None
    if isinstance(value, str):
        found = re.fullmatch(r"\S+:([0-9]{1,5})", value)
        if not found or int(found[1]) > 65535:
            raise ValueError(f"{value!r} is no address; write for example 0.0.0.0:8500")
    return value


def parse_policy(value: object) -> object:
    """Return the name of a policy as it is. Raises ValueError for text that is none."""
    if isinstance(value, str) and not re.fullmatch("|".join(NAMES).replace(":R", ":[0-9]+"), value):
        raise ValueError(f"{value!r} is no policy; there are {', '.join(NAMES)}")
    return value


Count = Annotated[int, Field(ge=1, strict=True)]
Duration = Annotated[float, BeforeValidator(parse_duration), Field(ge=0, allow_inf_nan=False)]
Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Address = Annotated[str, BeforeValidator(parse_address)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Strict):
    """One model to host."""

    source: str = "bundled:fashion"
    """bundled:NAME, or a timm architecture"""
    name: str | None = None
    """What requests call it; by default the source's own name."""
    kwargs: dict[str, Any] = {}
    """Further arguments of timm's create_model."""
    checkpoint: Path | None = None
    """Local weights, .safetensors or .pth; by default the pretrained ones from the hub."""
    labels: Path | None = None
    """A file with one class name a line."""
    quality: Path | None = None
    """What `tome-server evaluate` wrote."""
    data: dict[str, Any] = {}
    """Overrides of timm's data config."""
    default_budget: Annotated[Duration, Field(gt=0)] | None = None
    """Latency budget of requests that set none; by default 1s, or ten images' time if that is more."""
    proportional_attention: bool | None = None
    """Weigh tokens by the patches they stand for; by default on, except for MAE weights."""
    description: str = ""


class BatchingConfig(_Strict):
    """How requests wait."""

    max_batch: Count = 8
    """Images in a batch."""
    max_delay: Duration = 0.0
    """How long an idle device waits for batch-mates. 0 starts at once; batches still form while the device is busy."""
    max_pending: Count = 256
    """Requests held at once; more are refused with RESOURCE_EXHAUSTED."""


class LimitsConfig(_Strict):
    """What one image may cost."""

    max_image_bytes: Size = 16 * 2**20
    max_image_pixels: Count = 50_000_000


class TlsConfig(_Strict):
    """PEM files of the server's identity, and of whom it lets in. What is written anew serves the next connections."""

    certificate: Path
    """The certificate, and those between it and its root."""
    key: Path
    client_ca: Path | None = None
    """Authorities of which clients must show a certificate (mTLS); by default clients need none."""


class ServerConfig(_Strict):
    """Everything a server is told."""

    listen: Address = "0.0.0.0:8500"
    """gRPC host:port; port 0 picks a free one."""
    metrics: Annotated[str | None, BeforeValidator(parse_address)] = "0.0.0.0:8501"
    """Prometheus host:port; off or null serves none."""
    models: Annotated[tuple[ModelConfig, ...], Field(min_length=1)] = (ModelConfig(),)
    """The first answers requests that name no model."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    threads: Count | None = None
    """CPU threads for the model; by default one, or as many as the process may use CPUs, as measured at start."""
    policy: Annotated[str, BeforeValidator(parse_policy)] = "price"
    """What chooses r: price, fixed:R, max_accuracy, max_batch or slackfit."""
    profiles: Path | None = None
    """Folder of measured latencies; by default one in the user's cache."""
    profile_time: Annotated[Duration, Field(gt=0)] = 5.0
    """How long to measure a model's latencies at start where no profile fits."""
    batching: BatchingConfig = BatchingConfig()
    limits: LimitsConfig = LimitsConfig()
    tls: TlsConfig | None = None
    """Serve over TLS; by default plain text."""
    reply_margin: Duration = 0.001
    """The least kept back from each deadline for the answer's way to the client; more where that is measured."""
    drain_timeout: Duration = 30.0
    """How long requests in flight may take after SIGTERM."""


def read_config(path: Path) -> ServerConfig:
    """Read a YAML file; relative paths in it count from its folder.

    Raises ConfigError with file, line and, for an unknown key, the nearest valid one.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if root is None or root.tag == "tag:yaml.org,2002:null":
            return ServerConfig()
        wrong_keys = [f"{path}:{key.start_mark.line + 1}: {what}" for key, what in _wrong_keys(root, set())]
        if wrong_keys:
            raise ConfigError("\n".join(wrong_keys))
        settings = yaml.SafeLoader("").construct_document(root)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: text that isn't UTF-8, and dates that don't exist
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    try:
        config = ServerConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, root, *fault) for fault in faults(error))) from error
    return _beside(config, path.parent)


def faults(error: ValidationError) -> Iterator[tuple[tuple[str | int, ...], str | None]]:
    """Yield where each fault lies and what is wrong there: None for a setting that doesn't exist."""
    found = error.errors()
    for fault in found:
        location = fault["loc"]
        # A list is reported as too short when none of its items is right.
        if any(len(other["loc"]) > len(location) and other["loc"][: len(location)] == location for other in found):
            continue
        what = _WORDS.get(fault["type"], fault["msg"].removeprefix("Value error, "))
        yield location, None if fault["type"] == "extra_forbidden" else what


def _wrong_keys(node: yaml.Node, seen: set[int]) -> Iterator[tuple[yaml.Node, str]]:
    """Find keys that YAML would let pass: given twice, where the last would win, and others than text."""
    if id(node) in seen:  # an anchor may hold itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _wrong_keys(item, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEY_TAGS:
                yield key, "a setting's name must be text"
            elif key.value in first:
                yield key, f"{key.value} is given twice, first on line {first[key.value]}"
            else:
                first[key.value] = key.start_mark.line + 1
            yield from _wrong_keys(value, seen)


def _beside(config: ServerConfig, folder: Path) -> ServerConfig:
    def resolve(part: Any) -> Any:
        changes: dict[str, Any] = {}
        for name, value in part:
            if isinstance(value, Path):
                changes[name] = folder / value
            elif isinstance(value, BaseModel):
                changes[name] = resolve(value)
            elif isinstance(value, tuple):
                changes[name] = tuple(resolve(item) for item in value)
        return part.model_copy(update=changes)

    resolved: ServerConfig = resolve(config)
    return resolved


def _explain(path: Path, root: yaml.Node, location: tuple[str | int, ...], what: str | None) -> str:
    line = _line(root, location)
    where = ".".join(map(str, location)) or "the file"
    if what is not None:
        return f"{path}:{line}: {where}: {what}"
    valid = _fields(location[:-1])
    close = difflib.get_close_matches(str(location[-1]), valid, 1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"valid keys are {', '.join(valid)}"
    return f"{path}:{line}: {where} is not a setting; {hint}"


def _line(node: yaml.Node, location: tuple[str | int, ...]) -> int:
    """Line, from 1, of the key at `location`."""
    line = node.start_mark.line
    for step in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == step]
            if not found:
                break
            line, node = found[0][0].start_mark.line, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            node = node.value[step]
            line = node.start_mark.line
    return line + 1


def _fields(location: tuple[str | int, ...]) -> list[str]:
    sections: dict[str | int, type[BaseModel]] = {
        "models": ModelConfig,
        "batching": BatchingConfig,
        "limits": LimitsConfig,
        "tls": TlsConfig,
    }
    return sorted(sections.get(location[0], ServerConfig).model_fields if location else ServerConfig.model_fields)
