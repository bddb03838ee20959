"""The device that a name of the settings stands for."""

import torch

from tome_server.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """Return the device called "auto", "cpu", "cuda" or "cuda:N". Raises ConfigError if there is none.

    For a CUDA device, torch stops using cuDNN for attention from then on.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is none of auto, cpu, cuda, cuda:N") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigError(f"device {name!r} is none of auto, cpu, cuda, cuda:N")
    if not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: torch {torch.__version__} sees no CUDA device")
    if device.index is not None and device.index >= (count := torch.cuda.device_count()):
        raise ConfigError(f"device {name!r}: torch sees {count} CUDA device{'s' if count > 1 else ''}, from cuda:0 on")
    # torch prefers cuDNN on the H100. It makes a plan for each number of images and of tokens, in each thread anew, and
    # that takes longer than a batch. With merging, almost every block of almost every batch would need another plan.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device
