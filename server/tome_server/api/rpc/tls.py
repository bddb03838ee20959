"""TLS on the gRPC port, with certificates that may be replaced while the server runs."""

import logging
import math
import ssl
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import grpc

from tome_server.api.watched_file import State, state
from tome_server.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the server's identity, and the authorities that it accepts."""

    certificate: Path
    key: Path
    client_ca: Path | None = None
    """Certificates of the authorities that must have signed a client's; without it, clients need none."""

    def paths(self) -> tuple[Path, ...]:
        """Return the files that are set."""
        return (self.certificate, self.key, *([self.client_ca] if self.client_ca else []))


@dataclass(frozen=True)
class _Read:
    """The contents of the files."""

    configuration: grpc.ServerCertificateConfiguration
    expiry: float
    """Unix time at which the first of the certificates ends; NaN if that can't be read."""


class Certificates:
    """The last usable contents of the files.

    They are read again at the first handshake or query after any of them has changed. Unusable contents are logged, and
    the previous ones stay in use. Raises ConfigError if the files can't be used now; gRPC's own error names only the
    port.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._said = ""
        # Handshakes run in gRPC's threads, and the expiry is read from another.
        self._looking = Lock()
        try:
            self._seen: State | None = state(*files.paths())
            self._good = self._handed = _read(files)
        except OSError as error:
            raise ConfigError(f"tls: {error.filename}: {error.strerror}") from error

    def credentials(self) -> grpc.ServerCredentials:
        """Return the credentials for a port."""
        return grpc.dynamic_ssl_server_credentials(
            self._handed.configuration,
            self._changed,  # type: ignore[arg-type]  # None is "no change", which the stubs don't know
            require_client_authentication=self._files.client_ca is not None,
        )

    def expiry(self) -> float:
        """Return the Unix time at which the first certificate of the next handshake expires."""
        with self._looking:
            self._look()
            return self._good.expiry

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the new configuration, None if gRPC has it already. gRPC calls this before each handshake."""
        with self._looking:
            self._look()
            if self._good is self._handed:
                return None
            self._handed = self._good
            return self._good.configuration

    def _look(self) -> None:
        """Read the files if they have changed."""
        try:
            now = state(*self._files.paths())
            if now == self._seen:
                return
            self._seen = now
            found = _read(self._files)
            if state(*self._files.paths()) != now:  # written meanwhile: certificate and key may not belong together
                self._seen = None
                return
        except (ConfigError, OSError) as error:
            if str(error) != self._said:
                self._said = str(error)
                log.error("the certificates were not exchanged, those before stay in use: %s", error)  # noqa: TRY400
            return
        self._said = ""
        self._good = found
        log.info("certificates read anew from %s", self._files.certificate)


def _read(files: TlsFiles) -> _Read:
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        # An empty password, so that OpenSSL doesn't prompt for one.
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
    chain = files.certificate.read_bytes()
    return _Read(grpc.ssl_server_certificate_configuration([(files.key.read_bytes(), chain)], roots), _expiry(chain))


def _expiry(chain: bytes) -> float:
    """Return the Unix time at which the first of some certificates ends, NaN if only OpenSSL can read them."""
    # Imported here because it is not small, and many servers have no certificate.
    from cryptography import x509

    try:
        return min(one.not_valid_after_utc.timestamp() for one in x509.load_pem_x509_certificates(chain))
    except ValueError:
        return math.nan
