"""What the trust core refuses, without network or disk; each bad input is one that took somebody in."""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.metadata import DelegatedRole, Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from tbox.ota import metadata, workflow
from tbox.ota.metadata import (
    VERSION_MAX,
    Authority,
    Floors,
    MetadataError,
    TrustedSet,
    fingerprint,
    matches,
    parse,
)
from tbox.ota.workflow import ROLES_VISITED_MAX, drive, find_target, refresh
from tests.tuf_repository import START, Repository


class Device:
    """A client in memory that keeps its cache and its floors apart, as the store does."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.root = repository.served["root"][0]
        self.cached_roots: tuple[bytes, ...] = ()
        self.cached: dict[str, bytes] = {}
        self.floors = Floors()
        self.now = START

    def trusted(self) -> TrustedSet:
        return TrustedSet(self.root, cached_roots=self.cached_roots, cached=self.cached, floors=self.floors)

    def refresh(self) -> TrustedSet:
        trusted = self.trusted()
        try:
            drive(refresh(trusted, self.now), self.repository.fetch)
        finally:
            self.keep(trusted)
        return trusted

    def keep(self, trusted: TrustedSet) -> None:
        self.cached_roots, self.cached = tuple(trusted.roots[1:]), dict(trusted.kept)
        self.floors = msgspec.msgpack.decode(msgspec.msgpack.encode(trusted.floors), type=Floors)

    def lose_cache(self) -> None:
        self.cached, self.cached_roots = {}, ()

    def find(self, path: str) -> workflow.Found | None:
        trusted = self.refresh()
        found = drive(find_target(trusted, path, self.now), self.repository.fetch)
        self.keep(trusted)
        return found


@pytest.fixture
def repository() -> Repository:
    return Repository()


@pytest.fixture
def device(repository: Repository) -> Device:
    return Device(repository)


def edited(raw: bytes, **fields: Any) -> bytes:
    """Return metadata with other signed fields and its old signatures."""
    found = json.loads(raw)
    found["signed"] |= fields
    return json.dumps(found).encode()


# --- keys ----------------------------------------------------------------------------------------------


def test_one_key_under_two_ids_counts_once(repository: Repository, device: Device) -> None:
    """python-tuf GMS-2022-4197, and the twist that python-tuf itself still counts: same key, other id."""
    signer = repository.signers["timestamp"][0]
    twin_key = SSlibKey("f" * 64, "ed25519", "ed25519", dict(signer.public_key.keyval))
    twin = CryptoSigner(signer._private_key, twin_key)
    repository.root.add_key(twin_key, "timestamp")
    repository.signers["timestamp"].append(twin)
    repository.root.roles["timestamp"].threshold = 2
    repository.publish("root", "timestamp")
    assert len(Metadata.from_bytes(repository.served["timestamp"][-1]).signatures) == 2
    with pytest.raises(MetadataError, match=r"timestamp\.json: signed by 1 of the 2 keys"):
        device.refresh()


def test_one_rsa_key_written_in_two_ways_counts_once() -> None:
    key = repository_key()
    text: str = key.keyval["public"]
    respelt = SSlibKey("2" * 64, "rsa", "rsassa-pss-sha256", {"public": text.replace("\n", "\r\n") + "\r\n"})
    other_scheme = SSlibKey("3" * 64, "rsa", "rsa-pkcs1v15-sha256", {"public": text})
    assert fingerprint(key) == fingerprint(respelt) == fingerprint(other_scheme) != ""
    assert len(Authority((key, respelt, other_scheme), 2).prints()) == 1


def repository_key() -> SSlibKey:
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return CryptoSigner(private).public_key


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_no_signatures_at_all_are_not_enough(repository: Repository, device: Device, role: str) -> None:
    """fwupd CVE-2020-10759: zero signatures were taken for valid."""
    repository.signers[role].clear()
    repository.publish("root", "targets", "snapshot", "timestamp")
    with pytest.raises(MetadataError, match="signed by 0 of the 1 keys"):
        device.refresh()


def test_a_role_without_keys_is_never_signed(repository: Repository, device: Device) -> None:
    """A Mender thread: no keys present, so installed unverified."""
    repository.rotate("targets")
    repository.root.roles["targets"].keyids.clear()
    repository.publish("root", "targets", "snapshot", "timestamp")
    with pytest.raises(MetadataError, match=r"targets\.json: signed by 0 of the 1 keys"):
        device.refresh()


def test_a_threshold_of_zero_is_malformed(repository: Repository, device: Device) -> None:
    repository.root.roles["targets"].threshold = 0
    repository.publish("root")
    with pytest.raises(MetadataError, match=r"root\.json: malformed"):
        device.refresh()


def test_a_key_rotated_out_signs_nothing_any_more(repository: Repository, device: Device) -> None:
    old = list(repository.signers["targets"])
    repository.rotate("targets")
    repository.signers["targets"] = old
    repository.publish("root", "targets", "snapshot", "timestamp")
    with pytest.raises(MetadataError, match=r"targets\.json: signed by 0 of the 1"):
        device.refresh()


@pytest.mark.parametrize("keep", ["old", "new"])
def test_a_new_root_by_only_the_old_or_only_the_new_keys_is_refused(
    repository: Repository, device: Device, keep: str
) -> None:
    old = list(repository.signers["root"])
    repository.rotate("root")
    if keep == "old":
        repository.signers["root"] = old
    repository.publish("root")
    with pytest.raises(MetadataError, match=r"root\.json: signed by 0 of the 1"):
        device.refresh()


def test_a_root_may_not_be_skipped(repository: Repository, device: Device) -> None:
    repository.publish("root", "root")
    del repository.served["root"][1]
    with pytest.raises(MetadataError, match="version 3 follows 1"):
        device.refresh()


@pytest.mark.parametrize(
    ("keytype", "scheme", "public"),
    [
        ("ed25519", "ed25519ph", "00" * 32),
        ("ed25519", "ed25519", "00" * 31),
        ("ed25519", "ed25519", "not hex"),
        ("rsa", "rsassa-pss-md5", "x"),
        ("rsa", "rsassa-pss-sha256", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"),
        ("ecdsa", "ecdsa-sha2-nistp256", ""),
        ("quantum", "magic", "x"),
    ],
)
def test_a_key_of_an_unknown_or_broken_kind_counts_for_nothing(
    keytype: str, scheme: str, public: str
) -> None:
    key = SSlibKey("1" * 64, keytype, scheme, {"public": public})
    usable = (keytype, scheme) in metadata.SCHEMES
    if not usable or keytype != "ed25519" or public == "not hex":
        assert fingerprint(key) == ""
    loaded = parse(Root, "root", Repository().served["root"][0])
    assert Authority((key,), 1).count(loaded) == 0


def test_an_rsa_key_too_short_to_be_safe_counts_for_nothing() -> None:
    private = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    assert fingerprint(CryptoSigner(private).public_key) == ""


def test_an_unknown_algorithm_in_a_root_is_refused(repository: Repository, device: Device) -> None:
    signer = repository.signers["root"][0]
    repository.root.keys[signer.public_key.keyid].scheme = "magic"
    repository.publish("root")
    with pytest.raises(MetadataError, match=r"root\.json: malformed: .*ed25519/magic"):
        device.refresh()


# --- replays -------------------------------------------------------------------------------------------


def replayed(repository: Repository) -> None:
    """Serve the state of before the last publication, each file of it rightly signed."""
    for role in ("targets", "snapshot", "timestamp"):
        repository.served[role] = [*repository.served[role], repository.served[role][0]]


@pytest.mark.parametrize("lost", ["nothing", "cache"])
def test_an_older_timestamp_is_refused_even_when_the_cache_is_lost(
    repository: Repository, device: Device, lost: str
) -> None:
    """python-tuf writes without fsync: after a power cut it takes a replayed older timestamp."""
    repository.publish_all()
    device.refresh()
    if lost == "cache":
        device.lose_cache()
    replayed(repository)
    with pytest.raises(MetadataError, match=r"timestamp\.json: version 1 is older than 2"):
        device.refresh()


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"[]", b"\x00" * 4096])
@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_truncated_cache_accepts_no_replay_and_heals(
    repository: Repository, device: Device, role: str, damage: bytes
) -> None:
    repository.publish_all()
    device.refresh()
    device.cached[role] = damage
    served = {name: list(versions) for name, versions in repository.served.items()}
    replayed(repository)
    with pytest.raises(MetadataError, match="is older than 2"):
        device.refresh()
    repository.served = served
    device.refresh()
    assert device.cached[role] == served[role][-1]


def test_without_floors_a_truncated_cache_would_accept_the_replay(
    repository: Repository, device: Device
) -> None:
    """The test of the test: it is the floors that stand against the replay."""
    repository.publish_all()
    device.refresh()
    device.lose_cache()
    device.floors = Floors()
    replayed(repository)
    device.refresh()


def test_the_same_version_with_other_content_is_refused(repository: Repository, device: Device) -> None:
    device.refresh()
    device.lose_cache()
    repository.timestamp.expires += timedelta(days=1)
    repository.publish("timestamp", bump=False)
    with pytest.raises(MetadataError, match="version 1 was seen with other content"):
        device.refresh()
    repository.timestamp.expires -= timedelta(days=1)
    repository.publish("timestamp", bump=False)
    device.refresh()


def test_a_snapshot_of_the_same_version_with_other_content_is_refused(
    repository: Repository, device: Device
) -> None:
    repository.with_hashes = True
    repository.publish_all()
    device.refresh()
    repository.snapshot.expires += timedelta(days=1)
    repository.served["snapshot"].pop()
    repository.publish("snapshot", bump=False)
    repository.publish("timestamp")
    with pytest.raises(MetadataError, match=r"snapshot\.json: version 2 was seen with other content"):
        device.refresh()


def test_an_older_root_is_refused_when_the_cache_is_lost(repository: Repository, device: Device) -> None:
    repository.publish("root", "timestamp")
    device.refresh()
    device.lose_cache()
    del repository.served["root"][1]
    with pytest.raises(MetadataError, match=r"root\.json: version 1 is older than 2"):
        device.refresh()


def test_older_targets_are_refused_when_the_cache_is_lost(repository: Repository, device: Device) -> None:
    repository.publish_all()
    device.refresh()
    device.lose_cache()
    repository.snapshot.meta["targets.json"] = MetaFile(1)
    repository.publish("snapshot", "timestamp")
    with pytest.raises(MetadataError, match=r"targets\.json went from 2 to 1"):
        device.refresh()


def test_an_older_delegated_role_is_refused_when_the_cache_is_lost(
    repository: Repository, device: Device
) -> None:
    repository.delegate("targets", DelegatedRole("apps", [], 1, False, ["app/*"]))
    repository.add_target("app/x", b"x", "apps")
    repository.publish_all()
    repository.publish("apps", "snapshot", "timestamp")
    assert device.find("app/x") is not None
    device.lose_cache()
    repository.snapshot.meta["apps.json"] = MetaFile(1)
    repository.publish("snapshot", "timestamp")
    with pytest.raises(MetadataError, match=r"apps\.json went from 2 to 1"):
        device.refresh()


def test_a_floor_lapses_only_when_the_keys_that_set_it_no_longer_suffice(
    repository: Repository, device: Device
) -> None:
    repository.timestamp.version = 1000
    repository.publish("timestamp", bump=False)
    device.refresh()
    device.lose_cache()
    repository.add_key("timestamp")  # one more key: the old one still suffices, so the floor holds
    repository.publish("root")
    repository.timestamp.version = 5
    repository.publish("timestamp", bump=False)
    with pytest.raises(MetadataError, match="version 5 is older than 1000"):
        device.refresh()
    repository.rotate("timestamp")
    repository.publish("root")
    repository.publish("timestamp", bump=False)
    assert device.refresh().floors.roles["timestamp"].version == 5


# --- versions, sizes, times --------------------------------------------------------------------------------


OUT_OF_BOUNDS = "version is not a number from 1"


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ((1 << 63) - 1, OUT_OF_BOUNDS),
        (1 << 63, OUT_OF_BOUNDS),
        (1 << 64, OUT_OF_BOUNDS),
        (VERSION_MAX + 1, OUT_OF_BOUNDS),
        (True, OUT_OF_BOUNDS),
        (0, "must be > 0"),
        (-1, "must be > 0"),
        (1.0, "Could not encode"),
        ("2", "'str' and 'int'"),
    ],
)
def test_a_version_out_of_bounds_is_refused(
    repository: Repository, device: Device, version: Any, why: str
) -> None:
    raw = edited(repository.served["timestamp"][-1], version=version)
    repository.served["timestamp"][-1] = raw
    with pytest.raises(MetadataError, match=rf"timestamp\.json: .*{why}"):
        device.refresh()


def test_the_highest_version_leaves_a_way_back(repository: Repository, device: Device) -> None:
    repository.timestamp.version = VERSION_MAX
    repository.publish("timestamp", bump=False)
    device.refresh()
    repository.rotate("timestamp")
    repository.publish("root")
    repository.timestamp.version = 1
    repository.publish("timestamp", bump=False)
    device.refresh()


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_an_oversized_file_is_refused_before_it_is_parsed(
    repository: Repository, device: Device, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.publish("root")
    limit = len(repository.served[role][-1]) - 1
    monkeypatch.setattr(workflow, f"{role.upper()}_BYTES_MAX", limit)
    with pytest.raises(MetadataError, match=f"more than {limit} bytes"):
        device.refresh()


def test_a_length_in_the_snapshot_above_the_limit_does_not_lift_it(
    repository: Repository, device: Device
) -> None:
    repository.snapshot.meta["targets.json"] = MetaFile(1, length=1 << 40)
    repository.publish("snapshot", "timestamp")
    wanted = []

    def fetch(path: str, length_max: int) -> bytes | None:
        wanted.append(length_max)
        return repository.fetch(path, length_max)

    with pytest.raises(MetadataError, match=r"targets\.json: is not the file that snapshot\.json tells of"):
        drive(refresh(device.trusted(), START), fetch)
    assert max(wanted) == workflow.TARGETS_BYTES_MAX


@pytest.mark.parametrize("days", [-20_000, 40, 27_000])
def test_expiry_is_judged_by_the_time_that_is_handed_in(
    repository: Repository, device: Device, days: int
) -> None:
    """The shells see to it that a clock at 1970 or 2100 is no time at all (source.moment)."""
    device.now = START + timedelta(days=days)
    if days > 0:
        with pytest.raises(MetadataError, match=r"root\.json: version 1 expired on 2026-03-31 12:00 UTC"):
            device.refresh()
    else:
        device.refresh()


# --- malformed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"{}",
        b"[" * 16_000,
        b'{"signed": {"_type": "timestamp"}, "signatures": []}',
        b'{"signed": {"_type": "magic"}, "signatures": []}',
        b'{"signed": [], "signatures": {}}',
        b'{"signed": 1e999, "signatures": []}',
        b'{"signed": {"_type": "timestamp", "version": ' + b"9" * 5000 + b'}, "signatures": []}',
    ],
)
def test_what_is_no_metadata_is_refused(repository: Repository, device: Device, raw: bytes) -> None:
    repository.served["timestamp"][-1] = raw
    with pytest.raises(MetadataError, match=r"timestamp\.json: malformed"):
        device.refresh()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"expires": "2100-01-01"}, "'2100-01-01' does not match"),
        ({"expires": "tomorrow"}, "'tomorrow' does not match"),
        ({"expires": None}, "must be str, not None"),
        ({"spec_version": "2.0.0"}, "Unsupported spec_version"),
        ({"spec_version": "x"}, "parse spec_version"),
        ({"meta": {}}, "snapshot.json"),
        ({"meta": {"snapshot.json": {"version": "1"}}}, "'str' and 'int'"),
        ({"meta": {"snapshot.json": {"version": 1.5}}}, "Could not encode"),
        ({"meta": {"snapshot.json": {"version": 1, "hashes": {}}}}, "Hashes must be"),
        ({"meta": {"snapshot.json": {"version": 1, "length": -1}}}, "Length must be"),
        ({"half": 0.5}, "Could not encode"),
        ({"lone": "\ud800"}, "surrogates"),
    ],
)
def test_fields_that_make_no_sense_are_refused(
    repository: Repository, device: Device, fields: dict[str, Any], why: str
) -> None:
    repository.served["timestamp"][-1] = edited(repository.served["timestamp"][-1], **fields)
    with pytest.raises(MetadataError, match=rf"timestamp\.json: malformed: .*{why}"):
        device.refresh()


FUZZED = Repository()
FUZZED.delegate("targets", DelegatedRole("apps", [], 1, False, ["app/*"]))
FUZZED.publish_all()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    role=st.sampled_from(["root", "timestamp", "snapshot", "targets"]),
    at=st.floats(0, 1, exclude_max=True),
    piece=st.one_of(
        st.binary(max_size=4), st.sampled_from([b"{", b'"', b"null", b"-1", b"1e9", b"]", b"\\"])
    ),
    cut=st.integers(0, 40),
)
def test_no_change_to_a_file_gets_in_or_gets_out_as_another_error(
    role: str, at: float, piece: bytes, cut: int
) -> None:
    """Whatever is changed: refused as MetadataError, or nothing of what is signed was changed."""
    repository = deepcopy_served(FUZZED)
    original = repository.served[role][-1]
    begin = int(at * len(original))
    repository.served[role][-1] = original[:begin] + piece + original[begin + cut :]
    device = Device(repository)
    device.root = FUZZED.served["root"][0]
    try:
        if role == "root":
            device.root = repository.served["root"][0]
            device.trusted()
        else:
            device.refresh()
    except MetadataError:
        return
    kind: Any = {"root": Root, "timestamp": Timestamp, "snapshot": Snapshot, "targets": Targets}[role]
    covered = [parse(kind, role, raw).covered for raw in (original, repository.served[role][-1])]
    assert covered[0] == covered[1]


def deepcopy_served(repository: Repository) -> Repository:
    twin = object.__new__(Repository)
    twin.__dict__ = dict(repository.__dict__)
    twin.served = deepcopy(repository.served)
    return twin


# --- delegations -----------------------------------------------------------------------------------------


def test_delegations_too_many_or_too_deep_are_refused(repository: Repository, device: Device) -> None:
    above = "targets"
    for depth in range(workflow.DELEGATION_DEPTH_MAX):
        repository.delegate(above, DelegatedRole(f"d{depth}", [], 1, False, ["*"]))
        above = f"d{depth}"
    repository.publish_all()
    with pytest.raises(MetadataError, match="too many delegations"):
        device.find("missing")


def test_a_wide_graph_is_walked_no_further_than_the_limit(repository: Repository, device: Device) -> None:
    for number in range(ROLES_VISITED_MAX + 1):
        repository.delegate("targets", DelegatedRole(f"w{number}", [], 1, False, ["*"]))
    repository.publish_all()
    with pytest.raises(MetadataError, match="too many delegations"):
        device.find("missing")
    assert len([role for role, _ in repository.asked if role.startswith("w")]) == ROLES_VISITED_MAX


def test_a_delegated_role_must_be_signed_by_the_keys_its_delegator_names(
    repository: Repository, device: Device
) -> None:
    repository.delegate("targets", DelegatedRole("apps", [], 1, False, ["app/*"]))
    repository.add_target("app/x", b"x", "apps")
    repository.signers["apps"] = repository.signers["targets"]
    repository.publish_all()
    with pytest.raises(MetadataError, match=r"apps\.json: signed by 0 of the 1"):
        device.find("app/x")


def test_a_role_taken_from_one_delegator_is_verified_anew_for_another(
    repository: Repository, device: Device
) -> None:
    for above in ("A", "B"):
        repository.delegate("targets", DelegatedRole(above, [], 1, False, [f"{above.lower()}/*"]))
        repository.delegate(above, DelegatedRole("C", [], 1, False, [f"{above.lower()}/*"]))
    stranger = repository.signers["C"].pop()  # B's key for C signs no more
    assert stranger is not None
    repository.add_target("a/x", b"x", "C")
    repository.add_target("b/x", b"x", "C")
    repository.publish_all()
    assert device.find("a/x") is not None
    with pytest.raises(MetadataError, match=r"C\.json: signed by 0 of the 1"):
        device.find("b/x")


@pytest.mark.parametrize("name", ["", "root", "timestamp", "snapshot", "targets"])
def test_a_delegated_role_may_not_bear_a_top_level_name(
    repository: Repository, device: Device, name: str
) -> None:
    repository.delegate("targets", DelegatedRole("apps", [], 1, False, ["*"]))
    repository.publish("apps", "targets")
    raw = json.loads(repository.served["targets"].pop())
    raw["signed"]["delegations"]["roles"][0]["name"] = name
    repository.served["targets"].append(json.dumps(raw).encode())
    repository.publish("snapshot", "timestamp")
    with pytest.raises(MetadataError, match=r"targets\.json: malformed"):
        device.refresh()


# --- hashes ----------------------------------------------------------------------------------------------


def test_hashes_must_all_hold_and_one_must_be_known() -> None:
    data = b"content"
    right, wrong = hashlib.sha256(data).hexdigest(), "0" * 64
    assert matches(data, 7, {"sha256": right})
    assert matches(data, None, None)
    assert matches(data, 7, {"sha256": right, "magic": wrong})
    assert not matches(data, 8, {"sha256": right})
    assert not matches(data, 7, {"sha256": wrong})
    assert not matches(data, 7, {"sha256": right, "sha512": wrong})
    assert not matches(data, 7, {"magic": right})
    assert not matches(data, 7, {"md5": hashlib.md5(data).hexdigest()})
    assert not matches(data, 7, {})


# --- tests of the tests: with a bug planted, the bad input gets in ------------------------------------------


def test_counting_by_key_id_would_let_one_key_count_twice(
    repository: Repository, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "fingerprint", lambda key: hashlib.sha256(key.keyid.encode()).hexdigest())
    test_bug = pytest.raises(pytest.fail.Exception, match="DID NOT RAISE")
    with test_bug:
        test_one_key_under_two_ids_counts_once(repository, device)


def test_a_root_checked_by_its_own_keys_alone_would_be_anybodys(
    repository: Repository, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update_root(trusted: TrustedSet, raw: bytes) -> None:
        new = parse(Root, "root", raw)
        metadata.authority_of(new.signed, "root").signers(new)  # the threshold of the wrong root
        trusted.root = new
        trusted.roots.append(raw)

    monkeypatch.setattr(TrustedSet, "update_root", update_root)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_a_new_root_by_only_the_old_or_only_the_new_keys_is_refused(repository, device, "new")


def test_a_threshold_taken_for_one_would_let_one_signer_in(
    repository: Repository, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signers(authority: Authority, loaded: Any) -> frozenset[str]:
        if not authority.count(loaded):
            raise MetadataError("signed by 0 keys")
        return authority.prints()

    monkeypatch.setattr(Authority, "signers", signers)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_one_key_under_two_ids_counts_once(repository, device)


def test_floors_that_lapse_with_any_new_key_would_let_a_replay_in(
    repository: Repository, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        metadata, "_holds", lambda floor, authority: authority.prints() == frozenset(floor.signers)
    )
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_a_floor_lapses_only_when_the_keys_that_set_it_no_longer_suffice(repository, device)
