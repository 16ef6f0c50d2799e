"""The TUF client workflow as a core: which file is wanted next, and where a target is found. No IO, no clock.

`refresh` and `find_target` are generators that yield the file they want next (`Want`) and are sent its bytes,
or None when the server has no such file. What the bytes are worth is `metadata.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from datetime import datetime
from typing import NamedTuple, TypeVar
from urllib.parse import quote

from tuf.api.metadata import MetaFile, TargetFile, Targets

from tbox.ota.metadata import (
    ROLE_NAME_CHARS_MAX,
    ROOT,
    ROOT_BYTES_MAX,
    ROOT_ROTATIONS_MAX,
    SNAPSHOT,
    TARGETS,
    MetadataError,
    TrustedSet,
    file_of,
)

# Sizes as python-tuf's client has them by default: generous for every repository met so far.
TIMESTAMP_BYTES_MAX = 16_384
SNAPSHOT_BYTES_MAX = 2_000_000
TARGETS_BYTES_MAX = 5_000_000
ROLES_VISITED_MAX = 32  # delegated roles looked at for one target
DELEGATION_DEPTH_MAX = 8
TARGET_PATH_CHARS_MAX = 400


class Want(NamedTuple):
    """The next file wanted, as a path below the metadata URL; more than length_max bytes is an error."""

    path: str
    length_max: int


R = TypeVar("R")
Steps = Generator[Want, bytes | None, R]


def refresh(trusted: TrustedSet, now: datetime) -> Steps[None]:
    """Bring the top-level roles up to date, in the order of the specification (TUF 5.3 to 5.6)."""
    yield from _refresh_root(trusted)
    trusted.check_root(now)
    trusted.load_cached()
    trusted.update_timestamp((yield from _need("timestamp.json", TIMESTAMP_BYTES_MAX)), now)
    yield from _refresh_snapshot(trusted, now)
    yield from load_role(trusted, TARGETS, ROOT, now)


def _need(path: str, length_max: int) -> Steps[bytes]:
    raw = yield Want(path, length_max)
    if raw is None:
        raise MetadataError("the repository does not have it", where=path)
    return raw


def _refresh_root(trusted: TrustedSet) -> Steps[None]:
    while True:
        raw = yield Want(f"{trusted.root.version + 1}.root.json", ROOT_BYTES_MAX)
        if raw is None:
            return
        if len(trusted.roots) > ROOT_ROTATIONS_MAX:
            raise MetadataError(
                f"more than {ROOT_ROTATIONS_MAX} roots follow the first",
                where=file_of(ROOT),
                mend="provision the device with a newer first root",
            )
        trusted.update_root(raw)


def _refresh_snapshot(trusted: TrustedSet, now: datetime) -> Steps[None]:
    if trusted.snapshot_is_final(now):
        return
    assert trusted.timestamp is not None
    meta = trusted.timestamp.signed.snapshot_meta
    path = _versioned(trusted, SNAPSHOT, meta.version)
    raw = yield from _need(path, _length_max(meta, SNAPSHOT_BYTES_MAX))
    trusted.update_snapshot(raw, now)


def _versioned(trusted: TrustedSet, role: str, version: int) -> str:
    name = f"{quote(role, safe='')}.json"
    return f"{version}.{name}" if trusted.root.signed.consistent_snapshot else name


def _length_max(meta: MetaFile, limit: int) -> int:
    return min(meta.length, limit) if meta.length is not None else limit


def load_role(trusted: TrustedSet, role: str, delegator: str, now: datetime) -> Steps[Targets]:
    """Return a target role: as taken before, or from the cache if the snapshot names that, or as served."""
    if (delegator, role) in trusted.targets:
        return trusted.targets[delegator, role].signed
    if len(role) > ROLE_NAME_CHARS_MAX:
        raise MetadataError("role name is too long", where=file_of(role))
    if role in trusted.kept:
        try:
            trusted.update_targets(trusted.kept[role], role, delegator, now)
            return trusted.targets[delegator, role].signed
        except MetadataError:
            pass  # outdated, expired or of other keys; what is served must hold
    meta = trusted.targets_meta(role)
    path = _versioned(trusted, role, meta.version)
    raw = yield from _need(path, _length_max(meta, TARGETS_BYTES_MAX))
    trusted.update_targets(raw, role, delegator, now)
    return trusted.targets[delegator, role].signed


class Found(NamedTuple):
    """A target and the chain of roles that vouches for it, from "targets" down."""

    file: TargetFile
    roles: tuple[str, ...]


def find_target(trusted: TrustedSet, path: str, now: datetime) -> Steps[Found | None]:
    """Look a target up: pre-order, in the order of the delegations, a terminating one ends the search.

    Raises MetadataError when a role on the way does not hold, or the search exceeds its limits.
    """
    if len(path) > TARGET_PATH_CHARS_MAX:
        raise MetadataError(f"target path is longer than {TARGET_PATH_CHARS_MAX}", where=path[:80])
    stack: list[tuple[str, ...]] = [(TARGETS,)]
    visited: set[str] = set()
    while stack:
        chain = stack.pop()
        role = chain[-1]
        if role in visited:
            continue
        if len(visited) > ROLES_VISITED_MAX or len(chain) > DELEGATION_DEPTH_MAX:
            raise MetadataError("too many delegations", where=path)
        visited.add(role)
        targets = yield from load_role(trusted, role, chain[-2] if len(chain) > 1 else ROOT, now)
        if path in targets.targets:
            return Found(targets.targets[path], chain)
        children = []
        for child, terminating in _delegations(targets, path):
            children.append((*chain, child))
            if terminating:
                stack = []
                break
        stack.extend(reversed(children))
    return None


def _delegations(targets: Targets, path: str) -> Iterator[tuple[str, bool]]:
    """Yield (role, terminating) of those a path is delegated to."""
    if targets.delegations is not None:
        yield from targets.delegations.get_roles_for_target(path)


# Returns the file at a path below the metadata URL, of at most so many bytes; None when there is none.
Fetch = Callable[[str, int], bytes | None]


def drive(steps: Steps[R], fetch: Fetch) -> R:
    """Run a workflow to its end with files from `fetch`. Raises what either raises."""
    answer: bytes | None = None
    try:
        want = next(steps)
        while True:
            answer = fetch(want.path, want.length_max)
            if answer is not None and len(answer) > want.length_max:
                raise MetadataError(f"more than {want.length_max} bytes", where=want.path)
            want = steps.send(answer)
    except StopIteration as end:
        result: R = end.value
        return result
