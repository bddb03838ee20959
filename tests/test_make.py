"""What the Makefile does before it installs anything."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what make looks at first, and an interpreter that says it is Python 3.13."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python3.13"
    python.write_text("#!/bin/sh\necho 3.13\n")
    python.chmod(0o755)
    return tmp_path


def make(folder: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *args], cwd=folder, capture_output=True, text=True, check=False, env=plain)


def test_an_interpreter_that_is_not_supported_is_refused_at_once_in_words(clone: Path) -> None:
    python = clone / "python3.13"
    for target in ("demo", "test", "stack"):
        done = make(clone, target, f"PYTHON={python}")
        assert done.returncode != 0
        said = f"make: {python} is Python 3.13, and 3.11 3.12 are supported; make PYTHON=python3.12 names another"
        assert done.stderr.splitlines()[0] == said
        assert done.stdout == ""
    assert not (clone / ".venv").exists()


def test_an_interpreter_that_is_not_there_is_named(clone: Path) -> None:
    done = make(clone, "demo", "PYTHON=python2.1")
    assert done.stderr.splitlines()[0] == "make: there is no python2.1; make PYTHON=... names another"


def test_the_demo_and_the_stack_install_what_a_server_takes_and_tests_what_development_does(clone: Path) -> None:
    for target, extras in (("demo", ["server"]), ("stack", ["server"]), ("lint", ["server", "dev"])):
        planned = make(clone, "--dry-run", target, f"PYTHON={clone}/python3.13").stdout
        assert [extra for extra in ("server", "dev") if f"-e '.[{extra}]'" in planned] == extras
        assert "1.1 GB" in planned  # said before it begins
