"""Asks for known vulnerabilities of the versions in constraints.txt.

    python deploy/audit.py

Exits with 0 if there are none, 1 if there are, and 3 if nobody could be asked: a network without the package index's
own reports, which mirrors seldom have.
"""

import json
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
FOUND, UNKNOWN = 1, 3


def main() -> int:
    """Print what is known, a line for each vulnerability."""
    audit = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
    command = [*audit, "--format", "json", "--timeout", "15", "-r", str(CONSTRAINTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        last = done.stderr.strip().splitlines()[-1:] or ["pip-audit said nothing"]
        print(f"nothing could be asked: {last[0]}")
        return UNKNOWN
    asked = [package for package in packages if "skip_reason" not in package]
    if not asked:
        print(f"nothing could be asked: {packages[0]['skip_reason'] if packages else 'no packages'}")
        return UNKNOWN
    found = [(package, one) for package in asked for one in package["vulns"]]
    for package, one in found:
        fixed = ", ".join(one["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {one['id']}, fixed in {fixed}")
    print(f"{len(asked)} of {len(packages)} packages asked about: {len(found)} known vulnerabilities")
    return FOUND if found else 0


if __name__ == "__main__":
    sys.exit(main())
