"""A model small enough to run in every test."""

from tests.server.tiny_model import _seed, model, quiet  # noqa: F401
