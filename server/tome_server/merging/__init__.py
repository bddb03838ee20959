"""Token Merging (ToMe, arXiv 2210.09461) for timm's Vision Transformers. Usable alone, as a library.

merged = merge(timm.create_model("vit_base_patch16_224", pretrained=True).eval())
merged(images, r=8).logits

The package's modules import downwards only, from `cpu` to `matching`; pyproject.toml has the layers. This facade is
above all of them: it imports `cpu` for `pack`, and to have its kernels registered whichever module is imported first.
"""

import tome_server.merging.timm_import  # noqa: F401  isort: skip

from tome_server.mac_count import MacCount
from tome_server.merging.cpu.packing import pack, packable
from tome_server.merging.macs import macs
from tome_server.merging.model import MergedModel, MergedOutput, merge, unmerge
from tome_server.merging.schedule import Schedule, tokens_per_block
from tome_server.merging.support import UnsupportedModelError

__all__ = [
    "MacCount",
    "MergedModel",
    "MergedOutput",
    "Schedule",
    "UnsupportedModelError",
    "macs",
    "merge",
    "pack",
    "packable",
    "tokens_per_block",
    "unmerge",
]
