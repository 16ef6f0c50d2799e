"""What verified TUF metadata says of releases: custom fields into `model`, and the proof kept with a slot.

A core: bounds are held by the model, trust by `metadata.py`. A release is a target whose custom object has
a "tbox" part; the target itself is the file to download, and every delta is a target beside it. Who holds
only the online key of the role "rollout" can narrow a cohort and order a rollback, never offer an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from msgspec.structs import replace
from tuf.api.metadata import Root, TargetFile, Targets

from tbox.errors import Refused
from tbox.ota.metadata import (
    ROOT,
    ROOT_ROTATIONS_MAX,
    TARGETS,
    Loaded,
    MetadataError,
    TrustedSet,
    authority_of,
    parse,
)
from tbox.ota.model import (
    MANIFEST_BYTES_MAX,
    Name,
    Offer,
    RollbackOrder,
    Sha256,
    VerifiedTarget,
)
from tbox.ota.workflow import DELEGATION_DEPTH_MAX, ROLES_VISITED_MAX, Steps, find_target, load_role

CUSTOM = "tbox"  # the part of custom, and of a role's own fields, that is ours
ROLLOUT_ROLE = "rollout"
RELEASES_MAX = 256  # looked at in one check
ORDERS_MAX = 16

# Canonical JSON, which signatures cover, knows no fractions: percentages are signed in hundredths.
BasisPoints = Annotated[int, Meta(ge=0, le=10_000)]
COHORT = "cohort_basis_points"


class Notice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a role says beside its targets. basis_points: by image digest, how far its rollout has come."""

    basis_points: Annotated[dict[Sha256, BasisPoints], Meta(max_length=RELEASES_MAX)] = {}
    orders: Annotated[tuple[RollbackOrder, ...], Meta(max_length=ORDERS_MAX)] = ()


def release_of(file: TargetFile) -> VerifiedTarget | None:
    """Return the release a signed target stands for, None for any other file.

    Raises MetadataError when its custom part is not within the model's bounds.
    """
    custom = (file.custom or {}).get(CUSTOM) if isinstance(file.custom, dict) else None
    if custom is None:
        return None
    if not isinstance(custom, dict) or {"name", "full", "cohort_percent"} & custom.keys():
        raise MetadataError("its custom part is malformed", where=file.path)
    served = {"name": file.path, "length": file.length, "sha256": file.hashes.get("sha256", "")}
    fields = {key: value for key, value in custom.items() if key not in ("codec", COHORT)}
    full = served | ({"codec": custom["codec"]} if "codec" in custom else {})
    try:
        points = msgspec.convert(custom.get(COHORT, 10_000), BasisPoints)
        fields |= {"name": file.path, "full": full, "cohort_percent": points / 100}
        return msgspec.convert(fields, VerifiedTarget)
    except (msgspec.ValidationError, ValueError, TypeError) as error:
        raise MetadataError(f"its custom part is out of bounds: {error}", where=file.path) from None


def custom_of(release: VerifiedTarget) -> dict[str, Any]:
    """Return the custom object that `release_of` reads back; the inverse, for the publisher."""
    fields: dict[str, Any] = {
        field.name: msgspec.to_builtins(getattr(release, field.name))
        for field in msgspec.structs.fields(release)
        if getattr(release, field.name) != field.default
    }
    codec = fields.pop("full")["codec"]
    del fields["name"]
    points = round(fields.pop("cohort_percent", 100) * 100)
    return {CUSTOM: fields | {"codec": codec, COHORT: points}}


def check_deltas(release: VerifiedTarget, targets: Targets) -> None:
    """Raise MetadataError unless each delta is a target of the same role, of the same length and digest."""
    for delta in release.deltas:
        file = targets.targets.get(delta.name)
        if file is None or (file.length, file.hashes.get("sha256")) != (delta.length, delta.sha256):
            raise MetadataError(f"its delta {delta.name} is not a target beside it", where=release.name)


def notice_of(targets: Targets, role: str) -> Notice:
    """Return what a role says beside its targets. Raises MetadataError when it is malformed."""
    try:
        return msgspec.convert(targets.unrecognized_fields.get(CUSTOM, {}), Notice)
    except msgspec.ValidationError as error:
        raise MetadataError(f"its notice is out of bounds: {error}", where=f"{role}.json") from None


# --- the offer -----------------------------------------------------------------------------------------

Admits = Callable[[VerifiedTarget], bool]


def offer(trusted: TrustedSet, now: datetime, hardware_id: str, admits: Admits) -> Steps[Offer]:
    """Return what a refreshed repository offers to this kind of hardware.

    The highest security counter wins among the releases that `admits` lets in (the cohort); when it lets none
    in, the highest of all is returned, so that the device can say what it waits for.
    """
    chains = yield from _walk(trusted, now)
    notices = yield from _notices(trusted, now)
    found: list[tuple[VerifiedTarget, tuple[str, ...]]] = []
    for path in _paths(trusted, chains):
        place = yield from find_target(trusted, path, now)
        release = release_of(place.file) if place else None
        if place is None or release is None or hardware_id not in release.hardware_ids:
            continue
        check_deltas(release, trusted.role(place.roles[-1]).signed)
        found.append((_narrowed(release, notices), place.roles))
    orders = tuple(order for notice in notices for order in notice.orders)
    admitted = [entry for entry in found if admits(entry[0])] or found
    if not admitted:
        return Offer(target=None, orders=orders)
    best, chain = max(admitted, key=lambda entry: (entry[0].security_counter, entry[0].name))
    return Offer(target=best, manifest=manifest_of(trusted, chain, best.name), orders=orders)


def _notices(trusted: TrustedSet, now: datetime) -> Steps[list[Notice]]:
    """Return what those say who may: "targets", and the role "rollout" if that itself delegates to it."""
    targets = trusted.targets[ROOT, TARGETS].signed
    notices = [notice_of(targets, TARGETS)]
    if targets.delegations is not None and ROLLOUT_ROLE in (targets.delegations.roles or ()):
        rollout = yield from load_role(trusted, ROLLOUT_ROLE, TARGETS, now)
        notices.append(notice_of(rollout, ROLLOUT_ROLE))
    return notices


def _narrowed(release: VerifiedTarget, notices: list[Notice]) -> VerifiedTarget:
    """Return the release with its cohort as far as the rollout has come, never further than signed."""
    named = [
        notice.basis_points[release.sha256] / 100
        for notice in notices
        if release.sha256 in notice.basis_points
    ]
    return replace(release, cohort_percent=min([release.cohort_percent, *named]))


def _walk(trusted: TrustedSet, now: datetime) -> Steps[dict[str, tuple[str, ...]]]:
    """Load every named role (hash bins are only searched by path); return the chain that leads to each."""
    chains: dict[str, tuple[str, ...]] = {}
    stack: list[tuple[str, ...]] = [(TARGETS,)]
    while stack:
        chain = stack.pop()
        role = chain[-1]
        if role in chains:
            continue
        if len(chains) > ROLES_VISITED_MAX or len(chain) > DELEGATION_DEPTH_MAX:
            raise MetadataError("too many delegations", where=f"{role}.json")
        targets = yield from load_role(trusted, role, chain[-2] if len(chain) > 1 else ROOT, now)
        chains[role] = chain
        names = targets.delegations.roles if targets.delegations and targets.delegations.roles else {}
        stack.extend((*chain, name) for name in reversed(names))
    return chains


def _paths(trusted: TrustedSet, chains: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """Yield the paths of all that claims to be a release; whether it is, a proper search must say."""
    count = 0
    for role in chains:
        for path, file in trusted.role(role).signed.targets.items():
            if isinstance(file.custom, dict) and CUSTOM in file.custom:
                count += 1
                if count > RELEASES_MAX:
                    raise MetadataError(f"more than {RELEASES_MAX} releases", where=f"{role}.json")
                yield path


# --- the proof kept with a slot --------------------------------------------------------------------------


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The metadata that proves one target by itself, given the first root.

    roots: those after the first one. roles: (name, file) from "targets" down to the one with the target.
    """

    format: Annotated[int, Meta(ge=1, le=1)] = 1
    roots: Annotated[tuple[bytes, ...], Meta(max_length=ROOT_ROTATIONS_MAX)]
    roles: Annotated[tuple[tuple[str, bytes], ...], Meta(min_length=1, max_length=DELEGATION_DEPTH_MAX)]
    target: Name


def manifest_of(trusted: TrustedSet, chain: tuple[str, ...], target: str) -> bytes:
    """Return the proof of a target found through these roles. Raises MetadataError when it is too big."""
    roles = tuple((role, trusted.role(role).raw) for role in chain)
    manifest = msgspec.msgpack.encode(Manifest(roots=tuple(trusted.roots[1:]), roles=roles, target=target))
    if len(manifest) > MANIFEST_BYTES_MAX:
        raise MetadataError(
            f"its proof takes {len(manifest)} bytes, {MANIFEST_BYTES_MAX} fit a slot",
            where=target,
            mend="embed a newer first root, or delegate to smaller roles",
        )
    return manifest


def verify_manifest(manifest: bytes, root: bytes) -> VerifiedTarget:
    """Return the target that a slot's manifest proves: every threshold kept, expiry ignored.

    root: the first root. Raises Refused.
    """
    if len(manifest) > MANIFEST_BYTES_MAX:
        raise Refused("the stored proof is too big")
    try:
        proof = msgspec.msgpack.decode(manifest, type=Manifest)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise Refused(f"the stored proof is malformed: {error}") from None
    trusted = TrustedSet(root)
    for raw in proof.roots:
        if parse(Root, ROOT, raw).version > trusted.root.version:
            trusted.update_root(raw)
    file = _prove(trusted, proof)
    release = release_of(file)
    if release is None:
        raise Refused("the stored proof is of a file that is no release", where=proof.target)
    return release


def _prove(trusted: TrustedSet, proof: Manifest) -> TargetFile:
    above: Loaded[Targets] | None = None
    for role, raw in proof.roles:
        loaded = parse(Targets, role, raw)
        if above is None and role != TARGETS:
            raise Refused("the stored proof does not begin with targets.json")
        if above is not None and role not in _delegated(above.signed, proof.target):
            raise Refused(f"{above.role} does not delegate this target to {role}", where=proof.target)
        authority_of(trusted.root.signed if above is None else above.signed, role).signers(loaded)
        above = loaded
    assert above is not None
    if proof.target not in above.signed.targets:
        raise Refused("the stored proof does not tell of its target", where=proof.target)
    return above.signed.targets[proof.target]


def _delegated(targets: Targets, path: str) -> set[str]:
    return (
        {role for role, _ in targets.delegations.get_roles_for_target(path)} if targets.delegations else set()
    )
