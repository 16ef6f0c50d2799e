"""What it costs to verify a repository's metadata from nothing, against python-tuf's own trusted set.

Root and targets are signed by 3 of 5 Ed25519 keys, 20 releases are listed. Cold: every file is parsed and
every signature checked as after a restart. The peer counts by key id, keeps no floors and writes nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from tbox.durable import OsStorage
from tbox.ota import metadata, publish, releases, workflow
from tbox.ota.keys import make_key, read_signer
from tbox.ota.metadata import TrustedSet
from tbox.ota.model import VerifiedTarget
from tbox.ota.publish import KeyChange, Publisher
from tbox.ota.trust import TrustClient, verify_slot_manifest
from tbox.ota.workflow import drive
from tests.bench.harness import Result, interleaved, seconds

RELEASES = 20
COLD_MS_MAX = 50.0
ROUNDS = 20
WHERE = "CPU of this machine, library already imported"


def _repository(directory: Path) -> Publisher:
    publisher = Publisher(directory / "repo", datetime.now(UTC))
    publisher.create()
    names = {role: [f"{role}-{n}" for n in range(5)] for role in ("root", "targets")}
    keys = {role: [make_key(directory / f"{name}.pem") for name in names[role]] for role in names}
    online = make_key(directory / "online.pem")
    changes = [KeyChange(role, keys[role], (), 3) for role in keys]
    publisher.rotate(
        [*changes, *(KeyChange(role, [online]) for role in ("snapshot", "timestamp", "rollout"))]
    )
    for number in range(1, RELEASES + 1):
        (directory / "image").write_bytes(b"image %d" % number)
        publisher.add_release(directory / "image", _draft(number), bases=0)
    for role, names_of in names.items():
        publish.sign(
            publisher.staged / f"{role}.json",
            [read_signer(directory / f"{name}.pem") for name in names_of[:3]],
        )
    publisher.publish([read_signer(directory / "online.pem")])
    return publisher


def _draft(number: int) -> VerifiedTarget:
    path = f"app/{number}.img.zst"
    fields = {
        "name": path, "version": str(number), "kind": "raw", "length": 0, "sha256": "0" * 64,
        "security_counter": number, "hardware_ids": ("tbox-sim",),
        "full": {"name": path, "length": 0, "sha256": "0" * 64},
    }  # fmt: skip
    return msgspec.convert(fields, VerifiedTarget)


def _ms(work: Callable[[], object]) -> Callable[[], float]:
    """Return a measurement of one cold call, the mean of some."""

    def measure() -> float:
        def rounds() -> None:
            for _ in range(ROUNDS):
                metadata._fingerprint.cache_clear()
                work()

        return seconds(rounds) / ROUNDS * 1000

    return measure


def cases() -> Iterator[Result]:
    """Yield the figures: a verification from nothing, one from the cache, the boot loader's."""
    with tempfile.TemporaryDirectory() as top:
        yield from _cases(Path(top), _repository(Path(top)))


def _cases(top: Path, publisher: Publisher) -> Iterator[Result]:
    files = {path.name: path.read_bytes() for path in publisher.metadata.iterdir()}
    root, now = files["1.root.json"], datetime.now(UTC)

    def fetch(path: str, length_max: int) -> bytes | None:
        return files.get(path)

    def ours() -> TrustedSet:
        trusted = TrustedSet(root)
        drive(workflow.refresh(trusted, now), fetch)
        return trusted

    def peer() -> None:
        trusted = TrustedMetadataSet(root, EnvelopeType.METADATA)
        trusted.update_timestamp(files["timestamp.json"])
        trusted.update_snapshot(files["1.snapshot.json"])
        trusted.update_targets(files["1.targets.json"])

    ours_ms, peer_ms, ratio = interleaved(_ms(ours), _ms(peer))
    yield Result(
        bench="trust", case="cold verify, 3 of 5", value=round(ours_ms, 2), unit="ms",
        peer="python-tuf TrustedMetadataSet", peer_value=round(peer_ms, 2), ratio=round(ratio, 2),
        goal=f"<= {COLD_MS_MAX:g} ms", ok=ours_ms <= COLD_MS_MAX, note=WHERE,
    )  # fmt: skip
    yield _one("refresh with nothing new, from flash", _from_flash(top, root, fetch, now))
    trusted = ours()
    offer = drive(releases.offer(trusted, now, "tbox-sim", lambda release: True), fetch)
    yield _one("boot loader's check of a slot", _ms(lambda: verify_slot_manifest(offer.manifest, root=root)))


def _from_flash(
    top: Path, root: bytes, fetch: Callable[[str, int], bytes | None], now: datetime
) -> Callable[[], float]:
    for name in ("cache", "floors"):
        (top / name).mkdir()
    client = TrustClient(root, OsStorage(), str(top / "cache"), str(top / "floors"), fetch)
    client.refresh(now)
    return _ms(lambda: client.refresh(now))


def _one(case: str, measure: Callable[[], float]) -> Result:
    value_ms = min(measure() for _ in range(3))
    return Result(
        bench="trust", case=case, value=round(value_ms, 2), unit="ms",
        goal=f"<= {COLD_MS_MAX:g} ms", ok=value_ms <= COLD_MS_MAX, note=WHERE,
    )  # fmt: skip
