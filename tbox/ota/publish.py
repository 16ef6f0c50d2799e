"""The publisher: keys, signing by several people, releases with deltas, a static signed repository.

Nothing becomes public that a device would refuse: before a file is moved into place the whole new state is
verified by the device's own workflow. Root and targets are signed offline, one signature at a time, on
staged files; only snapshot, timestamp and the rollout notice have keys at the server. Not for the device.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zstandard
from msgspec.structs import replace
from securesystemslib.signer import Key
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from tbox.errors import Refused, TboxError
from tbox.ota import image as archive
from tbox.ota import metadata as core
from tbox.ota import releases, workflow
from tbox.ota.keys import Signer
from tbox.ota.metadata import ROOT, SNAPSHOT, TARGETS, TIMESTAMP, TrustedSet, authority_of
from tbox.ota.model import Delta, Full, VerifiedTarget
from tbox.ota.releases import ROLLOUT_ROLE, Notice
from tbox.ota.rollout import Progress, notice_with
from tbox.ota.trust import target_url_path

DAYS_VALID: Mapping[str, int] = {ROOT: 365, TARGETS: 180, SNAPSHOT: 30, TIMESTAMP: 7, ROLLOUT_ROLE: 30}
# Root and targets: no two thieves are enough, and no two lost keys are the end (FACTS, Updates).
OFFLINE_ROLES = (ROOT, TARGETS)
SIGNATURES_MIN, KEYS_MIN = 3, 5
DELTA_BASES = 3  # releases back that get a delta
DELTA_WORTH = 0.9  # a delta that is not at least this much smaller than the full image is left out
ZSTD_LEVEL = 19
ZSTD_WINDOW_LOG = 23  # 8 MiB, what the device grants (device.ZSTD_WINDOW_BYTES_MAX)

AnySigned = Root | Timestamp | Snapshot | Targets


# --- signing -------------------------------------------------------------------------------------------


class Standing(NamedTuple):
    """How far a staged file is signed, for one authority that it needs."""

    whose: str  # "root", "targets", "the root before"
    signed: int
    threshold: int

    @property
    def enough(self) -> bool:
        return self.signed >= self.threshold


def _load(path: Path) -> Metadata[Any]:
    try:
        return Metadata.from_bytes(path.read_bytes())
    except OSError as error:
        raise TboxError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except Exception as error:
        raise TboxError(f"not metadata: {error}", where=str(path)) from None


def sign(path: Path, signers: Iterable[Signer]) -> None:
    """Add signatures to a staged file; one by the same key replaces the one before. Raises TboxError."""
    staged = _load(path)
    for signer in signers:
        staged.sign(signer, append=True)
    _write(path, staged.to_bytes())


def summary(path: Path) -> list[str]:
    """Return in words what a signature on this file would stand for. Raises TboxError."""
    signed = _load(path).signed
    said = [f"{signed.type} version {signed.version}, valid until {signed.expires:%Y-%m-%d}"]
    if isinstance(signed, Root):
        for role, entry in signed.roles.items():
            said.append(f"  {role}: any {entry.threshold} of {', '.join(key[:12] for key in entry.keyids)}")
    if isinstance(signed, Targets):
        for file in signed.targets.values():
            release = releases.release_of(file)
            if release is not None:
                emergency = ", a permitted downgrade" if release.emergency else ""
                said.append(
                    f"  {release.version} for {', '.join(release.hardware_ids)}: counter"
                    f" {release.security_counter}, image {release.sha256[:12]}{emergency}"
                )
    return said


def _write(path: Path, data: bytes) -> None:
    """Write a file so that its readers see the old one or the new one, and it survives a power cut."""
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- the repository ------------------------------------------------------------------------------------


class KeyChange(NamedTuple):
    """What becomes of a role's keys: those named are added, those in `revoke` (ids) taken away.

    threshold None: as it was; for the first keys of root and targets SIGNATURES_MIN, for others one.
    """

    role: str
    add: Sequence[Key] = ()
    revoke: Sequence[str] = ()
    threshold: int | None = None


class Publisher:
    """A repository on disk: `metadata/` and `targets/` are public; `staged/` and `images/` are not.

    now: for expiry dates. Only what `metadata/timestamp.json` leads to is believed to be published.
    """

    def __init__(self, directory: Path, now: datetime) -> None:
        self.directory, self._now = directory, now.replace(microsecond=0)
        self.metadata, self.targets = directory / "metadata", directory / "targets"
        self.staged, self.images = directory / "staged", directory / "images"

    def create(self) -> None:
        for path in (self.metadata, self.targets, self.staged, self.images):
            path.mkdir(parents=True, exist_ok=True)

    # --- what is there ---------------------------------------------------------------------------

    def _roots(self) -> list[bytes]:
        found: list[bytes] = []
        while (path := self.metadata / f"{len(found) + 1}.root.json").exists():
            found.append(path.read_bytes())
        return found

    def _published(self, role: str) -> Metadata[Any] | None:
        """Return the newest public version of a role."""
        if role == ROOT:
            roots = self._roots()
            return Metadata.from_bytes(roots[-1]) if roots else None
        if role == TIMESTAMP:
            path = self.metadata / "timestamp.json"
            return _load(path) if path.exists() else None
        above = self._published(TIMESTAMP if role == SNAPSHOT else SNAPSHOT)
        if above is None:
            return None
        meta = above.signed.snapshot_meta if role == SNAPSHOT else above.signed.meta.get(f"{role}.json")
        return _load(self.metadata / f"{meta.version}.{role}.json") if meta is not None else None

    def _staged_path(self, role: str) -> Path:
        return self.staged / f"{role}.json"

    def _current(self, role: str) -> Metadata[Any] | None:
        """Return the staged version of a role, else the public one."""
        path = self._staged_path(role)
        return _load(path) if path.exists() else self._published(role)

    def _stage(self, role: str, signed: AnySigned) -> Path:
        """Stage content under the next version, without signatures."""
        published = self._published(role)
        signed.version = published.signed.version + 1 if published else 1
        signed.expires = self._now + timedelta(days=DAYS_VALID[role])
        path = self._staged_path(role)
        _write(path, Metadata(signed).to_bytes())  # type: ignore[type-var]
        return path

    def root(self) -> Root:
        """Return the root as it will be. Raises TboxError when there is none yet."""
        current = self._current(ROOT)
        if current is None:
            raise TboxError("no root yet", where=str(self.directory), mend="make one with `tbox ota rotate`")
        root: Root = current.signed
        return root

    # --- keys ------------------------------------------------------------------------------------

    def key_ids(self, role: str) -> set[str]:
        """Return the ids of the keys a role has now."""
        above = self._current(TARGETS if role == ROLLOUT_ROLE else ROOT)
        if above is None:
            return set()
        if role != ROLLOUT_ROLE:
            return set(above.signed.roles[role].keyids)
        roles = above.signed.delegations.roles if above.signed.delegations else {}
        return set(roles[role].keyids) if role in roles else set()

    def rotate(self, changes: Sequence[KeyChange], *, weaker: bool = False) -> list[Path]:
        """Stage a root, and targets for the rollout role, with changed keys; return what must be signed.

        Raises Refused when root or targets would take less than 3 of 5 keys, unless `weaker` is wanted.
        """
        paths = []
        top = [change for change in changes if change.role != ROLLOUT_ROLE]
        if top:
            current = self._current(ROOT)
            root = current.signed if current else Root()
            for change in top:
                _change_keys(root, change)
                if change.role in OFFLINE_ROLES and not weaker:
                    _check_strength(root, change.role)
            paths.append(self._stage(ROOT, root))
        for change in changes:
            if change.role == ROLLOUT_ROLE:
                paths.append(self._rotate_rollout(change))
        return paths

    def renew(self, role: str) -> Path:
        """Stage what a role says now under a new date, without signatures. Raises TboxError."""
        current = self._current(role)
        if current is None:
            raise TboxError(
                f"no {role} yet", where=str(self.directory), mend="make it with `tbox ota rotate`"
            )
        return self._stage(role, current.signed)

    def _rotate_rollout(self, change: KeyChange) -> Path:
        targets = self._targets()
        if targets.delegations is None:
            targets.delegations = Delegations({}, roles={})
        roles = targets.delegations.roles
        assert roles is not None
        if ROLLOUT_ROLE not in roles:
            roles[ROLLOUT_ROLE] = DelegatedRole(ROLLOUT_ROLE, [], 1, False, ["rollout/*"])
        for keyid in change.revoke:
            targets.revoke_key(keyid, ROLLOUT_ROLE)
        for key in change.add:
            targets.add_key(key, ROLLOUT_ROLE)
        roles[ROLLOUT_ROLE].threshold = change.threshold or roles[ROLLOUT_ROLE].threshold
        if self._current(ROLLOUT_ROLE) is None:
            self._stage(ROLLOUT_ROLE, Targets())
        return self._stage(TARGETS, targets)

    def _targets(self) -> Targets:
        current = self._current(TARGETS)
        targets: Targets = current.signed if current else Targets()
        return targets

    # --- releases --------------------------------------------------------------------------------

    def releases(self) -> list[VerifiedTarget]:
        """Return the releases listed, the highest security counter first."""
        found = (releases.release_of(file) for file in self._targets().targets.values())
        return sorted(
            (entry for entry in found if entry), key=lambda entry: entry.security_counter, reverse=True
        )

    def add_release(
        self, image: Path, draft: VerifiedTarget, *, bases: int = DELTA_BASES, delist: Sequence[str] = ()
    ) -> tuple[VerifiedTarget, Path]:
        """Stage targets with this image, its compressed file and deltas from the last `bases` releases.

        draft: the release but for lengths, digests, full and deltas, which are computed. delist: versions to
        take off the list, an emergency takes off all that is above it. Raises Refused, OSError.
        """
        data = image.read_bytes()
        if draft.kind == "app":
            archive.check(lambda offset, length: data[offset : offset + length], len(data))
        targets = self._targets()
        listed = self.releases()
        self._check_counter(draft, listed, delist)
        (self.images / f"{hashlib.sha256(data).hexdigest()}.img").write_bytes(data)
        full = self._put_target(targets, draft.full.name, compress(data))
        release = replace(
            draft,
            name=draft.full.name,
            length=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            full=Full(name=draft.full.name, length=full.length, sha256=full.hashes["sha256"]),
        )
        deltas = self._deltas(targets, data, release, [e for e in listed if e.kind == release.kind][:bases])
        release = replace(release, deltas=tuple(deltas))
        full.unrecognized_fields["custom"] = releases.custom_of(release)
        releases.release_of(full)  # holds the bounds of the model before anybody signs
        for entry in listed:
            above = release.emergency is not None and entry.security_counter > release.security_counter
            if entry.version in delist or above:
                _delist(targets, entry)
        return release, self._stage(TARGETS, targets)

    @staticmethod
    def _check_counter(draft: VerifiedTarget, listed: list[VerifiedTarget], delist: Sequence[str]) -> None:
        for entry in listed:
            if entry.version in delist or not {*entry.hardware_ids} & {*draft.hardware_ids}:
                continue
            if entry.security_counter >= draft.security_counter and draft.emergency is None:
                raise Refused(
                    f"counter {draft.security_counter} is not above the {entry.security_counter} of"
                    f" {entry.version}",
                    where=draft.version,
                    mend="raise --counter, or say --emergency",
                )

    def _put_target(self, targets: Targets, name: str, data: bytes) -> TargetFile:
        """Lay a file out under its digest and list it."""
        file = TargetFile.from_data(name, data, ["sha256"])
        path = self.targets / target_url_path(name, file.hashes["sha256"], consistent=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, data)
        targets.targets[name] = file
        return file

    def _deltas(
        self, targets: Targets, data: bytes, release: VerifiedTarget, bases: list[VerifiedTarget]
    ) -> list[Delta]:
        found = []
        for base in bases:
            path = self.images / f"{base.sha256}.img"
            if base.sha256 == release.sha256 or not path.exists():
                continue
            patch = diff(path.read_bytes(), data)
            if len(patch) > DELTA_WORTH * release.full.length:
                continue
            name = f"{release.name}.from-{base.sha256[:16]}.bsdiff"
            file = self._put_target(targets, name, patch)
            digest = file.hashes["sha256"]
            found.append(Delta(base_sha256=base.sha256, name=name, length=file.length, sha256=digest))
        return found

    def notify(self, notice: Notice) -> Path:
        """Stage the rollout role's notice."""
        signed = Targets()
        signed.unrecognized_fields[releases.CUSTOM] = msgspec.to_builtins(notice)
        return self._stage(ROLLOUT_ROLE, signed)

    def notice(self) -> Notice:
        current = self._current(ROLLOUT_ROLE)
        return releases.notice_of(current.signed, ROLLOUT_ROLE) if current else Notice()

    def rollout(self, sha256: str, now_s: float) -> Progress:
        """Return how far an image's rollout has come; at its first stage when it has not begun."""
        path = self.directory / "rollout" / f"{sha256}.json"
        if not path.exists():
            return Progress(sha256=sha256, since_s=now_s)
        try:
            return msgspec.json.decode(path.read_bytes(), type=Progress)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise TboxError(f"not a rollout's progress: {error}", where=str(path)) from None

    def save_rollout(self, progress: Progress) -> bool:
        """Keep the progress and stage the notice it makes; False when what is public says so already."""
        directory = self.directory / "rollout"
        directory.mkdir(exist_ok=True)
        _write(directory / f"{progress.sha256}.json", msgspec.json.encode(progress))
        return self.stage_notice(progress)

    def stage_notice(self, progress: Progress) -> bool:
        """Stage the notice this makes; False when nothing of the rollout role waits to become public."""
        before = self.notice()
        after = notice_with(before, progress)
        if after != before:
            self.notify(after)
        return self._staged_path(ROLLOUT_ROLE).exists()

    # --- making it public ------------------------------------------------------------------------

    def standing(self, role: str, above: Root | Targets | None = None) -> list[Standing]:
        """Return how far a staged role is signed, by each authority that it needs.

        above: what says who must; as staged when not given.
        """
        staged = self._current(role)
        assert staged is not None
        needs = {
            role: authority_of(above or (self._targets() if role == ROLLOUT_ROLE else self.root()), role)
        }
        published = self._published(ROOT)
        if role == ROOT and published is not None:
            needs["the root before"] = authority_of(published.signed, ROOT)
        return [
            Standing(whose, authority.count(core.parse(type(staged.signed), role, staged.to_bytes())),
                     authority.threshold)
            for whose, authority in needs.items()
        ]  # fmt: skip

    def publish(
        self, signers: Sequence[Signer], roles: Sequence[str] = (ROOT, TARGETS, ROLLOUT_ROLE)
    ) -> dict[str, int]:
        """Make what is staged of these roles public, with a new snapshot and timestamp; return the versions.

        signers: the online keys. Raises Refused when a staged file lacks signatures, or a device would refuse
        the result; nothing has become public then.
        """
        fresh: dict[str, bytes] = {}
        for role in roles:
            targets = self._next(TARGETS, fresh) if role == ROLLOUT_ROLE else None
            if targets is not None:
                self._renew_notice(targets)
            path = self._staged_path(role)
            if path.exists():
                if targets is not None:
                    sign(path, _holding(signers, authority_of(targets, role)))
                self._check_standing(role, targets)
                fresh[role] = path.read_bytes()
        self._name_and_sign(fresh, signers)
        self._rehearse(fresh)
        for role, raw in fresh.items():
            if role != TIMESTAMP:
                _write(self.metadata / f"{Metadata.from_bytes(raw).signed.version}.{role}.json", raw)
        _write(self.metadata / "timestamp.json", fresh[TIMESTAMP])
        for role in fresh:
            self._staged_path(role).unlink(missing_ok=True)
        return {role: Metadata.from_bytes(raw).signed.version for role, raw in fresh.items()}

    def _renew_notice(self, targets: Targets) -> None:
        """Stage the public notice anew where its signer counts no more, or half of its days are over."""
        public = self._published(ROLLOUT_ROLE)
        if public is None or self._staged_path(ROLLOUT_ROLE).exists():
            return
        authority = authority_of(targets, ROLLOUT_ROLE)
        signed = authority.count(core.parse(Targets, ROLLOUT_ROLE, public.to_bytes()))
        half = timedelta(days=DAYS_VALID[ROLLOUT_ROLE] / 2)
        if signed < authority.threshold or public.signed.expires - self._now < half:
            self._stage(ROLLOUT_ROLE, public.signed)

    def _next(self, role: str, fresh: Mapping[str, bytes]) -> Any:
        """Return what a role will say once `fresh` is public. Raises Refused when there is none."""
        found = Metadata.from_bytes(fresh[role]) if role in fresh else self._published(role)
        if found is None:
            raise Refused(f"no {role} to publish", where=str(self.staged), mend="stage and sign it first")
        return found.signed

    def _check_standing(self, role: str, above: Root | Targets | None = None) -> None:
        for standing in self.standing(role, above):
            if not standing.enough:
                raise Refused(
                    f"signed by {standing.signed} of the {standing.threshold} keys of {standing.whose}",
                    where=str(self._staged_path(role)),
                    mend="have the others sign it with `tbox ota sign`",
                )

    def _name_and_sign(self, fresh: dict[str, bytes], signers: Sequence[Signer]) -> None:
        """Add a snapshot that names what is fresh, and a timestamp that names the snapshot."""
        published = self._published(SNAPSHOT)
        snapshot = published.signed if published else Snapshot()
        for role in (TARGETS, ROLLOUT_ROLE):
            if role in fresh:
                version = Metadata.from_bytes(fresh[role]).signed.version
                snapshot.meta[f"{role}.json"] = MetaFile.from_data(version, fresh[role], ["sha256"])
        root = self._next(ROOT, fresh)
        fresh[SNAPSHOT] = self._sign_online(SNAPSHOT, snapshot, root, signers)
        before = self._published(TIMESTAMP)
        timestamp = before.signed if before else Timestamp()
        timestamp.snapshot_meta = MetaFile.from_data(snapshot.version, fresh[SNAPSHOT], ["sha256"])
        fresh[TIMESTAMP] = self._sign_online(TIMESTAMP, timestamp, root, signers)

    def _sign_online(self, role: str, signed: Any, root: Root, signers: Sequence[Signer]) -> bytes:
        published = self._published(role)
        signed.version = published.signed.version + 1 if published else 1
        signed.expires = self._now + timedelta(days=DAYS_VALID[role])
        metadata = Metadata(signed)
        for signer in _holding(signers, authority_of(root, role)):
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

    def _rehearse(self, fresh: Mapping[str, bytes]) -> None:
        """Refresh as a device would that holds the first root. Raises Refused."""
        roots = [*self._roots(), *([fresh[ROOT]] if ROOT in fresh else [])]
        files = {f"{n}.root.json": raw for n, raw in enumerate(roots, 1)}
        for role, raw in fresh.items():
            files[f"{Metadata.from_bytes(raw).signed.version}.{role}.json"] = raw
        files["timestamp.json"] = fresh[TIMESTAMP]

        def fetch(path: str, length_max: int) -> bytes | None:
            place = self.metadata / path
            return files.get(path) or (place.read_bytes() if place.exists() else None)

        trusted = TrustedSet(roots[0])
        workflow.drive(workflow.refresh(trusted, self._now), fetch)
        hardware = {name for release in self.releases() for name in release.hardware_ids}
        for hardware_id in sorted(hardware):
            workflow.drive(releases.offer(trusted, self._now, hardware_id, lambda release: True), fetch)


def _change_keys(root: Root, change: KeyChange) -> None:
    role = root.roles[change.role]
    first = SIGNATURES_MIN if change.role in OFFLINE_ROLES and not role.keyids else None
    for keyid in change.revoke:
        root.revoke_key(keyid, change.role)
    for key in change.add:
        root.add_key(key, change.role)
    role.threshold = change.threshold or first or role.threshold
    if len(role.keyids) < role.threshold:
        raise Refused(
            f"{len(role.keyids)} keys cannot reach a threshold of {role.threshold}",
            where=change.role,
            mend="add keys or lower --threshold",
        )


def _check_strength(root: Root, role: str) -> None:
    authority = authority_of(root, role)
    keys = len(authority.prints())  # one key counts once, whatever its ids
    if authority.threshold < SIGNATURES_MIN or keys < KEYS_MIN:
        raise Refused(
            f"{authority.threshold} of {keys} keys would do, {SIGNATURES_MIN} of {KEYS_MIN} should",
            where=role,
            mend=f"give more public keys with --{role}, or mean it with --weaker-than-3-of-5",
        )


def _holding(signers: Sequence[Signer], authority: core.Authority) -> list[Signer]:
    """Return those of the signers whose key counts there."""
    return [signer for signer in signers if core.fingerprint(signer.public_key) in authority.prints()]


def _delist(targets: Targets, release: VerifiedTarget) -> None:
    for name in (release.full.name, *(delta.name for delta in release.deltas)):
        targets.targets.pop(name, None)


def compress(data: bytes) -> bytes:
    """Return a full image as devices download it."""
    parameters = zstandard.ZstdCompressionParameters.from_level(ZSTD_LEVEL, window_log=ZSTD_WINDOW_LOG)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def diff(base: bytes, data: bytes) -> bytes:
    """Return the BSDIFF40 patch from one image to another. Raises TboxError."""
    try:
        import bsdiff4
    except ImportError:
        raise TboxError(
            "bsdiff4 is not installed, so no deltas can be made",
            mend="pip install 'tbox[publish]', or say --deltas 0",
        ) from None
    patch: bytes = bsdiff4.diff(base, data)
    return patch
