"""The command `tome-client`, with a module for each of its commands."""

from tome_client.cli.command import argument_parser, main

__all__ = ["argument_parser", "main"]
