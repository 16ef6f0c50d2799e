"""The nouns of updates: what signed metadata says about an image. Values only; it checks no signature.

Trust makes them from verified metadata with `msgspec.convert` (which holds the bounds); the engine, the
policy, the installer and the boot loader believe them and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

IMAGE_BYTES_MAX = 8 << 30
MANIFEST_BYTES_MAX = 1 << 20  # the signed metadata kept with a slot
SECURITY_COUNTER_MAX = (1 << 31) - 1
DELTAS_MAX = 16
HARDWARE_IDS_MAX = 64
REQUIRES_MAX = 64

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+/-]*\Z")]
Bytes = Annotated[int, Meta(ge=0, le=IMAGE_BYTES_MAX)]
Counter = Annotated[int, Meta(ge=1, le=SECURITY_COUNTER_MAX)]
MinuteOfDay = Annotated[int, Meta(ge=0, lt=24 * 60)]
Text = Annotated[str, Meta(max_length=400)]

ImageKind = Literal["app", "raw"]
Codec = Literal["zstd", "identity"]


class Full(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole image as a file to download; `length` and `sha256` are those of the file as served."""

    name: Name
    length: Bytes
    sha256: Sha256
    codec: Codec = "zstd"


class Delta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A BSDIFF40 patch from the image whose digest is `base_sha256`; the rest is of the patch file."""

    base_sha256: Sha256
    name: Name
    length: Bytes
    sha256: Sha256


class Window(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When downloads may run, local time; an end before the start reaches past midnight.

    An end equal to the start is the whole day, for which no clock is needed.
    """

    begin_minute: MinuteOfDay = 22 * 60  # off-peak 22:00 to 06:00, when networks are idle
    end_minute: MinuteOfDay = 6 * 60

    @property
    def whole_day(self) -> bool:
        return self.begin_minute == self.end_minute


class Preconditions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must hold before the switch; the device's own settings may only make it stricter (R156)."""

    parked: bool = True
    soc_percent_min: Annotated[int, Meta(ge=0, le=100)] = 20
    low_voltage_mv_min: Annotated[int, Meta(ge=0, le=60_000)] = 11_800
    consent: bool = False


class Emergency(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A signed permission to go below the anti-rollback floor, which itself stays where it is.

    It holds only on devices whose floor is at most `floor_max`, so it lapses with the next good release.
    """

    floor_max: Counter
    reason: Text


class VerifiedTarget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One release for one kind of hardware, as signed.

    `length` and `sha256` are those of the image as it stands in a slot. security_counter rises with every
    release; fallback_counter_min, once this image is good, is the least counter the boot loader still
    starts (raise it in a release that closes a hole; below it the previous image is no fallback any more).
    requires: what an app image does not carry, as "name>=1.2,<2" ("python" and "platform==…" included).
    """

    name: Name
    version: Name
    kind: ImageKind
    length: Bytes
    sha256: Sha256
    security_counter: Counter
    hardware_ids: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=HARDWARE_IDS_MAX)]
    full: Full
    deltas: Annotated[tuple[Delta, ...], Meta(max_length=DELTAS_MAX)] = ()
    requires: Annotated[tuple[Text, ...], Meta(max_length=REQUIRES_MAX)] = ()
    fallback_counter_min: Annotated[int, Meta(ge=0, le=SECURITY_COUNTER_MAX)] = 0
    cohort_percent: Annotated[float, Meta(ge=0, le=100)] = 100.0
    window: Window | None = None  # None: the device's own
    preconditions: Preconditions = Preconditions()
    critical: bool = False  # may be downloaded outside the window
    emergency: Emergency | None = None
    rxswin: Annotated[str, Meta(max_length=100)] = ""
    notes: Text = ""  # what the user is told: what, how long, what is lost (R156)


class RollbackOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A signed order to leave an image, even one already found good, for the other slot's good one."""

    leave_sha256: Sha256
    reason: Text


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """What one check of the repository yields, all of it verified.

    manifest: the signed metadata that proves `target` by itself (root chain, targets, delegations), opaque
    to the engine, stored with the slot and verified again by the boot loader at every start.
    """

    target: VerifiedTarget | None
    manifest: bytes = b""
    orders: tuple[RollbackOrder, ...] = ()


# Verifies a stored manifest, threshold kept and expiry ignored; raises tbox.errors.Refused when it fails.
# The boot loader's is trust.verify_slot_manifest(manifest, root=<the root beside the slots, as bytes>).
VerifyManifest = Callable[[bytes], VerifiedTarget]
