import math
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tome_server.config.server import (
    BatchingConfig,
    ConnectionsConfig,
    LimitsConfig,
    ModelConfig,
    ServerConfig,
    read_config,
)
from tome_server.errors import ConfigError

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "server.yaml"


def refusal(file: Path, text: str | bytes) -> str:
    """What is said of a file, less the file's own name."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        read_config(file)
    return str(caught.value).replace(str(file), "FILE")


def read(file: Path, text: str) -> ServerConfig:
    file.write_text(text)
    return read_config(file)


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n", "---\n"])
def test_an_empty_file_gives_the_defaults(file: Path, text: str) -> None:
    config = read(file, text)
    assert config == ServerConfig()
    assert config.listen == "0.0.0.0:8500"
    assert config.metrics == "0.0.0.0:8501"
    assert config.models == (ModelConfig(),)
    assert config.models[0].source == "bundled:fashion"
    assert config.batching == BatchingConfig(max_batch=8, max_delay=0.0, max_pending=256)
    assert config.limits == LimitsConfig(max_image_bytes=16 * 2**20, max_image_pixels=50_000_000)
    assert config.device == "auto"
    assert config.threads is None
    assert config.policy == "price"
    assert config.profiles is None
    assert config.profile_time == 5
    assert config.models[0].default_budget is None
    assert config.tls is None
    assert config.auth is None
    assert config.limits.max_client_requests is None
    assert config.connections == ConnectionsConfig(
        max_concurrent_streams=1024, max_connections=None, max_age=None, max_age_grace=30.0
    )
    assert config.reflection


def test_settings_are_read_at_every_level(file: Path) -> None:
    config = read(
        file,
        """
        listen: "[::1]:0"
        threads: 3
        policy: fixed:4
        profiles: /var/lib/profiles
        profile_time: 1m
        batching: {max_batch: 2}
        models:
          - source: vit_tiny_patch16_224
            kwargs: {img_size: 32}
            default_budget: 250ms
          - {}
        """,
    )
    assert config.listen == "[::1]:0"
    assert config.threads == 3
    assert (config.policy, config.profiles, config.profile_time) == ("fixed:4", Path("/var/lib/profiles"), 60)
    assert config.batching == BatchingConfig(max_batch=2)
    assert config.models == (
        ModelConfig(source="vit_tiny_patch16_224", kwargs={"img_size": 32}, default_budget=0.25),
        ModelConfig(),
    )
    # What was not given can still be told from what was: a bundled model brings settings of its own.
    assert config.models[0].model_dump(exclude_unset=True).keys() == {"source", "kwargs", "default_budget"}
    assert config.models[1].model_dump(exclude_unset=True) == {}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("50ms", 0.05),
        ("1.5s", 1.5),
        ("2m", 120),
        ("250us", 0.00025),
        ("2 s", 2),
        (".5s", 0.5),
        ("0ms", 0),
        ("0", 0),
        ("0.0", 0),
        ('"0"', 0),
    ],
)
def test_durations_have_units(file: Path, text: str, seconds: float) -> None:
    assert read(file, f"drain_timeout: {text}").drain_timeout == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["500", "0.25", '"3"', "30_0"])
def test_a_number_without_a_unit_is_refused_with_both_ways_to_write_it(file: Path, text: str) -> None:
    number = {"30_0": "300"}.get(text, text.strip('"'))
    assert refusal(file, f"listen: a:1\nbatching:\n  max_delay: {text}") == (
        f"FILE:3: batching.max_delay: {number} needs a unit: {number}ms or {number}s"
    )


@pytest.mark.parametrize(
    "text",
    [
        "5 parsecs",
        "abc",
        "1.2.3s",
        ".s",
        "s",
        "-1s",
        "-1",
        ".inf",
        ".nan",
        "true",
        "[1]",
        "null",
        "2026-01-01",
        "1e3ms",
    ],
)
def test_what_is_no_duration_names_line_and_key(file: Path, text: str) -> None:
    assert refusal(file, f"listen: a:1\nbatching:\n  max_delay: {text}").startswith("FILE:3: batching.max_delay: ")


@pytest.mark.parametrize(("text", "size"), [("16MiB", 2**24), ("512KiB", 2**19), ("1 GiB", 2**30), ("1000", 1000)])
def test_sizes_have_units_or_are_bytes(file: Path, text: str, size: int) -> None:
    assert read(file, f"limits: {{max_image_bytes: {text}}}").limits.max_image_bytes == size


@pytest.mark.parametrize("text", ["16MB", "1.5MiB", "0MiB", "0", "-1", "lots", "true", "1.5"])
def test_what_is_no_size_names_line_and_key(file: Path, text: str) -> None:
    assert refusal(file, f"limits:\n  max_image_bytes: {text}").startswith("FILE:2: limits.max_image_bytes: ")


def test_the_way_to_write_a_duration_a_size_or_an_address_is_shown(file: Path) -> None:
    text = "drain_timeout: soon\nlimits: {max_image_bytes: big}\nlisten: here"
    assert sorted(refusal(file, text).splitlines()) == [
        "FILE:1: drain_timeout: 'soon' is not a duration; write for example 50ms, 1.5s or 2m",
        "FILE:2: limits.max_image_bytes: 'big' is no size; write for example 512KiB or 16MiB",
        "FILE:3: listen: 'here' is no address; write for example 0.0.0.0:8500",
    ]


@pytest.mark.parametrize(
    "address", ["localhost", "8500", ":8500", "a b:1", "host:", "host:port", "host:65536", "host:-1"]
)
def test_an_address_is_host_and_port(file: Path, address: str) -> None:
    for key in ("listen", "metrics"):
        assert refusal(file, f'{key}: "{address}"').startswith(f"FILE:1: {key}: ")


@pytest.mark.parametrize("text", ["null", "off", '"off"', ""])
def test_metrics_can_be_off(file: Path, text: str) -> None:
    assert read(file, f"metrics: {text}").metrics is None


def test_listening_cannot_be_off(file: Path) -> None:
    assert refusal(file, "listen: off").startswith("FILE:1: listen: ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\nlissen: a:1", "FILE:2: lissen is not a setting; did you mean 'listen'?"),
        (
            "batching:\n  max_batch: 1\n  max_bach: 2",
            "FILE:3: batching.max_bach is not a setting; did you mean 'max_batch'?",
        ),
        ("limits:\n  max_pixels: 2", "FILE:2: limits.max_pixels is not a setting; did you mean 'max_image_pixels'?"),
        ("tls:\n  certificate: a\n  key: b\n  kye: c", "FILE:4: tls.kye is not a setting; did you mean 'key'?"),
        (
            "models:\n- source: x\n- source: y\n  chekpoint: z",
            "FILE:4: models.1.chekpoint is not a setting; did you mean 'checkpoint'?",
        ),
        (
            "batching: {zzz: 1}",
            "FILE:1: batching.zzz is not a setting; valid keys are max_batch, max_delay, max_pending",
        ),
        ("models:\n- default_r: 8", "FILE:2: models.0.default_r is not a setting; did you mean 'default_min_r'?"),
        ("profile: x", "FILE:1: profile is not a setting; did you mean 'profiles'?"),
        ("Listen: a:1", "FILE:1: Listen is not a setting; did you mean 'listen'?"),
    ],
)
def test_an_unknown_key_names_its_line_and_the_nearest_key(file: Path, text: str, says: str) -> None:
    assert refusal(file, text) == says


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("batching:\n  max_batch: 0", "FILE:2: batching.max_batch: "),
        ("batching:\n  max_batch: two", "FILE:2: batching.max_batch: "),
        ("batching:\n  max_batch: 2.0", "FILE:2: batching.max_batch: "),
        ("batching:\n  max_batch: true", "FILE:2: batching.max_batch: "),
        ('batching:\n  max_batch: "8"', "FILE:2: batching.max_batch: "),
        ("batching:\n  max_pending: -5", "FILE:2: batching.max_pending: "),
        ("batching: 3", "FILE:1: batching: must be a mapping"),
        ("batching:", "FILE:1: batching: must be a mapping"),
        ("listen: a:1\nthreads: 0", "FILE:2: threads: "),
        ("device: 3", "FILE:1: device: "),
        ("models: []", "FILE:1: models: "),
        ("models:", "FILE:1: models: must be a list"),
        ("models: {source: x}", "FILE:1: models: must be a list"),
        ("models: [x]", "FILE:1: models.0: must be a mapping"),
        ("models:\n- source: x\n- source: y\n  default_budget: 0", "FILE:4: models.1.default_budget: "),
        ("models:\n- default_budget: -1s", "FILE:2: models.0.default_budget: "),
        ("models:\n- default_budget: soon", "FILE:2: models.0.default_budget: 'soon' is not a duration"),
        ("listen: a:1\nprofile_time: 0s", "FILE:2: profile_time: "),
        ("listen: a:1\nprofile_time: null", "FILE:2: profile_time: "),
        ("profiles: 3", "FILE:1: profiles: must be a path"),
        ("policy: 3", "FILE:1: policy: "),
        ("policy:", "FILE:1: policy: "),
        ("models:\n- source: x\n  checkpoint: 3", "FILE:3: models.0.checkpoint: must be a path"),
        ("models:\n- kwargs: [1]", "FILE:2: models.0.kwargs: "),
        ("listen: a:1\ntls:\n  certificate: a", "FILE:2: tls.key: is missing"),
        ("- listen: a:1", "FILE:1: the file: must be a mapping"),
        ("just text", "FILE:1: the file: must be a mapping"),
    ],
)
def test_a_wrong_value_names_line_and_key_and_nothing_else(file: Path, text: str, where: str) -> None:
    message = refusal(file, text)
    assert message.startswith(where)
    assert "\n" not in message


@pytest.mark.parametrize("policy", ["price", "fixed:0", "fixed:14", "max_accuracy", "max_batch", "slackfit"])
def test_a_policy_is_one_of_those_there_are(file: Path, policy: str) -> None:
    assert read(file, f"policy: {policy}").policy == policy


@pytest.mark.parametrize(
    "policy", ["Price", "fixed", "fixed:", "fixed:R", "fixed:-1", "fixed:1.5", "slackfit:3", "best", ""]
)
def test_any_other_policy_names_its_line_and_all_policies(file: Path, policy: str) -> None:
    assert refusal(file, f'listen: a:1\npolicy: "{policy}"').startswith(
        f"FILE:2: policy: '{policy}' is no policy; there are price, fixed:R, max_accuracy, max_batch, slackfit"
    )


def test_every_fault_is_reported_at_once(file: Path) -> None:
    lines = refusal(file, "listen: 1\nbatching: {max_batch: 0, max_bach: 1}\nmodels:\n- default_budget: x").splitlines()
    assert sorted(line.split(": ")[0] for line in lines) == ["FILE:1", "FILE:2", "FILE:2", "FILE:4"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("listen: a:1\nlisten: b:2", "FILE:2: listen is given twice, first on line 1"),
        ("batching:\n  max_batch: 2\n\n  max_batch: 3", "FILE:4: max_batch is given twice, first on line 2"),
        ("models:\n- kwargs:\n    depth: 2\n    depth: 3", "FILE:4: depth is given twice, first on line 3"),
    ],
)
def test_a_key_given_twice_is_an_error(file: Path, text: str, says: str) -> None:
    assert refusal(file, text) == says


@pytest.mark.parametrize("key", ["1", "true", "null", "1.5", "2026-01-01", "? [a, b]\n", "? {a: b}\n", "? !!str [a]\n"])
def test_a_key_that_is_no_text_is_an_error(file: Path, key: str) -> None:
    assert refusal(file, f"listen: a:1\n{key}: 3") == "FILE:2: a setting's name must be text"
    assert refusal(file, f"models:\n- kwargs:\n    ? {key.strip('? ')}\n    : 3").startswith("FILE:3: ")


def test_anchors_and_merge_keys_work(file: Path) -> None:
    config = read(
        file, "models:\n- &vit {source: vit, default_budget: 2s}\n- {<<: *vit, name: other, default_budget: 3s}"
    )
    assert [(model.source, model.name, model.default_budget) for model in config.models] == [
        ("vit", None, 2),
        ("vit", "other", 3),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "listen: [",
        "listen: *nowhere",
        "listen: a\n---\nlisten: b",
        "listen: !!python/object/apply:os.getcwd []",
        "drain_timeout: 2026-99-99",
        "\tlisten: a",
        b"listen: \xff\xfe",
        b"listen: \0",
    ],
)
def test_what_is_no_yaml_is_refused(file: Path, text: str | bytes) -> None:
    said = refusal(file, text)
    assert re.match(r"FILE(:[12])?: not valid YAML: .", said)
    assert "\n  in " not in said


def test_what_is_no_yaml_names_the_line(file: Path) -> None:
    said = "while parsing a flow sequence, expected ',' or ']', but got ':'"
    assert refusal(file, "listen: a:1\nmodels: [\nthreads: 1:\n") == f"FILE:3: not valid YAML: {said}"


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "b: &b {c: *b}",
        "\n".join(["a0: &a0 x", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 20))]),
    ],
)
def test_a_file_whose_aliases_stand_for_more_than_memory_holds_is_refused(file: Path, text: str) -> None:
    assert refusal(file, text) == "FILE: holds more than 100,000 values, counting what aliases repeat"


def test_a_file_that_is_nested_deeply_is_refused(file: Path) -> None:
    assert refusal(file, "a: " + "[" * 100_000) == "FILE: not valid YAML: it is nested too deeply"


def test_a_file_may_have_a_byte_order_mark(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbflisten: 127.0.0.1:1\n")
    assert read_config(file).listen == "127.0.0.1:1"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("listen: a:1\n".encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
        ("listen: a:1\n".encode("utf-32"), "the file is UTF-32; save it as UTF-8"),
        ("# x\ndescription: grün\n".encode("latin-1"), "line 2 is not UTF-8 (byte 0xfc); save it as UTF-8"),
    ],
)
def test_a_file_in_another_encoding_is_named_as_such(file: Path, data: bytes, why: str) -> None:
    assert refusal(file, data) == f"FILE: not valid YAML: {why}"


def test_a_file_that_is_not_there_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.yaml: No such file or directory"):
        read_config(file)
    with pytest.raises(ConfigError, match="Is a directory"):
        read_config(tmp_path)


def test_relative_paths_count_from_the_files_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    config = read(
        file,
        """
        models:
          - {source: vit, checkpoint: weights.pth, labels: ../labels.txt, quality: /elsewhere/quality.json}
        tls: {certificate: tls/cert.pem, key: tls/key.pem}
        profiles: measured
        """,
    )
    [model] = config.models
    assert model.checkpoint == tmp_path / "weights.pth"
    assert model.labels == tmp_path / "../labels.txt"
    assert model.quality == Path("/elsewhere/quality.json")
    assert config.profiles == tmp_path / "measured"
    assert config.tls is not None
    assert (config.tls.certificate, config.tls.key) == (tmp_path / "tls/cert.pem", tmp_path / "tls/key.pem")


def test_a_repository_takes_the_place_of_the_default_model(file: Path, tmp_path: Path) -> None:
    config = read(file, "repository: models")
    assert config.repository == tmp_path / "models"
    assert config.models == ()
    both = read(file, "repository: models\nmodels: [{source: vit}]")
    assert [model.source for model in both.models] == ["vit"]
    assert read(file, "repository: models\nmodels: []").models == ()
    assert "models: there must be one, or a repository" in refusal(file, "models: []")


def test_settings_cannot_be_changed() -> None:
    config: Any = ServerConfig()
    with pytest.raises(ValidationError):
        config.listen = "a:1"
    with pytest.raises(ValidationError):
        config.batching.max_batch = 3


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_valid(example: Path) -> None:
    read_config(example)


def test_a_models_requests_may_have_no_deadline_by_default(file: Path) -> None:
    file.write_text("models:\n- default_budget: none\n")
    assert read_config(file).models[0].default_budget == math.inf


@pytest.mark.parametrize(
    "text",
    [
        'models: [{source: vit, checkpoint: "a\\0b"}]',
        'auth: {tokens: "a\\0b"}',
        'repository: "a\\0b"',
        'models: [{description: "\\ud800"}]',
        'models: [{kwargs: {a: [{b: "\\udfff"}]}}]',
    ],
)
def test_text_that_no_path_or_message_can_hold_is_refused(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"{file}:1: text can't hold NUL or halves of characters"):
        read_config(file)


@pytest.mark.parametrize(
    "text",
    ["models: [{default_budget: 9999999999999999m}]", "drain_timeout: 99999999999m", "profile_time: 1000000000s"],
)
def test_a_duration_of_more_than_a_year_is_refused(file: Path, text: str) -> None:
    """As a message to clients it could not be told, so that GetModel would fail."""
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"{file}:1: .*must be at most"):
        read_config(file)


def test_a_file_of_more_than_a_mebibyte_is_refused_before_it_is_parsed(file: Path) -> None:
    with file.open("wb") as sparse:
        sparse.truncate(2**30)
    with pytest.raises(ConfigError, match="it is larger than 1,048,576 bytes"):
        read_config(file)
