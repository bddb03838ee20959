"""Which device a name stands for."""

import torch

from tome_server.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu", "cuda" or "cuda:N". Raises ConfigError if it isn't there.

    On CUDA has torch attend without cuDNN from then on.
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
    # torch prefers it on the H100. It makes a plan for each number of images and of tokens, in each thread anew, which
    # takes longer than a batch; and with merging almost every block of almost every batch would be another.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device
