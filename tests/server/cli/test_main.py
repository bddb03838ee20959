import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tome_server import app
from tome_server.calibration.datasets import DatasetError
from tome_server.calibration.profile_key import ProfileKey
from tome_server.calibration.profile_store import profile_text
from tome_server.calibration.tuning import Kept, Tuned
from tome_server.cli import main, offline
from tome_server.config.server import ServerConfig
from tome_server.errors import ModelLoadError, PortInUseError
from tome_server.models.spec import ModelSpec
from tome_server.scheduling.profile import Profile
from tome_server.serving.served import LEAST_DEFAULT_BUDGET

FILE = """
listen: 127.0.0.1:1
metrics: 127.0.0.1:2
device: cpu
threads: 5
policy: slackfit
profiles: measured
profile_time: 8s
drain_timeout: 7s
reply_margin: 9ms
batching: {max_batch: 3, max_delay: 4ms, max_pending: 6}
limits: {max_image_bytes: 1MiB}
models:
  - {source: first, name: one, checkpoint: first.pth, default_budget: 2s}
  - {source: second}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "server.yaml"
    path.write_text(FILE)
    return path


@pytest.fixture(autouse=True)
def _same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets OMP_WAIT_POLICY for its own process, which here is pytest's."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


def config(monkeypatch: pytest.MonkeyPatch, *flags: str) -> ServerConfig:
    """The settings that `tome-server serve` would serve with."""
    served: list[ServerConfig] = []

    async def serve(settings: ServerConfig) -> int:
        served.append(settings)
        return 0

    monkeypatch.setattr(app, "serve", serve)
    monkeypatch.setattr("tome_server.cli.serve.leave", sys.exit)  # it would end this process
    with pytest.raises(SystemExit) as caught:
        main.main(["serve", *flags])
    assert caught.value.code == 0
    return served[0]


def failure(*args: str) -> str:
    """What a command that fails says."""
    with pytest.raises(SystemExit) as caught:
        main.main(args)
    assert isinstance(caught.value.code, str)  # Python prints it on standard error and exits with 1
    return caught.value.code


def wrong_usage(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main.main(args)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_without_flags_the_defaults_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config(monkeypatch) == ServerConfig()


def test_a_file_is_served_as_it_is(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    served = config(monkeypatch, "--config", str(file))
    assert served.listen == "127.0.0.1:1"
    assert served.batching.max_delay == 0.004
    assert served.limits.max_image_bytes == 2**20
    assert [model.source for model in served.models] == ["first", "second"]
    assert served.models[1].model_dump(exclude_unset=True) == {"source": "second"}


FLAGS: list[tuple[list[str], tuple[str, ...], Any]] = [
    (["--listen", "h:8"], ("listen",), "h:8"),
    (["--metrics", "h:9"], ("metrics",), "h:9"),
    (["--metrics", "off"], ("metrics",), None),
    (["--device", "cuda:1"], ("device",), "cuda:1"),
    (["--threads", "2"], ("threads",), 2),
    (["--policy", "fixed:8"], ("policy",), "fixed:8"),
    (["--profiles", "elsewhere"], ("profiles",), Path("elsewhere")),  # counts from the working directory
    (["--profile-time", "500ms"], ("profile_time",), 0.5),
    (["--drain-timeout", "1m"], ("drain_timeout",), 60.0),
    (["--max-batch", "16"], ("batching", "max_batch"), 16),
    (["--max-delay", "50ms"], ("batching", "max_delay"), 0.05),
    (["--max-pending", "9"], ("batching", "max_pending"), 9),
]


@pytest.mark.parametrize(
    ("flags", "changed", "value"), FLAGS, ids=lambda case: " ".join(case) if isinstance(case, list) else ""
)
def test_a_flag_overrides_its_own_setting_and_no_other(
    monkeypatch: pytest.MonkeyPatch, file: Path, flags: list[str], changed: tuple[str, ...], value: Any
) -> None:
    expected = config(monkeypatch, "--config", str(file)).model_dump()
    section = expected
    for key in changed[:-1]:
        section = section[key]
    section[changed[-1]] = value
    assert config(monkeypatch, "--config", str(file), *flags).model_dump() == expected


def test_model_flags_change_the_first_model_of_the_file(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    first, second = config(
        monkeypatch, "--config", str(file), "--labels", "labels.txt", "--quality", "q.json", "--default-budget", "50ms"
    ).models
    assert first.model_dump(exclude_unset=True) == {
        "source": "first",
        "name": "one",
        "checkpoint": file.parent / "first.pth",
        "labels": Path("labels.txt"),  # of a flag, a path counts from the working directory
        "quality": Path("q.json"),
        "default_budget": 0.05,
    }
    assert second.source == "second"


def test_a_model_flag_replaces_the_models_of_the_file(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    [model] = config(monkeypatch, "--config", str(file), "--model", "vit", "--checkpoint", "w.pth").models
    assert model.model_dump(exclude_unset=True) == {"source": "vit", "checkpoint": Path("w.pth")}


def test_a_repository_is_served_beside_the_models_that_are_named(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    flag = ["--repository", "models"]
    assert config(monkeypatch, *flag).repository == Path("models")
    assert config(monkeypatch, *flag).models == ()
    assert [model.source for model in config(monkeypatch, *flag, "--model", "vit").models] == ["vit"]
    assert [model.source for model in config(monkeypatch, *flag, "--config", str(file)).models] == ["first", "second"]
    said = "tome-server: --checkpoint is for one of `models` or --model, and there is none"
    assert failure("serve", *flag, "--checkpoint", "w.pth") == said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max-delay", "abc"], "--max-delay: 'abc' is not a duration; write for example 50ms, 1.5s or 2m"),
        (["--drain-timeout", "-1s"], "--drain-timeout: '-1s' is not a duration; write for example 50ms, 1.5s or 2m"),
        (["--listen", "8500"], "--listen: '8500' is no address; write for example 0.0.0.0:8500"),
        (["--metrics", "on"], "--metrics: 'on' is no address; write for example 0.0.0.0:8500"),
        (["--max-batch", "0"], "--max-batch: must be at least 1"),
        (["--max-pending", "-1"], "--max-pending: must be at least 1"),
        (["--threads", "0"], "--threads: must be at least 1"),
        (["--default-budget", "0s"], "--default-budget: '0s' must be above 0; write for example 50ms, 1.5s or 2m"),
        (["--default-budget", "8h"], "--default-budget: '8h' is not a duration; write for example 50ms, 1.5s or 2m"),
        (["--profile-time", "0s"], "--profile-time: must be above 0"),
        (["--default-budget", "200"], "--default-budget: 200 needs a unit: 200ms or 200s"),
        (["--drain-timeout", "30"], "--drain-timeout: 30 needs a unit: 30ms or 30s"),
        (
            ["--policy", "best"],
            "--policy: 'best' is no policy; there are price, fixed:R, max_accuracy, max_batch, slackfit",
        ),
    ],
)
def test_a_wrong_value_gives_one_sentence_that_names_the_flag(flags: list[str], says: str, file: Path) -> None:
    name, value = flags
    for rest in ([], ["--config", str(file)]):
        assert failure("serve", f"{name}={value}", *rest) == f"tome-server: {says}"


def test_a_fault_in_the_file_names_the_line(file: Path) -> None:
    file.write_text("listen: a:1\nbatching: {max_bach: 2}")
    said = "batching.max_bach is not a setting; did you mean 'max_batch'?"
    assert failure("serve", "--config", str(file)) == f"tome-server: {file}:2: {said}"
    assert failure("serve", "--config", "/nowhere.yaml") == "tome-server: /nowhere.yaml: No such file or directory"


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["sevre"],
        ["serve", "--nonsense"],
        ["serve", "--max-batch", "two"],
        ["serve", "--log-level", "loud"],
        ["serve", "--default-r", "8"],
        ["serve", "extra"],
        ["demo", "--port", "1"],
        ["evaluate"],
        ["evaluate", "--data"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_says_in_a_line_what_is_wrong(
    capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    what, where = wrong_usage(capsys, *args).splitlines()
    command = "tome-server" if args in ([], ["sevre"]) else f"tome-server {args[0]}"
    assert what.startswith(f"{command}: ")
    assert where == f"{command} --help lists what it takes"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["serve", "--polcy", "price"], "there is no flag --polcy; did you mean '--policy'?"),
        (["serve", "--polcy=price"], "there is no flag --polcy; did you mean '--policy'?"),
        (["models", "add", "x", "--repository", "y", "--weight-file", "z"], "there is no flag --weight-file"),
        (["models", "fit-haed"], "'fit-haed' is none of add, fit-head, evaluate, "),
        (["sevre"], "did you mean 'serve'?"),
        (["serve", "--log-level", "warn"], "'warn' is none of debug, info, warning, error; did you mean 'warning'?"),
        (["serve", "bundled:fashion"], "unexpected argument 'bundled:fashion'"),
        (["models", "profile", "x", "--repository", "y", "--device", "cud"], "did you mean 'cuda'?"),
    ],
)
def test_the_nearest_name_is_told(capsys: pytest.CaptureFixture[str], args: list[str], says: str) -> None:
    assert says in wrong_usage(capsys, *args)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--dtype", "bloat16"], "--dtype: 'bloat16' is none of 'auto', 'float32', 'bfloat16' or 'float16'; did you"),
        (["--device", "cdua"], "--device: 'cdua' is none of auto, cpu, cuda, cuda:N; did you mean 'cuda'?"),
        (["--device", "cuda:x"], "--device: 'cuda:x' is none of auto, cpu, cuda, cuda:N"),
        (["--model", "bundled:fashoin"], "no bundled model is named 'fashoin'; there is fashion; did you mean"),
        (["--model", "vit_bas_patch16_224"], "no model named 'vit_bas_patch16_224'; did you mean vit_base_patch16_224"),
        (
            ["--model", "vit_base_patch16_224", "--checkpoint", "/gone.safetensors"],
            "checkpoint /gone.safetensors is no file",
        ),
    ],
)
@pytest.mark.parametrize(
    "command", [["serve"], ["profile"], ["evaluate", "--data", "x"], ["tune", "--data", "x"]], ids=str
)
def test_a_wrong_name_is_said_before_torch_is_imported(command: list[str], flags: list[str], says: str) -> None:
    code = f"import sys\nfrom tome_server.cli.main import main\ntry: main({[*command, *flags]!r})\n"
    code += "finally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stdout == "False\n"


def test_the_nearest_policy_is_told() -> None:
    said = (
        "--policy: 'prize' is no policy; there are price, fixed:R, max_accuracy, max_batch, slackfit; did you mean 'p"
    )
    assert said in failure("serve", "--policy", "prize")


@pytest.mark.parametrize("flags", [["evaluate", "--data", "images"], ["tune", "--data", "images"], ["profile"]])
def test_a_file_that_is_there_is_replaced_only_when_told_to(
    flags: list[str], evaluated: list[Any], tuned: list[Any], profiled: list[Any], tmp_path: Path
) -> None:
    output = tmp_path / "kept"
    output.write_text("before")
    said = f"tome-server: --output: {output} exists; --overwrite replaces it"
    assert failure(*flags, "--output", str(output)) == said
    assert output.read_text() == "before"
    assert evaluated == tuned == profiled == []
    with pytest.raises(SystemExit) as caught:
        main.main([*flags, "--output", str(output), "--overwrite"])
    assert caught.value.code == 0
    assert json.loads(output.read_text())


def test_a_picture_that_is_there_is_replaced_only_when_told_to(profiled: list[Any], tmp_path: Path) -> None:
    picture = tmp_path / "profile.svg"
    picture.write_text("before")
    said = f"tome-server: --picture: {picture} exists; --overwrite replaces it"
    assert failure("profile", "--picture", str(picture)) == said
    assert profiled == []


@pytest.mark.parametrize("value", ["a", "1,b", "", "1,,2", "-1", "0,-4", "1.5"])
def test_a_wrong_list_of_r_is_wrong_usage(capsys: pytest.CaptureFixture[str], value: str) -> None:
    error = wrong_usage(capsys, "evaluate", "--data", ".", f"--r={value}")
    assert f"argument --r: {value!r} is no list of r values; write for example 0,4,8" in error


@pytest.mark.parametrize("value", ["0", "-5", "many", "1.5"])
def test_a_limit_of_no_images_is_wrong_usage(capsys: pytest.CaptureFixture[str], value: str) -> None:
    error = wrong_usage(capsys, "evaluate", "--data", ".", f"--limit={value}")
    assert f"argument --limit: {value!r} is no number from 1" in error


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"tome-serving {importlib.metadata.version('tome-serving')}\n"


@pytest.mark.parametrize(
    "command", [[], ["serve"], ["demo"], ["evaluate"], ["profile"]], ids=lambda command: " ".join(command) or "all"
)
def test_help_exits_with_0(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main([*command, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(" ".join(["usage: tome-server", *command]))


def test_help_takes_nothing_that_the_plain_install_lacks() -> None:
    """Nor what takes long to import: torch, timm, pydantic and gRPC."""
    lacking = ["torch", "timm", "pydantic", "numpy", "yaml", "tqdm", "prometheus_client", "matplotlib", "grpc"]
    commands = ["", "serve", "demo", "evaluate", "tune", "profile", "settings", "plan", "models"]
    own = ("add", "fit-head", "evaluate", "tune", "profile", "inspect", "list", "remove", "supported")
    commands += [f"models {name}" for name in own]
    code = f"""
import sys
sys.modules |= dict.fromkeys({lacking})
from tome_server.cli.main import main
for command in {commands}:
    try:
        main([*command.split(), "--help"])
    except SystemExit as end:
        assert end.code == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(commands)


def test_the_defaults_in_the_help_are_the_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main.main(["serve", "--help"])
    shown = capsys.readouterr().out
    config = ServerConfig()
    for default in (
        config.listen,
        config.metrics,
        config.batching.max_batch,
        config.batching.max_pending,
        "30s",
        "0ms",
        "5s",
        "1s",
    ):
        assert f"(default: {default}" in shown
    assert f"{config.policy} (default)" in shown
    assert (config.drain_timeout, config.batching.max_delay, config.profile_time) == (30, 0, 5)
    assert LEAST_DEFAULT_BUDGET == 1


@pytest.mark.parametrize("error", [ModelLoadError("no such weights"), PortInUseError("port 1 is taken")])
def test_what_the_operator_can_mend_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def serve(_: ServerConfig) -> None:
        raise error

    monkeypatch.setattr(app, "serve", serve)
    assert failure("serve") == f"tome-server: {error}"


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of the evaluation, which does nothing."""
    calls: list[tuple[Any, ...]] = []

    def evaluate(spec: ModelSpec, data: Path, machine: offline.Machine, **options: Any) -> dict[str, object]:
        calls.append((spec, data, machine, options))
        return {"levels": []}

    monkeypatch.setattr(offline, "evaluate_model", evaluate)
    return calls


def test_evaluate_prints_its_report(capsys: pytest.CaptureFixture[str], evaluated: list[tuple[Any, ...]]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["evaluate", "--data", "images", "--r", "0,4, 8", "--limit", "3", "--model", "vit_base_patch16_224"])
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out) == {"levels": []}
    [(spec, data, machine, options)] = evaluated
    assert spec.architecture == "vit_base_patch16_224"
    assert data == Path("images")
    assert machine == offline.Machine()
    assert options == {"limit": 3, "grid": [0, 4, 8]}


def test_evaluate_writes_its_report(
    capsys: pytest.CaptureFixture[str], evaluated: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    output = tmp_path / "quality.json"
    with pytest.raises(SystemExit) as caught:
        main.main(["evaluate", "--data", "images", "--output", str(output)])
    assert caught.value.code == 0
    assert json.loads(output.read_text()) == {"levels": []}
    assert capsys.readouterr().out == ""


def test_evaluate_does_not_begin_what_it_could_not_write(evaluated: list[tuple[Any, ...]], tmp_path: Path) -> None:
    message = failure("evaluate", "--data", "images", "--output", str(tmp_path / "gone" / "quality.json"))
    assert message == f"tome-server: --output: there is no folder {tmp_path / 'gone'}"
    assert evaluated == []


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of the tuning, which finds one schedule."""
    calls: list[tuple[Any, ...]] = []
    kept = Kept(shifted=0.01, agreement=0.9, top1=None)

    def tune(*args: Any) -> tuple[dict[str, object], list[Tuned]]:
        calls.append(args)
        return {"levels": []}, [Tuned(8, (9, 7), 80, 90, kept, kept, -0.01, 0.002)]

    monkeypatch.setattr(offline, "tune_model", tune)
    return calls


def test_tune_prints_a_report_or_writes_it_and_prints_what_was_found(
    capsys: pytest.CaptureFixture[str], tuned: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(
            [
                "tune",
                "--data",
                "images",
                "--model",
                "vit_base_patch16_224",
                "--r",
                "8,14",
                "--blocks",
                "2",
                "--seed",
                "3",
                "--held-out",
                "99",
            ]
        )
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out) == {"levels": []}
    with pytest.raises(SystemExit):
        main.main(["tune", "--data", "x", "--target-macs", "0.6", "--output", str(tmp_path / "q"), "--limit", "9"])
    assert json.loads((tmp_path / "q").read_text()) == {"levels": []}
    assert "  9 7   -0.01000 ± 0.00200\n" in capsys.readouterr().out
    (spec, data, _, first), (_, _, _, second) = tuned
    assert (spec.architecture, data) == ("vit_base_patch16_224", Path("images"))
    assert first == offline.Tuning(rs=[8, 14], held_out=99, blocks=2, seed=3)
    assert second == offline.Tuning(target_macs=0.6, images=9)


@pytest.mark.parametrize(
    "flags",
    [
        ["--target-macs", "1.2"],
        ["--target-macs", "0"],
        ["--target-macs", "half"],
        ["--target-macs", "0.6", "--r", "8"],
        ["--r", "-8"],
        ["--trials", "0"],
        ["--limit", "none"],
        ["--held-out", "0"],
        ["--blocks", "0"],
    ],
)
def test_tune_refuses_what_makes_no_sense(tuned: list[tuple[Any, ...]], flags: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["tune", "--data", "images", *flags])
    assert caught.value.code == 2
    assert tuned == []


def test_tune_does_not_begin_what_it_could_not_write(tuned: list[tuple[Any, ...]], tmp_path: Path) -> None:
    message = failure("tune", "--data", "images", "--output", str(tmp_path / "gone" / "quality.json"))
    assert message == f"tome-server: --output: there is no folder {tmp_path / 'gone'}"
    assert tuned == []


def test_what_could_not_be_written_in_the_end_is_printed(
    capsys: pytest.CaptureFixture[str], evaluated: list[tuple[Any, ...]]
) -> None:
    message = failure("evaluate", "--data", "images", "--output", "/dev/full")
    said = "--output: /dev/full: No space left on device; what it was to hold is printed instead"
    assert message == f"tome-server: {said}"
    assert json.loads(capsys.readouterr().out) == {"levels": []}
    assert len(evaluated) == 1


@pytest.mark.parametrize("flags", [["evaluate", "--data", "images"], ["tune", "--data", "images"], ["profile"]])
def test_a_folder_is_no_output(flags: list[str], tmp_path: Path) -> None:
    message = failure(*flags, "--output", str(tmp_path))
    assert message == f"tome-server: --output: {tmp_path} is a folder; name a file in it"


def test_a_file_that_stands_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = failure("models", "add", "bundled:fashion", "--repository", str(tmp_path / "file"))
    assert message == f"tome-server: {tmp_path / 'file'}: File exists"


def test_images_that_cannot_be_read_are_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: object, **__: object) -> None:
        raise DatasetError("images does not exist")

    monkeypatch.setattr(offline, "evaluate_model", evaluate)
    assert failure("evaluate", "--data", "images") == "tome-server: images does not exist"


KEY = ProfileKey("vit", "hub:vit", (3, 8, 8), (9, 5), True, "A Processor", "float32", 1, "2", "1", "0", 2, (0, 4))
PROFILE = Profile((1, 2), (0, 4), ((0.01, 0.005), (0.02, 0.01)), ((0.011, 0.006), (0.022, 0.011)), 0.001)


Profiled: TypeAlias = tuple[ModelSpec, offline.Machine, dict[str, Any]]


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> list[Profiled]:
    """Calls of the measurement, which takes no time."""
    calls: list[Profiled] = []

    def profile(spec: ModelSpec, machine: offline.Machine, **options: Any) -> tuple[ProfileKey, Profile, Path | None]:
        calls.append((spec, machine, options))
        return KEY, PROFILE, Path("/cache/tiny.json")

    monkeypatch.setattr(offline, "profile_model", profile)
    return calls


def succeeds(*args: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(args)
    assert caught.value.code == 0


def test_profile_prints_a_table_and_where_it_is_kept(
    capsys: pytest.CaptureFixture[str], profiled: list[Profiled]
) -> None:
    succeeds(
        "profile", "--model", "vit_base_patch16_224", "--max-batch", "2", "--profile-time", "7500ms", "--threads", "1"
    )
    shown = capsys.readouterr()
    assert shown.out.startswith("batch              r=0    r=4\n    1  p50 ms     10.0    5.0\n")
    assert shown.err == "measured vit_base_patch16_224 in float32\nkept for the server in /cache/tiny.json\n"
    [(spec, machine, options)] = profiled
    assert spec.architecture == "vit_base_patch16_224"
    assert machine == offline.Machine(max_batch=2, threads=1)
    assert options == {"beside": [], "budget": 7.5, "progress": False}


def test_profile_measures_for_40_seconds_unless_told(profiled: list[Profiled]) -> None:
    succeeds("profile")
    [(spec, machine, options)] = profiled
    assert spec.name == "fashion"
    assert machine == offline.Machine()
    assert options == {"beside": [], "budget": 40.0, "progress": False}


def test_profile_measures_the_first_model_and_chooses_threads_for_all(profiled: list[Profiled], tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(
        "models: [{source: vit_base_patch16_224}, {source: bundled:fashion}]\ndevice: cpu\nprofiles: kept\n"
        "cuda_graph_memory: 1MiB\nbatching: {max_batch: 4}\n"
    )
    succeeds("profile", "--config", str(file))
    [(spec, machine, options)] = profiled
    assert spec.architecture == "vit_base_patch16_224"
    assert machine == offline.Machine("cpu", None, 4, tmp_path / "kept", 2**20)
    assert [other.name for other in options["beside"]] == ["fashion"]


def test_profile_prints_and_writes_the_same_json(
    capsys: pytest.CaptureFixture[str], profiled: list[Any], tmp_path: Path
) -> None:
    succeeds("profile", "--json", "--output", str(tmp_path / "profile.json"))
    printed = capsys.readouterr().out
    assert printed == profile_text(KEY, PROFILE)
    assert (tmp_path / "profile.json").read_text() == printed


def test_profile_draws_a_picture(profiled: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    succeeds("profile", "--picture", str(tmp_path / "profile.svg"))
    assert "fashion on A Processor, float32" in (tmp_path / "profile.svg").read_text()


def test_what_profile_could_not_write_or_draw_is_said_before_it_measures(
    profiled: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    assert failure("profile", "--output", str(gone / "a.json")) == f"tome-server: --output: there is no folder {gone}"
    assert failure("profile", "--picture", str(gone / "a.png")) == f"tome-server: --picture: there is no folder {gone}"
    pytest.importorskip("matplotlib")
    message = failure("profile", "--picture", str(tmp_path / "a.jpeg"))
    assert message == f"tome-server: --picture: {tmp_path / 'a.jpeg'} must end in one of .png, .svg, .pdf"
    monkeypatch.delitem(sys.modules, "tome_server.cli.pictures")
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    message = failure("profile", "--picture", str(tmp_path / "a.png"))
    assert message.startswith("tome-server: --picture: ")
    assert message.endswith("it needs: pip install 'tome-serving[plots]'")
    assert profiled == []


@pytest.mark.parametrize("value", ["0", "0s", "-5s", "7", "many", "nan", "inf"])
@pytest.mark.parametrize("command", [("profile",), ("models", "profile", "x", "--repository", "y")])
def test_a_time_of_no_seconds_is_wrong_usage(
    capsys: pytest.CaptureFixture[str], command: tuple[str, ...], value: str
) -> None:
    error = wrong_usage(capsys, *command, f"--profile-time={value}")
    assert "argument --profile-time: " in error
    assert f"{value}" in error


ADD = ["models", "add", "bundled:fashion"]
STORED = ["models", "profile", "x", "--repository", "y"]


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        (ADD, ["--to", "y"], ["--repository", "y"]),
        (ADD, ["--to=y", "--weights", "w.pth"], ["--repository=y", "--checkpoint", "w.pth"]),
        (ADD, ["--repository", "y", "--seconds", "3"], ["--repository", "y", "--profile-time", "3s"]),
        (["profile"], ["--seconds", "7.5"], ["--profile-time", "7.5s"]),
        (["profile"], ["--seconds=1e-2"], ["--profile-time=10ms"]),
        (STORED, ["--seconds=0.2"], ["--profile-time", "200ms"]),
        (["models", "fit-head", "x", "--repository", "y", "--data", "z"], ["--seconds", "1"], ["--profile-time", "1s"]),
        (["plan", "--rate", "1", "--budget", "1s"], ["--plot", "a.svg"], ["--picture", "a.svg"]),
        (["tune", "--data", "z"], ["--images", "9"], ["--limit", "9"]),
        (["models", "tune", "x", "--repository", "y", "--data", "z"], ["--images", "9"], ["--limit", "9"]),
    ],
    ids=str,
)
def test_flags_are_taken_by_their_names_of_before_with_a_warning(
    command: list[str], old: list[str], new: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parse = main._parser().parse_args
    expected = parse([*command, *new])
    assert capsys.readouterr().err == ""
    assert parse([*command, *old]) == expected
    said = capsys.readouterr().err.splitlines()
    names = zip((one for one in old if "--" in one), (one for one in new if "--" in one), strict=True)
    changed = [(was.partition("=")[0], now.partition("=")[0]) for was, now in names if was != now]
    names_of_command = " ".join(command[: 2 if command[0] == "models" else 1])
    assert said == [
        f"tome-server {names_of_command}: {was} is now {now}; the next release takes no other name"
        for was, now in changed
    ]


@pytest.mark.parametrize("value", ["0", "-5", "many", "nan", "inf"])
def test_a_flags_old_name_takes_no_other_values_than_it_did(capsys: pytest.CaptureFixture[str], value: str) -> None:
    assert f"argument --profile-time: {value!r}" in wrong_usage(capsys, "profile", f"--seconds={value}")


def test_without_the_servers_packages_the_way_to_get_them_is_said() -> None:
    code = "import sys; sys.modules['pydantic'] = None; from tome_server.cli.main import main; main(['serve'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 1
    assert done.stderr.startswith("tome-server: ")
    assert "pip install 'tome-serving[server]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "kept"), [({}, main.KERNELS_KEPT), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "10"}, "10")]
)
def test_kernels_of_all_shapes_are_kept_unless_the_environment_says_otherwise(
    given: dict[str, str], kept: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment = dict(given)
    monkeypatch.setattr(os, "environ", environment)
    with pytest.raises(SystemExit):
        main.main(["evaluate", "--data", "x", "--output", str(tmp_path / "no" / "folder")])
    assert environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == kept
