"""Fixtures of a scripted engine."""

import contextlib

with contextlib.suppress(ModuleNotFoundError):  # where only the tests of CUDA run
    from scripted_engine import bench, bundled, clock, start, stopped  # noqa: F401
