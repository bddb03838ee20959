"""How the commands connect: server, TLS, token and health checks, from the command line and the environment."""

from __future__ import annotations

import argparse
import codecs
import os
from pathlib import Path
from typing import TypedDict

from tome_api.parser import Parser

TOKEN = "TOME_TOKEN"


class Connection(TypedDict):
    """Arguments of Client, AsyncClient and run_load."""

    tls: bool
    root_certificates: bytes | None
    client_certificate: bytes | None
    client_key: bytes | None
    token: str | None
    health_checks: bool


def connection_options(default: str | None = None) -> Parser:
    """Returns a parent parser of the arguments; those that are left out become `default`."""
    parent = Parser(add_help=False)
    options = parent.add_argument_group("connection")
    options.add_argument(
        "--target",
        default=default or os.environ.get("TOME_TARGET") or "localhost:8500",
        metavar="HOST:PORT",
        help="the server's address (default: $TOME_TARGET or localhost:8500)",
    )
    options.add_argument("--tls", action="store_true", default=default or False, help="connect with TLS")
    options.add_argument(
        "--ca",
        type=Path,
        default=default,
        metavar="FILE",
        help="PEM root certificates to trust instead of the system's; implies --tls",
    )
    options.add_argument(
        "--certificate",
        type=Path,
        default=default,
        metavar="FILE",
        help="PEM certificate to show to the server (mTLS); implies --tls and needs --key",
    )
    options.add_argument("--key", type=Path, default=default, metavar="FILE", help="PEM private key of --certificate")
    # There is no flag for the token itself: every process of the machine can read a command line.
    options.add_argument(
        "--token-file",
        type=Path,
        default=default,
        metavar="FILE",
        help=f"file with the bearer token to send (default: the token in ${TOKEN}, if set)",
    )
    options.add_argument(
        "--health-checks",
        action="store_true",
        default=default or False,
        help="skip servers that report that they are loading or draining; not for use through a proxy",
    )
    return parent


def connection(args: argparse.Namespace) -> Connection:
    """Returns the connection that the arguments describe, with the contents of their files.

    Raises:
        OSError: A file cannot be read.
        ValueError: The token's file is not text.
    """
    return Connection(
        tls=args.tls,
        root_certificates=_pem(args.ca),
        client_certificate=_pem(args.certificate),
        client_key=_pem(args.key),
        token=(_text(args.token_file) if args.token_file else os.environ.get(TOKEN, "")).strip() or None,
        health_checks=args.health_checks,
    )


def _pem(file: Path | None) -> bytes | None:
    # OpenSSL does not recognise the first line after a byte order mark.
    return file.read_bytes().removeprefix(codecs.BOM_UTF8) if file else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        # The message leaves out the bytes, since they may be most of a token.
        raise ValueError(f"{file}: the file is not UTF-8 text: {error.reason}") from None
