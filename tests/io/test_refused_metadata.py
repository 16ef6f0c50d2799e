"""Bad keys and bad metadata that every engine must refuse, each from a hostile server over real HTTP.

The test ids name the lines. Each ends with the same demands: the refusal names file and reason, and
what was trusted before is trusted still.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from securesystemslib.formats import encode_canonical
from securesystemslib.signer import CryptoSigner

from tbox.durable import OsStorage
from tbox.errors import Refused, TboxError
from tbox.model import NS_PER_S, Now
from tbox.ota.fetch import Http
from tbox.ota.trust import TrustClient, moment
from tbox.ota.workflow import TIMESTAMP_BYTES_MAX
from tests.tuf_repository import START, Repository, serving

THRESHOLD = 3


class Scene(NamedTuple):
    """A device that trusts version 1, of the timestamp version 2, and the repository that lies to it."""

    repository: Repository
    device: Callable[[], TrustClient]
    directory: Path


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    repository = Repository()
    for role in ("root", "targets"):
        repository.root.roles[role].threshold = THRESHOLD
        for _ in range(4):
            repository.add_key(role)
    repository.served.clear()
    repository.root.version = 1
    repository.publish("root", "targets", "snapshot", "timestamp", bump=False)
    for name in ("cache", "floors"):
        (tmp_path / name).mkdir()
    root = repository.served["root"][0]
    with serving(repository) as base:

        def device() -> TrustClient:
            def fetch(path: str, length_max: int) -> bytes | None:
                return Http().small(f"{base}/metadata/{path}", length_max)

            return TrustClient(root, OsStorage(), str(tmp_path / "cache"), str(tmp_path / "floors"), fetch)

        repository.publish("timestamp")
        device().refresh(START)
        yield Scene(repository, device, tmp_path)


def trusted(client: TrustClient) -> dict[str, str]:
    return {role: hashlib.sha256(raw).hexdigest() for role, raw in client.trusted.kept.items()}


def edited(raw: bytes, change: Callable[[dict[str, Any]], None], *signers: CryptoSigner) -> bytes:
    """A file changed by hand, in ways that no library would write, and signed rightly over the change."""
    file = json.loads(raw)
    change(file["signed"])
    file["signatures"] = [
        signer.sign(encode_canonical(file["signed"]).encode()).to_dict() for signer in signers
    ]
    return json.dumps(file).encode()


# --- keys ------------------------------------------------------------------------------------------------


def one_key_counted_twice(repository: Repository) -> None:
    """Targets signed by one key of three, three times: under its id and under two further ids of its own."""
    signer = repository.signers["targets"][0]

    def twins(signed: dict[str, Any]) -> None:
        key = signed["keys"][signer.public_key.keyid]
        signed["roles"]["targets"]["keyids"] = [signer.public_key.keyid, "a" * 64, "b" * 64]
        signed["keys"] |= {name: copy.deepcopy(key) for name in ("a" * 64, "b" * 64)}
        signed["version"] = 2

    repository.served["root"].append(edited(repository.served["root"][0], twins, *repository.signers["root"]))
    raw = newer(repository, "targets", signer)
    file = json.loads(raw)
    file["signatures"] += [file["signatures"][0] | {"keyid": name} for name in ("a" * 64, "b" * 64)]
    tell(repository, "targets", json.dumps(file).encode())


def zero_signatures(repository: Repository) -> None:
    tell(repository, "targets", newer(repository, "targets"))


def no_keys_present(repository: Repository) -> None:
    """A root, rightly signed, after which anybody could sign targets: no keys, and none needed."""

    def without(signed: dict[str, Any]) -> None:
        signed["roles"]["targets"] |= {"keyids": [], "threshold": 0}
        signed["version"] = 2

    repository.served["root"].append(
        edited(repository.served["root"][0], without, *repository.signers["root"])
    )
    tell(repository, "targets", newer(repository, "targets"))


def rotated_out_key(repository: Repository) -> None:
    """Targets signed by three of whom the newest root no longer names one."""
    old = list(repository.signers["targets"])
    repository.root.revoke_key(old[0].public_key.keyid, "targets")
    repository.publish("root")
    tell(repository, "targets", newer(repository, "targets", *old[:3]))


def new_root(signed_by_old: bool) -> Callable[[Repository], None]:
    def change(repository: Repository) -> None:
        old = list(repository.signers["root"])
        repository.rotate("root")
        if signed_by_old:
            repository.signers["root"] = old
        repository.publish("root")

    return change


def unknown_algorithm(repository: Repository) -> None:
    """Two of three keys in a scheme that nobody can check, their signatures in it."""
    signer, *others = repository.signers["targets"]

    def exotic(signed: dict[str, Any]) -> None:
        for other in others:
            signed["keys"][other.public_key.keyid]["scheme"] = "ed25519-but-not-quite"
        signed["version"] = 2

    repository.served["root"].append(
        edited(repository.served["root"][0], exotic, *repository.signers["root"])
    )
    tell(repository, "targets", newer(repository, "targets", signer, *others))


def newer(repository: Repository, role: str, *signers: CryptoSigner) -> bytes:
    def bump(signed: dict[str, Any]) -> None:
        signed["version"] += 1

    return edited(repository.served[role][-1], bump, *signers)


def tell(repository: Repository, role: str, raw: bytes) -> None:
    """Serve a file made by hand, named by a snapshot and timestamp that are rightly signed."""
    repository.signed(role).version = json.loads(raw)["signed"]["version"]
    repository.served[role].append(raw)
    repository.tell(role, raw)
    repository.publish("snapshot", "timestamp")


# --- metadata --------------------------------------------------------------------------------------------


def older_timestamp(repository: Repository) -> None:
    """Version 1 again, to a device that was shown version 2."""
    repository.served["timestamp"].append(repository.served["timestamp"][0])


def same_version_other_content(repository: Repository) -> None:
    """The timestamp names the snapshot held already, and another one stands under that version."""
    repository.snapshot.meta["targets.json"].version = 1
    repository.snapshot.unrecognized_fields["other"] = "content"
    repository.with_hashes = True
    repository.served["snapshot"][-1] = raw = repository.sign("snapshot")
    repository.tell("snapshot", raw)
    repository.publish("timestamp")


def expired(repository: Repository) -> None:
    repository.timestamp.expires = START - timedelta(seconds=1)
    repository.publish("timestamp")


def near_2_63(repository: Repository) -> None:
    def huge(signed: dict[str, Any]) -> None:
        signed["version"] = 2**63 - 1

    timestamp = repository.served["timestamp"]
    timestamp.append(edited(timestamp[-1], huge, *repository.signers["timestamp"]))


def oversized(repository: Repository) -> None:
    """Rightly signed, and one field larger than any timestamp may be."""

    def fat(signed: dict[str, Any]) -> None:
        signed |= {"version": signed["version"] + 1, "filler": "x" * TIMESTAMP_BYTES_MAX}

    timestamp = repository.served["timestamp"]
    timestamp.append(edited(timestamp[-1], fat, *repository.signers["timestamp"]))


def endless(handler: BaseHTTPRequestHandler) -> None:
    """Send without saying how long, and without end: until the device hangs up."""
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" " * 65536)
    except OSError:
        handler.close_connection = True


def endless_file(path: str) -> Callable[[Repository], None]:
    def change(repository: Repository) -> None:
        repository.publish("targets", "snapshot", "timestamp")
        repository.hostile[path] = endless

    return change


class Lie(NamedTuple):
    """What the server does, the file that is refused for it, and the reason given."""

    tell: Callable[[Repository], None]
    role: str
    why: str


LIES = {
    "keys: one key counted twice towards a threshold": Lie(one_key_counted_twice, "targets", "by 1 of the 3"),
    "keys: zero signatures": Lie(zero_signatures, "targets", "by 0 of the 3"),
    "keys: no keys present": Lie(
        no_keys_present, "root", "malformed: ValueError threshold should be at least 1"
    ),
    "keys: a rotated-out key": Lie(rotated_out_key, "targets", "by 2 of the 3"),
    "keys: a new root signed by only the old keys": Lie(
        new_root(signed_by_old=True), "root", "by 0 of the 3"
    ),
    "keys: a new root signed by only the new keys": Lie(
        new_root(signed_by_old=False), "root", "by 0 of the 3"
    ),
    "keys: unknown algorithm": Lie(
        unknown_algorithm, "root", "Unsupported public key ed25519/ed25519-but-not-quite"
    ),
    "metadata: an older timestamp replayed": Lie(older_timestamp, "timestamp", "is older than 2"),
    "metadata: same version, other content": Lie(same_version_other_content, "snapshot", "other content"),
    "metadata: expired": Lie(expired, "timestamp", "expired on"),
    "metadata: version near 2^63": Lie(near_2_63, "timestamp", "version is not a number from 1"),
    "metadata: oversized": Lie(oversized, "timestamp", "more than"),
    "metadata: endless timestamp": Lie(endless_file("timestamp.json"), "timestamp", "more than"),
    "metadata: endless root": Lie(endless_file("2.root.json"), "root", "more than"),
    "metadata: endless snapshot": Lie(endless_file("2.snapshot.json"), "snapshot", "more than"),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_refused(scene: Scene, lie: Lie) -> None:
    before = trusted(scene.device())
    lie.tell(scene.repository)
    with pytest.raises(TboxError, match=lie.why) as refusal:
        scene.device().refresh(START)
    assert f"{lie.role}.json" in str(refusal.value)
    assert trusted(scene.device())[lie.role] == before[lie.role]


@pytest.mark.parametrize("year", [1970, 2100], ids="metadata: clock at {}".format)
def test_a_clock_that_cannot_be_right_asks_the_server_nothing(scene: Scene, year: int) -> None:
    scene.repository.asked.clear()
    wall_ns = int(datetime(year, 1, 1, 1, tzinfo=UTC).timestamp()) * NS_PER_S
    with pytest.raises(Refused, match="time is not known"):
        scene.device().refresh(moment(Now(0, wall_ns)))
    assert scene.repository.asked == []


@pytest.mark.parametrize("kept_bytes", [0, 100], ids=["zero-length", "truncated"])
@pytest.mark.parametrize("room", ["cache", "floors"])
def test_a_damaged_cache_accepts_no_replay(scene: Scene, room: str, kept_bytes: int) -> None:
    repository = scene.repository
    repository.publish("targets", "snapshot", "timestamp")
    scene.device().refresh(START)
    for path in (scene.directory / room).iterdir():
        path.write_bytes(path.read_bytes()[:kept_bytes])
    for role in ("targets", "snapshot", "timestamp"):
        repository.served[role].append(repository.served[role][0])
    with pytest.raises(TboxError, match="is older than 3"):
        scene.device().refresh(START)
