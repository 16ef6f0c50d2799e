"""The publisher's keys: files, or, for signing, keys on a PKCS#11 token. Never needed by the device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner, Key, Signature

from tbox.errors import TboxError

RSA_BITS = 2048

KeyKind = Literal["ed25519", "rsa"]


class Signer(Protocol):
    """A private key, wherever it is kept."""

    @property
    def public_key(self) -> Key: ...

    def sign(self, payload: bytes) -> Signature: ...


def make_key(path: Path, kind: KeyKind = "ed25519", password: bytes | None = None) -> Key:
    """Write a new private key to `path` (mode 600) and its public part beside it as .pub; return that.

    Raises TboxError when a key stands there already, OSError.
    """
    private = (
        ed25519.Ed25519PrivateKey.generate()
        if kind == "ed25519"
        else rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)
    )
    protection: KeySerializationEncryption = BestAvailableEncryption(password) if password else NoEncryption()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise TboxError("a key stands there already", where=str(path), mend="choose another name") from None
    with os.fdopen(fd, "wb") as file:
        file.write(pem)
    public: Key = CryptoSigner(private).public_key
    write_public(public_path(path), public)
    return public


def write_public(path: Path, public: Key) -> None:
    """Write a public key for others, with its id. Raises OSError."""
    named: dict[str, Any] = {"keyid": public.keyid} | public.to_dict()
    path.write_bytes(msgspec.json.format(msgspec.json.encode(named)) + b"\n")


def public_path(private: Path) -> Path:
    return private.with_suffix(".pub")


def read_public(path: Path) -> Key:
    """Return a public key as `make_key` wrote it. Raises TboxError."""
    try:
        fields = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        return Key.from_dict(fields.pop("keyid"), fields)
    except OSError as error:
        raise TboxError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (msgspec.DecodeError, ValueError, KeyError, TypeError) as error:
        raise TboxError(f"not a public key: {error}", where=str(path), mend="give the .pub file") from None


def read_signer(path: Path, password: bytes | None = None) -> Signer:
    """Return the signer of a private key file. Raises TboxError."""
    try:
        private = load_pem_private_key(path.read_bytes(), password)
    except OSError as error:
        raise TboxError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (ValueError, TypeError) as error:
        raise TboxError(f"not a private key that opens: {error}", where=str(path)) from None
    if not isinstance(private, ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey):
        raise TboxError("neither an Ed25519 nor an RSA key", where=str(path))
    signer: Signer = CryptoSigner(private)
    return signer


def open_signer(place: str, password: bytes | None = None) -> Signer:
    """Return the signer of a private key file, or of a key on a token (`pkcs11:…`). Raises TboxError."""
    from tbox.ota import hsm

    if place.startswith(hsm.URI_SCHEME):
        return hsm.TokenSigner(hsm.parse_uri(place))
    return read_signer(Path(place), password)
