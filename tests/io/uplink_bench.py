"""Parts of the uplink's tests on real sockets: a broker, a receiver with its proof, certificates, waiting."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tbox.record.proof import Proof, ProofResult
from tbox.sim.broker import find_mosquitto
from tbox.uplink.mqtt import MqttUplink
from tbox.uplink.receive import Receiver
from tbox.uplink.session import SessionSettings, UplinkSettings
from tests.memory_spool import MemorySpool

DEADLINE_S = 60.0
VEHICLE = "vehicle"
# Impatient, so that tests are quick; every wait in them polls, so a slow machine is only slower.
QUICK = SessionSettings(
    window=20, backoff_base_ms=50, backoff_max_ms=200, connect_deadline_ms=2_000, ack_deadline_ms=1_000,
    probe_idle_ms=1_000, resume_probe_ms=500, stable_ms=1_000, poll_ms=10,
)  # fmt: skip

needs_mosquitto = [
    pytest.mark.mosquitto,
    pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed"),
]


def wait_for(what: str, condition: Callable[[], Any], deadline_s: float = DEADLINE_S) -> None:
    """Poll until the condition holds; fail with its name when it never does."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"waited {deadline_s:g} s in vain: {what}"
        time.sleep(0.01)


class Listener:
    """A receiver beside its proof, fed in the receiver's own thread."""

    def __init__(self, settings: UplinkSettings) -> None:
        self.proof = Proof()
        self.states: list[str] = []
        self.payloads: dict[int, bytes] = {}
        self._receiver = Receiver(settings, VEHICLE, self._take)

    def __enter__(self) -> Self:
        self._receiver.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._receiver.close()

    def _take(self, topic: str, payload: bytes, _mono_ns: int, _retained: bool) -> None:
        record = self.proof.feed_message(topic, payload)
        if record is not None:
            self.payloads[record["id"]] = payload
        elif topic.endswith("/state"):
            self.states.append(json.loads(payload)["state"])

    def wait_for_records(self, n: int) -> ProofResult:
        wait_for(f"{n} records", lambda: self.proof.received >= n)
        return self.proof.result()


def settings_for(port: int, mqtt: str = "5", **changes: Any) -> UplinkSettings:
    return UplinkSettings(**{"port": port, "mqtt": mqtt, "session": QUICK, **changes})


def an_uplink(settings: UplinkSettings, spool: MemorySpool, start: int = 1) -> MqttUplink:
    return MqttUplink(settings, VEHICLE, spool, start=start, last_id=lambda: max(spool.offered, default=None))


# --- certificates -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pki:
    """PEM files: an authority, a broker's certificate for 127.0.0.1, a device's; and a stranger's."""

    ca: str
    broker: str
    broker_key: str
    device: str
    device_key: str
    stranger: str
    stranger_key: str
    other_ca: str


def make_pki(directory: Path) -> Pki:
    ca, ca_key = _certificate("authority")
    other, other_key = _certificate("another authority")
    paths: dict[str, str] = {
        "ca": _write(directory / "ca.pem", ca),
        "other_ca": _write(directory / "o.pem", other),
    }
    for name, issuer, issuer_key in (
        ("broker", ca, ca_key), ("device", ca, ca_key), ("stranger", other, other_key),
    ):  # fmt: skip
        certificate, key = _certificate(name, issuer, issuer_key)
        paths[name] = _write(directory / f"{name}.pem", certificate)
        paths[f"{name}_key"] = _write(directory / f"{name}.key", key)
    return Pki(**paths)


def _certificate(
    name: str, issuer: x509.Certificate | None = None, issuer_key: ec.EllipticCurvePrivateKey | None = None
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    signer = issuer_key or key
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(names, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    return builder.sign(signer, hashes.SHA256()), key


def _write(path: Path, what: x509.Certificate | ec.EllipticCurvePrivateKey) -> str:
    pem = serialization.Encoding.PEM
    if isinstance(what, x509.Certificate):
        path.write_bytes(what.public_bytes(pem))
    else:
        plain = serialization.NoEncryption()
        path.write_bytes(what.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        path.chmod(0o600)
    return str(path)
