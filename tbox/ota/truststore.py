"""Verified metadata on flash: generations that a power cut cannot mix, and floors kept apart from them.

Files stand under the digest of their content and are never written over while they count; a generation is a
list of digests in two CRC'd copies, switched after everything it names was synced. The floors stand in both
of their copies: were the older of two left to count when the newer rots, a replay could get in. Nothing is
verified here: what is read back is believed only to be what was written.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from tbox.durable import Storage, TwoCopies
from tbox.errors import Refused
from tbox.ota.metadata import ROLES_KEPT_MAX, ROOT_ROTATIONS_MAX, Floors, RoleName, Sha256, TrustedSet

GENERATION_STEM = "generation"
FLOORS_STEM = "floors"
OBJECT_SUFFIX = ".object"


class Generation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One whole state of the cache, as digests: the roots after the embedded one, in order, and the roles."""

    format: Annotated[int, Meta(ge=1, le=1)] = 1
    roots: Annotated[tuple[Sha256, ...], Meta(max_length=ROOT_ROTATIONS_MAX)] = ()
    roles: Annotated[dict[RoleName, Sha256], Meta(max_length=ROLES_KEPT_MAX)] = {}


class Stored(NamedTuple):
    """What was read back. whole: nothing that the generation names is missing or damaged."""

    roots: tuple[bytes, ...]
    roles: dict[str, bytes]
    floors: Floors
    whole: bool


def _decode(copies: TwoCopies, kind: type[msgspec.Struct]) -> msgspec.Struct | None:
    newest = copies.read()
    if newest is None:
        return None
    try:
        return msgspec.msgpack.decode(newest[1], type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError):
        return None


class TrustStore:
    """The cache in `directory`, the floors in `floors_directory`. Both must exist."""

    def __init__(self, storage: Storage, directory: str, floors_directory: str) -> None:
        self._storage, self._dir = storage, directory
        self._generation = TwoCopies(storage, directory, GENERATION_STEM)
        self._floors = TwoCopies(storage, floors_directory, FLOORS_STEM)
        self._floors_paths = [f"{floors_directory}/{FLOORS_STEM}.{n}" for n in (0, 1)]

    def load(self) -> Stored:
        """Return what stands on the medium.

        Raises Refused when the floors are gone though there were some and no whole generation says what they
        were: then a replay could not be told from news. Raises OSError.
        """
        generation = _decode(self._generation, Generation)
        floors = _decode(self._floors, Floors)
        found = generation if isinstance(generation, Generation) else Generation()
        roots, roles, whole = self._objects(found)
        if isinstance(floors, Floors):
            return Stored(roots, roles, floors, whole and generation is not None)
        # One copy alone, and torn: the very first write was cut, and nothing was believed yet.
        if self._both_floors() and not (generation is not None and whole):
            raise Refused(
                "the floors of trust are damaged, and so is the metadata they could be taken from",
                where=self._floors_paths[0],
                mend="provision the device anew",
            )
        return Stored(roots, roles, Floors(), whole and generation is not None)

    def _both_floors(self) -> bool:
        return all(map(self._storage.exists, self._floors_paths))

    def _objects(self, generation: Generation) -> tuple[tuple[bytes, ...], dict[str, bytes], bool]:
        roots = [self._object(digest) for digest in generation.roots]
        roles = {role: self._object(digest) for role, digest in generation.roles.items()}
        whole = None not in roots and None not in roles.values()
        if None in roots:
            roots = roots[: roots.index(None)]  # the chain counts up to the gap
        return (
            tuple(raw for raw in roots if raw is not None),
            {role: raw for role, raw in roles.items() if raw is not None},
            whole,
        )

    def _path(self, digest: str) -> str:
        return f"{self._dir}/{digest}{OBJECT_SUFFIX}"

    def _object(self, digest: str) -> bytes | None:
        try:
            raw = self._storage.read(self._path(digest))
        except FileNotFoundError:
            return None
        return raw if hashlib.sha256(raw).hexdigest() == digest else None

    def save(self, trusted: TrustedSet) -> None:
        """Make this the state that counts: floors first, so that they are never behind what was believed.

        Durable when it returns; a cut anywhere leaves the old generation or the new one. Raises OSError.
        """
        self._keep_floors(trusted.floors)
        before = _decode(self._generation, Generation)
        durable = {*before.roots, *before.roles.values()} if isinstance(before, Generation) else set()
        roots = tuple(self._put(raw, durable) for raw in trusted.roots[1:])
        roles = {role: self._put(raw, durable) for role, raw in trusted.kept.items()}
        after = Generation(roots=roots, roles=roles)
        if after != before:
            self._storage.fsync_dir(self._dir)
            self._generation.write(msgspec.msgpack.encode(after))
            self._sweep({*roots, *roles.values()})

    def _keep_floors(self, floors: Floors) -> None:
        self._floors.write_both(msgspec.msgpack.encode(floors))

    def _put(self, raw: bytes, durable: set[str]) -> str:
        """Make a file durable, but for its name. durable: what the generation that counts names."""
        digest = hashlib.sha256(raw).hexdigest()
        path = self._path(digest)
        whole = self._object(digest) is not None
        if not whole:
            if self._storage.exists(path):
                self._storage.truncate(path, 0)
            self._storage.write(path, raw)
        if not whole or digest not in durable:
            # A whole one may be in the page cache alone, left there by a process that was killed.
            self._storage.fsync(path)
        return digest

    def _sweep(self, keep: set[str]) -> None:
        """Remove what no generation names any more. What cannot be removed now goes the next time."""
        for name in self._storage.listdir(self._dir):
            if name.endswith(OBJECT_SUFFIX) and name.removesuffix(OBJECT_SUFFIX) not in keep:
                with contextlib.suppress(OSError):
                    self._storage.unlink(f"{self._dir}/{name}")
