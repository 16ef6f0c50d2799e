"""The power is cut after every operation of an update, torn, reordered, twice; the device must not notice."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import bsdiff4
import msgspec
import pytest

from tbox import durable
from tbox.durable import TwoCopies
from tbox.ota import boot, bootctl, install, supervisor
from tbox.ota.boot import BootControl, SlotState
from tbox.ota.bootctl import BootControlError, BootCtl
from tbox.ota.device import JOURNAL_STEM, load_journal
from tbox.ota.install import STEPS, Job, Step
from tbox.ota.model import Delta, Emergency, RollbackOrder, VerifiedTarget
from tbox.ota.slots import Slots
from tests.crash.flash import Flash, Image, every_cut
from tests.crash.ota_world import (
    DATA,
    FIRMWARE,
    Violation,
    World,
    drive,
    manifest_of,
    provisioned,
    sha256,
    target_of,
    verify,
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
    flash.log.clear()
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


@pytest.mark.parametrize("name", SCENARIOS)
def test_one_cut_anywhere_is_harmless(name: str) -> None:
    explore(SCENARIOS[name], twice=False)


# --- the way out of last resort ---------------------------------------------------------------------------

RESCUE = f"{DATA}/rescue"


def rescue(flash: Flash) -> None:
    """What a person does: the recovery command, unless the device boots by now."""
    ctl, slots = BootCtl(flash, FIRMWARE), Slots(flash, FIRMWARE)
    try:
        chosen = supervisor.choose(ctl, slots, verify, {})
    except BootControlError:
        chosen = boot.LastResort({})
    if isinstance(chosen, boot.LastResort):
        supervisor.restore(ctl, slots, verify, RESCUE, manifest_of(NEW_TARGET))


@pytest.mark.parametrize("lost", ["slots rotten", "boot control lost", "empty device"])
def test_a_recovery_that_is_cut_can_be_done_again(lost: str) -> None:
    start = provisioned(OLD, OLD_TARGET) | {RESCUE: NEW}
    if lost == "slots rotten":
        start[f"{FIRMWARE}/slot_a.img"] = bytes(len(OLD))
    elif lost == "boot control lost":
        start |= {path: b"rotten" for path in start if "bootctl" in path}
    else:
        start = {RESCUE: NEW}
    flash = Flash(start)
    rescue(flash)
    for _, image in every_cut(start, flash.log):
        again = Flash(image)
        rescue(again)
        ctl, slots = BootCtl(again, FIRMWARE), Slots(again, FIRMWARE)
        chosen = supervisor.choose(ctl, slots, verify, {})
        assert not isinstance(chosen, boot.LastResort) and chosen[1] == NEW_TARGET
        assert ctl.read().floor == 2


# --- planted bugs: the exploration must catch each --------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch, Scenario], Scenario]


def with_steps(scenario: Scenario, *steps: Step) -> Scenario:
    return replace(scenario, world=replace(scenario.world, steps=steps))


def with_boot_ctl(scenario: Scenario, boot_ctl: Callable[[Flash, str], BootCtl]) -> Scenario:
    return replace(scenario, world=replace(scenario.world, boot_ctl=boot_ctl))


def switch_before_fsync(_: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    return with_steps(scenario, *(step for step in STEPS if step is not install.sync_image))


def bytes_before_unbootable(_: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    first, second, *rest = STEPS
    return with_steps(scenario, second, first, *rest)


def tries_before_bytes(_: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    return with_steps(
        scenario,
        install.mark_unbootable,
        install.store_manifest,
        install.seal,
        install.write_image,
        install.sync_image,
        install.read_back,
    )


def tries_before_manifest(_: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    def seal(job: Job) -> None:
        job.manifest_sha256 = sha256(job.manifest)
        install.seal(job)

    return with_steps(scenario, *STEPS[:4], seal, install.store_manifest)


def manifest_without_fsync(_: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    def store(job: Job) -> None:
        job.slots.storage.write(job.slots.manifest_path(job.name), job.manifest)
        job.slots.storage.fsync_dir(job.slots.directory)
        job.manifest_sha256 = sha256(job.manifest)

    return with_steps(scenario, *STEPS[:4], store, install.seal)


def image_name_not_synced(_: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    def sync(job: Job) -> None:
        job.slots.storage.fsync(job.slots.image_path(job.name))

    def store(job: Job) -> None:  # with the manifest's name synced, the image's would be too
        job.slots.storage.fsync_dir = lambda path: None  # type: ignore[method-assign]
        install.store_manifest(job)

    return with_steps(scenario, *STEPS[:2], sync, STEPS[3], store, install.seal)


class OneCopy(BootCtl):
    """Writes the copy that holds the newest value."""

    def __init__(self, flash: Flash, directory: str) -> None:
        super().__init__(flash, directory)
        self._flash, self._path = flash, f"{directory}/bootctl.1"

    def commit(self, control: BootControl) -> BootControl:
        raw = durable.frame(99, bootctl.encode(control))
        self._flash.write(self._path, raw)
        self._flash.fsync(self._path)
        return control


class BothCopiesAtOnce(OneCopy):
    """Writes both copies and syncs them afterwards."""

    def commit(self, control: BootControl) -> BootControl:
        raw = durable.frame(99, bootctl.encode(control))
        paths = (f"{FIRMWARE}/bootctl.0", f"{FIRMWARE}/bootctl.1")
        for path in paths:
            self._flash.write(path, raw)
        for path in paths:
            self._flash.fsync(path)
        return control


class NoSync(BootCtl):
    """Takes the write for the deed."""

    def __init__(self, flash: Flash, directory: str) -> None:
        super().__init__(flash, directory)
        self._flash = flash

    def commit(self, control: BootControl) -> BootControl:
        sync, self._flash.fsync = self._flash.fsync, lambda path: None  # type: ignore[method-assign]
        super().commit(control)
        self._flash.fsync = sync  # type: ignore[method-assign]
        return control


def one_copy(_: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    return with_boot_ctl(scenario, OneCopy)


def both_copies_at_once(_: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    return with_boot_ctl(scenario, BothCopiesAtOnce)


def boot_control_without_fsync(_: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    return with_boot_ctl(scenario, NoSync)


def boot_control_without_crc(patch: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    def unframe(raw: bytes) -> tuple[int, bytes] | None:
        if len(raw) < 24:
            return None
        return int.from_bytes(raw[8:16], "little"), raw[20 : 20 + int.from_bytes(raw[16:20], "little")]

    patch.setattr(durable, "unframe", unframe)
    return scenario


def floor_before_good(patch: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    activate = boot.activate

    def early(control: BootControl, name: boot.SlotName) -> BootControl:
        after = activate(control, name)
        return msgspec.structs.replace(after, floor=after.slot(name).security_counter)

    patch.setattr(boot, "activate", early)
    return scenario


def no_try_counted(patch: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    patch.setattr(boot, "count_try", lambda control, name: control)
    return scenario


def good_at_first_start(patch: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    patch.setattr(boot, "count_try", boot.confirm)
    return scenario


def failed_image_forgotten(patch: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    fail = boot.fail

    def forget(control: BootControl, name: boot.SlotName, reason: str) -> BootControl:
        return msgspec.structs.replace(fail(control, name, reason), failed=())

    patch.setattr(boot, "fail", forget)
    return scenario


def fallback_given_up(patch: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    activate = boot.activate

    def alone(control: BootControl, name: boot.SlotName) -> BootControl:
        after = activate(control, name)
        gone = msgspec.structs.replace(after.slot(boot.other_slot(name)), priority=0, successful=False)
        return after.with_slots(boot.other_slot(name), gone)

    patch.setattr(boot, "activate", alone)
    return scenario


def cut_blamed_on_the_image(patch: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    """A slot that is half written at the next start is taken for a bad image."""
    erase = boot.erase

    def suspicious(control: BootControl, name: boot.SlotName, target: VerifiedTarget) -> BootControl:
        entry = control.slot(name)
        after = erase(control, name, target)
        if entry.state is SlotState.UNBOOTABLE and entry.sha256 == target.sha256:
            image = boot.FailedImage(sha256=entry.sha256, version=entry.version, reason="half written")
            return msgspec.structs.replace(after, failed=(image,))
        return after

    patch.setattr(boot, "erase", suspicious)
    return scenario


def torn_copy_kept(patch: pytest.MonkeyPatch, scenario: Scenario) -> Scenario:
    """What is left of a torn boot-control copy is written over instead of erased first."""

    def write(self: TwoCopies, payload: bytes) -> int:
        newest = self.read()
        sequence = newest[0] + 1 if newest else 1
        path = self._paths[sequence % 2]
        if newest is not None and self._read_one(path) == newest:
            path = self._paths[(sequence + 1) % 2]
        existed = self._storage.exists(path)
        self._storage.write(path, durable.frame(sequence, payload))
        self._storage.fsync(path)
        if not existed:
            self._storage.fsync_dir(self._dir)
        return sequence

    patch.setattr(TwoCopies, "write", write)
    return scenario


PLANTED: dict[str, tuple[Plant, str]] = {
    plant.__name__: (plant, scenario)
    for plant, scenario in (
        (switch_before_fsync, "full image"),
        (bytes_before_unbootable, "back into slot a"),
        (tries_before_bytes, "full image"),
        (tries_before_manifest, "full image"),
        (manifest_without_fsync, "full image"),
        (image_name_not_synced, "full image"),
        (one_copy, "full image"),
        (both_copies_at_once, "full image"),
        (boot_control_without_fsync, "full image"),
        (boot_control_without_crc, "full image"),
        (floor_before_good, "full image"),
        (no_try_counted, "crash loop"),
        (good_at_first_start, "crash loop"),
        (failed_image_forgotten, "unhealthy"),
        (fallback_given_up, "full image"),
        (cut_blamed_on_the_image, "full image"),
        (torn_copy_kept, "full image"),
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_the_exploration_catches_a_planted_bug(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, scenario = PLANTED[bug]
    planted = plant(monkeypatch, SCENARIOS[scenario])
    with pytest.raises(Violation) as caught:
        explore(planted, twice=bug == "torn_copy_kept")
    print(f"{bug}: {caught.value}")


def test_an_image_that_the_medium_changed_is_never_sealed() -> None:
    class Worn(Flash):
        def write(self, path: str, data: bytes, offset: int = 0, *, create: bool = True) -> None:
            if path.endswith("slot_b.img"):
                data = bytes([data[0] ^ 1]) + data[1:]
            super().write(path, data, offset, create=create)

    scenario = SCENARIOS["full image"]
    world = fresh(scenario)
    flash = Worn(scenario.start | world.staged)
    assert drive(world, flash)[1] == OLD
    control = BootCtl(flash, FIRMWARE).read()
    assert control.b.state is SlotState.UNBOOTABLE and world.starts == 0
    assert world.drafts[-1].body["event"] == "give-up"
    drive(world, flash)
    assert world.drafts[-1].body["reason"].startswith("given up after")
