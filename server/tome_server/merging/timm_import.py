"""Makes timm importable with a CPU-only torch. Import this module before timm.

timm imports torchvision, whose published Linux wheel is built for CUDA. With a CPU-only torch its C++ extension can't
load, and torchvision's Python code then fails to register implementations of operators that the extension would have
declared. Declaring them here is enough for everything that timm uses; the operators themselves stay unavailable.
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


# Operators stay declared as long as this object lives.
_library = _declare_missing_operators()
