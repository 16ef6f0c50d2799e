"""TUF metadata, verified: bytes and the time come in, what holds stays (`TrustedSet`). No IO, no clock.

In which order files are asked for is `workflow.py`'s. Signatures are counted by key material, never by key
id, so that one key cannot count twice. What was seen once is a floor that holds even when every cached file
is lost.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from msgspec import Meta
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Key, SSlibKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Role,
    Root,
    Signed,
    Snapshot,
    Targets,
    Timestamp,
)

from tbox.errors import Refused

ROOT_BYTES_MAX = 512_000  # as python-tuf's client has it by default
ROOT_ROTATIONS_MAX = 256  # roots taken and kept since the first one, which is embedded
ROLES_KEPT_MAX = 64  # target roles kept and given a floor
KEYS_MAX = 64  # of one role, and signatures of one file
ROLE_NAME_CHARS_MAX = 80
VERSION_MAX = (1 << 53) - 1  # beyond it JSON readers disagree about an integer
RSA_BITS_MIN, RSA_BITS_MAX = 2048, 4096

# (key type, scheme) that may count. Ed25519 and RSA-PSS are what our publisher makes; the others are what
# repositories of the field carry.
SCHEMES = frozenset(
    {
        ("ed25519", "ed25519"),
        ("rsa", "rsassa-pss-sha256"),
        ("rsa", "rsa-pkcs1v15-sha256"),
        ("ecdsa", "ecdsa-sha2-nistp256"),
        ("ecdsa", "ecdsa-sha2-nistp384"),
        ("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp256"),  # as old repositories name the type
    }
)
HASHES = ("sha256", "sha384", "sha512")

ROOT, TIMESTAMP, SNAPSHOT, TARGETS = "root", "timestamp", "snapshot", "targets"
TOP_LEVEL = frozenset({ROOT, TIMESTAMP, SNAPSHOT, TARGETS})


class MetadataError(Refused):
    """The metadata does not hold: malformed, not signed by enough keys, replayed, expired, too big."""


T = TypeVar("T", Root, Timestamp, Snapshot, Targets)


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """One metadata file: as served, as parsed, and the canonical bytes that its signatures cover."""

    role: str
    raw: bytes
    signed: T
    covered: bytes
    signatures: Mapping[str, Any]

    @property
    def version(self) -> int:
        version: int = self.signed.version
        return version

    @property
    def sha256(self) -> str:
        """Digest of the signed content: signing anew does not change it."""
        return hashlib.sha256(self.covered).hexdigest()


# --- parsing and signatures ----------------------------------------------------------------------------


def parse(kind: type[T], role: str, raw: bytes) -> Loaded[T]:
    """Return what the bytes say, unverified. Raises MetadataError on anything but well-formed metadata."""
    try:
        found: Metadata[Any] = Metadata.from_bytes(raw)
        if type(found.signed) is not kind:
            raise MetadataError(f"is of type {found.signed.type}", where=file_of(role))
        covered = found.signed_bytes
        if len(found.signatures) > KEYS_MAX:
            raise MetadataError(f"more than {KEYS_MAX} signatures", where=file_of(role))
        _check_version(found.signed.version, role)
        return Loaded(role, raw, found.signed, covered, found.signatures)
    except (RepositoryError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        cause = error.__cause__ or error  # python-tuf tells only there what is malformed
        raise MetadataError(f"malformed: {type(cause).__name__} {cause}"[:200], where=file_of(role)) from None


def _check_version(version: Any, role: str) -> None:
    if type(version) is not int or not 1 <= version <= VERSION_MAX:
        raise MetadataError(f"version is not a number from 1 to {VERSION_MAX}", where=file_of(role))


def file_of(role: str) -> str:
    return f"{role[:ROLE_NAME_CHARS_MAX]}.json"


@functools.lru_cache(maxsize=256)
def _fingerprint(keytype: str, scheme: str, public: str) -> str:
    """Return the digest of the key itself, "" for one that may not count."""
    if (keytype, scheme) not in SCHEMES:
        return ""
    try:
        if keytype == "ed25519":
            return hashlib.sha256(bytes.fromhex(public)).hexdigest()
        key = load_pem_public_key(public.encode())
        if isinstance(key, RSAPublicKey) and not RSA_BITS_MIN <= key.key_size <= RSA_BITS_MAX:
            return ""
        der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return ""
    return hashlib.sha256(der).hexdigest()


def fingerprint(key: Key) -> str:
    """Return what identifies a key whatever its id says, "" when it may not count."""
    if not isinstance(key, SSlibKey):
        return ""
    return _fingerprint(key.keytype, key.scheme, key.keyval["public"])


class Authority(NamedTuple):
    """Who may sign a role: the keys that count, and how many of them it takes."""

    keys: tuple[Key, ...]
    threshold: int

    def prints(self) -> frozenset[str]:
        return frozenset(filter(None, map(fingerprint, self.keys)))

    def _good(self, loaded: Loaded[Any]) -> frozenset[str]:
        good = set()
        for key in self.keys:
            print_, signature = fingerprint(key), loaded.signatures.get(key.keyid)
            if not print_ or signature is None or print_ in good:
                continue
            try:
                key.verify_signature(signature, loaded.covered)
            except UnverifiedSignatureError:
                continue
            good.add(print_)
        return frozenset(good)

    def count(self, loaded: Loaded[Any]) -> int:
        """Return how many keys have rightly signed."""
        return len(self._good(loaded))

    def signers(self, loaded: Loaded[Any]) -> frozenset[str]:
        """Return fingerprints of the keys that rightly signed. Raises MetadataError below the threshold."""
        good = self._good(loaded)
        if len(good) < self.threshold:
            raise MetadataError(
                f"signed by {len(good)} of the {self.threshold} keys it takes", where=file_of(loaded.role)
            )
        return good


def _authority(keys: Mapping[str, Key], role: Role) -> Authority:
    if len(role.keyids) > KEYS_MAX:
        raise MetadataError(f"a role with more than {KEYS_MAX} keys")
    return Authority(tuple(keys[keyid] for keyid in role.keyids if keyid in keys), role.threshold)


def authority_of(delegator: Root | Targets, role: str) -> Authority:
    """Return who may sign a role, as the one above it says. Raises MetadataError when it does not."""
    if isinstance(delegator, Root):
        return _authority(delegator.keys, delegator.roles[role])
    found = delegator.delegations
    entry: Role | None = None
    if found is not None and found.succinct_roles is not None:
        entry = found.succinct_roles if found.succinct_roles.is_delegated_role(role) else None
    elif found is not None and found.roles is not None:
        entry = found.roles.get(role)
    if found is None or entry is None:
        raise MetadataError("is not delegated to", where=file_of(role))
    return _authority(found.keys, entry)


def matches(data: bytes, length: int | None, hashes: Mapping[str, str] | None) -> bool:
    """Whether the bytes are those that signed metadata tells of; no hash of a kind we know is a no."""
    if length is not None and len(data) != length:
        return False
    if hashes is None:
        return True
    known = {name: value for name, value in hashes.items() if name in HASHES}
    return bool(known) and all(hashlib.new(name, data).hexdigest() == value for name, value in known.items())


# --- floors --------------------------------------------------------------------------------------------

Version = Annotated[int, Meta(ge=1, le=VERSION_MAX)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
RoleName = Annotated[str, Meta(max_length=ROLE_NAME_CHARS_MAX)]


class Floor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The newest content seen of a role, and whose signatures made it count.

    meta: versions it names of other files. When the role's keys are replaced so that these signers would no
    longer suffice, the floor lapses: that is how a repository recovers from stolen keys that were used to
    run a version up (TUF 5.3.11).
    """

    version: Version
    sha256: Sha256
    signers: Annotated[tuple[Sha256, ...], Meta(max_length=KEYS_MAX)]
    meta: Annotated[dict[str, Version], Meta(max_length=ROLES_KEPT_MAX)] = {}


class Floors(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may never be gone below, whatever became of the cached metadata."""

    format: Annotated[int, Meta(ge=1, le=1)] = 1
    root: Floor | None = None
    roles: Annotated[dict[RoleName, Floor], Meta(max_length=ROLES_KEPT_MAX)] = {}


def _holds(floor: Floor, authority: Authority) -> bool:
    return len(authority.prints() & frozenset(floor.signers)) >= authority.threshold


def _check_floor(loaded: Loaded[Any], meta: Mapping[str, MetaFile], floor: Floor) -> None:
    """Raise MetadataError when this is older than what was seen, or is it in other words."""
    where = file_of(loaded.role)
    if loaded.version < floor.version:
        raise MetadataError(f"version {loaded.version} is older than {floor.version}", where=where)
    if loaded.version == floor.version and loaded.sha256 != floor.sha256:
        raise MetadataError(f"version {loaded.version} was seen with other content", where=where)
    for name, version in floor.meta.items():
        if name not in meta:
            raise MetadataError(f"tells no more of {name}", where=where)
        if meta[name].version < version:
            raise MetadataError(f"{name} went from {version} to {meta[name].version}", where=where)


def _meta_of(signed: Signed) -> dict[str, MetaFile]:
    if isinstance(signed, Timestamp):
        return {"snapshot.json": signed.snapshot_meta}
    return signed.meta if isinstance(signed, Snapshot) else {}


# --- the trusted set -----------------------------------------------------------------------------------


class TrustedSet:
    """What is trusted now. Every method verifies before it keeps; what it refuses changes nothing.

    root: the first root, embedded in the device. cached: what an earlier refresh kept, by role; each file is
    verified anew under the keys of now, and one that does not hold is as if it were not there.
    """

    def __init__(
        self,
        root: bytes,
        *,
        cached_roots: tuple[bytes, ...] = (),
        cached: Mapping[str, bytes] | None = None,
        floors: Floors | None = None,
    ) -> None:
        self.floors = floors or Floors()
        self.root, self._root_signers = _self_signed(root)
        self.roots: list[bytes] = [root]  # from the embedded one to the newest
        self.timestamp: Loaded[Timestamp] | None = None
        self.snapshot: Loaded[Snapshot] | None = None
        self.targets: dict[tuple[str, str], Loaded[Targets]] = {}  # by (delegator, role)
        self.kept: dict[str, bytes] = dict(cached or {})
        for raw in cached_roots:
            try:
                self.update_root(raw)
            except MetadataError:
                break
        self.kept[ROOT] = self.root.raw

    # --- one file each -------------------------------------------------------------------------------

    def update_root(self, raw: bytes) -> None:
        """Take the next root: signed by enough of the old keys and by enough of its own."""
        if len(raw) > ROOT_BYTES_MAX:
            raise MetadataError("is too big", where=file_of(ROOT))
        new = parse(Root, ROOT, raw)
        if new.version != self.root.version + 1:
            raise MetadataError(f"version {new.version} follows {self.root.version}", where=file_of(ROOT))
        authority_of(self.root.signed, ROOT).signers(new)
        self.root, self._root_signers = _self_signed(raw)
        self.roots.append(raw)
        self.kept[ROOT] = raw

    def check_root(self, now: datetime) -> None:
        """Raise MetadataError unless the newest root is valid now and none older than one seen before."""
        floor = self.floors.root
        if floor is not None and self.root.version < floor.version:
            raise MetadataError(
                f"version {self.root.version} is older than {floor.version}", where=file_of(ROOT)
            )
        if floor is not None and self.root.version == floor.version and self.root.sha256 != floor.sha256:
            raise MetadataError(
                f"version {self.root.version} was seen with other content", where=file_of(ROOT)
            )
        reached = _floor_of(self.root, self._root_signers, {})
        self.floors = msgspec.structs.replace(self.floors, root=reached)
        _check_expiry(self.root, now)

    def load_cached(self) -> None:
        """Take up the timestamp and snapshot kept before, if they still hold under the root of now."""
        self.timestamp = self._cached(Timestamp, TIMESTAMP)
        self.snapshot = self._cached(Snapshot, SNAPSHOT)

    def _cached(self, kind: type[T], role: str) -> Loaded[T] | None:
        if role not in self.kept:
            return None
        try:
            loaded = parse(kind, role, self.kept[role])
            signers = self._verify(loaded, authority_of(self.root.signed, role))
        except MetadataError:
            return None
        self._keep(loaded, signers)
        return loaded

    def _verify(self, loaded: Loaded[Any], authority: Authority) -> frozenset[str]:
        """Check signatures and the floor; return who signed."""
        signers = authority.signers(loaded)
        meta = _meta_of(loaded.signed)
        for name, file in meta.items():
            _check_version(file.version, name)
        floor = self.floors.roles.get(loaded.role)
        if floor is not None and _holds(floor, authority):
            _check_floor(loaded, meta, floor)
        return signers

    def update_timestamp(self, raw: bytes, now: datetime) -> bool:
        """Take a timestamp; False when its version is the one already held, which then stays.

        The one held may have expired and is then refused, whatever was served.
        """
        new = parse(Timestamp, TIMESTAMP, raw)
        authority = authority_of(self.root.signed, TIMESTAMP)
        signers = authority.signers(new)
        if self.timestamp is not None and new.version == self.timestamp.version:
            _check_expiry(self.timestamp, now)
            return False
        self._verify(new, authority)
        _check_expiry(new, now)
        self.timestamp = new
        self._keep(new, signers)
        return True

    def snapshot_is_final(self, now: datetime) -> bool:
        """Whether the snapshot held is the one that the timestamp names. Raises MetadataError if it expired
        or was seen with other content."""
        assert self.timestamp is not None
        meta = self.timestamp.signed.snapshot_meta
        if self.snapshot is None or self.snapshot.version != meta.version:
            return False
        if not matches(self.snapshot.raw, meta.length, meta.hashes):
            return False  # signed anew, or other content: what is served will tell
        _check_expiry(self.snapshot, now)
        return True

    def update_snapshot(self, raw: bytes, now: datetime) -> None:
        """Take the snapshot that the timestamp names."""
        assert self.timestamp is not None
        meta = self.timestamp.signed.snapshot_meta
        if not matches(raw, meta.length, meta.hashes):
            raise MetadataError("is not the file that timestamp.json tells of", where=file_of(SNAPSHOT))
        new = parse(Snapshot, SNAPSHOT, raw)
        signers = self._verify(new, authority_of(self.root.signed, SNAPSHOT))
        if self.snapshot is not None:
            versions = {name: file.version for name, file in self.snapshot.signed.meta.items()}
            _check_floor(new, new.signed.meta, _floor_of(self.snapshot, frozenset(), versions))
        if new.version != meta.version:
            raise MetadataError(
                f"version {new.version}, and timestamp.json tells of {meta.version}",
                where=file_of(SNAPSHOT),
            )
        _check_expiry(new, now)
        self.snapshot = new
        self._keep(new, signers)

    def _named_by(self, signed: Signed) -> dict[str, int]:
        """Return the versions it names that are worth remembering: of the roles this device uses."""
        meta = _meta_of(signed)
        roles = [SNAPSHOT, TARGETS, *(role for role in self.kept if role not in TOP_LEVEL)]
        names = [f"{role}.json" for role in roles[:ROLES_KEPT_MAX]]
        return {name: meta[name].version for name in names if name in meta}

    def targets_meta(self, role: str) -> MetaFile:
        """Return what the snapshot tells of a target role."""
        assert self.snapshot is not None
        meta = self.snapshot.signed.meta.get(f"{role}.json")
        if meta is None:
            raise MetadataError("snapshot.json does not tell of it", where=file_of(role))
        return meta

    def update_targets(self, raw: bytes, role: str, delegator: str, now: datetime) -> None:
        """Take a target role that `delegator` (a target role trusted already, or root) delegates to."""
        meta = self.targets_meta(role)
        if not matches(raw, meta.length, meta.hashes):
            raise MetadataError("is not the file that snapshot.json tells of", where=file_of(role))
        new = parse(Targets, role, raw)
        signers = self._verify(new, self._targets_authority(role, delegator))
        if new.version != meta.version:
            raise MetadataError(
                f"version {new.version}, and snapshot.json tells of {meta.version}", where=file_of(role)
            )
        _check_expiry(new, now)
        self.targets[delegator, role] = new
        self._keep(new, signers)

    def _targets_authority(self, role: str, delegator: str) -> Authority:
        above = self.root if delegator == ROOT else self.role(delegator)
        return authority_of(above.signed, role)

    def role(self, role: str) -> Loaded[Targets]:
        """Return a target role that was taken, whoever delegated it."""
        return next(loaded for (_, name), loaded in self.targets.items() if name == role)

    def _keep(self, loaded: Loaded[Any], signers: frozenset[str]) -> None:
        """Remember a file that was verified, and raise the floor.

        Target roles have no floor of their own: the snapshot's holds their versions, and lapses with it.
        """
        role, roles = loaded.role, self.floors.roles
        if role not in self.kept and len(self.kept) >= ROLES_KEPT_MAX:
            return
        self.kept[role] = loaded.raw
        if role in (TIMESTAMP, SNAPSHOT):
            roles = roles | {role: _floor_of(loaded, signers, self._named_by(loaded.signed))}
        elif self.snapshot is not None and SNAPSHOT in roles:
            # A role used for the first time joins what the snapshot's floor remembers.
            meta = roles[SNAPSHOT].meta | self._named_by(self.snapshot.signed)
            roles = roles | {SNAPSHOT: msgspec.structs.replace(roles[SNAPSHOT], meta=meta)}
        self.floors = msgspec.structs.replace(self.floors, roles=roles)


def _self_signed(raw: bytes) -> tuple[Loaded[Root], frozenset[str]]:
    """Return a root that its own keys have signed, and who did."""
    root = parse(Root, ROOT, raw)
    return root, authority_of(root.signed, ROOT).signers(root)


def _floor_of(loaded: Loaded[Any], signers: frozenset[str], meta: dict[str, int]) -> Floor:
    return Floor(version=loaded.version, sha256=loaded.sha256, signers=tuple(sorted(signers)), meta=meta)


def _check_expiry(loaded: Loaded[Any], now: datetime) -> None:
    if loaded.signed.is_expired(now):
        raise MetadataError(
            f"version {loaded.version} expired on {loaded.signed.expires:%Y-%m-%d %H:%M} UTC",
            where=file_of(loaded.role),
            mend="publish it anew, or set the clock",
        )
