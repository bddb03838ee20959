"""Makes timm importable beside a CPU-only torch: import this before timm.

timm imports torchvision, whose Linux wheel on the registry is built for CUDA. Beside a CPU-only torch its C++
extension cannot load, and torchvision's Python code then fails registering implementations for operators that nobody
declared. Declaring them is enough for all that timm uses; the operators themselves stay unavailable.
"""

import torch

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _declare_missing_operators() -> "torch.library.Library | None":
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    else:
        return None
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)  # type: ignore[no-untyped-call]
    return library


# Operators live as long as the library that declared them.
_library = _declare_missing_operators()
