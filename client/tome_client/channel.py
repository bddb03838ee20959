"""How a client connects: transport security, retries, load balancing and limits of its channel."""

from __future__ import annotations

import json
from typing import Any, Final

import grpc

from tome_client.version import __version__

# What a server with default limits takes: anything longer would be refused there, and tried again in vain.
DEFAULT_MAX_MESSAGE_BYTES: Final = 32 * 1024 * 1024

# UNAVAILABLE: loading, draining or gone; another address may answer. RESOURCE_EXHAUSTED: the
# queue is full; the server's grpc-retry-pushback-ms trailer, if it sends one, says when to come
# back or, being negative, not to. Nothing else can go differently the second time.
_RETRY_POLICY: Final = {
    "maxAttempts": 4,
    "initialBackoff": "0.05s",
    "maxBackoff": "1s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
}

# Stops retrying while more than about one call in ten fails, lest retries feed an overload.
_RETRY_THROTTLING: Final = {"maxTokens": 100, "tokenRatio": 0.1}


def channel_credentials(
    tls: bool | grpc.ChannelCredentials, root_certificates: bytes | None
) -> grpc.ChannelCredentials | None:
    """Returns what secures the channel; None for plain text.

    Raises:
        ValueError: Root certificates beside credentials that have their own.
    """
    if isinstance(tls, grpc.ChannelCredentials):
        if root_certificates is not None:
            raise ValueError("root_certificates are part of the credentials given as tls")
        return tls
    # Whoever names the certificates to trust does not mean plain text.
    if tls or root_certificates is not None:
        return grpc.ssl_channel_credentials(root_certificates)
    return None


def channel_options(*, retries: bool, max_send_bytes: int, max_receive_bytes: int) -> list[tuple[str, Any]]:
    """Returns the channel arguments that both clients use."""
    service_config: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if retries:
        service_config["methodConfig"] = [{"name": [{}], "retryPolicy": _RETRY_POLICY}]
        service_config["retryThrottling"] = _RETRY_THROTTLING
    return [
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
    ]
