"""Certificates made on the spot: an authority, and pairs it has signed."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from pathlib import Path


class Authority:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("test authority")
        self.path = folder / "ca.pem"
        self._write(self.path, self._signed(self._name, self._key, authority=True, days=1))

    def pair(self, name: str, days: int = 1) -> tuple[Path, Path]:
        """Certificate and key for loopback; a negative number of days has already expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._signed(_name(name), key, authority=False, days=days)
        paths = self._folder / f"{name}.pem", self._folder / f"{name}-key.pem"
        self._write(paths[0], certificate)
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        paths[1].write_bytes(secret)
        return paths

    def _signed(self, subject, key, *, authority: bool, days: int) -> x509.Certificate:
        start = datetime.now(tz=UTC) - timedelta(days=10)
        addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + timedelta(days=10 + days))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    @staticmethod
    def _write(path: Path, certificate: x509.Certificate) -> None:
        path.write_bytes(certificate.public_bytes(Encoding.PEM))


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
