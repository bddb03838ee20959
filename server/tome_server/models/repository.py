"""Models on disk: one folder for each model, with everything that serving it needs. Doesn't import torch.

A model's folder holds `config.yaml` and `weights.safetensors`, and may hold `labels.txt`, `quality.json` and
`profiles/`. Or it holds versions: folders named 1, 2, …, each of which is such a folder. Then its own `config.yaml`, if
there is one, may say which version is served; by default it is the highest.
"""

import logging
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, Field

from tome_server.config.dtypes import Dtype
from tome_server.config.model_overrides import ModelSettings
from tome_server.config.settings import Count, Strict, read_settings
from tome_server.errors import ConfigError, ModelLoadError
from tome_server.models.spec import CONFIG, LABELS, PROFILES, QUALITY, WEIGHTS, ModelSpec, qualities, quality_file
from tome_server.models.weights.checkpoint_header import check_header

log = logging.getLogger(__name__)

# Weights that torch.save wrote. They are read with weights_only, so that no code in them is run.
OTHER_WEIGHTS = "weights.pth"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
# timm's create_model would fetch or read other weights for these, or build something that gives no classes.
_FORBIDDEN = frozenset({
    "cache_dir", "checkpoint_path", "features_only", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
    "pretrained_strict",
})  # fmt: skip


def check_name(name: str) -> str:
    """Return `name` if models and their folders may have it. Raises ConfigError if not."""
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


class VersionConfig(ModelSettings):
    """What `config.yaml` says about a model."""

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


@dataclass(frozen=True)
class Contents:
    """What a repository holds."""

    specs: list[ModelSpec]
    """The models without faults, as far as that shows without loading them; in order of name."""
    faults: dict[str, ConfigError]
    """What is wrong with each of the others, by name."""


class Repository:
    """The models in one folder. Every call reads the disk anew."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError if `folder` is none."""
        if not folder.is_dir():
            raise ConfigError(f"repository {folder} is no folder")
        self.folder = folder

    def names(self) -> list[str]:
        """Return the models' names in order: the names of all folders that can be a model's.

        Raises ConfigError if the repository can't be read.
        """
        return [path.name for path in self._entries() if _NAME.fullmatch(path.name) and _is_folder(path)]

    def versions(self, name: str) -> list[int]:
        """Return the model's versions in order, none if it has no version folders. Raises ConfigError."""
        folder = self._model(name)
        try:
            found = [path.name for path in folder.iterdir() if path.name.isdecimal() and _is_folder(path)]
        except OSError as error:  # removed meanwhile, or not readable
            raise ConfigError(f"{folder} can't be read: {error.strerror}") from error
        for version in found:
            if not _VERSION.fullmatch(version):
                raise ConfigError(f"{folder / version}: a version is a whole number from 1, without leading zeros")
        return sorted(map(int, found))

    def served(self, name: str) -> int | None:
        """Return the version that is served by default, None if there are no versions. Raises ConfigError."""
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
        """Return what to load for a model, after all checks that don't need to load it.

        Raises ConfigError, naming file and field, if anything is missing or wrong.
        """
        folder = self.path(name, version)
        return read_folder(folder, name, int(folder.name) if self.versions(name) else None)

    def scan(self) -> Contents:
        """Return what to load for every model, and what is wrong with those that can't be loaded.

        Entries that can't be a model, such as a file or the folder `lost+found`, are skipped with a line in the log.
        Raises ConfigError if the repository can't be read.
        """
        contents = Contents([], {})
        for path in self._entries():
            name = path.name
            if not _is_folder(path) or not (_NAME.fullmatch(name) or _holds_a_model(path)):
                level = logging.DEBUG if name.startswith(".") else logging.INFO
                log.log(level, "%s/%s is passed over: it is no model's folder", self.folder, _shown(name))
                continue
            try:
                contents.specs.append(self.spec(name))
            except ConfigError as error:
                contents.faults[_shown(name)] = error
            except Exception as error:  # whatever a file made a library raise, the other models are served
                log.debug("reading %s", path, exc_info=True)
                contents.faults[_shown(name)] = ConfigError(f"{path} can't be read: {type(error).__name__}: {error}")
        return contents

    def write(self, name: str, fill: Callable[[Path], None], *, version: int | None = None, replace: bool) -> Path:
        """Write a model's folder, whole or not at all.

        Args:
            name: The model.
            fill: Writes the model into an empty folder, which then takes its place.
            version: The version to write; None for a model without versions. A model that had no versions yet becomes
                version 1 of itself.
            replace: Whether a folder that is there already is replaced.

        Returns:
            The folder.

        Raises:
            ConfigError: If the folder exists and may not be replaced, or if the model has versions and none is named.
            Exception: What `fill` raises.
        """
        place = self.folder / check_name(name)
        if version is None and place.is_dir() and self.versions(name):
            raise ConfigError(f"{place} has versions; name one")
        plain = place if (place / WEIGHTS).exists() or (place / OTHER_WEIGHTS).exists() else None
        if version is not None:
            if plain and version == 1:
                raise ConfigError(f"{place} has no versions yet: what lies in it becomes version 1, so take 2 or more")
            place /= str(version)
        if place.exists() and not replace:
            raise ConfigError(f"{place} exists; remove it first, or take another name or version")
        # On the same file system, and with a name that names() skips.
        draft, before = (self.folder / f".{name}-{secrets.token_hex(4)}" for _ in range(2))
        draft.mkdir()
        try:
            try:
                fill(draft)
            except (ConfigError, ModelLoadError) as error:
                # Messages name the final folder, not the draft.
                raise type(error)(str(error).replace(str(draft), str(place))) from error
            if version is not None and plain:
                _with_version_1(plain, draft, str(version), before)
            else:
                place.parent.mkdir(exist_ok=True)
                if place.exists():
                    place.rename(before)
                draft.rename(place)
        finally:
            for left in (draft, before):
                shutil.rmtree(left, ignore_errors=True)
        return place

    def remove(self, name: str, version: int | None = None) -> Path:
        """Delete a model, or one version of it, and return its folder. Raises ConfigError if there is none."""
        folder = self._model(name) if version is None else self.path(name, version)
        # Renamed first, so that a scan sees all of it or nothing.
        gone = self.folder / f".{name}-{secrets.token_hex(4)}"
        folder.rename(gone)
        shutil.rmtree(gone)
        return folder

    def _entries(self) -> list[Path]:
        try:
            return sorted(self.folder.iterdir())
        except OSError as error:
            raise ConfigError(f"repository {self.folder} can't be read: {error.strerror}") from error

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
    if not _is_file(folder / CONFIG):
        raise ConfigError(f"{folder} is no model: there is no {CONFIG} in it, and no folder of a version")
    config = read_settings(folder / CONFIG, VersionConfig)
    weights = [folder / file for file in (WEIGHTS, OTHER_WEIGHTS) if _is_file(folder / file)]
    if len(weights) != 1:
        what = f"only one of {WEIGHTS} and {OTHER_WEIGHTS} may be" if weights else f"no {WEIGHTS} is"
        raise ConfigError(f"{folder}: {what} there")
    check_header(weights[0])
    profiles = folder / PROFILES
    if not _is_folder(profiles) and _is_there(profiles):
        raise ConfigError(f"{profiles} is no folder")
    for dtype in get_args(Dtype):
        _is_file(quality_file(folder, dtype))
    return ModelSpec(
        name=name,
        version=version,
        architecture=config.architecture,
        kwargs=config.kwargs,
        checkpoint=weights[0],
        labels=folder / LABELS if _is_file(folder / LABELS) else None,
        **qualities(folder / QUALITY, config.dtype),
        dtype=config.dtype,
        profiles=profiles,
        data=config.data,
        default_budget=config.default_budget,
        proportional_attention=config.proportional_attention,
        description=config.description,
        overrides=config.overrides,
        file=folder / CONFIG,
    )


def _with_version_1(model: Path, draft: Path, version: str, both: Path) -> None:
    """Turn a model without versions into one with two: itself as version 1, and `draft`.

    `both` is a path for the new folder, until it takes the model's place. Between the last two renames a scan finds no
    such model; if the second fails, the first is undone.
    """
    both.mkdir()
    draft.rename(both / version)
    model.rename(both / "1")
    try:
        both.rename(model)
    except OSError:
        (both / "1").rename(model)
        raise


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # not readable
        return False


def _is_file(path: Path) -> bool:
    """Return whether there is a file. Raises ConfigError for anything else that is there: a folder, a broken link."""
    try:
        if path.is_file():
            return True
        if not _is_there(path):
            return False
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    raise ConfigError(f"{path} is no file" + (": it is a link to what isn't there" if path.is_symlink() else ""))


def _holds_a_model(folder: Path) -> bool:
    """Return whether a folder looks like a model's, though its name isn't one that a model may have."""
    if folder.name.startswith("."):
        return False
    with suppress(OSError):
        return any(path.name in (CONFIG, WEIGHTS, OTHER_WEIGHTS) for path in folder.iterdir())
    return False


def _shown(name: str) -> str:
    """Return a file's name as messages show it: in quotes if it holds line breaks or isn't text."""
    return name if name.isprintable() else repr(name)
