"""Models on disk: one folder a model, with everything that serving it takes. Knows nothing of torch.

A model's folder holds `config.yaml` and `weights.safetensors`, and may hold `labels.txt`, `quality.json` and
`profiles/`. Or it holds versions: folders named 1, 2, … that each are such a folder; then its own `config.yaml`, if
there is one, may say which of them is served, else the highest is.
"""

import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from tome_server.errors import ConfigError
from tome_server.models.own import OwnConfig
from tome_server.models.spec import CONFIG, LABELS, PROFILES, QUALITY, WEIGHTS, ModelSpec, Own, qualities
from tome_server.settings import Count, Strict, read_settings

# What torch wrote. Read with weights_only, so that no code in it is run.
OTHER_WEIGHTS = "weights.pth"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
# timm's create_model would fetch or read other weights for these, or build something that gives no classes.
_FORBIDDEN = frozenset({
    "cache_dir", "checkpoint_path", "features_only", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
    "pretrained_strict",
})  # fmt: skip


def check_name(name: str) -> str:
    """Return `name` if a model may be called that, and a folder after it. Raises ConfigError if not."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name of a model: 1 to 100 letters, digits, dots, dashes and underscores, the first a "
            "letter or digit"
        )
    return name


def _kwargs(value: dict[str, Any]) -> dict[str, Any]:
    if forbidden := sorted(value.keys() & _FORBIDDEN):
        raise ValueError(f"{', '.join(forbidden)} can't be set: the weights are those beside this file")
    return value


class VersionConfig(OwnConfig):
    """What `config.yaml` says of a model."""

    architecture: str
    """timm's name, with or without a tag."""
    kwargs: Annotated[dict[str, Any], AfterValidator(_kwargs)] = Field(default_factory=dict)
    """Further arguments of timm's create_model."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Overrides of timm's data config."""
    license: str = ""


class ChoiceConfig(Strict):
    """What `config.yaml` says beside version folders."""

    version: Count | None = None
    """The version to serve; by default the highest."""


class Repository:
    """The models in one folder. Reads the disk anew at every call, so that it says what is there now."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError if `folder` is none."""
        if not folder.is_dir():
            raise ConfigError(f"repository {folder} is no folder")
        self.folder = folder

    def names(self) -> list[str]:
        """Return the models' names in order. Files, and folders that start with a dot, are passed over.

        Raises ConfigError if the folder can't be read or one in it can't be a model's name.
        """
        try:
            folders = sorted(p.name for p in self.folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        except OSError as error:
            raise ConfigError(f"repository {self.folder} can't be read: {error.strerror}") from error
        return [check_name(name) for name in folders]

    def versions(self, name: str) -> list[int]:
        """Return the model's versions in order, none if it has no version folders. Raises ConfigError."""
        folder = self._model(name)
        found = [p.name for p in folder.iterdir() if p.is_dir() and p.name.isdecimal()]
        for version in found:
            if not _VERSION.fullmatch(version):
                raise ConfigError(f"{folder / version}: a version is a whole number from 1, without leading zeros")
        return sorted(map(int, found))

    def served(self, name: str) -> int | None:
        """Return the version that is served unless another is asked for, None without versions. Raises ConfigError."""
        versions = self.versions(name)
        if not versions:
            return None
        config = self._model(name) / CONFIG
        chosen = read_settings(config, ChoiceConfig).version if config.is_file() else None
        if chosen is not None and chosen not in versions:
            raise ConfigError(f"{config}: version: there is no {chosen}, only {', '.join(map(str, versions))}")
        return chosen or versions[-1]

    def path(self, name: str, version: int | None = None) -> Path:
        """Return the folder that holds the model's config and weights: of `version`, or of the one that is served.

        Raises ConfigError if there is no such model or version.
        """
        versions = self.versions(name)
        if version is None:
            version = self.served(name)
        elif version not in versions:
            there = f"only {', '.join(map(str, versions))}" if versions else "it has no versions"
            raise ConfigError(f"{self.folder / name} has no version {version}; {there}")
        return self._model(name) / str(version or "")

    def spec(self, name: str, version: int | None = None) -> ModelSpec:
        """Return what to load for a model, checked as far as that goes without loading it.

        Raises ConfigError, naming file and field, if anything is missing or wrong.
        """
        folder = self.path(name, version)
        return read_folder(folder, name, int(folder.name) if self.versions(name) else None)

    def scan(self) -> list[ModelSpec]:
        """Return what to load for every model, in order of name. Raises ConfigError with all that is wrong, by line."""
        specs, problems = [], []
        for name in self.names():
            try:
                specs.append(self.spec(name))
            except ConfigError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))
        return specs

    def write(self, name: str, fill: Callable[[Path], None], *, version: int | None = None, replace: bool) -> Path:
        """Make a model's folder, whole or not at all: `fill` writes into an empty one, which then takes its place.

        With `version`, a version folder of the model. Returns the folder. Raises ConfigError if there is one already
        and it isn't to be replaced, if a model has versions and is written without one or the other way about, and
        what `fill` raises.
        """
        place = self.folder / check_name(name)
        if version is None and place.is_dir() and self.versions(name):
            raise ConfigError(f"{place} has versions; name one")
        if version is not None:
            if (place / WEIGHTS).exists() or (place / OTHER_WEIGHTS).exists():
                raise ConfigError(f"{place} has no versions: its files lie in it, and not in a folder of a version")
            place /= str(version)
        if place.exists() and not replace:
            raise ConfigError(f"{place} exists; remove it first, or take another name or version")
        # On the same file system as its place, and passed over by names() meanwhile.
        draft, before = (self.folder / f".{name}-{secrets.token_hex(4)}" for _ in range(2))
        draft.mkdir()
        try:
            fill(draft)
            place.parent.mkdir(exist_ok=True)
            if place.exists():
                place.rename(before)
            draft.rename(place)
        finally:
            for left in (draft, before):
                shutil.rmtree(left, ignore_errors=True)
        return place

    def remove(self, name: str, version: int | None = None) -> Path:
        """Delete a model, or one version of it. Returns the folder that was. Raises ConfigError if there is none."""
        folder = self._model(name) if version is None else self.path(name, version)
        # Out of sight first: a scan sees all of it or nothing.
        gone = self.folder / f".{name}-{secrets.token_hex(4)}"
        folder.rename(gone)
        shutil.rmtree(gone)
        return folder

    def _model(self, name: str) -> Path:
        folder = self.folder / check_name(name)
        if not folder.is_dir():
            known = ", ".join(self.names()) or "none"
            raise ConfigError(f"repository {self.folder} has no model named {name!r}; there is {known}")
        return folder


def read_folder(folder: Path, name: str, version: int | None = None) -> ModelSpec:
    """Return what to load for the model in `folder`, which requests will call `name`.

    Raises ConfigError, naming file and field, if config.yaml or the weights are missing, or config.yaml is wrong.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} is no model: there is no {CONFIG} in it, and no folder of a version")
    config = read_settings(folder / CONFIG, VersionConfig)
    weights = [folder / file for file in (WEIGHTS, OTHER_WEIGHTS) if (folder / file).is_file()]
    if len(weights) != 1:
        what = f"only one of {WEIGHTS} and {OTHER_WEIGHTS} may be" if weights else f"no {WEIGHTS} is"
        raise ConfigError(f"{folder}: {what} there")
    return ModelSpec(
        name=name,
        version=version,
        architecture=config.architecture,
        kwargs=config.kwargs,
        checkpoint=weights[0],
        labels=_if_there(folder / LABELS),
        **qualities(folder / QUALITY, config.dtype),
        dtype=config.dtype,
        profiles=folder / PROFILES,
        data=config.data,
        default_budget=config.default_budget,
        proportional_attention=config.proportional_attention,
        description=config.description,
        own=Own.of(config.model_dump(), folder / CONFIG),
    )


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None
