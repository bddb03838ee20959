"""Known vulnerabilities of what is pinned."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.chart import ROOT

SCRIPT = ROOT / "deploy/audit.py"
# What pip-audit prints of a package, where the index has reports.
CLEAN = {"name": "numpy", "version": "2.4.6", "vulns": []}
FLAWED = {"name": "numpy", "version": "2.4.6", "vulns": [{"id": "CVE-1", "fix_versions": ["2.4.7"]}]}
UNKNOWN = {"name": "numpy", "skip_reason": "Dependency not found"}


def audit() -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)


@pytest.mark.nightly
def test_no_pinned_dependency_has_a_known_vulnerability() -> None:
    done = audit()
    if done.returncode == 3:
        pytest.skip(f"{done.stdout.strip()}; run `make audit` on a network that reaches the package index itself")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("told", "status", "said"),
    [
        (json.dumps({"dependencies": [CLEAN]}), 0, "0 known vulnerabilities"),
        (json.dumps({"dependencies": [CLEAN, FLAWED]}), 1, "numpy 2.4.6: CVE-1, fixed in 2.4.7"),
        (json.dumps({"dependencies": [UNKNOWN]}), 3, "the package index gives no reports: Dependency not found"),
        ("", 3, "the package index gives no reports: no network"),
    ],
    ids=["none", "one", "index without reports", "no network"],
)
def test_no_vulnerabilities_differ_from_no_reports(
    told: str, status: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This stands in for pip-audit, whose answer changes by the day and with the network.
    (tmp_path / "pip_audit.py").write_text(f"import sys; print({told!r}); print('no network', file=sys.stderr)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    done = audit()
    assert done.returncode == status
    assert said in done.stdout
