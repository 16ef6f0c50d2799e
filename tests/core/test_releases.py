"""Custom fields are believed only within their bounds, and a slot's proof only when every signature holds."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuf.api.metadata import DelegatedRole, TargetFile

from tbox.errors import Refused
from tbox.ota import releases
from tbox.ota.metadata import MetadataError, TrustedSet
from tbox.ota.model import MANIFEST_BYTES_MAX, Offer, VerifiedTarget
from tbox.ota.releases import Manifest, custom_of, offer, release_of, verify_manifest
from tbox.ota.workflow import drive, refresh
from tests.tuf_repository import START, Repository

SHA = "c" * 64
GOOD: dict[str, Any] = {
    "version": "1.0",
    "kind": "app",
    "length": 1000,
    "sha256": SHA,
    "security_counter": 3,
    "hardware_ids": ["tbox-sim"],
}


def file_of(custom: Any, path: str = "app/1.img", length: int = 10) -> TargetFile:
    return TargetFile(length, {"sha256": SHA}, path, {"custom": {"tbox": custom}})


def test_a_release_takes_name_length_and_digest_of_its_file_from_the_target_itself() -> None:
    release = release_of(file_of(GOOD))
    assert release is not None
    assert (release.full.name, release.full.length, release.full.sha256) == ("app/1.img", 10, SHA)
    found = msgspec.json.decode(msgspec.json.encode(custom_of(release)["tbox"]))
    assert found == GOOD | {"codec": "zstd", "cohort_basis_points": 10_000}


def test_another_file_is_no_release() -> None:
    assert release_of(TargetFile(1, {"sha256": SHA}, "x")) is None
    assert release_of(TargetFile(1, {"sha256": SHA}, "x", {"custom": {"other": 1}})) is None
    assert release_of(TargetFile(1, {"sha256": SHA}, "x", {"custom": "text"})) is None


COUNTER, LENGTH, DIGEST = "- at `$.security_counter`", "- at `$.length`", "- at `$.sha256`"
DELTA = {"base_sha256": SHA, "name": "d", "length": 5, "sha256": SHA}
# case -> what is signed instead, and the reason it is refused for
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "counter absent": ({"security_counter": None}, "missing required field `security_counter`"),
    "counter zero": ({"security_counter": 0}, f">= 1 {COUNTER}"),
    "counter negative": ({"security_counter": -1}, f">= 1 {COUNTER}"),
    "counter a fraction": ({"security_counter": 1.5}, f"got `float` {COUNTER}"),
    "counter a word": ({"security_counter": "3"}, f"got `str` {COUNTER}"),
    "counter beyond 31 bits": ({"security_counter": 1 << 31}, f"<= 2147483647 {COUNTER}"),
    "size negative": ({"length": -1}, f">= 0 {LENGTH}"),
    "size beyond any slot": ({"length": 1 << 40}, f"<= {8 << 30} {LENGTH}"),
    "digest short": ({"sha256": "ab"}, DIGEST),
    "digest and a line end": ({"sha256": f"{SHA}\n"}, DIGEST),
    "version and a line end": ({"version": "1.0\n"}, "- at `$.version`"),
    "digest in capitals": ({"sha256": "C" * 64}, DIGEST),
    "no hardware": ({"hardware_ids": []}, "length >= 1 - at `$.hardware_ids`"),
    "hardware a word": ({"hardware_ids": "tbox-sim"}, "got `str` - at `$.hardware_ids`"),
    "too much hardware": (
        {"hardware_ids": [f"h{n}" for n in range(65)]}, "length <= 64 - at `$.hardware_ids`"
    ),
    "kind unknown": ({"kind": "firmware"}, "'firmware' - at `$.kind`"),
    "codec unknown": ({"codec": "gzip"}, "'gzip' - at `$.full.codec`"),
    "cohort above all": ({"cohort_basis_points": 10_001}, "<= 10000"),
    "cohort in per cent": ({"cohort_percent": 5}, "its custom part is malformed"),
    "window beyond the day": (
        {"window": {"begin_minute": 1440, "end_minute": 0}}, "<= 1439 - at `$.window.begin_minute`"
    ),
    "name smuggled in": ({"name": "app/other.img"}, "its custom part is malformed"),
    "file smuggled in": (
        {"full": {"name": "x", "length": 1, "sha256": SHA}}, "its custom part is malformed"
    ),
    "field unknown": ({"autorun": True}, "unknown field `autorun`"),
    "delta of negative size": ({"deltas": [DELTA | {"length": -5}]}, ">= 0 - at `$.deltas[0].length`"),
    "too many deltas": ({"deltas": [DELTA] * 17}, "length <= 16 - at `$.deltas`"),
    "emergency without a reason": (
        {"emergency": {"floor_max": 3}}, "missing required field `reason` - at `$.emergency`"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_custom_field_out_of_bounds_is_refused(case: str) -> None:
    change, why = BAD[case]
    custom = {key: value for key, value in (GOOD | change).items() if value is not None}
    with pytest.raises(MetadataError, match=re.escape(why)):
        release_of(file_of(custom))


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", " x", "", "x" * 201, "a\nb", "ü"])
def test_a_target_of_an_odd_name_is_no_release(path: str) -> None:
    with pytest.raises(MetadataError, match=r"- at `\$\.name`"):
        release_of(file_of(GOOD, path))


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*GOOD, "deltas", "window", "codec", "emergency", "requires", "rxswin", "x"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
            ),
            max_leaves=6,
        ),
    )
)
def test_no_custom_object_leads_to_another_error(changes: dict[str, Any]) -> None:
    try:
        release = release_of(file_of(GOOD | changes))
    except MetadataError:
        return
    assert isinstance(release, VerifiedTarget)


# --- the offer -----------------------------------------------------------------------------------------


@pytest.fixture
def repository() -> Repository:
    return Repository()


def add(repository: Repository, path: str, role: str = "targets", **changes: Any) -> None:
    repository.add_target(path, b"image file", role, tbox=GOOD | changes)


def look(repository: Repository, hardware_id: str = "tbox-sim") -> tuple[Offer, TrustedSet]:
    repository.publish_all()
    trusted = TrustedSet(repository.served["root"][0])
    drive(refresh(trusted, START), repository.fetch)
    return drive(offer(trusted, START, hardware_id, lambda release: True), repository.fetch), trusted


def test_releases_come_from_delegated_roles_too_and_prove_themselves(repository: Repository) -> None:
    repository.delegate("targets", DelegatedRole("apps", [], 1, False, ["app/*"]))
    add(repository, "app/2.img", "apps", security_counter=7)
    add(repository, "top.img", security_counter=5)
    found, _ = look(repository)
    assert found.target is not None and found.target.name == "app/2.img"
    assert verify_manifest(found.manifest, repository.served["root"][0]) == found.target


def test_a_release_outside_its_roles_paths_is_not_offered(repository: Repository) -> None:
    repository.delegate("targets", DelegatedRole("apps", [], 1, False, ["app/*"]))
    add(repository, "raw/2.img", "apps", security_counter=7)
    found, _ = look(repository)
    assert found.target is None


def test_a_release_that_an_earlier_role_answers_for_is_that_roles(repository: Repository) -> None:
    for name in ("first", "second"):
        repository.delegate("targets", DelegatedRole(name, [], 1, False, ["app/*"]))
    add(repository, "app/1.img", "second", security_counter=9, version="forged")
    add(repository, "app/1.img", "first", security_counter=3)
    found, _ = look(repository)
    assert found.target is not None and found.target.version == "1.0"


def test_a_delta_that_is_no_target_beside_its_release_is_refused(repository: Repository) -> None:
    delta = {"base_sha256": SHA, "name": "app/d", "length": 5, "sha256": SHA}
    add(repository, "app/1.img", deltas=[delta])
    with pytest.raises(MetadataError, match="is not a target beside it"):
        look(repository)


def test_an_order_of_a_role_that_may_give_none_is_not_heard(repository: Repository) -> None:
    repository.delegate("targets", DelegatedRole("apps", [], 1, False, ["*"]))
    order = {"orders": [{"leave_sha256": SHA, "reason": "x"}]}
    repository.roles["apps"].unrecognized_fields["tbox"] = order
    assert look(repository)[0].orders == ()
    repository.targets.unrecognized_fields["tbox"] = order
    assert len(look(repository)[0].orders) == 1


def test_a_rollout_role_under_another_role_is_not_heard(repository: Repository) -> None:
    repository.delegate("targets", DelegatedRole("apps", [], 1, False, ["*"]))
    repository.delegate("apps", DelegatedRole("rollout", [], 1, False, ["*"]))
    order = {"orders": [{"leave_sha256": SHA, "reason": "x"}]}
    repository.roles["rollout"].unrecognized_fields["tbox"] = order
    assert look(repository)[0].orders == ()


@pytest.mark.parametrize(
    "notice", [{"orders": 1}, {"x": 1}, {"basis_points": {"x": 1}}, {"basis_points": {SHA: -1}}]
)
def test_a_notice_out_of_bounds_is_refused(repository: Repository, notice: dict[str, Any]) -> None:
    repository.targets.unrecognized_fields["tbox"] = notice
    with pytest.raises(MetadataError, match="its notice is out of bounds"):
        look(repository)


def test_more_releases_than_a_check_looks_at_are_refused(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releases, "RELEASES_MAX", 3)
    for number in range(4):
        add(repository, f"app/{number}.img")
    with pytest.raises(MetadataError, match="more than 3 releases"):
        look(repository)


# --- the proof kept with a slot --------------------------------------------------------------------------


@pytest.fixture
def proof(repository: Repository) -> tuple[Manifest, bytes]:
    repository.delegate("targets", DelegatedRole("apps", [], 1, False, ["app/*"]))
    add(repository, "app/1.img", "apps")
    add(repository, "app/9.img", "apps", security_counter=9)
    repository.publish("root")
    found, _ = look(repository)
    return msgspec.msgpack.decode(found.manifest, type=Manifest), repository.served["root"][0]


def encoded(manifest: Manifest, **changes: Any) -> bytes:
    return msgspec.msgpack.encode(msgspec.structs.replace(manifest, **changes))


def test_a_proof_holds_as_it_was_made(proof: tuple[Manifest, bytes]) -> None:
    manifest, root = proof
    assert len(manifest.roots) == 1 and [role for role, _ in manifest.roles] == ["targets", "apps"]
    assert verify_manifest(encoded(manifest), root).security_counter == 9


def test_a_proof_is_taken_apart_and_put_together_in_vain(
    proof: tuple[Manifest, bytes], repository: Repository
) -> None:
    manifest, root = proof
    targets, apps = manifest.roles
    stranger = Repository(first_key=50)
    stranger.publish("root")
    cases = {
        "another target of the role": (encoded(manifest, target="app/2.img"), "does not tell of its target"),
        "a target the role was not given": (encoded(manifest, target="raw/1.img"), "does not delegate"),
        "without the top": (encoded(manifest, roles=(apps,)), "does not begin with targets.json"),
        "the top alone": (encoded(manifest, roles=(targets,)), "does not tell of its target"),
        "the top twice": (encoded(manifest, roles=(targets, targets)), "does not delegate"),
        "renamed": (encoded(manifest, roles=(targets, ("other", apps[1]))), "does not delegate"),
        "of another repository": (
            encoded(manifest, roots=tuple(stranger.served["root"])), "signed by 0 of the 1"
        ),
        "without roles": (encoded(manifest, roles=()), "the stored proof is malformed"),
        "changed": (
            encoded(manifest, roles=(targets, (apps[0], apps[1].replace(b'":9', b'":8')))),
            "apps.json: signed by 0 of the 1",
        ),
        "cut": (encoded(manifest)[:-1], "the stored proof is malformed"),
        "too big": (bytes(MANIFEST_BYTES_MAX + 1), "the stored proof is too big"),
        "empty": (b"", "the stored proof is malformed"),
    }  # fmt: skip
    for case, (raw, why) in cases.items():
        with pytest.raises(Refused, match=why):
            verify_manifest(raw, root)
            pytest.fail(case)
    with pytest.raises(Refused, match="signed by 0 of the 1"):
        verify_manifest(encoded(manifest), stranger.served["root"][0])


def test_a_proof_of_keys_rotated_out_does_not_hold_under_the_new_root(repository: Repository) -> None:
    add(repository, "app/1.img")
    found, _ = look(repository)
    old = msgspec.msgpack.decode(found.manifest, type=Manifest)
    repository.rotate("targets")
    repository.publish("root")
    with pytest.raises(MetadataError, match=r"targets\.json: signed by 0 of the 1"):
        verify_manifest(encoded(old, roots=(repository.served["root"][-1],)), repository.served["root"][0])


def test_a_newer_first_root_in_the_boot_loader_does_no_harm(proof: tuple[Manifest, bytes]) -> None:
    manifest, _ = proof
    assert verify_manifest(encoded(manifest), manifest.roots[-1]).security_counter == 9


def test_a_proof_too_big_for_a_slot_is_told_when_it_is_made(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releases, "MANIFEST_BYTES_MAX", 500)
    add(repository, "app/1.img")
    with pytest.raises(MetadataError, match="500 fit a slot"):
        look(repository)


@settings(max_examples=150, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), piece=st.binary(max_size=4), cut=st.integers(0, 20))
def test_no_change_to_a_proof_gets_another_target_in(at: float, piece: bytes, cut: int) -> None:
    begin = int(at * len(PROOF))
    try:
        found = verify_manifest(PROOF[:begin] + piece + PROOF[begin + cut :], ROOT)
    except Refused:
        return
    assert found == TARGET


def _made() -> tuple[bytes, bytes, VerifiedTarget]:
    repository = Repository()
    add(repository, "app/1.img")
    found, _ = look(repository)
    assert found.target is not None
    return found.manifest, repository.served["root"][0], found.target


PROOF, ROOT, TARGET = _made()
