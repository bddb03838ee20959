"""The TLS of the gRPC port: who is let in, and what happens when files are exchanged under a running server."""

import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tome_server.api.rpc.health import HealthServicer
from tome_server.api.rpc.tls import Certificates, TlsFiles
from tome_server.errors import ConfigError

PATIENCE = 60.0


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def other_ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(ca: trustme.CA, tmp_path: Path) -> TlsFiles:
    return identity(tmp_path, ca)


def identity(folder: Path, ca: trustme.CA, end: datetime | None = None) -> TlsFiles:
    """Write a certificate of localhost that `ca` signed, and that ends at `end`."""
    files = TlsFiles(folder / "server.pem", folder / "server.key")
    issued = ca.issue_cert("localhost", not_after=end)
    files.certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    files.key.write_bytes(issued.private_key_pem.bytes())
    return files


def root(ca: trustme.CA) -> bytes:
    return ca.cert_pem.bytes()


@asynccontextmanager
async def serving(certificates: Certificates) -> AsyncIterator[str]:
    """Run a server for as long as the test takes; yields its address."""
    server = grpc.aio.server()
    health = HealthServicer([""])
    health.ready()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_secure_port("localhost:0", certificates.credentials())
    await server.start()
    try:
        yield f"localhost:{port}"
    finally:
        await server.stop(None)


@pytest.fixture
async def target(files: TlsFiles) -> AsyncIterator[str]:
    async with serving(Certificates(files)) as target:
        yield target


def channel(target: str, roots: bytes, client: trustme.LeafCert | None = None) -> grpc.aio.Channel:
    pair = (None, None)
    if client is not None:
        pair = (client.private_key_pem.bytes(), b"".join(blob.bytes() for blob in client.cert_chain_pems))
    # Else gRPC would let channels of equal credentials share a connection, and do no new handshake.
    options = [("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(roots, *pair), options)


async def status(channel: grpc.aio.Channel) -> int:
    return (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)).status


async def let_in(target: str, roots: bytes, client: trustme.LeafCert | None = None) -> bool:
    """Whether a new connection that trusts `roots` comes about."""
    async with channel(target, roots, client) as one:
        try:
            return await status(one) == health_pb2.HealthCheckResponse.SERVING
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017
            return False


async def test_a_certificate_exchanged_under_a_running_server_serves_new_connections_and_keeps_old_ones(
    target: str, files: TlsFiles, ca: trustme.CA, other_ca: trustme.CA
) -> None:
    async with channel(target, root(ca)) as before:
        assert await status(before)
        assert not await let_in(target, root(other_ca))
        identity(files.certificate.parent, other_ca)
        assert await let_in(target, root(other_ca))
        assert not await let_in(target, root(ca))
        assert await status(before)


async def test_a_link_turned_to_another_folder_is_an_exchange(
    tmp_path: Path, ca: trustme.CA, other_ca: trustme.CA
) -> None:
    """As an orchestrator exchanges a mounted secret."""
    for name, by in (("old", ca), ("new", other_ca)):
        (tmp_path / name).mkdir()
        identity(tmp_path / name, by)
    data = tmp_path / "data"
    data.symlink_to("old")
    async with serving(Certificates(TlsFiles(data / "server.pem", data / "server.key"))) as target:
        assert await let_in(target, root(ca))
        (tmp_path / "next").symlink_to("new")
        (tmp_path / "next").rename(data)
        assert await let_in(target, root(other_ca))
        assert not await let_in(target, root(ca))


@pytest.mark.parametrize("harm", ["junk", "another key", "gone"])
async def test_files_that_do_not_serve_are_said_once_and_change_nothing_until_they_do(
    target: str, files: TlsFiles, ca: trustme.CA, other_ca: trustme.CA, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    match harm:
        case "junk":
            files.certificate.write_text("junk")
        case "another key":
            files.key.write_bytes(other_ca.issue_cert("localhost").private_key_pem.bytes())
        case _:
            files.key.unlink()
    with caplog.at_level(logging.INFO, "tome_server"):
        assert await let_in(target, root(ca))
        assert await let_in(target, root(ca))
        (said,) = (record.message for record in caplog.records)
        assert said.startswith("the certificates were not exchanged, those before stay in use: ")
        assert said.endswith(f"No such file or directory: '{files.key}'") == (harm == "gone")
        identity(files.certificate.parent, other_ca)
        assert await let_in(target, root(other_ca))
        assert caplog.records[-1].message == f"certificates read anew from {files.certificate}"


async def test_with_a_client_ca_only_its_clients_are_let_in(
    files: TlsFiles, ca: trustme.CA, other_ca: trustme.CA
) -> None:
    client_ca = files.key.parent / "clients.pem"
    client_ca.write_bytes(root(other_ca))
    async with serving(Certificates(TlsFiles(files.certificate, files.key, client_ca))) as target:
        known, stranger = other_ca.issue_cert("client"), ca.issue_cert("client")
        assert await let_in(target, root(ca), known)
        assert not await let_in(target, root(ca), stranger)
        assert not await let_in(target, root(ca))
        client_ca.write_bytes(root(ca))
        assert await let_in(target, root(ca), stranger)
        assert not await let_in(target, root(ca), known)


async def test_who_asks_when_the_certificate_ends_does_not_keep_it_from_being_exchanged(
    files: TlsFiles, ca: trustme.CA, other_ca: trustme.CA
) -> None:
    ends = [datetime.now(UTC).replace(microsecond=0) + timedelta(days=days) for days in (30, 90)]
    identity(files.key.parent, ca, ends[0])
    certificates = Certificates(files)
    async with serving(certificates) as target:
        assert certificates.expiry() == ends[0].timestamp()
        assert await let_in(target, root(ca))
        identity(files.key.parent, other_ca, ends[1])
        assert certificates.expiry() == ends[1].timestamp()
        assert await let_in(target, root(other_ca))
        files.certificate.write_text("junk")
        assert certificates.expiry() == ends[1].timestamp()


def test_of_several_certificates_the_first_to_end_counts(files: TlsFiles, ca: trustme.CA) -> None:
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(days=3)
    identity(files.key.parent, ca, soon)
    files.certificate.write_bytes(files.certificate.read_bytes() + root(ca))
    assert Certificates(files).expiry() == soon.timestamp()


def test_a_certificate_whose_end_cannot_be_read_serves_all_the_same(files: TlsFiles) -> None:
    written = files.certificate.read_bytes().replace(b" CERTIFICATE-", b" TRUSTED CERTIFICATE-")
    files.certificate.write_bytes(written)
    assert math.isnan(Certificates(files).expiry())


def test_files_that_cannot_be_used_are_named(files: TlsFiles, tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    for wrong, text in (
        (TlsFiles(junk, files.key), f"tls: {junk} and {files.key} are no certificate and its key: "),
        (TlsFiles(tmp_path / "no.pem", files.key), f"tls: {tmp_path / 'no.pem'}: No such file or directory"),
        (TlsFiles(files.certificate, files.key, junk), f"tls: {junk} holds no certificates: "),
        (TlsFiles(files.certificate, files.key, tmp_path / "no.pem"), f"tls: {tmp_path / 'no.pem'}: No such file"),
    ):
        with pytest.raises(ConfigError) as caught:
            Certificates(wrong)
        assert str(caught.value).startswith(text)
