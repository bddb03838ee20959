"""How torch says that a device lacks memory."""

import torch

# Where it has no type of error for that.
_SIGNS = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def lacks_memory(error: Exception) -> bool:
    """Return whether that is what `error` says."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
