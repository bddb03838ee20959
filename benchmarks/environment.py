"""The environment that `tome-server` runs models in, and its import of timm. It must be imported before torch."""

import os

from tome_server.cli.main import KERNELS_KEPT

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS_KEPT)

import tome_server.merging.timm_import  # noqa: F401
