"""TLS for both doors, and when a server may be opened to other machines."""

from __future__ import annotations

import ipaddress
import ssl
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from engine.errors import BadConfig

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.config import TlsConfig


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def exposure_warning(host: str, tls: TlsConfig | None, *, keys: bool, insecure: bool) -> str | None:
    """The sentence to print before listening on `host`, or BadConfig without `insecure`.

    Other machines need encryption, and a key or a client certificate.
    """
    if is_loopback(host):
        return None
    missing = []
    if tls is None:
        missing.append("encryption (gateway.tls)")
    if not keys and (tls is None or tls.client_ca is None):
        missing.append("keys (gateway.api_keys_file) or client certificates")
    if not missing:
        return None
    lacks = " and ".join(missing)
    if not insecure:
        rule = f"reachable from other machines without {lacks}; --insecure allows it"
        raise BadConfig("gateway.host", host, rule)
    return f"WARNING: {host} is reachable from other machines without {lacks}."


def check_tls(tls: TlsConfig) -> None:
    """Raises BadConfig for files that cannot serve: unreadable, expired, or not a pair."""
    certificate = _certificate(tls.certificate, "gateway.tls.certificate")
    try:
        key = load_pem_private_key(tls.key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise BadConfig("gateway.tls.key", str(tls.key), f"cannot be read: {error}") from error
    if key.public_key() != certificate.public_key():
        raise BadConfig("gateway.tls.key", str(tls.key), "does not belong to the certificate")
    if tls.client_ca is not None:
        _certificate(tls.client_ca, "gateway.tls.client_ca")


def uvicorn_options(tls: TlsConfig | None) -> dict[str, Any]:
    if tls is None:
        return {}
    options: dict[str, Any] = {
        "ssl_certfile": str(tls.certificate),
        "ssl_keyfile": str(tls.key),
    }
    if tls.client_ca is not None:
        options |= {"ssl_ca_certs": str(tls.client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return options


def grpc_credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
    authority = None if tls.client_ca is None else tls.client_ca.read_bytes()
    return grpc.ssl_server_credentials(
        [pair], root_certificates=authority, require_client_auth=authority is not None
    )


def _certificate(path: Path, field: str) -> x509.Certificate:
    try:
        certificate = x509.load_pem_x509_certificates(path.read_bytes())[0]
    except (OSError, ValueError) as error:
        raise BadConfig(field, str(path), f"cannot be read: {error}") from error
    now = datetime.now(tz=UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        until = certificate.not_valid_after_utc.isoformat()
        raise BadConfig(field, str(path), f"is not valid now; valid until {until}")
    return certificate
