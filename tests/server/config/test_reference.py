"""The list of settings, and the JSON Schema of a settings file, against what the server itself takes."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, ValidationError

from tome_server.cli.main import main
from tome_server.config.reference import settings_schema, settings_table
from tome_server.config.server import ServerConfig
from tome_server.config.settings import FROM_FILE

ROOT = Path(__file__).parents[3]
SCHEMA = settings_schema()
TAKEN = [
    {},
    yaml.safe_load((ROOT / "examples/server.yaml").read_text()),
    {"metrics": False},
    {"metrics": None},
    {"metrics": "off"},
    {"threads": 3, "device": "cuda:1", "policy": "fixed:12"},
    {"models": [{"default_budget": "200ms", "kwargs": {"a": [1]}, "proportional_attention": None}]},
    {"batching": {"max_delay": "500us", "max_pending": 1}, "reply_margin": "1.5 ms", "profile_time": " 2m "},
    {"drain_timeout": 0, "reply_margin": "0"},
    {"limits": {"max_image_bytes": 1000}},
    {"tls": {"certificate": "a", "key": "b", "client_ca": None}, "auth": {"tokens": "c"}},
]  # fmt: skip
REFUSED = [
    {"polcy": "price"},
    {"policy": "fixed:x"},
    {"listen": "8500"},
    {"listen": False},
    {"models": {}},
    {"models": [{"sorce": "x"}]},
    {"threads": 0},
    {"batching": {"max_batch": 0}},
    {"batching": {"max_batch": "8"}},
    {"batching": {"max_delay": "2 minutes"}},
    {"limits": {"max_image_bytes": "3MB"}},
    {"limits": {"max_image_bytes": 0}},
    {"drain_timeout": -1},
    {"drain_timeout": 30},
    {"drain_timeout": "30"},
    {"models": [{"default_budget": 0.2}]},
    {"tls": {"certificate": "a"}},
    {"reflection": "yes"},
]  # fmt: skip


@pytest.mark.parametrize("settings", TAKEN, ids=str)
def test_the_schema_takes_what_the_server_takes(settings: object) -> None:
    ServerConfig.model_validate(settings, context=FROM_FILE)
    jsonschema.Draft202012Validator(SCHEMA).validate(settings)


@pytest.mark.parametrize("settings", REFUSED, ids=str)
def test_the_schema_refuses_what_the_server_refuses(settings: object) -> None:
    with pytest.raises(ValidationError):
        ServerConfig.model_validate(settings, context=FROM_FILE)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(settings)


def test_the_schema_stands_alone() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert "$ref" not in json.dumps(SCHEMA)


def sections(kind: type[BaseModel]) -> list[type[BaseModel]]:
    below = [value for value in vars(__import__(kind.__module__, fromlist=["x"])).values() if isinstance(value, type)]
    return [one for one in below if issubclass(one, BaseModel)]


def test_every_setting_is_in_the_table_and_says_what_it_means() -> None:
    rows = dict(line.split(" | ", 1) for line in settings_table().splitlines()[2:])
    for kind in sections(ServerConfig):
        for name, field in kind.model_fields.items():
            assert any(row.strip("| `").split(".")[-1] == name for row in rows) or isinstance(field.default, BaseModel)
    for row, rest in rows.items():
        assert rest.rsplit(" | ", 1)[1].strip(" |"), f"{row} has no line of documentation in its class"


@pytest.mark.parametrize(
    ("setting", "default"),
    [("profile_time", "5s"), ("reply_margin", "1ms"), ("limits.max_image_bytes", "16MiB"), ("reflection", "true")],
)
def test_defaults_are_written_as_one_would_write_them(setting: str, default: str) -> None:
    assert f"| `{setting}` | `{default}` |" in settings_table()


@pytest.mark.parametrize(("flags", "printed"), [([], settings_table()), (["--schema"], SCHEMA)])
def test_the_command_prints_both(flags: list[str], printed: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["settings", *flags])
    out = capsys.readouterr().out
    assert (json.loads(out) if flags else out) == printed


def test_configuration_md_has_every_setting() -> None:
    page = (ROOT / "docs/configuration.md").read_text()
    for line in settings_table().splitlines()[2:]:
        name = line.split("`")[1].split(".")[-1]
        assert f"`{name}`" in page or f"## {name}" in page, f"docs/configuration.md lacks {name}"
