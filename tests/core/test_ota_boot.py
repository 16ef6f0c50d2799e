"""The slot table: every pair of state and event, the boot loader's choice, and floors that never fall."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbox.errors import Refused
from tbox.ota import boot
from tbox.ota.boot import (
    SLOT_NAMES,
    TABLE,
    BootControl,
    GiveUp,
    IllegalTransition,
    LastResort,
    SlotEntry,
    SlotEvent,
    SlotName,
    SlotState,
    Start,
)
from tbox.ota.model import Emergency, VerifiedTarget
from tests.crash.ota_world import sha256, target_of
from tests.tables import check_pair, check_whole, every_pair

OLD = target_of(b"old", 1)
NEW = target_of(b"new", 2)
DIGEST = sha256(b"manifest")


def good_entry(target: VerifiedTarget, priority: int = boot.PRIORITY_ACTIVE) -> SlotEntry:
    return SlotEntry(
        priority=priority,
        successful=True,
        sha256=target.sha256,
        length=target.length,
        version=target.version,
        security_counter=target.security_counter,
        manifest_sha256=DIGEST,
    )


FACTORY = BootControl(a=good_entry(OLD), floor=1)
UNBOOTABLE = boot.erase(FACTORY, "b", NEW)
SEALED = boot.seal(UNBOOTABLE, "b", DIGEST)
TRIAL = boot.activate(SEALED, "b")
LAST_TRY = boot.count_try(boot.count_try(boot.count_try(TRIAL, "b"), "b"), "b")
GOOD = boot.confirm(boot.count_try(TRIAL, "b"), "b")

IN_STATE: dict[SlotState, BootControl] = {
    SlotState.EMPTY: FACTORY,
    SlotState.UNBOOTABLE: UNBOOTABLE,
    SlotState.SEALED: SEALED,
    SlotState.TRIAL: TRIAL,
    SlotState.LAST_TRY: LAST_TRY,
    SlotState.GOOD: GOOD,
}
DO: dict[SlotEvent, Callable[[BootControl], BootControl]] = {
    SlotEvent.ERASE: lambda control: boot.erase(control, "b", NEW),
    SlotEvent.SEAL: lambda control: boot.seal(control, "b", DIGEST),
    SlotEvent.ACTIVATE: lambda control: boot.activate(control, "b"),
    SlotEvent.TRY: lambda control: boot.count_try(control, "b"),
    SlotEvent.TRY_LAST: lambda control: boot.count_try(_one_try_left(control), "b"),
    SlotEvent.CONFIRM: lambda control: boot.confirm(control, "b"),
    SlotEvent.FAIL: lambda control: boot.fail(control, "b", "why"),
}


def _one_try_left(control: BootControl) -> BootControl:
    if control.b.state is not SlotState.TRIAL:
        return control
    return control.with_slots("b", msgspec.structs.replace(control.b, tries_left=1))


@every_pair(SlotState, SlotEvent)
def test_every_state_takes_the_events_of_the_table_and_no_other(state: SlotState, event: SlotEvent) -> None:
    assert IN_STATE[state].b.state is state
    check_pair(TABLE, state, event, lambda s, e: DO[e](IN_STATE[s]).b.state, IllegalTransition)


def test_every_state_can_be_reached_and_left() -> None:
    check_whole(TABLE, SlotState, SlotEvent)


def test_the_floor_rises_only_when_the_image_is_found_good() -> None:
    for control in (UNBOOTABLE, SEALED, TRIAL, LAST_TRY, boot.fail(TRIAL, "b", "why")):
        assert control.floor == 1
    assert GOOD.floor == 2


def test_the_previous_image_still_boots_after_the_floor_rose_unless_the_new_one_forbids_it() -> None:
    assert boot.unfit(GOOD, "a") == ""
    closing = target_of(b"new", 2, fallback_counter_min=2)
    trial = boot.activate(boot.seal(boot.erase(FACTORY, "b", closing), "b", DIGEST), "b")
    assert boot.unfit(trial, "a") == ""
    assert boot.unfit(boot.confirm(trial, "b"), "a") == "security counter 1 is below the floor 2"


def test_a_release_cannot_forbid_itself() -> None:
    greedy = target_of(b"new", 2, fallback_counter_min=99)
    trial = boot.activate(boot.seal(boot.erase(FACTORY, "b", greedy), "b", DIGEST), "b")
    assert boot.unfit(boot.confirm(trial, "b"), "b") == ""


def test_the_only_good_slot_is_never_erased() -> None:
    with pytest.raises(Refused, match="nothing to fall back on"):
        boot.erase(TRIAL, "a", NEW)
    with pytest.raises(Refused, match="nothing to fall back on"):
        boot.erase(FACTORY, "a", NEW)


def test_the_boot_loader_prefers_the_active_slot_and_falls_back() -> None:
    assert boot.plan(FACTORY, {}) == Start("a", trial=False)
    assert boot.plan(SEALED, {}) == Start("a", trial=False)
    assert boot.plan(TRIAL, {}) == Start("b", trial=True)
    assert boot.plan(TRIAL, {"b": "unreadable"}) == Start("a", trial=False)
    assert boot.plan(LAST_TRY, {}) == GiveUp("b", "tries used up without a verdict")
    assert boot.plan(boot.fail(LAST_TRY, "b", "why"), {}) == Start("a", trial=False)
    assert boot.plan(GOOD, {}) == Start("b", trial=False)
    assert boot.plan(boot.activate(GOOD, "a"), {}) == Start("a", trial=False)


def test_last_resort_says_why_for_each_slot() -> None:
    control = boot.fail(TRIAL, "b", "crashed")
    assert boot.plan(control, {"a": "rotten"}) == LastResort({"a": "rotten", "b": "crashed"})
    assert isinstance(boot.plan(BootControl(), {}), LastResort)


def test_stored_metadata_must_be_of_the_image_that_boot_control_names() -> None:
    assert boot.mismatch(TRIAL, "b", NEW) == ""
    assert "another image" in boot.mismatch(TRIAL, "b", OLD)
    assert "security counter" in boot.mismatch(TRIAL, "b", msgspec.structs.replace(NEW, security_counter=3))


def test_an_emergency_boots_below_the_floor_only_with_its_signed_permission() -> None:
    high = BootControl(a=good_entry(target_of(b"high", 9)), floor=9, fallback_floor=9)
    permitted = target_of(b"low", 3, emergency=Emergency(floor_max=9, reason="9 loses the brakes' light"))
    trial = boot.activate(boot.seal(boot.erase(high, "b", permitted), "b", DIGEST), "b")
    assert boot.plan(trial, {}) == Start("b", trial=True)
    assert boot.mismatch(trial, "b", permitted) == ""
    assert "no signed emergency" in boot.mismatch(trial, "b", target_of(b"low", 3))
    lapsed = target_of(b"low", 3, emergency=Emergency(floor_max=8, reason="old"))
    assert "no signed emergency" in boot.mismatch(trial, "b", lapsed)
    good = boot.confirm(trial, "b")
    assert (good.floor, good.fallback_floor) == (9, 9)


@given(st.integers(0, 1 << 32))
@settings(deadline=None)
def test_whatever_happens_floors_never_fall_and_something_boots(seed: int) -> None:
    """A device that only does what install, engine and boot loader do is never without a slot to boot."""
    rng = random.Random(seed)
    control, counter = FACTORY, 1
    for _ in range(60):
        before = control
        counter += 1
        control = _act(control, rng, counter)
        assert control.floor >= before.floor and control.fallback_floor >= before.fallback_floor
        assert any(not boot.unfit(control, name) for name in SLOT_NAMES)
        assert len(control.failed) <= boot.FAILED_IMAGES_MAX


def _act(control: BootControl, rng: random.Random, counter: int) -> BootControl:
    """Do one thing that may be done now."""
    name: SlotName = rng.choice(SLOT_NAMES)
    target = target_of(rng.randbytes(4), counter, fallback_counter_min=rng.choice((0, counter // 2, counter)))
    beside_good = control.slot(boot.other_slot(name)).state is SlotState.GOOD
    choices: list[Callable[[], BootControl]] = [
        lambda: boot.erase(control, name, target),
        lambda: boot.seal(control, name, DIGEST),
        lambda: boot.count_try(control, name),
        lambda: boot.confirm(control, name),
    ]
    if not boot.unfit(control, name) or control.slot(name).state is SlotState.SEALED:
        choices.append(lambda: boot.activate(control, name))
    if beside_good and not boot.unfit(control, boot.other_slot(name)):
        choices.append(lambda: boot.fail(control, name, "why"))
    try:
        return rng.choice(choices)()
    except (IllegalTransition, Refused):
        return control
