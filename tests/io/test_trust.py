"""The cases of the stock TUF client-conformance suite, driven as it does: commands, HTTP, files.

What that suite holds a client to is written down here anew, against a repository of our own.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
from securesystemslib.formats import encode_canonical
from tuf.api.metadata import DelegatedRole, Metadata, MetaFile, TargetFile, Targets

from tbox.ota import trust
from tbox.ota.metadata import ROOT_ROTATIONS_MAX
from tests.tuf_repository import START, Repository, serving

FIRST = [("root", 2), ("timestamp", None), ("snapshot", 1), ("targets", 1)]


@dataclass
class Client:
    """The client under test, as the suite's runner drives one."""

    directory: Path
    base: str
    repository: Repository
    monkeypatch: pytest.MonkeyPatch
    said: str = ""  # why the last command failed

    def init(self, root: bytes | None = None) -> int:
        path = self.directory / "initial_root.json"
        path.write_bytes(root if root is not None else self.repository.served["root"][0])
        return trust.main(["--metadata-dir", str(self.metadata), "init", str(path)])

    @property
    def metadata(self) -> Path:
        return self.directory / "metadata"

    def _run(self, now: datetime, *arguments: str) -> int:
        self.monkeypatch.setattr("time.time", now.timestamp)
        url = f"{self.base}/metadata/"
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            code = trust.main(["--metadata-dir", str(self.metadata), "--metadata-url", url, *arguments])
        self.said = stderr.getvalue()
        assert self.said.count("\n") == code, "one line says why, and only why not"
        return code

    def refresh(self, now: datetime = START) -> int:
        return self._run(now, "refresh")

    def download(self, target: str, now: datetime = START) -> int:
        targets = ["--target-dir", str(self.directory / "targets")]
        url = ["--target-base-url", f"{self.base}/targets/"]
        return self._run(now, "--target-name", target, *targets, *url, "download")

    def version(self, role: str) -> int | None:
        path = self.metadata / f"{role}.json"
        return Metadata.from_file(str(path)).signed.version if path.exists() else None

    def trusted(self) -> dict[str, int]:
        """Every <role>.json in the metadata directory, as the suite lists them."""
        return {
            path.stem: Metadata.from_file(str(path)).signed.version
            for path in sorted(self.metadata.iterdir())
            if path.name.endswith(".json")
        }

    def downloaded(self) -> list[bytes]:
        files = [path for path in (self.directory / "targets").rglob("*") if path.is_file()]
        return [path.read_bytes() for path in sorted(files, key=lambda path: path.stat().st_mtime_ns)]


@pytest.fixture
def repository() -> Repository:
    return Repository()


@pytest.fixture
def client(tmp_path: Path, repository: Repository, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    (tmp_path / "metadata").mkdir()
    (tmp_path / "targets").mkdir()
    with serving(repository) as base:
        yield Client(tmp_path, base, repository, monkeypatch)


# --- the basics ----------------------------------------------------------------------------------------


def test_a_refresh_asks_for_the_next_root_and_the_four_roles_and_shows_them(client: Client) -> None:
    repository = client.repository
    assert client.init() == 0
    assert repository.asked == []
    assert client.refresh() == 0
    assert repository.asked == FIRST
    for role in ("root", "timestamp", "snapshot", "targets"):
        assert (client.metadata / f"{role}.json").read_bytes() == repository.served[role][-1]


def test_a_second_refresh_asks_for_no_more_than_it_must(client: Client) -> None:
    client.init()
    client.refresh()
    client.repository.asked.clear()
    assert client.refresh() == 0
    assert client.repository.asked == FIRST[:2]


def test_the_command_line_works_as_a_process(client: Client, tmp_path: Path) -> None:
    repository = Repository(datetime.now(START.tzinfo))
    (tmp_path / "root").write_bytes(repository.served["root"][0])
    repository.add_target("a/b.txt", b"content")
    repository.publish("targets", "snapshot", "timestamp")
    with serving(repository) as base:
        common = [sys.executable, "-m", "tbox.ota.trust", "--metadata-dir", str(client.metadata)]
        init = subprocess.run([*common, "init", str(tmp_path / "root")], check=False)
        wanted = ["--target-name", "a/b.txt", "--target-dir", str(tmp_path / "targets")]
        urls = ["--metadata-url", f"{base}/metadata", "--target-base-url", f"{base}/targets"]
        download = subprocess.run([*common, *urls, *wanted, "download"], check=False)
        absent = subprocess.run(
            [*common, *urls, "--target-name", "x", *wanted[2:], "download"],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
    assert (init.returncode, download.returncode, absent.returncode) == (0, 0, 1)
    assert absent.stderr.count("\n") == 1 and "no role has this target" in absent.stderr
    assert client.downloaded() == [b"content"]


def test_a_download_refreshes_first_though_the_target_is_not_there(client: Client) -> None:
    client.init()
    assert client.download("nonexistent artifact") == 1 and "no role has this target" in client.said
    assert client.repository.asked == FIRST
    assert client.trusted() == {"root": 1, "snapshot": 1, "targets": 1, "timestamp": 1}


def test_an_invalid_first_root_leads_to_no_request(client: Client) -> None:
    root = json.loads(client.repository.served["root"][0])
    del root["signed"]["version"]
    client.init(json.dumps(root).encode())
    assert client.refresh() == 1 and "first-root" in client.said
    assert client.repository.asked == []


def test_a_first_root_with_a_wrong_signature_leads_to_no_request(client: Client) -> None:
    root = json.loads(client.repository.served["root"][0])
    root["signatures"][0]["sig"] = "ab" * 64
    client.init(json.dumps(root).encode())
    assert client.refresh() == 1 and "first-root" in client.said
    assert client.repository.asked == []


@pytest.mark.parametrize(
    ("role", "trusted"),
    [
        ("root", {"root": 1}),
        ("timestamp", {"root": 2}),
        ("snapshot", {"root": 2, "timestamp": 2}),
        ("targets", {"root": 2, "snapshot": 2, "timestamp": 2}),
    ],
)
def test_what_is_not_signed_is_refused_and_what_came_before_is_kept(
    client: Client, role: str, trusted: dict[str, int]
) -> None:
    client.repository.signers[role].clear()
    client.repository.publish("root", "targets", "snapshot", "timestamp")
    client.init()
    assert client.refresh() == 1 and f"{role}.json: signed by 0 of the 1 keys" in client.said
    assert client.trusted() == trusted


@pytest.mark.parametrize(
    ("role", "why", "trusted"),
    [
        ("root", "root.json: version 3 follows 1", {"root": 1}),
        ("snapshot", "version 3, and timestamp.json tells of 2", {"root": 2, "timestamp": 2}),
        (
            "targets", "version 3, and snapshot.json tells of 2",
            {"root": 2, "snapshot": 2, "timestamp": 2},
        ),
    ],
)  # fmt: skip
def test_a_file_of_another_version_than_its_name_says_is_refused(
    client: Client, role: str, why: str, trusted: dict[str, int]
) -> None:
    repository = client.repository
    repository.signed(role).version += 1  # served as 2.<role>.json, and it says 3
    repository.publish("root", "targets")
    if role == "targets":
        repository.snapshot.meta["targets.json"].version = 2
    repository.publish("snapshot")
    if role == "snapshot":
        repository.timestamp.snapshot_meta.version = 2
    repository.publish("timestamp")
    client.init()
    assert client.refresh() == 1 and why in client.said
    assert client.trusted() == trusted


def test_a_timestamp_of_the_same_version_with_other_content_is_not_taken(client: Client) -> None:
    repository = client.repository
    client.init()
    client.refresh()
    repository.timestamp.snapshot_meta.version = 100
    repository.served["timestamp"] = [repository.sign("timestamp")]
    assert client.refresh() == 0
    assert repository.asked[-1] == ("timestamp", None)
    held = Metadata.from_file(str(client.metadata / "timestamp.json")).signed
    assert held.snapshot_meta.version == 1  # type: ignore[attr-defined]


def test_hashes_of_metadata_are_checked(client: Client) -> None:
    repository = client.repository
    repository.with_hashes = True
    repository.publish("targets", "snapshot", "timestamp")
    client.init()
    assert client.refresh() == 0
    repository.publish("targets")
    repository.snapshot.meta["targets.json"].hashes = {"sha256": "46" * 32}
    repository.publish("snapshot", "timestamp")
    assert (
        client.refresh() == 1 and "targets.json: is not the file that snapshot.json tells of" in client.said
    )
    assert (client.version("snapshot"), client.version("targets")) == (3, 2)


def test_metadata_is_kept_byte_for_byte(client: Client) -> None:
    served = client.repository.served["timestamp"]
    served[-1] += b" "
    client.init()
    assert client.refresh() == 0
    assert (client.metadata / "timestamp.json").read_bytes() == served[-1]


def test_targets_that_the_snapshot_does_not_tell_of_are_not_taken(client: Client) -> None:
    client.init()
    client.refresh()
    client.repository.publish("targets")
    assert client.refresh() == 0
    assert client.version("targets") == 1
    assert client.repository.asked[-1] == ("timestamp", None)


def test_unknown_fields_are_part_of_what_is_signed(client: Client) -> None:
    repository = client.repository
    client.init()
    client.refresh()
    signer = repository.key()
    signer.public_key.unrecognized_fields["extra-field"] = {"a": 1, "b": 2}
    text = encode_canonical(signer.public_key.to_dict())
    assert text is not None
    repository.add_key("root", signer)
    repository.root.unrecognized_fields["custom-field"] = "value"
    repository.root.roles["root"].unrecognized_fields["another-field"] = "value"
    repository.publish("root")
    assert client.refresh() == 0
    assert client.version("root") == 2


def test_a_misleading_hash_algorithm_of_key_ids_changes_nothing(client: Client) -> None:
    repository = client.repository
    client.init()
    repository.rotate("snapshot")
    repository.signers["snapshot"][0].public_key.unrecognized_fields = {"keyid_hash_algorithms": "md5"}
    repository.publish("root", "snapshot", "timestamp")
    assert client.refresh() == 0
    assert (client.version("root"), client.version("snapshot")) == (2, 2)


def test_a_missing_snapshot_fails_the_refresh_after_the_timestamp(client: Client) -> None:
    repository = client.repository
    client.init()
    client.refresh()
    repository.timestamp.snapshot_meta.version += 1
    repository.publish("timestamp")
    assert client.refresh() == 1 and "2.snapshot.json: the repository does not have it" in client.said
    assert repository.asked[-1] == ("snapshot", 2)
    assert client.trusted() == {"root": 1, "snapshot": 1, "targets": 1, "timestamp": 2}


def test_missing_targets_fail_the_refresh_after_the_snapshot(client: Client) -> None:
    repository = client.repository
    client.init()
    client.refresh()
    repository.snapshot.meta["targets.json"].version += 1
    repository.publish("snapshot", "timestamp")
    assert client.refresh() == 1 and "2.targets.json: the repository does not have it" in client.said
    assert repository.asked[-1] == ("targets", 2)
    assert client.trusted() == {"root": 1, "snapshot": 2, "targets": 1, "timestamp": 2}


def test_a_missing_timestamp_fails_the_refresh(client: Client) -> None:
    client.init()
    client.refresh()
    del client.repository.served["timestamp"]
    assert client.refresh() == 1 and "timestamp.json: the repository does not have it" in client.said
    assert client.repository.asked[-1] == ("timestamp", None)


def test_metadata_of_another_type_is_refused_though_rightly_signed(client: Client) -> None:
    repository = client.repository
    client.init()
    repository.add_key("snapshot", repository.signers["timestamp"][0])
    repository.snapshot.meta = {"snapshot.json": MetaFile(1)}
    repository.publish("root", "snapshot")
    repository.served["timestamp"].append(repository.served["snapshot"].pop())
    assert client.refresh() == 1 and "timestamp.json: is of type snapshot" in client.said
    assert client.trusted() == {"root": 2}


def test_a_repository_without_consistent_snapshots_is_asked_for_plain_names(client: Client) -> None:
    repository = client.repository
    repository.root.consistent_snapshot = False
    repository.add_target("dir/file.txt", b"plain")
    repository.delegate("targets", DelegatedRole("role1", [], 1, False, ["*"]))
    repository.publish("root", "role1", "targets", "snapshot", "timestamp")
    client.init()
    assert client.download("dir/file.txt") == 0
    assert client.downloaded() == [b"plain"]
    assert client.download("missing") == 1 and "no role has this target" in client.said
    assert [name for name, version in repository.asked if version is None][-1] == "role1"


# --- rollback ------------------------------------------------------------------------------------------


def test_an_older_timestamp_is_refused(client: Client) -> None:
    repository = client.repository
    client.init()
    repository.publish("timestamp")
    assert client.refresh() == 0
    repository.served["timestamp"].append(repository.served["timestamp"][0])
    assert client.refresh() == 1 and "timestamp.json: version 1 is older than 2" in client.said
    assert client.version("timestamp") == 2


@pytest.mark.parametrize("with_hashes", [False, True])
def test_a_timestamp_that_names_an_older_snapshot_is_refused(client: Client, with_hashes: bool) -> None:
    repository = client.repository
    repository.with_hashes = with_hashes
    client.init()
    repository.publish("snapshot", "timestamp")
    assert client.refresh() == 0
    repository.timestamp.snapshot_meta = MetaFile(1)
    repository.publish("timestamp")
    assert client.refresh() == 1 and "timestamp.json: snapshot.json went from 2 to 1" in client.said
    assert (client.version("timestamp"), client.version("snapshot")) == (2, 2)
    assert repository.asked[-1] == ("timestamp", None)


@pytest.mark.parametrize("with_hashes", [False, True])
def test_a_snapshot_that_names_older_targets_is_refused(client: Client, with_hashes: bool) -> None:
    repository = client.repository
    repository.with_hashes = with_hashes
    client.init()
    repository.publish("targets", "snapshot", "timestamp")
    assert client.refresh() == 0
    repository.snapshot.meta["targets.json"] = MetaFile(1)
    repository.publish("snapshot", "timestamp")
    assert client.refresh() == 1 and "snapshot.json: targets.json went from 2 to 1" in client.said
    assert (client.version("snapshot"), client.version("targets")) == (2, 2)


def test_a_snapshot_that_leaves_a_role_out_is_refused(client: Client) -> None:
    repository = client.repository
    repository.delegate("targets", DelegatedRole("role1", [], 1, False, ["*"]))
    repository.publish_all()
    client.init()
    assert client.refresh() == 0
    del repository.snapshot.meta["role1.json"]
    repository.publish("snapshot", "timestamp")
    assert client.refresh() == 1 and "snapshot.json: tells no more of role1.json" in client.said
    assert client.version("snapshot") == 2


def test_a_delegated_version_run_up_by_stolen_keys_is_recovered_from_by_new_keys(client: Client) -> None:
    repository = client.repository
    repository.delegate("targets", DelegatedRole("role1", [], 1, False, ["*"]))
    repository.add_target("file", b"first", "role1")
    repository.roles["role1"].version = 99
    repository.publish("role1", bump=False)
    repository.served["role1"] *= 99
    repository.publish("targets", "snapshot", "timestamp")
    client.init()
    assert client.download("file") == 0 and client.version("role1") == 99
    repository.roles["role1"].version = 1
    repository.served["role1"].clear()
    repository.publish("role1", bump=False)
    repository.publish("snapshot", "timestamp")
    assert client.refresh() == 1 and "role1.json went from 99 to 1" in client.said
    repository.rotate("snapshot")
    repository.publish("root", "snapshot", "timestamp")
    assert client.download("file") == 0 and client.version("role1") == 1


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_version_run_up_by_stolen_keys_is_recovered_from_by_new_keys(client: Client, role: str) -> None:
    repository = client.repository
    client.init()
    signed = repository.signed(role)
    signed.version = 99
    repository.publish(role, bump=False)
    repository.served[role] = [repository.served[role][-1]] * 99
    repository.publish(*[r for r in ("snapshot", "timestamp") if r != role and role != "timestamp"])
    assert client.refresh() == 0
    assert client.version(role) == 99
    for changed in {"targets": ["snapshot"], "snapshot": ["snapshot", "timestamp"]}.get(role, [role]):
        repository.rotate(changed)
    repository.publish("root")
    signed.version = 1
    repository.served[role].clear()
    repository.publish(role, bump=False)
    repository.publish(*[r for r in ("snapshot", "timestamp") if r != role])
    assert client.refresh() == 0
    assert client.version(role) in (1, 2)


# --- expiry --------------------------------------------------------------------------------------------


def test_an_expired_root_is_kept_and_nothing_after_it(client: Client) -> None:
    repository = client.repository
    client.init()
    client.refresh()
    repository.root.expires = START - timedelta(days=1)
    repository.publish("root", "timestamp")
    assert client.refresh() == 1 and "root.json: version 2 expired" in client.said
    assert (client.version("root"), client.version("timestamp")) == (2, 1)


@pytest.mark.parametrize(
    ("role", "trusted"),
    [
        ("timestamp", {"root": 1, "snapshot": 1, "targets": 1, "timestamp": 1}),
        ("snapshot", {"root": 1, "snapshot": 1, "targets": 1, "timestamp": 2}),
        ("targets", {"root": 1, "snapshot": 2, "targets": 1, "timestamp": 2}),
    ],
)
def test_expired_metadata_is_refused(client: Client, role: str, trusted: dict[str, int]) -> None:
    repository = client.repository
    client.init()
    client.refresh()
    repository.signed(role).expires = START - timedelta(days=5)
    repository.publish(*{"timestamp": [], "snapshot": ["snapshot"]}.get(role, ["targets", "snapshot"]))
    repository.publish("timestamp")
    assert client.refresh() == 1 and f"{role}.json: version 2 expired" in client.said
    assert client.trusted() == trusted


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
def test_what_expired_here_is_replaced_by_what_is_valid_there(client: Client, role: str) -> None:
    repository = client.repository
    client.init()
    repository.signed(role).expires = START + timedelta(days=7)
    everything = ("root", "targets", "snapshot", "timestamp")
    repository.publish(*everything)
    assert client.refresh() == 0
    repository.signed(role).expires = START + timedelta(days=21)
    repository.publish(*everything)
    assert client.refresh(START + timedelta(days=18)) == 0
    assert client.trusted() == {"root": 3, "snapshot": 3, "targets": 3, "timestamp": 3}


def test_an_expired_delegated_role_is_not_used(client: Client) -> None:
    repository = client.repository
    role = DelegatedRole("delegated", [], 1, False, ["delegatedpath/*"])
    repository.delegate("targets", role, Targets(expires=START - timedelta(days=1)))
    repository.add_target("delegatedpath/target", b"content", "delegated")
    repository.publish_all()
    client.init()
    assert client.refresh() == 0
    assert client.download("delegatedpath/target") == 1 and "delegated.json: version 1 expired" in client.said
    assert client.downloaded() == []
    assert client.trusted() == {"root": 1, "snapshot": 2, "targets": 2, "timestamp": 2}


def test_a_delegated_role_that_expires_here_is_fetched_anew_or_not_used(client: Client) -> None:
    repository = client.repository
    role = DelegatedRole("delegated", [], 1, False, ["p/*"])
    repository.delegate("targets", role, Targets(expires=START + timedelta(days=7)))
    repository.add_target("p/first", b"first", "delegated")
    repository.add_target("p/second", b"second", "delegated")
    repository.publish_all()
    client.init()
    assert client.download("p/first") == 0
    assert (
        client.download("p/second", START + timedelta(days=18)) == 1
        and "delegated.json: version 1 expired" in client.said
    )
    repository.roles["delegated"].expires = START + timedelta(days=21)
    repository.publish("delegated", "snapshot", "timestamp")
    assert client.download("p/second", START + timedelta(days=18)) == 0
    assert client.downloaded() == [b"first", b"second"]


@pytest.mark.parametrize("year", [1970, 2000, 2100])
def test_a_clock_that_cannot_be_right_judges_nothing(client: Client, year: int) -> None:
    client.repository.root.expires = datetime(2150, 1, 1, tzinfo=UTC)
    client.repository.publish("root")
    client.init()
    assert client.refresh(datetime(year, 1, 2, tzinfo=UTC)) == 1 and "the time is not known" in client.said
    assert client.repository.asked == []
    assert client.refresh() == 0


# --- keys ----------------------------------------------------------------------------------------------


def test_a_snapshot_below_its_threshold_is_refused(client: Client) -> None:
    repository = client.repository
    repository.root.roles["snapshot"].threshold = 3
    repository.add_key("snapshot")
    repository.add_key("snapshot")
    repository.publish("root", "targets", "snapshot", "timestamp")
    client.init()
    assert client.refresh() == 0
    repository.signers["snapshot"].pop()
    repository.publish("snapshot", "timestamp")
    assert client.refresh() == 1 and "snapshot.json: signed by 2 of the 3 keys" in client.said
    assert client.version("snapshot") == 2


def test_a_threshold_above_the_number_of_keys_is_never_met(client: Client) -> None:
    repository = client.repository
    client.init()
    for _ in range(4):
        repository.add_key("snapshot")
    repository.root.roles["snapshot"].threshold = 6
    repository.publish("root", "snapshot", "timestamp")
    assert client.refresh() == 1 and "snapshot.json: signed by 5 of the 6 keys" in client.said
    assert client.trusted() == {"root": 2, "timestamp": 2}


def test_one_key_named_nine_times_counts_once(client: Client) -> None:
    repository = client.repository
    client.init()
    signer = repository.add_key("snapshot")
    repository.root.roles["snapshot"].keyids += [signer.public_key.keyid] * 8
    repository.root.roles["snapshot"].threshold = 6
    repository.publish("root", "snapshot", "timestamp")
    assert client.refresh() == 1 and "root.json: malformed" in client.said
    assert client.version("snapshot") is None


def test_a_key_id_twice_among_the_signatures_is_refused(client: Client) -> None:
    client.init()
    served = client.repository.served["snapshot"]
    snapshot = json.loads(served[-1])
    snapshot["signatures"].append(snapshot["signatures"][0])
    served[-1] = json.dumps(snapshot).encode()
    assert client.refresh() == 1 and "snapshot.json: malformed" in client.said
    assert client.version("snapshot") is None


@pytest.mark.parametrize("known", [2, 3])
def test_a_key_named_and_not_told_counts_for_nothing_and_does_no_harm(client: Client, known: int) -> None:
    """Three ids for the snapshot, of which the root holds two keys or all three; three must sign."""
    repository = client.repository
    client.init()
    assert client.refresh() == 0
    repository.add_key("snapshot")
    last = repository.key()
    repository.signers["snapshot"].append(last)
    repository.root.roles["snapshot"].keyids.append(last.public_key.keyid)
    if known == 3:
        repository.root.keys[last.public_key.keyid] = last.public_key
    repository.root.roles["snapshot"].threshold = 3
    repository.publish("root", "snapshot", "timestamp")
    assert client.refresh() == (0 if known == 3 else 1)
    assert known == 3 or "snapshot.json: signed by 2 of the 3 keys" in client.said
    assert (client.version("root"), client.version("snapshot")) == (2, known - 1)


@pytest.mark.filterwarnings("ignore:keytype 'ecdsa-sha2-nistp256' is deprecated")
@pytest.mark.parametrize("kind", ["rsa", "rsa-pkcs1v15", "ecdsa", "ed25519", "ecdsa, as once named"])
def test_the_kinds_of_keys_of_the_specification_count_and_only_with_right_signatures(
    client: Client, kind: str
) -> None:
    repository = client.repository
    client.init()
    key = repository.key(kind.partition(",")[0])
    if "once" in kind:
        key.public_key.keytype = "ecdsa-sha2-nistp256"
    signer = repository.add_key("root", key)
    repository.root.roles["root"].threshold += 1
    repository.publish("root")
    assert client.refresh() == 0
    assert client.version("root") == 2
    good = Metadata.from_bytes(repository.served["root"][-1]).signatures[signer.public_key.keyid]
    repository.publish("root")
    third = Metadata.from_bytes(repository.served["root"].pop())
    third.signatures[signer.public_key.keyid] = good  # plausible, of another version
    repository.served["root"].append(third.to_bytes())
    assert client.refresh() == 1 and "root.json: signed by 1 of the 2 keys" in client.said
    assert client.version("root") == 2


@pytest.mark.parametrize("signature", ["ab" * 64, "", "zz"])
def test_a_wrong_signature_beside_enough_right_ones_does_no_harm(client: Client, signature: str) -> None:
    repository = client.repository
    client.init()
    first = repository.signers["timestamp"][0].public_key.keyid
    repository.add_key("timestamp")
    repository.publish("root", "timestamp")
    timestamp = Metadata.from_bytes(repository.served["timestamp"].pop())
    timestamp.signatures[first].signature = signature
    repository.served["timestamp"].append(timestamp.to_bytes())
    assert client.refresh() == 0


# each root: its keys, its threshold, who signs it; and whether the last one may be taken
ROOTS: dict[str, tuple[list[tuple[list[int], int, list[int]]], bool]] = {
    "1 of 1": ([([1], 1, [1]), ([2], 1, [2, 1]), ([2], 1, [2])], True),
    "unused signatures": ([([1], 1, [3, 1, 4]), ([2], 1, [3, 2, 1, 4]), ([2], 1, [3, 2, 4])], True),
    "3 of 5, other signers each time": (
        [([0, 1, 2, 3, 4], 3, [0, 2, 4]), ([0, 1, 2, 3, 4], 3, [0, 4, 1]), ([0, 1, 2, 3, 4], 3, [0, 1, 3])],
        True,
    ),
    "3 of 5, one replaced": ([([0, 1, 2, 3, 4], 3, [0, 2, 4]), ([0, 1, 3, 4, 5], 3, [0, 4, 1])], True),
    "3 of 5, all replaced": (
        [([0, 1, 2, 3, 4], 3, [0, 2, 4]), ([5, 6, 7, 8, 9], 3, [0, 2, 4, 5, 6, 7]),
         ([5, 6, 7, 8, 9], 3, [5, 6, 7])],
        True,
    ),
    "1 to 2 of 3": ([([1, 2, 3], 1, [1]), ([1, 2, 3], 2, [1, 2])], True),
    "2 to 1 of 3": ([([1, 2, 3], 2, [1, 2]), ([1, 2, 3], 1, [1, 2]), ([1, 2, 3], 1, [1])], True),
    "1 to 2 of 2": ([([1], 1, [1]), ([1, 2], 2, [1, 2])], True),
    "not by the old key": ([([1], 1, [1]), ([2], 1, [2, 3, 4])], False),
    "not by the new key": ([([1], 1, [1]), ([2], 1, [1, 3, 4])], False),
    "not by three new ones": ([([0, 1, 2, 3, 4], 3, [0, 2, 4]), ([0, 1, 3, 4, 5], 3, [0, 2, 4])], False),
    "not by three old ones": ([([0, 1, 2, 3, 4], 3, [0, 2, 4]), ([0, 1, 3, 4, 5], 3, [0, 4, 5])], False),
    "new threshold not reached": ([([1, 2, 3], 1, [1]), ([1, 2, 3], 2, [2])], False),
    "old threshold not reached": ([([1, 2, 3], 2, [1, 2]), ([1, 2, 3], 1, [1])], False),
}  # fmt: skip


@pytest.mark.parametrize("case", ROOTS)
def test_roots_follow_one_another_only_with_both_thresholds(client: Client, case: str) -> None:
    versions, taken = ROOTS[case]
    repository = client.repository
    keys = [repository.key() for _ in range(10)]
    repository.served["root"].clear()
    repository.root.version = 0
    for named, threshold, signing in versions:
        repository.root.roles["root"].keyids.clear()
        repository.root.roles["root"].threshold = threshold
        for number in named:
            repository.root.add_key(keys[number].public_key, "root")
        repository.signers["root"] = [keys[number] for number in signing]
        repository.root.version += 1
        repository.publish("root", bump=False)
    assert client.init() == 0
    assert client.refresh() == (0 if taken else 1)
    expected = repository.served["root"][-1 if taken else -2]
    assert (client.metadata / "root.json").read_bytes() == expected


@pytest.mark.parametrize("many", [30, pytest.param(ROOT_ROTATIONS_MAX, marks=pytest.mark.slow)])
def test_a_long_chain_of_roots_is_followed_and_kept(client: Client, many: int) -> None:
    """Every key of every role but one is replaced by every root, as after many years."""
    _rotated(client.repository, many)
    client.init()
    assert client.refresh() == 0
    assert client.version("root") == many + 1
    client.repository.asked.clear()
    assert client.refresh() == 0
    assert client.repository.asked == [("root", many + 2), ("timestamp", None)]


@pytest.mark.slow
def test_a_chain_of_roots_without_an_end_is_refused(client: Client) -> None:
    _rotated(client.repository, ROOT_ROTATIONS_MAX + 1)
    client.init()
    for _ in range(2):
        assert client.refresh() == 1
        assert f"more than {ROOT_ROTATIONS_MAX} roots follow the first" in client.said
        assert client.version("root") == ROOT_ROTATIONS_MAX + 1
        client.repository.asked.clear()
    assert client.refresh() == 1
    assert client.repository.asked == [("root", ROOT_ROTATIONS_MAX + 2)]


def _rotated(repository: Repository, times: int) -> None:
    for number in range(times):
        old = list(repository.signers["root"])
        repository.rotate("root")
        repository.signers["root"] += old  # the root before says who may sign this one
        repository.publish("root")
        repository.signers["root"] = repository.signers["root"][: -len(old)]
        repository._next_key = 4 + number % 2  # two keys in turn


SIGNERS: dict[str, tuple[list[int], int, list[int], bool]] = {
    "new key": ([2], 1, [2], True),
    "unused signatures": ([1], 1, [3, 1, 4], True),
    "not by the new key": ([2], 1, [1, 3, 4], False),
    "one of three is not a key": ([0, 1, 3, 4, 5], 3, [0, 2, 4], False),
    "two of three": ([0, 1, 3, 4, 5], 3, [0, 4], False),
    "three of five": ([0, 1, 2, 3, 4], 3, [0, 2, 4], True),
    "three others of five": ([0, 1, 2, 3, 4], 3, [2, 3, 4], True),
}


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
@pytest.mark.parametrize("case", SIGNERS)
def test_a_role_changes_its_keys_through_the_root_alone(client: Client, role: str, case: str) -> None:
    named, threshold, signing, taken = SIGNERS[case]
    repository = client.repository
    keys = [repository.key() for _ in range(6)]
    client.init()
    assert client.refresh() == 0
    repository.root.roles[role].keyids.clear()
    repository.root.roles[role].threshold = threshold
    for number in named:
        repository.root.add_key(keys[number].public_key, role)
    repository.signers[role] = [keys[number] for number in signing]
    repository.publish("root")
    repository.served[role] = [repository.sign(role)]  # the same version, signed anew
    assert client.refresh() == (0 if taken else 1)
    if taken:
        assert (client.metadata / f"{role}.json").read_bytes() == repository.served[role][-1]


# --- targets and delegations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "target_file.txt", "path/to/a/target_file.txt", "sp ace/ü?#.bin", "../../out", "/tmp/out", "a/../b",
        "file:///etc/passwd", "http://127.0.0.1:1/out", "//127.0.0.1:1/out", "a%2f..%2fb", "c:\\out",
    ],
)  # fmt: skip
def test_a_target_is_downloaded_once_into_its_directory_whatever_its_name(client: Client, path: str) -> None:
    client.repository.add_target(path, b"target file contents")
    client.repository.publish_all()
    client.init()
    assert client.refresh() == 0
    assert client.downloaded() == []
    assert client.download(path) == 0
    assert client.download(path) == 0
    assert client.downloaded() == [b"target file contents"]
    assert len(client.repository.asked_targets) == 1
    assert {path.name for path in client.directory.iterdir()} == {
        "initial_root.json", "metadata", "targets",
    }  # fmt: skip


def test_a_directory_is_no_target(client: Client) -> None:
    client.repository.add_target("..", b"out")
    client.repository.publish_all()
    client.init()
    assert client.download("..") == 1 and "is no name for a file" in client.said


def test_a_target_replaced_at_the_server_is_not_taken(client: Client) -> None:
    repository = client.repository
    repository.add_target("one", b"first content")
    repository.add_target("two", b"second content")
    repository.publish_all()
    client.init()
    assert client.download("one") == 0
    repository.files["one"] = repository.files["two"] = b"malicious"
    client.download("one")
    assert client.download("two") == 1 and "what the server has is not the signed target" in client.said
    assert client.downloaded() == [b"first content"]
    repository.files["two"] = b"second content, and more than was signed"
    assert client.download("two") == 1 and "more than 14 bytes" in client.said


def test_a_target_that_changes_replaces_the_one_before(client: Client) -> None:
    repository = client.repository
    client.init()
    for turn in range(3):
        repository.add_target("file", b"content %d" % turn)
        repository.publish_all()
        assert client.download("file") == 0
        assert client.downloaded() == [b"content %d" % turn]


@pytest.mark.parametrize("hashes", [["sha256"], ["sha512"], ["sha256", "sha512"]])
def test_a_target_is_held_to_every_hash_known(client: Client, hashes: list[str]) -> None:
    repository = client.repository
    file = TargetFile.from_data("file", b"content", hashes)
    repository.targets.targets["file"] = file
    repository.files["file"] = b"content"
    repository.publish_all()
    client.init()
    assert client.download("file") == 0
    file.hashes[hashes[-1]] = "0" * len(file.hashes[hashes[-1]])
    repository.publish_all()
    assert client.download("file") == 1 and "what the server has is not the signed target" in client.said


def test_a_target_with_no_hash_we_know_is_refused(client: Client) -> None:
    file = client.repository.add_target("file", b"content")
    file.hashes = {"unknown-hash": file.hashes["sha256"]}
    client.repository.publish_all()
    client.init()
    assert client.download("file") == 1 and "signed with no hash of a kind that counts" in client.said
    assert client.downloaded() == []


# delegations as (delegator, role, terminating, paths), and the order in which roles are asked for
GRAPHS: dict[str, tuple[list[tuple[str, str, bool, list[str]]], list[str]]] = {
    "one": ([("targets", "A", False, ["*"])], ["A"]),
    "two": ([("targets", "A", False, ["*"]), ("targets", "B", False, ["*"])], ["A", "B"]),
    "two levels": (
        [("targets", "A", False, ["*"]), ("targets", "B", False, ["*"]), ("B", "C", False, ["*"])],
        ["A", "B", "C"],
    ),
    "depth first": (
        [("targets", "A", False, ["*"]), ("targets", "B", False, ["*"]),
         ("A", "C", False, ["*"]), ("C", "D", False, ["*"])],
        ["A", "C", "D", "B"],
    ),
    "terminating": (
        [("targets", "A", False, ["*"]), ("targets", "B", False, ["*"]),
         ("A", "C", True, ["*"]), ("A", "D", False, ["*"])],
        ["A", "C"],
    ),
    "terminating, its own delegations count": (
        [("targets", "A", False, ["*"]), ("targets", "B", False, ["*"]),
         ("A", "C", True, ["*"]), ("C", "D", False, ["*"])],
        ["A", "C", "D"],
    ),
    "other paths": (
        [("targets", "A", False, ["*.py"]), ("targets", "B", False, ["*"]), ("A", "C", False, ["*"])],
        ["B"],
    ),
    "a circle": (
        [("targets", "A", False, ["*"]), ("targets", "B", False, ["*"]), ("B", "C", False, ["*"]),
         ("C", "D", False, ["*"]), ("D", "B", False, ["*"])],
        ["A", "B", "C", "D"],
    ),
    "two ways to one role": (
        [("targets", "A", False, ["*"]), ("targets", "B", False, ["*"]),
         ("B", "C", False, ["*"]), ("A", "C", False, ["*"])],
        ["A", "C", "B"],
    ),
    "one of two ways is for other paths": (
        [("targets", "A", False, ["*"]), ("targets", "B", False, ["*"]),
         ("B", "C", False, ["*"]), ("A", "C", False, ["*.py"])],
        ["A", "B", "C"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GRAPHS)
def test_delegations_are_walked_in_order_and_depth_first(client: Client, case: str) -> None:
    delegations, expected = GRAPHS[case]
    for delegator, role, terminating, paths in delegations:
        client.repository.delegate(delegator, DelegatedRole(role, [], 1, terminating, paths))
    client.repository.publish_all()
    client.init()
    assert client.download("missingpath") == 1 and "no role has this target" in client.said
    assert client.repository.asked[4:] == [(role, 1) for role in expected]


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("targetfile", []),
        ("README.md", ["A"]),
        ("releases/x/x_v1", ["B", "C"]),
        ("releases/y/y_v1.zip", ["B", "D"]),
    ],
)
def test_a_target_is_found_through_patterns(client: Client, path: str, asked: list[str]) -> None:
    repository = _tree(client.repository)
    client.init()
    assert client.download(path) == 0
    assert client.downloaded() == [repository.files[path]]
    assert repository.asked[4:] == [(role, 1) for role in asked]


def test_a_target_outside_what_its_role_was_given_is_not_found(client: Client) -> None:
    _tree(client.repository)
    client.init()
    assert client.download("releases/z/z_v1.zip") == 1 and "no role has this target" in client.said
    assert client.repository.asked[4:] == [("B", 1)]


def _tree(repository: Repository) -> Repository:
    for delegator, role, paths in (
        ("targets", "A", ["*.doc", "*.md"]),
        ("targets", "B", ["releases/*/*"]),
        ("B", "C", ["releases/x/*"]),
        ("B", "D", ["releases/y/*.zip"]),
    ):
        repository.delegate(delegator, DelegatedRole(role, [], 1, False, paths))
    for role, path in (
        ("targets", "targetfile"),
        ("A", "README.md"),
        ("C", "releases/x/x_v1"),
        ("D", "releases/y/y_v1.zip"),
        ("D", "releases/z/z_v1.zip"),
    ):
        repository.add_target(path, f"{path} by {role}".encode(), role)
    repository.publish_all()
    return repository


def test_a_target_is_found_through_the_prefix_of_its_paths_hash(client: Client) -> None:
    repository = client.repository
    for name, prefixes in (("low", [f"{n:x}" for n in range(8)]), ("high", [f"{n:x}" for n in range(8, 16)])):
        repository.delegate("targets", DelegatedRole(name, [], 1, False, None, prefixes))
    repository.add_target("file1.txt", b"low", "low")  # its SHA-256 begins with 5
    repository.publish_all()
    client.init()
    assert client.download("file1.txt") == 0
    assert ("high", 1) not in repository.asked


@pytest.mark.parametrize("bits", [1, 3])
def test_a_target_is_found_in_its_hash_bin(client: Client, bits: int) -> None:
    repository = client.repository
    repository.delegate_bins("targets", bits, "bin")
    delegations = repository.targets.delegations
    assert delegations is not None and delegations.succinct_roles is not None
    name = delegations.succinct_roles.get_role_for_target("some/file")
    repository.add_target("some/file", b"binned", name)
    repository.publish_all()
    client.init()
    assert client.download("some/file") == 0
    assert repository.asked[4:] == [(name, 1)]


def test_a_target_listed_in_another_bin_than_its_hash_says_is_not_found(client: Client) -> None:
    repository = client.repository
    repository.delegate_bins("targets", 2, "bin")
    delegations = repository.targets.delegations
    assert delegations is not None and delegations.succinct_roles is not None
    bins = delegations.succinct_roles
    right = bins.get_role_for_target("some/file")
    wrong = next(name for name in bins.get_roles() if name != right)
    repository.add_target("some/file", b"misplaced", wrong)
    repository.publish_all()
    client.init()
    assert client.download("some/file") == 1 and "no role has this target" in client.said
    assert repository.asked[4:] == [(right, 1)]


@pytest.mark.parametrize("with_own_keys", [True, False])
def test_a_bin_is_taken_from_the_keys_of_the_bins_alone(client: Client, with_own_keys: bool) -> None:
    repository = client.repository
    repository.delegate_bins("targets", 1, "bin")
    delegations = repository.targets.delegations
    assert delegations is not None and delegations.succinct_roles is not None
    name = delegations.succinct_roles.get_role_for_target("some/file")
    repository.add_target("some/file", b"binned", name)
    if not with_own_keys:
        repository.signers[name] = repository.signers["targets"]
    repository.publish_all()
    client.init()
    assert client.download("some/file") == (0 if with_own_keys else 1)
    assert with_own_keys or f"{name}.json: signed by 0 of the 1 keys" in client.said


@pytest.mark.parametrize("role", ["?", "#", "/delegatedrole", "../delegatedrole", ".", "..", "ü"])
def test_an_unusual_role_name_is_quoted_in_urls_and_file_names(client: Client, role: str) -> None:
    repository = client.repository
    repository.delegate("targets", DelegatedRole(role, [], 1, False, ["*"]))
    repository.publish_all()
    client.init()
    assert client.download("nonexistent target") == 1 and "no role has this target" in client.said
    assert (quote(role, safe=""), 1) in repository.asked
    assert len(client.trusted()) == 5


# --- what python-tuf's client falls for: a power cut that empties files, then a replay ---------------------


@pytest.mark.parametrize("emptied", ["*.json", "cache/*", "floors/*", "**/*"])
def test_no_files_emptied_by_a_power_cut_let_a_replay_in(client: Client, emptied: str) -> None:
    repository = client.repository
    client.init()
    repository.publish("targets", "snapshot", "timestamp")
    assert client.refresh() == 0
    for path in client.metadata.glob(emptied):
        if path.is_file() and path.name != trust.FIRST_ROOT:
            path.write_bytes(b"")
    served = {role: list(versions) for role, versions in repository.served.items()}
    for role in ("targets", "snapshot", "timestamp"):
        repository.served[role].append(repository.served[role][0])
    assert client.refresh() == 1 and (
        "older than" in client.said or "floors of trust are damaged" in client.said
    )
    repository.served = served
    assert client.refresh() == (1 if emptied == "**/*" else 0)  # with nothing left, it is provisioned anew
