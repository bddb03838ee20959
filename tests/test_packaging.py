"""What is installed: stubs that match the contract, a client without the server's weight, a complete wheel."""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tome_server.merging.cpu import attention_c, matching_c

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
CONTRACTS = ("tome_api/v1", "tome_api/oip")
SCRIPTS = [
    script.name
    for script in importlib.metadata.entry_points(group="console_scripts")
    if script.dist and script.dist.name == "tome-serving"
]


def run(command: list[str], folder: Path = REPOSITORY) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_stubs_are_what_make_proto_generates(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="needs the dev extra")
    recipe = run(["make", "--dry-run", "--no-print-directory", "--assume-old=.venv/.installed", "proto", f"BIN={BIN}"])
    assert recipe.count("_out=protos") + recipe.count("_out=quiet:protos") == 4
    elsewhere = recipe.replace("_out=protos", f"_out={tmp_path}").replace("_out=quiet:protos", f"_out=quiet:{tmp_path}")
    run(["sh", "-c", elsewhere])
    for contract in CONTRACTS:
        generated = {path.name: path.read_text() for path in (tmp_path / contract).iterdir()}
        kept = {path.name: path.read_text() for path in (REPOSITORY / "protos" / contract).glob("*_pb2*")}
        assert generated == kept, "run `make proto`"


def test_the_client_imports_nothing_of_the_servers() -> None:
    heavy = ("torch", "torchvision", "timm", "numpy", "PIL", "pydantic", "yaml", "matplotlib", "tome_server")
    code = f"import sys, tome_client, tome_client.cli; print([name for name in {heavy} if name in sys.modules])"
    assert run([sys.executable, "-c", code]) == "[]\n"


def test_the_commands_are_installed() -> None:
    assert sorted(SCRIPTS) == ["tome-client", "tome-server"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_command_answers_help_without_importing_torch(script: str) -> None:
    assert run([str(BIN / script), "--help"]).startswith(f"usage: {script}")
    module = script.replace("-", "_")
    code = f"import sys, {module}.cli; print('torch' in sys.modules)"
    assert run([sys.executable, "-c", code]) == "False\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in the wheel, which is built of a copy, for setuptools builds beside the sources."""
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("needs setuptools and pip")
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("protos", "server", "client"):
        shutil.copytree(
            REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(built), "."], source)
    [file] = built.iterdir()
    with zipfile.ZipFile(file) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel: set[str]) -> None:
    sources = {
        path.relative_to(folder).as_posix()
        for folder in (REPOSITORY / name for name in ("protos", "server", "client"))
        for path in folder.glob("tome_*/**/*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".c", ".h", ".so")
    }
    assert {name for name in wheel if not name.endswith(".so")} == sources


def test_the_wheel_holds_what_is_compiled_for_any_python(wheel: set[str]) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    compiled = {f"tome_server/merging/cpu/{name}.abi3.so" for name in ("_matching", "_attention")}
    assert {name for name in wheel if name.endswith(".so")} == compiled


def test_what_is_compiled_is_there_where_it_can_be() -> None:
    """Else all others would be green with torch's operators alone."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    assert matching_c.BUILT
    assert attention_c.BUILT


@pytest.mark.parametrize(
    "name",
    [
        "tome_api/py.typed",
        "tome_api/v1/inference.proto",
        "tome_api/v1/inference_pb2.pyi",
        "tome_api/oip/open_inference.proto",
        "tome_client/py.typed",
        "tome_server/py.typed",
        "tome_server/models/bundled/fashion/config.yaml",
        "tome_server/models/bundled/fashion/labels.txt",
        "tome_server/models/bundled/fashion/samples/labels.json",
        "tome_server/models/bundled/fashion/weights.safetensors",
    ],
)
def test_the_wheel_holds_what_is_not_python(wheel: set[str], name: str) -> None:
    assert name in wheel
