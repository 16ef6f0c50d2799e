"""The boot loader of the simulator and supervisor on a Pi; it lives outside the slots and never writes one.

`choose` picks what may start and is the secure boot: signed metadata, digest from the medium, counters.
`Supervisor` unpacks, starts, watches and falls back. When both slots are bad it says so and ends; no loop.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import structlog
from msgspec import Meta

from tbox.errors import Refused, TboxError
from tbox.ota import boot, image, install
from tbox.ota.boot import BootControl, GiveUp, LastResort, SlotName, SlotState, Start
from tbox.ota.bootctl import BootControlError, BootCtl
from tbox.ota.model import VerifiedTarget, VerifyManifest
from tbox.ota.slots import Slots

log = structlog.get_logger()

RESTART_EXIT = 85  # the agent's exit code for "start again from what boot control says now"
NOTIFY_BYTES_MAX = 4096


def inspect(
    control: BootControl, slots: Slots, name: SlotName, verify: VerifyManifest
) -> VerifiedTarget | str:
    """Return the verified target of a slot, or why it may not start. Raises OSError."""
    entry = control.slot(name)
    manifest = slots.manifest(name, entry.manifest_sha256)
    if manifest is None:
        return "its signed metadata is missing or damaged"
    try:
        target = verify(manifest)
    except Refused as error:
        return f"its signed metadata does not hold: {error}"
    problem = boot.mismatch(control, name, target)
    if problem:
        return problem
    if slots.digest(name, target.length) != target.sha256:
        return "the image on the medium is not the signed one"
    return target


def choose(
    ctl: BootCtl, slots: Slots, verify: VerifyManifest, rejected: dict[SlotName, str]
) -> tuple[SlotName, VerifiedTarget] | LastResort:
    """Return the slot to start, its try already counted; or why nothing may start.

    rejected: slots not to start this time, with the reason; those found bad are added. Raises
    BootControlError, OSError when boot control cannot be read or written.
    """
    while True:
        control = ctl.read()
        match boot.plan(control, rejected):
            case LastResort() as nothing:
                return nothing
            case GiveUp(slot, reason):
                log.warning("slot_given_up", slot=slot, reason=reason)
                ctl.commit(boot.fail(control, slot, reason))
            case Start(slot, trial):
                try:
                    found = inspect(control, slots, slot, verify)
                except OSError as error:
                    # Not the image's fault for certain: it costs a try, so that it cannot go on for ever.
                    found = f"cannot be read: {error.strerror or error}"
                    rejected[slot] = found
                    if trial:
                        ctl.commit(boot.count_try(control, slot))
                    continue
                if isinstance(found, VerifiedTarget):
                    if trial:
                        ctl.commit(boot.count_try(control, slot))
                    return slot, found
                log.warning("slot_rejected", slot=slot, reason=found)
                if trial:
                    ctl.commit(boot.fail(control, slot, found))
                else:
                    rejected[slot] = found


# --- starting and watching -----------------------------------------------------------------------------

Seconds = Annotated[float, Meta(gt=0, le=3600)]


class BootSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long things may take. An agent says READY=1 once and WATCHDOG=1 ever after, as to systemd."""

    ready_s: Seconds = 60.0
    watchdog_s: Seconds = 60.0
    stop_s: Seconds = 30.0  # from SIGTERM to SIGKILL
    abort_s: Seconds = 2.0  # from SIGABRT to SIGKILL, for one that hangs
    trial_pause_s: Seconds = 1.0  # between the tries of an image on trial
    crash_pause_s: Seconds = 1.0  # doubles with each crash in a row of a good image
    quick_crash_s: Seconds = 60.0  # a crash later than this after the start does not count as in a row
    quick_crashes_max: Annotated[int, Meta(ge=1, le=20)] = 5


class End(Enum):
    """How a run of the agent ended."""

    STOPPED = "stopped"  # we were told to stop
    RESTART = "restart"
    FINISHED = "finished"  # it ended by itself, without complaint
    CRASHED = "crashed"


class Ended(NamedTuple):
    end: End
    why: str
    lasted_s: float


# What the new process runs: dies with its supervisor, then calls the image's entry. -P keeps the working
# directory off the path, so that nothing but the image is imported under its names.
_BOOTSTRAP = """
import ctypes, importlib, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the boot loader is gone")
module, _, name = sys.argv[2].partition(":")
sys.argv = ["tbox", *sys.argv[3:]]
sys.exit(getattr(importlib.import_module(module), name)())
"""


class Supervisor:
    """Boots, watches, falls back; ends when it is told to, when the agent has finished, or in last resort."""

    def __init__(
        self,
        ctl: BootCtl,
        slots: Slots,
        verify: VerifyManifest,
        run_directory: Path,
        arguments: Sequence[str],
        settings: BootSettings | None = None,
    ) -> None:
        self._ctl, self._slots, self._verify = ctl, slots, verify
        self._run = run_directory
        self._arguments = list(arguments)
        self._settings = settings or BootSettings()
        self._stop = False
        self._rejected: dict[SlotName, str] = {}
        self._quick_crashes: dict[SlotName, int] = dict.fromkeys(boot.SLOT_NAMES, 0)

    def stop(self) -> None:
        """Stop the agent in order and return; from a signal handler."""
        self._stop = True

    def run(self) -> LastResort | None:
        """Boot again and again until the end. Returns why nothing may boot, None at an orderly end.

        Raises BootControlError, OSError when boot control cannot be read or written.
        """
        while not self._stop:
            chosen = choose(self._ctl, self._slots, self._verify, self._rejected)
            if isinstance(chosen, LastResort):
                log.error("last_resort", **{f"slot_{name}": why for name, why in chosen.reasons.items()})
                return chosen
            slot, target = chosen
            trial = self._ctl.read().slot(slot).state is not SlotState.GOOD
            ended = self._start(slot, target)
            log.info("agent_ended", slot=slot, version=target.version, how=ended.end.value, why=ended.why)
            if ended.end is End.STOPPED or (ended.end is End.FINISHED and not trial):
                return None
            if ended.end is End.RESTART:
                self._rejected.clear()  # it may have put another image into a slot we gave up
            else:
                self._after_crash(slot, trial, ended)
        return None

    def _after_crash(self, slot: SlotName, trial: bool, ended: Ended) -> None:
        """Wait before the next start; a good image that keeps crashing is left for the other slot."""
        if trial:
            self._pause(self._settings.trial_pause_s)
            return
        quick = ended.lasted_s < self._settings.quick_crash_s
        self._quick_crashes[slot] = self._quick_crashes[slot] + 1 if quick else 1
        if self._quick_crashes[slot] >= self._settings.quick_crashes_max:
            self._rejected[slot] = f"crashed {self._quick_crashes[slot]} times in a row: {ended.why}"
            return
        self._pause(self._settings.crash_pause_s * 2 ** (self._quick_crashes[slot] - 1))

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stop and time.monotonic() < until:
            time.sleep(min(0.1, seconds))

    def _start(self, slot: SlotName, target: VerifiedTarget) -> Ended:
        tree = self._run / f"slot_{slot}"
        shutil.rmtree(tree, ignore_errors=True)
        try:
            header = image.unpack(
                lambda offset, length: self._slots.read_at(slot, offset, length),
                target.length,
                tree,
                target.sha256,
            )
        except (Refused, OSError) as error:
            return Ended(End.CRASHED, f"cannot be unpacked: {error}", 0.0)
        log.info("agent_starts", slot=slot, version=target.version)
        with _notify_socket(self._run / "notify") as notify:
            begin = time.monotonic()
            process = subprocess.Popen(self._command(header.entry), env=self._environment(slot, tree))
            end, why = self._watch(process, notify)
        return Ended(end, why, time.monotonic() - begin)

    def _command(self, entry: str) -> list[str]:
        return [sys.executable, "-P", "-c", _BOOTSTRAP, str(os.getpid()), entry, *self._arguments]

    def _environment(self, slot: SlotName, tree: Path) -> dict[str, str]:
        other = boot.other_slot(slot)
        return {
            **os.environ,
            "PYTHONPATH": str(tree),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TBOX_SLOT": slot,
            "TBOX_SLOTS": str(Path(self._slots.directory).resolve()),
            "TBOX_BOOT_NOTE": f"slot {other}: {self._rejected[other]}" if other in self._rejected else "",
            "NOTIFY_SOCKET": str(self._run / "notify"),
            "WATCHDOG_USEC": str(int(self._settings.watchdog_s * 1e6)),
        }

    def _watch(self, process: subprocess.Popen[bytes], notify: socket.socket) -> tuple[End, str]:
        """Wait until the agent ends; end it when it stays silent too long or we are told to stop."""
        deadline, ready = time.monotonic() + self._settings.ready_s, False
        while process.poll() is None:
            if self._stop:
                _end(process, signal.SIGTERM, self._settings.stop_s)
                return End.STOPPED, ""
            said = _hear(notify)
            if b"READY=1" in said or b"WATCHDOG=1" in said:
                deadline, ready = time.monotonic() + self._settings.watchdog_s, True
            if time.monotonic() >= deadline:
                _end(process, signal.SIGABRT, self._settings.abort_s)
                return (
                    End.CRASHED,
                    "stopped feeding the watchdog" if ready else "did not become ready in time",
                )
        code = process.returncode
        if code == RESTART_EXIT:
            return End.RESTART, ""
        if code == 0:
            return End.FINISHED, "ended without a verdict"
        return End.CRASHED, f"exit code {code}" if code > 0 else f"killed by signal {-code}"


def _end(process: subprocess.Popen[bytes], sign: signal.Signals, patience_s: float) -> None:
    process.send_signal(sign)
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _notify_socket(path: Path) -> Iterator[socket.socket]:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(0.1)
        yield sock
    path.unlink(missing_ok=True)


def _hear(notify: socket.socket) -> bytes:
    try:
        return notify.recv(NOTIFY_BYTES_MAX)
    except TimeoutError:
        return b""


def prepare_run_directory(path: Path) -> Path:
    """Make the directory the image is unpacked to, on a memory disk; nobody else may own or enter it."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        facts = path.lstat()
    except OSError as error:
        raise TboxError(f"cannot be made: {error.strerror}", where=str(path), mend="name --run-dir") from None
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise TboxError("is not ours alone", where=str(path), mend="remove it or name another --run-dir")
    return path


# --- the factory and the way out of last resort ----------------------------------------------------------


def restore(
    ctl: BootCtl, slots: Slots, verify: VerifyManifest, image_path: str, manifest: bytes
) -> tuple[SlotName, VerifiedTarget]:
    """Bring a signed image into a slot that does not boot and make it good, by hand: provision or recover.

    Floors that can still be read are kept and held; when boot control is lost they come back from the
    signed metadata in the slots. Raises Refused when the image is below them or both slots are fit.
    """
    target = verify(manifest)
    try:
        control = ctl.read()
    except BootControlError:
        control = BootControl(floor=_floor_of_slots(slots, verify))
    name = _unfit_slot(control, slots, verify)
    if target.security_counter < control.floor:
        raise Refused(
            f"security counter {target.security_counter} is below the floor {control.floor}",
            where=target.name,
            mend="recover with this release or a later one",
        )

    def vacate(_: install.Job) -> None:
        ctl.commit(boot.vacate(control, name, target))

    def make_good(job: install.Job) -> None:
        sealed = boot.seal(ctl.read(), name, job.manifest_sha256)
        ctl.commit(boot.confirm(boot.activate(sealed, name), name))

    chunks = _file_chunks(slots, image_path)
    job = install.Job(ctl, slots, name, target, manifest, chunks)
    install.install(job, (vacate, *install.STEPS[1:-1], make_good))
    return name, target


def _file_chunks(slots: Slots, path: str) -> Iterator[bytes]:
    offset = 0
    while block := slots.storage.read_at(path, offset, install.WRITE_BLOCK_BYTES):
        offset += len(block)
        yield block


def _unfit_slot(control: BootControl, slots: Slots, verify: VerifyManifest) -> SlotName:
    for name in boot.SLOT_NAMES:
        if boot.unfit(control, name) or not isinstance(inspect(control, slots, name, verify), VerifiedTarget):
            return name
    raise Refused("both slots are fit to boot", where=slots.directory, mend="run `tbox boot`")


def _floor_of_slots(slots: Slots, verify: VerifyManifest) -> int:
    """Return the highest security counter that signed metadata in the slots speaks of, 0 for none."""
    counters = [0]
    for name in boot.SLOT_NAMES:
        with contextlib.suppress(OSError, Refused):
            counters.append(verify(slots.storage.read(slots.manifest_path(name))).security_counter)
    return max(counters)
