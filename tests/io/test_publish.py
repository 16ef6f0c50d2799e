"""From an image to a signed static repository, and from there into a device's slot, over real HTTP."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import bsdiff4
import msgspec
import pytest
import zstandard
from tuf.api.metadata import Metadata, TargetFile, Targets

from tbox.durable import OsStorage
from tbox.errors import Refused, TboxError
from tbox.model import NS_PER_S, Now, TimeQuality
from tbox.ota import patch, publish, releases
from tbox.ota.fetch import Http
from tbox.ota.keys import make_key, public_path, read_public, read_signer
from tbox.ota.model import Delta, Emergency, Full, Offer, RollbackOrder, VerifiedTarget
from tbox.ota.publish import KeyChange, Publisher
from tbox.ota.releases import Notice
from tbox.ota.serve import running
from tbox.ota.source import SourceSettings, UpdateSource
from tbox.ota.trust import verify_slot_manifest
from tests.tuf_repository import START

RNG = random.Random(7)
V1 = RNG.randbytes(200_000)
V2 = V1[:90_000] + RNG.randbytes(500) + V1[90_400:]
NOW = Now(0, int(START.timestamp()) * NS_PER_S, TimeQuality.NTP)


def draft(version: str, counter: int, **changes: object) -> VerifiedTarget:
    name = f"app/{version}.img.zst"
    values: dict[str, object] = {
        "name": name,
        "version": version,
        "kind": "raw",
        "length": 0,
        "sha256": "0" * 64,
        "security_counter": counter,
        "hardware_ids": ("tbox-sim",),
        "full": {"name": name, "length": 0, "sha256": "0" * 64},
    }
    return msgspec.convert(values | changes, VerifiedTarget)


@dataclass
class Factory:
    """A publisher with its keys, one person's private key a file."""

    directory: Path
    publisher: Publisher

    def key(self, name: str) -> Path:
        return self.directory / "keys" / f"{name}.pem"

    def sign(self, staged: Path, *names: str) -> None:
        for name in names:  # one person at a time
            publish.sign(staged, [read_signer(self.key(name))])

    def publish(self) -> dict[str, int]:
        return self.publisher.publish([read_signer(self.key("online"))])

    def release(self, data: bytes, *signers: str, **changes: object) -> VerifiedTarget:
        image = self.directory / "image"
        image.write_bytes(data)
        release, staged = self.publisher.add_release(image, draft(**changes))  # type: ignore[arg-type]
        self.sign(staged, *(signers or ("targets-1", "targets-3", "targets-5")))
        return release

    @property
    def first_root(self) -> bytes:
        return (self.publisher.metadata / "1.root.json").read_bytes()


@pytest.fixture
def factory(tmp_path: Path) -> Factory:
    (tmp_path / "keys").mkdir()
    made = Factory(tmp_path, Publisher(tmp_path / "repo", START))
    made.publisher.create()
    publics = {role: [make_key(made.key(f"{role}-{n}")) for n in range(1, 6)] for role in ("root", "targets")}
    online = make_key(made.key("online"))
    changes = [KeyChange(role, keys, (), 3) for role, keys in publics.items()]
    changes += [KeyChange(role, [online]) for role in ("snapshot", "timestamp", "rollout")]
    root, targets = made.publisher.rotate(changes)
    made.sign(root, "root-1", "root-2", "root-4")
    made.sign(targets, "targets-1", "targets-2", "targets-3")
    made.publish()
    return made


def device(factory: Factory, base: str, **options: object) -> UpdateSource:
    settings = SourceSettings(metadata_url=f"{base}/metadata")
    directory = str(factory.directory / "device")
    return UpdateSource(
        settings, factory.first_root, OsStorage(), directory, "tbox-sim", **options  # type: ignore[arg-type]
    )  # fmt: skip


def check(factory: Factory, **options: object) -> Offer:
    with running(factory.publisher.directory) as base:
        return device(factory, base, **options).check(NOW)


def test_a_release_reaches_a_device_as_a_whole_and_as_a_delta(factory: Factory) -> None:
    factory.release(V1, version="1.0", counter=1)
    factory.publish()
    released = factory.release(V2, version="2.0", counter=2, notes="better")
    factory.publish()
    with running(factory.publisher.directory) as base:
        source = device(factory, base)
        offer = source.check(NOW)
        assert offer.target == released
        full = Path(source.fetch(released.full, lambda: ""))
        assert zstandard.ZstdDecompressor().decompress(full.read_bytes()) == V2
        (delta,) = released.deltas
        path = source.fetch(delta, lambda: "")
        assert bsdiff4.patch(V1, Path(path).read_bytes()) == V2
        raw = Path(path).read_bytes()
        ours = patch.apply(
            lambda at, n: V1[at : at + n], len(V1), lambda at, n: raw[at : at + n], len(raw), len(V2)
        )
        assert b"".join(ours) == V2
        assert delta.length < released.full.length / 8


def test_the_boot_loaders_check_takes_the_manifest_after_everything_expired(factory: Factory) -> None:
    released = factory.release(V1, version="1.0", counter=1)
    factory.publish()
    offer = check(factory)
    assert verify_slot_manifest(offer.manifest, root=factory.first_root) == released
    damaged = offer.manifest.replace(b'"security_counter":1', b'"security_counter":9')
    assert damaged != offer.manifest
    with pytest.raises(Refused, match="signed by 0 of the 3"):
        verify_slot_manifest(damaged, root=factory.first_root)


def test_two_of_five_signatures_publish_nothing(factory: Factory) -> None:
    factory.release(V1, "targets-1", "targets-2", version="1.0", counter=1)
    before = sorted(path.name for path in factory.publisher.metadata.iterdir())
    with pytest.raises(Refused, match="signed by 2 of the 3"):
        factory.publish()
    assert sorted(path.name for path in factory.publisher.metadata.iterdir()) == before
    factory.sign(factory.publisher.staged / "targets.json", "targets-1", "root-1")  # again, and a stranger
    with pytest.raises(Refused, match="signed by 2 of the 3"):
        factory.publish()
    factory.sign(factory.publisher.staged / "targets.json", "targets-4")
    assert factory.publish()["targets"] == 2


def test_a_counter_that_does_not_rise_is_refused_at_the_publisher(factory: Factory) -> None:
    factory.release(V1, version="1.0", counter=5)
    factory.publish()
    with pytest.raises(Refused, match="not above the 5"):
        factory.release(V2, version="2.0", counter=5)


def test_an_emergency_takes_what_is_above_it_off_the_list(factory: Factory) -> None:
    factory.release(V1, version="1.0", counter=1)
    factory.publish()
    factory.release(V2, version="2.0", counter=2)
    factory.publish()
    permission = Emergency(floor_max=2, reason="2.0 drains the battery")
    factory.release(V1, version="1.0", counter=1, emergency=permission)
    factory.publish()
    target = check(factory).target
    assert target is not None
    assert (target.version, target.emergency) == ("1.0", permission)


def test_a_key_that_was_rotated_out_signs_no_more(factory: Factory) -> None:
    publisher = factory.publisher
    assert check(factory).target is None
    old = read_public(public_path(factory.key("targets-1"))).keyid
    new = make_key(factory.key("targets-6"))
    (root,) = publisher.rotate([KeyChange("targets", [new], [old])])
    factory.sign(root, "root-1", "root-3", "root-5")
    with pytest.raises(Refused, match=r"targets\.json: signed by 2 of the 3"):
        factory.publish()  # the published targets were signed by the key that goes
    factory.release(V1, "targets-1", "targets-2", "targets-3", version="1.0", counter=1)
    with pytest.raises(Refused, match="signed by 2 of the 3"):
        factory.publish()
    factory.sign(publisher.staged / "targets.json", "targets-6")
    assert factory.publish() == {"root": 2, "targets": 2, "snapshot": 2, "timestamp": 2}
    target = check(factory).target
    assert target is not None and target.version == "1.0"


def test_a_new_root_takes_both_thresholds(factory: Factory) -> None:
    publisher = factory.publisher
    olds = [read_public(public_path(factory.key(f"root-{n}"))).keyid for n in range(1, 6)]
    news = [make_key(factory.key(f"new-root-{n}")) for n in range(1, 6)]
    (root,) = publisher.rotate([KeyChange("root", news, olds)])
    factory.sign(root, "root-1", "root-2", "root-3")
    with pytest.raises(Refused, match="signed by 0 of the 3 keys of root"):
        factory.publish()
    factory.sign(root, "new-root-1", "new-root-2", "new-root-3")
    factory.publish()
    (again,) = publisher.rotate([KeyChange("root", [make_key(factory.key("new-root-6"))], [])])
    factory.sign(again, "new-root-1", "new-root-5", "new-root-6")
    with pytest.raises(Refused, match="signed by 2 of the 3 keys of the root before"):
        factory.publish()
    factory.sign(again, "new-root-2")
    factory.publish()
    offer = check(factory)
    assert offer.target is None  # and the chain from the first root to the third held


def test_keys_that_cannot_reach_the_threshold_are_refused(factory: Factory) -> None:
    olds = [read_public(public_path(factory.key(f"root-{n}"))).keyid for n in range(1, 4)]
    with pytest.raises(Refused, match="2 keys cannot reach a threshold of 3"):
        factory.publisher.rotate([KeyChange("root", [], olds)])


def test_rsa_keys_count_as_well(factory: Factory) -> None:
    rsa = make_key(factory.key("rsa"), "rsa", b"secret")
    (root,) = factory.publisher.rotate([KeyChange("targets", [rsa])])
    factory.sign(root, "root-1", "root-3", "root-5")
    factory.release(V1, "targets-1", "targets-2", version="1.0", counter=1)
    publish.sign(factory.publisher.staged / "targets.json", [read_signer(factory.key("rsa"), b"secret")])
    factory.publish()
    assert check(factory).target is not None


def test_a_key_file_is_private_never_written_over_and_opens_with_its_password_alone(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    make_key(path, password=b"right")
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(TboxError, match="stands there already"):
        make_key(path)
    with pytest.raises(TboxError, match="not a private key that opens"):
        read_signer(path, b"wrong")
    with pytest.raises(TboxError, match="not a public key"):
        read_public(path)


def test_the_rollout_key_narrows_a_cohort_and_orders_back_and_can_do_no_more(factory: Factory) -> None:
    released = factory.release(V1, version="1.0", counter=1, cohort_percent=50)
    factory.publish()
    order = RollbackOrder(leave_sha256="1" * 64, reason="it crashes")
    for points, expected in ((500, 5.0), (10_000, 50.0)):
        factory.publisher.notify(Notice(basis_points={released.sha256: points}, orders=(order,)))
        factory.publish()
        offer = check(factory)
        assert offer.target is not None and offer.target.cohort_percent == expected
        assert offer.orders == (order,)


def test_a_release_in_the_rollout_role_is_not_offered(factory: Factory) -> None:
    released = factory.release(V1, version="1.0", counter=1)
    staged = factory.publisher.notify(Notice())
    rollout = Metadata[Targets].from_file(str(staged))
    targets = Metadata[Targets].from_file(str(factory.publisher.staged / "targets.json"))
    stolen = targets.signed.targets[released.name]
    rollout.signed.targets = {"app/9.9.img.zst": stolen}
    staged.write_bytes(rollout.to_bytes())
    factory.publish()
    target = check(factory).target
    assert target is not None and target.name == released.name


def test_the_highest_release_whose_cohort_holds_the_vehicle_is_offered(factory: Factory) -> None:
    factory.release(V1, version="1.0", counter=1)
    factory.publish()
    factory.release(V2, version="2.0", counter=2, cohort_percent=5)
    factory.publish()

    def admits(release: VerifiedTarget) -> bool:
        return release.cohort_percent > 20

    inside, outside = check(factory).target, check(factory, admits=admits).target
    assert inside is not None and inside.version == "2.0"
    assert outside is not None and outside.version == "1.0"
    nobody = check(factory, admits=lambda release: False).target
    assert nobody is not None and nobody.version == "2.0"  # so that the device can say what it waits for


def test_another_kind_of_hardware_is_offered_nothing(factory: Factory) -> None:
    factory.release(V1, version="1.0", counter=1, hardware_ids=("other",))
    factory.publish()
    assert check(factory).target is None


def test_without_the_time_nothing_is_checked(factory: Factory) -> None:
    with running(factory.publisher.directory) as base:
        source = device(factory, base)
        for now in (Now(0), Now(0, 0, TimeQuality.NTP), Now(0, 4_102_444_800 * NS_PER_S, TimeQuality.NTP)):
            with pytest.raises(Refused, match="time is not known"):
                source.check(now)


def test_a_repository_that_nobody_renews_is_refused_after_a_week(factory: Factory) -> None:
    later = NOW.wall_ns + 8 * 86_400 * NS_PER_S  # type: ignore[operator]
    with running(factory.publisher.directory) as base:
        source = device(factory, base)
        source.check(NOW)
        with pytest.raises(Refused, match=r"timestamp\.json: version 1 expired"):
            source.check(Now(1, later, TimeQuality.NTP))
        factory.publisher = Publisher(factory.publisher.directory, START + timedelta(days=8))
        assert factory.publish() == {"snapshot": 2, "timestamp": 2}
        source.check(Now(1, later, TimeQuality.NTP))


def test_the_rollout_notice_is_renewed_with_the_timestamp_and_does_not_expire(factory: Factory) -> None:
    released = factory.release(V1, version="1.0", counter=1)
    notice = Notice(basis_points={released.sha256: 500})
    factory.publisher.notify(notice)
    factory.publish()
    for week in range(1, 10):
        later = Publisher(factory.publisher.directory, START + timedelta(weeks=week, days=-1))
        later.publish([read_signer(factory.key("online"))])
    assert later.notice() == notice
    now = Now(0, int((START + timedelta(weeks=9)).timestamp()) * NS_PER_S, TimeQuality.NTP)
    with running(factory.publisher.directory) as base:
        offer = device(factory, base).check(now)
    assert offer.target is not None and offer.target.cohort_percent == 5.0


def test_nothing_but_metadata_and_targets_is_served(factory: Factory) -> None:
    with running(factory.publisher.directory) as base:
        for path in ("staged/targets.json", "metadata/../staged/x", "keys/root-1.pem", "", "%2e%2e/keys"):
            assert Http().small(f"{base}/{path}", 10_000) is None
        assert Http().small(f"{base}/metadata/1.root.json", 100_000) == factory.first_root


def test_custom_fields_come_back_as_they_were_signed(factory: Factory) -> None:
    full = Full(name="app/1.img", length=10, sha256="2" * 64, codec="identity")
    delta = Delta(base_sha256="3" * 64, name="app/1.bsdiff", length=5, sha256="4" * 64)
    release = draft("1.0", 7, name="app/1.img", full=full, deltas=(delta,), requires=("python>=3.11",))
    file = TargetFile(10, {"sha256": "2" * 64}, "app/1.img", {"custom": releases.custom_of(release)})
    assert releases.release_of(file) == release
