"""Looks up known vulnerabilities of the versions in constraints.txt.

    python deploy/audit.py

Exits with 0 if there are none, 1 if there are, and 3 if the package index here has no reports: mirrors seldom have
them.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
FOUND, UNKNOWN = 1, 3


class NoReportsError(Exception):
    """The package index here has no reports."""


def reports(pins: list[str]) -> list[dict[str, Any]]:
    """Return pip-audit's report of each pinned package. Raises NoReportsError, with a reason, if there are none."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins))
        file.flush()
        audit = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
        command = [*audit, "--format", "json", "--timeout", "15", "-r", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        lines = done.stderr.strip().splitlines() or ["pip-audit said nothing"]
        raise NoReportsError(lines[-1]) from None
    if all("skip_reason" in package for package in packages):
        raise NoReportsError(packages[0]["skip_reason"])
    return packages


def main() -> int:
    """Print what is known, a line for each vulnerability."""
    pins = [line for line in CONSTRAINTS.read_text().splitlines() if "==" in line and not line.startswith("#")]
    try:
        # First of one package that every index has: if there is no report of it, there are none of the others.
        reports([pin for pin in pins if pin.startswith("numpy==")])
        packages = reports(pins)
    except NoReportsError as error:
        print(f"the package index gives no reports: {error}")
        return UNKNOWN
    reported = [package for package in packages if "skip_reason" not in package]
    found = [(package, one) for package in reported for one in package["vulns"]]
    for package, one in found:
        fixed = ", ".join(one["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {one['id']}, fixed in {fixed}")
    print(f"{len(reported)} of {len(packages)} packages have reports: {len(found)} known vulnerabilities")
    return FOUND if found else 0


if __name__ == "__main__":
    sys.exit(main())
