"""The slot table: what a slot may become and which slot boots. Pure: nothing is read, content never decides.

Everything that changes a slot's state is in this file: the table says what the state becomes, the fields
follow, and the two must agree. `plan` is the boot loader's choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from tbox.errors import Refused
from tbox.ota.model import SECURITY_COUNTER_MAX, VerifiedTarget

TRIES = 3  # starts a new image gets before it is given up
TRIES_MAX = 7
PRIORITY_ACTIVE = 2
PRIORITY_FALLBACK = 1
FAILED_IMAGES_MAX = 16  # remembered, oldest forgotten first
REASON_CHARS_MAX = 200

SlotName = Literal["a", "b"]
SLOT_NAMES: tuple[SlotName, SlotName] = ("a", "b")
Floor = Annotated[int, Meta(ge=0, le=SECURITY_COUNTER_MAX)]


class SlotState(Enum):
    EMPTY = "empty"  # never written
    UNBOOTABLE = "unbootable"  # being written, or given up
    SEALED = "sealed"  # written, synced, read back and hashed; not active yet
    TRIAL = "trial"  # active, must still prove itself, has tries left
    LAST_TRY = "last-try"  # running on its last try
    GOOD = "good"


class SlotEvent(Enum):
    ERASE = "erase"
    SEAL = "seal"
    ACTIVATE = "activate"
    TRY = "try"
    TRY_LAST = "try-last"
    CONFIRM = "confirm"
    FAIL = "fail"


TABLE: dict[SlotState, dict[SlotEvent, SlotState]] = {
    SlotState.EMPTY: {SlotEvent.ERASE: SlotState.UNBOOTABLE},
    SlotState.UNBOOTABLE: {
        SlotEvent.ERASE: SlotState.UNBOOTABLE,
        SlotEvent.SEAL: SlotState.SEALED,
    },
    SlotState.SEALED: {
        SlotEvent.ERASE: SlotState.UNBOOTABLE,
        SlotEvent.ACTIVATE: SlotState.TRIAL,
        SlotEvent.FAIL: SlotState.UNBOOTABLE,
    },
    SlotState.TRIAL: {
        SlotEvent.TRY: SlotState.TRIAL,
        SlotEvent.TRY_LAST: SlotState.LAST_TRY,
        SlotEvent.CONFIRM: SlotState.GOOD,
        SlotEvent.FAIL: SlotState.UNBOOTABLE,
    },
    SlotState.LAST_TRY: {
        SlotEvent.CONFIRM: SlotState.GOOD,
        SlotEvent.FAIL: SlotState.UNBOOTABLE,
    },
    SlotState.GOOD: {
        SlotEvent.ERASE: SlotState.UNBOOTABLE,
        SlotEvent.ACTIVATE: SlotState.GOOD,
        SlotEvent.FAIL: SlotState.UNBOOTABLE,
    },
}


class IllegalTransition(Exception):
    """An event that the table does not allow in this state: a bug, never the world."""


class SlotEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What boot control says of one slot. `state` is derived from the fields, in the order of its lines.

    length, sha256, version, security_counter: of the image the slot holds or is being given.
    manifest_sha256: of the signed metadata stored beside it. emergency: let in below the floor by a
    signed permission.
    """

    priority: Annotated[int, Meta(ge=0, le=PRIORITY_ACTIVE)] = 0
    tries_left: Annotated[int, Meta(ge=0, le=TRIES_MAX)] = 0
    successful: bool = False
    sha256: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    length: Annotated[int, Meta(ge=0)] = 0
    version: Annotated[str, Meta(max_length=200)] = ""
    security_counter: Floor = 0
    fallback_counter_min: Floor = 0
    manifest_sha256: Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""
    emergency: bool = False

    @property
    def state(self) -> SlotState:
        if not self.sha256:
            return SlotState.EMPTY
        if self.priority == 0:
            return SlotState.SEALED if self.tries_left else SlotState.UNBOOTABLE
        if self.successful:
            return SlotState.GOOD
        return SlotState.TRIAL if self.tries_left else SlotState.LAST_TRY


class FailedImage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An image that was tried and given up; it is not tried again."""

    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    version: Annotated[str, Meta(max_length=200)]
    reason: Annotated[str, Meta(max_length=REASON_CHARS_MAX)]


class BootControl(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that decides what boots. Neither floor ever falls, and both rise only when an image is found good.

    floor: the highest security counter found good here; a new image must be above it.
    fallback_floor: the least counter that still boots; the good image's signed `fallback_counter_min`. It
    trails `floor`, since a floor at the new image's own counter would take away the slot to fall back on.
    """

    format: Literal[1] = 1
    a: SlotEntry = SlotEntry()
    b: SlotEntry = SlotEntry()
    floor: Floor = 0
    fallback_floor: Floor = 0
    failed: Annotated[tuple[FailedImage, ...], Meta(max_length=FAILED_IMAGES_MAX)] = ()

    def slot(self, name: SlotName) -> SlotEntry:
        return self.a if name == "a" else self.b

    def failure(self, sha256: str) -> FailedImage | None:
        """Return why this image was given up before, None if it was not."""
        return next((image for image in self.failed if image.sha256 == sha256), None)

    def with_slots(self, name: SlotName, entry: SlotEntry, beside: SlotEntry | None = None) -> BootControl:
        """Return this with `entry` in slot `name`, and `beside` in the other one."""
        other = beside if beside is not None else self.slot(other_slot(name))
        return replace(self, a=entry, b=other) if name == "a" else replace(self, a=other, b=entry)


def other_slot(name: SlotName) -> SlotName:
    return "b" if name == "a" else "a"


def step(state: SlotState, event: SlotEvent) -> SlotState:
    """Return the next state. Raises IllegalTransition."""
    try:
        return TABLE[state][event]
    except KeyError:
        raise IllegalTransition(f"slot is {state.value}: no {event.value}") from None


def _moved(control: BootControl, name: SlotName, event: SlotEvent, after: BootControl) -> BootControl:
    """Hold the table against the fields."""
    expected = step(control.slot(name).state, event)
    found = after.slot(name).state
    assert found == expected, f"slot {name}: fields say {found}, the table {expected}"
    assert after.floor >= control.floor and after.fallback_floor >= control.fallback_floor
    return after


def erase(control: BootControl, name: SlotName, target: VerifiedTarget) -> BootControl:
    """Mark a slot unbootable before its first byte is overwritten. Raises IllegalTransition, Refused.

    The only good slot is never erased.
    """
    step(control.slot(name).state, SlotEvent.ERASE)
    beside = other_slot(name)
    if control.slot(beside).state is not SlotState.GOOD or unfit(control, beside):
        raise Refused(
            f"slot {beside} is {control.slot(beside).state.value}: there is nothing to fall back on",
            where=f"slot {name}",
            mend="confirm or roll back the running image first",
        )
    return vacate(control, name, target)


def vacate(control: BootControl, name: SlotName, target: VerifiedTarget) -> BootControl:
    """As `erase`, for a device that has nothing to fall back on: in the factory, or for its recovery."""
    entry = SlotEntry(
        sha256=target.sha256,
        length=target.length,
        version=target.version,
        security_counter=target.security_counter,
        fallback_counter_min=target.fallback_counter_min,
        emergency=target.emergency is not None,
    )
    return _moved(control, name, SlotEvent.ERASE, control.with_slots(name, entry))


def seal(control: BootControl, name: SlotName, manifest_sha256: str, tries: int = TRIES) -> BootControl:
    """Set the tries of a slot whose bytes were read back from the medium and hashed."""
    entry = replace(control.slot(name), manifest_sha256=manifest_sha256, tries_left=tries)
    return _moved(control, name, SlotEvent.SEAL, control.with_slots(name, entry))


def activate(control: BootControl, name: SlotName) -> BootControl:
    """Make a sealed slot the next to boot, on trial; or a good one again."""
    other = control.slot(other_slot(name))
    after = control.with_slots(
        name,
        replace(control.slot(name), priority=PRIORITY_ACTIVE),
        replace(other, priority=min(other.priority, PRIORITY_FALLBACK)),
    )
    return _moved(control, name, SlotEvent.ACTIVATE, after)


def count_try(control: BootControl, name: SlotName) -> BootControl:
    """Take one try from a slot on trial, before it is started."""
    entry = control.slot(name)
    event = SlotEvent.TRY_LAST if entry.tries_left == 1 else SlotEvent.TRY
    step(entry.state, event)  # before the subtraction, so that tries never go below zero
    after = control.with_slots(name, replace(entry, tries_left=entry.tries_left - 1))
    return _moved(control, name, event, after)


def confirm(control: BootControl, name: SlotName) -> BootControl:
    """Mark the image on trial good; only now the floors rise."""
    entry = control.slot(name)
    step(entry.state, SlotEvent.CONFIRM)
    after = replace(
        control.with_slots(name, replace(entry, successful=True, tries_left=0)),
        floor=max(control.floor, entry.security_counter),
        fallback_floor=max(control.fallback_floor, min(entry.fallback_counter_min, entry.security_counter)),
    )
    return _moved(control, name, SlotEvent.CONFIRM, after)


def fail(control: BootControl, name: SlotName, reason: str) -> BootControl:
    """Give a slot up and remember its image with the reason."""
    entry = control.slot(name)
    step(entry.state, SlotEvent.FAIL)
    image = FailedImage(sha256=entry.sha256, version=entry.version, reason=reason[:REASON_CHARS_MAX])
    kept = tuple(old for old in control.failed if old.sha256 != entry.sha256)
    after = replace(
        control.with_slots(name, replace(entry, priority=0, tries_left=0, successful=False)),
        failed=(*kept, image)[-FAILED_IMAGES_MAX:],
    )
    return _moved(control, name, SlotEvent.FAIL, after)


def holds(control: BootControl, name: SlotName, target: VerifiedTarget) -> bool:
    """Whether this slot was sealed with this image before, so that it need not be installed again."""
    entry = control.slot(name)
    return entry.state is SlotState.SEALED and entry.sha256 == target.sha256


# --- the boot loader's choice --------------------------------------------------------------------------


class GiveUp(NamedTuple):
    """A slot used up its tries: fail it, then plan again."""

    slot: SlotName
    reason: str


class Start(NamedTuple):
    """Verify this slot, count a try if it is on trial, start it."""

    slot: SlotName
    trial: bool


class LastResort(NamedTuple):
    """Nothing may boot. Why, per slot. Only the recovery command leads out of here."""

    reasons: dict[SlotName, str]


def unfit(control: BootControl, name: SlotName) -> str:
    """Return why boot control forbids to start this slot, "" if it does not."""
    entry = control.slot(name)
    if entry.state not in (SlotState.GOOD, SlotState.TRIAL):
        failure = control.failure(entry.sha256)
        return failure.reason if failure else f"slot is {entry.state.value}"
    if entry.security_counter < control.fallback_floor and not entry.emergency:
        return f"security counter {entry.security_counter} is below the floor {control.fallback_floor}"
    return ""


def plan(control: BootControl, rejected: Mapping[SlotName, str]) -> GiveUp | Start | LastResort:
    """Return the boot loader's next step. rejected: slots found bad at this boot, with the reason."""
    for name in SLOT_NAMES:
        if control.slot(name).state is SlotState.LAST_TRY:
            return GiveUp(name, "tries used up without a verdict")
    reasons = {name: rejected.get(name) or unfit(control, name) for name in SLOT_NAMES}
    fit = [name for name in SLOT_NAMES if not reasons[name]]
    if not fit:
        return LastResort(reasons)
    best = max(fit, key=lambda name: control.slot(name).priority)
    return Start(best, control.slot(best).state is SlotState.TRIAL)


def mismatch(control: BootControl, name: SlotName, target: VerifiedTarget) -> str:
    """Return how the signed metadata of a slot contradicts boot control, "" if it does not."""
    entry = control.slot(name)
    if (target.sha256, target.length) != (entry.sha256, entry.length):
        return "the stored manifest is of another image"
    if target.security_counter != entry.security_counter:
        return "boot control's security counter is not the signed one"
    if entry.security_counter < control.fallback_floor and (
        target.emergency is None or target.emergency.floor_max < control.floor
    ):
        return "below the floor, and no signed emergency permits it"
    return ""
