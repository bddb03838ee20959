"""How a client connects: transport security, retries, load balancing and limits of its channel."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, Final, TypeAlias

import grpc

from tome_client.proxy import is_direct
from tome_client.version import __version__

# What a server with default limits takes: anything longer would be refused there, and tried again in vain.
DEFAULT_MAX_MESSAGE_BYTES: Final = 32 * 1024 * 1024

# UNAVAILABLE: loading, draining or gone; another address may answer. CANCELLED: so does gRPC end
# what has just arrived at a server that stops. RESOURCE_EXHAUSTED: the
# queue is full; the server's grpc-retry-pushback-ms trailer, if it sends one, says when to come
# back or, being negative, not to. Nothing else can go differently the second time. All pauses
# together, 1.2 s at the least, outlast the half second for which a draining server refuses.
_RETRY_POLICY: Final = {
    "maxAttempts": 5,
    "initialBackoff": "0.1s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED", "RESOURCE_EXHAUSTED"],
}

# Stops retrying while more than about one call in ten fails, lest retries feed an overload.
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
        ValueError: Certificates beside credentials that have their own; a certificate without its key.
    """
    given = [one for one in (root_certificates, client_certificate, client_key) if one is not None]
    if isinstance(tls, grpc.ChannelCredentials):
        if given:
            raise ValueError("certificates and keys are part of the credentials given as tls")
        return tls
    if (client_certificate is None) != (client_key is None):
        raise ValueError("a client's certificate and its key go together, and one is missing")
    # Whoever names certificates does not mean plain text.
    if tls or given:
        return grpc.ssl_channel_credentials(root_certificates, client_key, client_certificate)
    return None


def call_metadata(
    metadata: Iterable[tuple[str, str | bytes]], token: str | Callable[[], str] | None
) -> Callable[[], Metadata]:
    """Returns what gives the metadata of the next call.

    Raises:
        ValueError: What cannot be a token; so does what is returned, of a function's.
    """
    sent = tuple(metadata)
    if token is None:
        return lambda: sent
    if callable(token):
        return lambda: (*sent, ("authorization", _bearer(token())))
    fixed = (*sent, ("authorization", _bearer(token)))
    return lambda: fixed


def _bearer(token: str) -> str:
    # gRPC would refuse it too, and put it into the error.
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("a token is ASCII letters, digits and signs, without spaces or line breaks")
    return f"Bearer {token}"


def channel_options(
    target: str, *, retries: bool, health_checks: bool, max_send_bytes: int, max_receive_bytes: int
) -> list[tuple[str, Any]]:
    """Returns the channel arguments that both clients use."""
    service_config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if health_checks:
        # Of the server as a whole, which every health service knows.
        service_config["healthCheckConfig"] = {"serviceName": ""}
    if retries:
        service_config["methodConfig"] = [{"name": [{}], "retryPolicy": _RETRY_POLICY}]
        service_config["retryThrottling"] = _RETRY_THROTTLING
    options = [
        ("grpc.service_config", json.dumps(service_config)),
        # What a DNS TXT record says must not replace the above.
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.enable_retries", int(retries)),
        # gRPC keeps 256 KiB of a call for a retry, and does not retry a longer one.
        ("grpc.per_rpc_retry_buffer_size", max_send_bytes),
        ("grpc.max_send_message_length", max_send_bytes),
        ("grpc.max_receive_message_length", max_receive_bytes),
        # Finds a dead connection under a waiting call, no oftener than servers put up with.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.primary_user_agent", f"tome-client/{__version__}"),
        # Each channel connects by itself. gRPC would let channels to one address share a connection, and two of which
        # only one checks health race in its C core, which can end the process by SIGSEGV; the load generator's would
        # be one connection.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if is_direct(target):
        options.append(("grpc.enable_http_proxy", 0))
    return options
