"""Merged models on the CPU: packed weights, threads, and the parts written in C."""
