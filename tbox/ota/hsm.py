"""Signing with a key that never leaves its PKCS#11 token (HSM, smart card, SoftHSM). Not for the device.

The key is named by an RFC 7512 URI, `pkcs11:token=…;object=…?module-path=…&pin-source=…`. The PIN comes from
the file of `pin-source` or from the environment; it is never part of a URI, a message or a log.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import load_der_public_key
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Key, Signature, SSlibKey

from tbox.errors import TboxError
from tbox.ota.metadata import fingerprint

if TYPE_CHECKING:
    import pkcs11

URI_SCHEME = "pkcs11:"
PIN_VARIABLE = "TBOX_PKCS11_PIN"
PIN_BYTES_MAX = 256
PSS_SALT_BYTES = 32  # as long as the digest, which every token can
ED25519_BYTES = 32
ED25519_POINT_HEADERS = (b"", b"\x04\x20")  # tokens give the bare point, or as a DER octet string


class TokenKey(NamedTuple):
    """Where a key stands: the module that drives the token, the labels of token and key, the PIN's file."""

    uri: str
    module: str
    token: str
    label: str
    pin_source: str = ""


def parse_uri(uri: str) -> TokenKey:
    """Return what a PKCS#11 URI names. Raises TboxError, which never repeats a PIN."""
    path, _, query = uri.removeprefix(URI_SCHEME).partition("?")
    pairs = [part.partition("=") for part in (*path.split(";"), *query.split("&")) if part]
    said = {name: unquote(value) for name, _, value in pairs}
    if "pin-value" in said:
        raise TboxError(
            "a PIN does not belong on a command line",
            where=URI_SCHEME,
            mend=f"give pin-source=FILE, or set {PIN_VARIABLE}",
        )
    unknown = said.keys() - {"token", "object", "module-path", "pin-source"}
    missing = {"token", "object", "module-path"} - {name for name, value in said.items() if value}
    if unknown or missing or len(pairs) != len(said):
        wrong = ", ".join(sorted(unknown)) or ", ".join(sorted(missing)) or "an attribute twice"
        raise TboxError(
            f"{'not understood' if unknown else 'missing' if missing else 'said'}: {wrong}",
            where=uri,
            mend="write pkcs11:token=LABEL;object=LABEL?module-path=FILE&pin-source=FILE",
        )
    pin_source = said.get("pin-source", "").removeprefix("file:")
    return TokenKey(uri, said["module-path"], said["token"], said["object"], pin_source)


def read_pin(key: TokenKey) -> str:
    """Return the PIN from the key's file, else from the environment. Raises TboxError."""
    if not key.pin_source:
        pin = os.environ.get(PIN_VARIABLE, "")
    else:
        try:
            with Path(key.pin_source).open("rb") as file:
                pin = file.read(PIN_BYTES_MAX + 1).decode().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise TboxError(f"the PIN cannot be read: {type(error).__name__}", where=key.pin_source) from None
    if not 0 < len(pin.encode()) <= PIN_BYTES_MAX:
        raise TboxError(
            "no PIN, or one too long",
            where=key.pin_source or PIN_VARIABLE,
            mend=f"give pin-source=FILE, or set {PIN_VARIABLE}",
        )
    return pin


@contextlib.contextmanager
def _session(key: TokenKey, pin: str | None) -> Iterator[pkcs11.Session]:
    """Open the token for one piece of work. Raises TboxError for whatever it refuses."""
    try:
        import pkcs11
        from pkcs11.exceptions import PKCS11Error
    except ImportError:
        raise TboxError(
            "python-pkcs11 is not installed", where=key.uri, mend="pip install 'tbox[publish]'"
        ) from None
    try:
        with pkcs11.lib(key.module).get_token(token_label=key.token).open(user_pin=pin) as session:
            yield session
    except (PKCS11Error, RuntimeError) as error:  # RuntimeError: the module cannot be loaded
        said = str(error) or type(error).__name__
        raise TboxError(f"the token refused: {said}", where=key.uri) from None


class TokenSigner:
    """Signs with a token's key; logs in for each signature and out again. Raises TboxError."""

    def __init__(self, key: TokenKey) -> None:
        self._key = key
        self.public_key: Key = read_public(key)

    def sign(self, payload: bytes) -> Signature:
        """Return the signature, checked: a token's word is not enough."""
        import pkcs11

        with _session(self._key, read_pin(self._key)) as session:
            private: Any = session.get_key(object_class=pkcs11.ObjectClass.PRIVATE_KEY, label=self._key.label)
            if self.public_key.keytype == "ed25519":
                raw = private.sign(payload, mechanism=pkcs11.Mechanism.EDDSA)
            else:
                pss = (pkcs11.Mechanism.SHA256, pkcs11.MGF.SHA256, PSS_SALT_BYTES)
                raw = private.sign(
                    payload, mechanism=pkcs11.Mechanism.SHA256_RSA_PKCS_PSS, mechanism_param=pss
                )
        signature = Signature(self.public_key.keyid, raw.hex())
        try:
            self.public_key.verify_signature(signature, payload)
        except UnverifiedSignatureError:
            raise TboxError("the token's signature does not verify", where=self._key.uri) from None
        return signature


def read_public(key: TokenKey) -> Key:
    """Return the public part of a token's key, which needs no PIN. Raises TboxError."""
    with _session(key, None) as session:
        der = _public_of(session, key)
    try:
        if len(der) == ED25519_BYTES:
            public: Key = SSlibKey.from_crypto(ed25519.Ed25519PublicKey.from_public_bytes(der))
        else:
            public = SSlibKey.from_crypto(load_der_public_key(der))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TboxError(f"not a public key: {error}", where=key.uri) from None
    if not fingerprint(public):
        raise TboxError("a key that no device would take: too short, or of another kind", where=key.uri)
    return public


def _public_of(session: pkcs11.Session, key: TokenKey) -> bytes:
    """Return the 32 bytes of an Ed25519 key, or an RSA key in DER."""
    import pkcs11
    from pkcs11.util.rsa import encode_rsa_public_key

    found: Any = session.get_key(object_class=pkcs11.ObjectClass.PUBLIC_KEY, label=key.label)
    if found.key_type == pkcs11.KeyType.RSA:
        return bytes(encode_rsa_public_key(found))
    point = bytes(found[pkcs11.Attribute.EC_POINT])
    if found.key_type != pkcs11.KeyType.EC_EDWARDS or point[:-ED25519_BYTES] not in ED25519_POINT_HEADERS:
        raise TboxError("neither an Ed25519 nor an RSA key", where=key.uri)
    return point[-ED25519_BYTES:]
