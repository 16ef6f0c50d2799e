"""The power is cut after every operation of an update, torn, reordered, twice; the device must not notice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import bsdiff4
import pytest

from tbox.durable import TwoCopies
from tbox.ota import boot
from tbox.ota.boot import BootControl, SlotState
from tbox.ota.bootctl import BootControlError, BootCtl
from tbox.ota.device import JOURNAL_STEM, load_journal
from tbox.ota.model import Delta, Emergency, RollbackOrder
from tbox.ota.slots import Slots
from tests.crash.flash import Flash, Image, every_cut
from tests.crash.ota_world import (
    DATA,
    FIRMWARE,
    Violation,
    World,
    drive,
    provisioned,
    sha256,
    target_of,
)

RNG = random.Random(5)
OLD = RNG.randbytes(2300)
NEW = OLD[:700] + RNG.randbytes(90) + OLD[720:]
OLD_TARGET, NEW_TARGET = target_of(OLD, 1), target_of(NEW, 2)
PATCH = bsdiff4.diff(OLD, NEW)


@dataclass(frozen=True)
class Scenario:
    """One update from its start to the rest it must come to, whatever happens in between."""

    world: World
    start: Image
    ends_on: bytes
    floor: int
    failed: bool = False


def scenarios() -> dict[str, Scenario]:
    delta = Delta(base_sha256=sha256(OLD), name="p", length=len(PATCH), sha256=sha256(PATCH))
    start = provisioned(OLD, OLD_TARGET)
    by_delta = target_of(NEW, 2, deltas=(delta,))
    full = World(OLD, NEW, NEW_TARGET)
    good = _after(full, start)
    older = target_of(OLD, 1, emergency=Emergency(floor_max=2, reason="2.0 drains the battery"))
    order = RollbackOrder(leave_sha256=sha256(NEW), reason="2.0 crashes")
    third = NEW[:400] + RNG.randbytes(300)
    closing = target_of(third, 3, fallback_counter_min=2)
    return {
        "full image": Scenario(full, start, NEW, 2),
        "delta": Scenario(World(OLD, NEW, by_delta, download=PATCH), start, NEW, 2),
        "crash loop": Scenario(World(OLD, NEW, NEW_TARGET, "crash"), start, OLD, 1, failed=True),
        "unhealthy": Scenario(World(OLD, NEW, NEW_TARGET, "unhealthy"), start, OLD, 1, failed=True),
        "back into slot a": Scenario(World(NEW, third, closing), good, third, 3),
        "ordered back": Scenario(
            World(OLD, NEW, NEW_TARGET, orders=(order,)), good, OLD, 2, failed=True
        ),
        "emergency downgrade": Scenario(
            World(NEW, OLD, older), provisioned(NEW, NEW_TARGET), OLD, 2
        ),
    }  # fmt: skip


def _after(world: World, start: Image) -> Image:
    flash = Flash(start | world.staged)
    drive(world, flash)
    return {path: bytes(data) for path, data in flash.files.items()}


def fresh(scenario: Scenario) -> World:
    return replace(scenario.world, starts=0, drafts=[], commits=[])


def started(scenario: Scenario) -> Flash:
    return Flash(scenario.start | scenario.world.staged)


# --- what must hold in every state ------------------------------------------------------------------------


def read_control(world: World, image: Image) -> BootControl:
    try:
        return world.boot_ctl(Flash(image), FIRMWARE).read()
    except BootControlError as error:
        raise Violation(f"boot control is lost: {error}") from None


def check_medium(scenario: Scenario, image: Image, allowed: list[BootControl]) -> None:
    """Hold what boot control promises against what stands on the medium."""
    control = read_control(scenario.world, image)
    if control not in allowed:
        raise Violation("boot control is neither the last one written nor the next")
    slots = Slots(Flash(image), FIRMWARE)
    for name in boot.SLOT_NAMES:
        entry = control.slot(name)
        if entry.state in (SlotState.EMPTY, SlotState.UNBOOTABLE):
            continue
        if slots.digest(name, entry.length) != entry.sha256:
            raise Violation(f"slot {name} is {entry.state.value}, and its bytes are not what was promised")
        if slots.manifest(name, entry.manifest_sha256) is None:
            raise Violation(f"slot {name} is {entry.state.value} without its signed metadata")
    good = [control.slot(name) for name in boot.SLOT_NAMES if control.slot(name).state is SlotState.GOOD]
    if not good:
        raise Violation("no good slot is left to fall back on")
    proved = [entry.security_counter for entry in good]
    if control.floor > max([*proved, scenario.floor if scenario.failed else 0]):
        raise Violation("the floor rose before the image was good")
    if all(boot.unfit(control, name) for name in boot.SLOT_NAMES):
        raise Violation("the floor forbids every slot")
    if not scenario.failed and control.failed:
        raise Violation(f"a power cut was blamed on the image: {control.failed[0].reason}")


def check_rest(scenario: Scenario, flash: Flash, running: bytes, world: World) -> None:
    """Hold the end against the end that this scenario must come to."""
    control = world.boot_ctl(flash, FIRMWARE).read()
    if running != scenario.ends_on:
        raise Violation(f"rests on the wrong image: {control}")
    if control.floor != scenario.floor:
        raise Violation(f"rests with floor {control.floor}, and {scenario.floor} was due")
    if bool(control.failure(world.target.sha256)) != scenario.failed:
        raise Violation("what is remembered of the image is wrong")
    if world.starts > boot.TRIES and world.behaviour == "crash":
        raise Violation(f"a crashing image was started {world.starts} times")
    if drive(replace(world, starts=0, drafts=[], commits=[]), flash)[1] != running or flash.log:
        raise Violation(f"the next start is not quiet: {flash.log[:3]}")


def allowed_controls(
    start: BootControl, commits: list[tuple[int, BootControl]], done: int
) -> list[BootControl]:
    """Return what boot control may read after `done` operations: the last finished write, or the next."""
    before = [start, *(control for at, control in commits if at <= done)]
    after = [control for at, control in commits if at > done]
    return [before[-1], *after[:1]]


# --- the exploration ----------------------------------------------------------------------------------------

Key = tuple[tuple[str, bytes], ...]


def explore(scenario: Scenario, *, twice: bool = True) -> tuple[int, int]:
    """Cut after every operation of the update and recover; if `twice`, cut every operation of that too.

    Every state is held against what must always be true, and recovered from to the end without a further
    cut. Returns the numbers of different states after one cut and after two. Raises Violation.
    """
    seen: set[Key] = set()
    once = list(new_states(scenario, scenario.start | scenario.world.staged, seen))
    after_two = 0
    for image in once:
        if not twice:
            run_to_rest(scenario, image)
            continue
        for deeper in new_states(scenario, image, seen):
            run_to_rest(scenario, deeper)
            after_two += 1
    return len(once), after_two


def run_to_rest(scenario: Scenario, image: Image) -> tuple[World, Flash]:
    """Run the device from this state to its end, and hold that against the end it must come to."""
    world, flash = fresh(scenario), Flash(image)
    _, running = drive(world, flash)
    check_rest(scenario, Flash({path: bytes(data) for path, data in flash.files.items()}), running, world)
    return world, flash


def new_states(scenario: Scenario, image: Image, seen: set[Key]) -> Iterator[Image]:
    """Run the device from this state to its end; yield each new state that a cut on the way can leave."""
    first = read_control(scenario.world, image)
    world, flash = run_to_rest(scenario, image)
    log, commits = flash.log, list(world.commits)
    for done, state in every_cut(image, log):
        check_medium(scenario, state, allowed_controls(first, commits, done))
        load_journal(TwoCopies(Flash(state), DATA, JOURNAL_STEM))
        key = tuple(sorted(state.items()))
        if key not in seen:
            seen.add(key)
            yield state


SCENARIOS = scenarios()


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_no_cut_and_no_second_cut_leave_anything_but_old_or_new(name: str) -> None:
    once, twice = explore(SCENARIOS[name])
    print(f"{name}: {once} states after one cut, {twice} more after two")
    assert once >= 10 and twice >= once


@pytest.mark.parametrize("name", SCENARIOS)
def test_each_update_comes_to_the_rest_it_should(name: str) -> None:
    _, flash = run_to_rest(SCENARIOS[name], started(SCENARIOS[name]).start)
    assert isinstance(BootCtl(flash, FIRMWARE).read(), BootControl)
