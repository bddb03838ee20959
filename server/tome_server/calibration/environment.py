"""The machine and the software that measurements depend on, whatever the model."""

import importlib.metadata
import platform
import re
from pathlib import Path

import torch

from tome_server.merging.cpu import matching_c


def software_versions(device: torch.device) -> dict[str, str]:
    """Return what runs models, by its name in keys: versions of libraries, and whether tokens are merged in C."""
    return {
        "merging": "C" if matching_c.BUILT and device.type == "cpu" else "torch",
        "torch": torch.__version__,
        "timm": importlib.metadata.version("timm"),
        "tome_serving": _own_version(),
    }


def _own_version() -> str:
    try:
        return importlib.metadata.version("tome-serving")
    except importlib.metadata.PackageNotFoundError:  # run from its source, not installed
        return "0+unknown"


def device_name(device: torch.device) -> str:
    """Return the name that the maker of the processor or GPU gave it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name(Path("/proc/cpuinfo")) or platform.processor() or platform.machine()


def _cpu_name(cpuinfo: Path) -> str | None:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None
