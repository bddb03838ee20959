"""TLS on the gRPC port, with certificates that may be exchanged while the server runs."""

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from tome_server.errors import ConfigError
from tome_server.rpc.files import State, state

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of the server's identity, and of whom it lets in."""

    certificate: Path
    key: Path
    client_ca: Path | None = None
    """Certificates of the authorities that must have signed a client's; without it, clients need none."""

    def paths(self) -> tuple[Path, ...]:
        """Return the files there are."""
        return (self.certificate, self.key, *([self.client_ca] if self.client_ca else []))


def credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Read the files, and again for the first handshake after any of them has changed.

    What can't be used then is logged, and the handshake done with what was good before. Raises ConfigError if the files
    can't be used now, of which gRPC would only say that the port can't.
    """
    certificates = _Certificates(files)
    return grpc.dynamic_ssl_server_credentials(
        certificates.first,
        certificates.changed,  # type: ignore[arg-type]  # None is "no change", which the stubs don't know
        require_client_authentication=files.client_ca is not None,
    )


class _Certificates:
    """What the files held when they were last good."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._said = ""
        try:
            self._seen: State | None = state(*files.paths())
            self.first = _read(files)
        except OSError as error:
            raise ConfigError(f"tls: {error.filename}: {error.strerror}") from error

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what the files hold, None if that is nothing new. gRPC asks before each handshake, in its threads."""
        try:
            now = state(*self._files.paths())
            if now == self._seen:
                return None
            self._seen = now
            found = _read(self._files)
            if state(*self._files.paths()) != now:  # written meanwhile: certificate and key may not belong together
                self._seen = None
                return None
        except (ConfigError, OSError) as error:
            if str(error) != self._said:
                self._said = str(error)
                log.error("the certificates were not exchanged, those before stay in use: %s", error)  # noqa: TRY400
            return None
        self._said = ""
        log.info("certificates read anew from %s", self._files.certificate)
        return found


def _read(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        # An empty password, so that nobody is asked for one.
        context.load_cert_chain(files.certificate, files.key, password="")
    except ssl.SSLError as error:
        raise ConfigError(
            f"tls: {files.certificate} and {files.key} are no certificate and its key: {error}"
        ) from error
    try:
        roots = files.client_ca.read_bytes() if files.client_ca else None
        if roots is not None:
            context.load_verify_locations(cadata=roots.decode("ascii", "replace"))
    except ssl.SSLError as error:
        raise ConfigError(f"tls: {files.client_ca} holds no certificates: {error}") from error
    return grpc.ssl_server_certificate_configuration([(files.key.read_bytes(), files.certificate.read_bytes())], roots)
