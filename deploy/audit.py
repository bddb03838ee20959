"""Asks for known vulnerabilities of the versions in constraints.txt.

    python deploy/audit.py

Exits with 0 if there are none, 1 if there are, and 3 if nobody could be asked: a network without the package index's
own reports, which mirrors seldom have.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
FOUND, UNKNOWN = 1, 3


class NobodyToAskError(Exception):
    """The index gives no reports here."""


def ask(pins: list[str]) -> list[dict[str, Any]]:
    """Return what is known of pinned packages. Raises NobodyToAskError, with a reason, if nothing could be asked."""
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
        raise NobodyToAskError(lines[-1]) from None
    if all("skip_reason" in package for package in packages):
        raise NobodyToAskError(packages[0]["skip_reason"])
    return packages


def main() -> int:
    """Print what is known, a line for each vulnerability."""
    pins = [line for line in CONSTRAINTS.read_text().splitlines() if "==" in line and not line.startswith("#")]
    try:
        # Of one first, one that every index has: where that is unknown the others would be asked in vain.
        ask([pin for pin in pins if pin.startswith("numpy==")])
        packages = ask(pins)
    except NobodyToAskError as error:
        print(f"nothing could be asked: {error}")
        return UNKNOWN
    asked = [package for package in packages if "skip_reason" not in package]
    found = [(package, one) for package in asked for one in package["vulns"]]
    for package, one in found:
        fixed = ", ".join(one["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {one['id']}, fixed in {fixed}")
    print(f"{len(asked)} of {len(packages)} packages asked about: {len(found)} known vulnerabilities")
    return FOUND if found else 0


if __name__ == "__main__":
    sys.exit(main())
