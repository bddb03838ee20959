"""How a client connects: transport security, retries, load balancing and limits of its channel."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

import grpc

from tome_client.proxy import is_direct
from tome_client.version import __version__

# The longest message that a server with default limits takes. It would refuse a longer one at every try.
DEFAULT_MAX_MESSAGE_BYTES: Final = 32 * 1024 * 1024

# UNAVAILABLE: the server is loading, draining or gone; another address may answer. CANCELLED: gRPC ends calls so that
# have just arrived at a server that stops. RESOURCE_EXHAUSTED: the queue is full; the server's grpc-retry-pushback-ms
# trailer, if it sends one, says when to try again or, if negative, not to. With any other code a second try would end
# like the first. The pauses add up to at least 1.2 s, longer than the half second for which a draining server refuses.
_RETRY_POLICY: Final = {
    "maxAttempts": 5,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED", "RESOURCE_EXHAUSTED"],
}

# Stops retrying while more than about one call in ten fails, so that retries don't add to an overload.
_RETRY_THROTTLING: Final = {"maxTokens": 100, "tokenRatio": 0.1}


Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]


def channel_credentials(
    tls: bool | grpc.ChannelCredentials,
    root_certificates: bytes | None = None,
    client_certificate: bytes | None = None,
    client_key: bytes | None = None,
) -> grpc.ChannelCredentials | None:
    """Returns what secures the channel; None for plain text.

    Raises:
        ValueError: Certificates are given beside credentials that have their own, or a certificate without its key.
    """
    given = [one for one in (root_certificates, client_certificate, client_key) if one is not None]
    if isinstance(tls, grpc.ChannelCredentials):
        if given:
            raise ValueError("certificates and keys are part of the credentials given as tls")
        return tls
    if (client_certificate is None) != (client_key is None):
        raise ValueError("a client's certificate and its key go together, and one is missing")
    # Certificates imply TLS.
    if tls or given:
        return grpc.ssl_channel_credentials(root_certificates, client_key, client_certificate)
    return None


def call_metadata(
    metadata: Iterable[tuple[str, str | bytes]], token: str | Callable[[], str] | None
) -> Callable[[], Metadata]:
    """Returns a function that returns the metadata of the next call.

    Raises:
        ValueError: The token is not valid. If `token` is a function, the returned function raises it.
    """
    sent = tuple(metadata)
    if token is None:
        return lambda: sent
    if callable(token):
        return lambda: (*sent, ("authorization", _bearer(token())))
    fixed = (*sent, ("authorization", _bearer(token)))
    return lambda: fixed


def _bearer(token: str) -> str:
    # gRPC would refuse such a token too, but would show it in the error.
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("a token is ASCII letters, digits and signs, without spaces or line breaks")
    return f"Bearer {token}"


def channel_options(
    target: str, *, retries: bool, health_checks: bool, max_send_bytes: int, max_receive_bytes: int
) -> list[tuple[str, Any]]:
    """Returns the channel arguments that both clients use."""
    service_config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if health_checks:
        # The empty name stands for the server as a whole; every health service knows it.
        service_config["healthCheckConfig"] = {"serviceName": ""}
    if retries:
        service_config["methodConfig"] = [{"name": [{}], "retryPolicy": _RETRY_POLICY}]
        service_config["retryThrottling"] = _RETRY_THROTTLING
    options = [
        ("grpc.service_config", json.dumps(service_config)),
        # A service config in a DNS TXT record must not replace this one.
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.enable_retries", int(retries)),
        # By default gRPC keeps 256 KiB of a call for a retry, and does not retry a longer one.
        ("grpc.per_rpc_retry_buffer_size", max_send_bytes),
        ("grpc.max_send_message_length", max_send_bytes),
        ("grpc.max_receive_message_length", max_receive_bytes),
        # Detects a dead connection under a waiting call. Servers refuse pings that are more frequent.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.primary_user_agent", f"tome-client/{__version__}"),
        # Each channel has a connection of its own. Otherwise gRPC lets channels to one address share a connection. If
        # only one of them checks health, they race in gRPC's C core, which can end the process by SIGSEGV. And all
        # channels of the load generator would be one connection.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if is_direct(target):
        options.append(("grpc.enable_http_proxy", 0))
    return options
