"""Start number, monotonic and wall clock, and how far the wall clock is believed. Never orders by wall.

`TimeKeeper` is a core: it is shown the raw clocks and answers with `Now`. `SystemClock` is the thin shell
that reads them, `kernel_quality` asks whether somebody keeps the wall clock. `next_start` raises the number
that makes record ids unique for ever.
"""

from __future__ import annotations

import ctypes
import datetime as dt
import time
from collections.abc import Callable
from dataclasses import dataclass

from tbox.durable import Storage, TwoCopies
from tbox.errors import TboxError
from tbox.model import NS_PER_S, Now, TimeQuality

# No wall clock before this can be right: the code did not exist. Catches 1970 and 2000 (FACTS, Time).
WALL_FLOOR_NS = int(dt.datetime(2025, 1, 1, tzinfo=dt.UTC).timestamp()) * NS_PER_S
# Nor one this far ahead: a battery-backed clock with flipped bits says 2100 (PITFALLS, Link and time).
WALL_CEILING_NS = int(dt.datetime(2080, 1, 1, tzinfo=dt.UTC).timestamp()) * NS_PER_S
# Wall and monotonic time may drift apart by slewing; more than this between two looks is a jump.
WALL_JUMP_NS_MIN = NS_PER_S // 2

BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"

# A start number that was lost jumps this far above any that was seen, past starts that left no trace.
START_JUMP = 1 << 16
START_MAX = (1 << 31) - 1  # ids stay within SQLite's signed 64 bit


class StartNumberError(TboxError):
    """The start number could not be raised, so no record could get a unique id."""


@dataclass(frozen=True, slots=True)
class Offset:
    """The wall clock was set or jumped: samples of this start can be re-dated with it.

    step_ns = wall_ns − (what the wall clock was expected to say, or the monotonic time if it was unset).
    """

    mono_ns: int
    wall_ns: int
    step_ns: int
    quality: TimeQuality
    first: bool


class TimeKeeper:
    """Judges the wall clock against the monotonic one. A core: time comes in, nothing is read."""

    def __init__(self) -> None:
        self._offset_ns: int | None = None  # wall − mono, as last believed
        self._quality = TimeQuality.UNSET

    def look(self, mono_ns: int, wall_ns: int, quality: TimeQuality) -> tuple[Now, Offset | None]:
        """Return this instant, and an Offset when the wall clock was first set, jumped or gained quality.

        An implausible wall clock is not believed: the instant then carries the last believed offset, or None.
        """
        if quality == TimeQuality.UNSET or not WALL_FLOOR_NS <= wall_ns < WALL_CEILING_NS:
            if self._offset_ns is None:
                return Now(mono_ns), None
            return Now(mono_ns, mono_ns + self._offset_ns, self._quality), None
        now = Now(mono_ns, wall_ns, quality)
        offset = wall_ns - mono_ns
        first = self._offset_ns is None
        step = offset - (self._offset_ns or 0)
        changed = first or abs(step) >= WALL_JUMP_NS_MIN or quality > self._quality
        self._offset_ns, self._quality = offset, quality
        return now, Offset(mono_ns, wall_ns, step, quality, first) if changed else None


class Timex(ctypes.Structure):
    """The head of the kernel's `struct timex` (adjtimex(2)); what follows is not looked at."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("rest", ctypes.c_char * 512),
    )


# The kernel lets an unset clock's error stand at 16 s, and a set one's grow by 0.5 ms/s until it is there;
# below that somebody disciplines it. systemd judges by the same figure, and unlike the flag STA_UNSYNC it
# also holds for a chrony that leaves the battery-backed clock alone.
MAXERROR_US_UNSET = 16_000_000

Adjtimex = Callable[[ctypes.Structure], int]


def _libc_adjtimex(timex: ctypes.Structure) -> int:
    answer: int = ctypes.CDLL(None).adjtimex(ctypes.byref(timex))
    return answer


def kernel_quality(adjtimex: Adjtimex = _libc_adjtimex) -> TimeQuality:
    """Return NTP while a time daemon keeps the kernel's clock, RTC when none does or it cannot be asked."""
    timex = Timex()  # modes 0: only read
    try:
        asked = adjtimex(timex) >= 0
    except (OSError, AttributeError):  # a system without the call
        asked = False
    return TimeQuality.NTP if asked and timex.maxerror < MAXERROR_US_UNSET else TimeQuality.RTC


class SystemClock:
    """The machine's own clocks, and how far the wall clock is believed: asked anew at every look.

    One thread looks at the wall clock now and then; `now()`, from any thread, adds the offset last believed
    to the monotonic clock, so that a jump shows in every thread at once and only after it was told.
    """

    def __init__(
        self,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        wall_ns: Callable[[], int] = time.time_ns,
        quality: Callable[[], TimeQuality] = kernel_quality,
    ) -> None:
        self._monotonic_ns, self._wall_ns, self._quality = monotonic_ns, wall_ns, quality
        self._keeper = TimeKeeper()
        self._last = Now(0)

    def mono_ns(self) -> int:
        return self._monotonic_ns()

    def now(self) -> Now:
        last, mono_ns = self._last, self._monotonic_ns()
        if last.wall_ns is None:
            return Now(mono_ns)
        return Now(mono_ns, last.wall_ns + mono_ns - last.mono_ns, last.quality)

    def look(self) -> tuple[Now, Offset | None]:
        """Return this instant and, when the wall clock was set or jumped since the last look, by how much."""
        self._last, offset = self._keeper.look(self._monotonic_ns(), self._wall_ns(), self._quality())
        return self._last, offset


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in monotonic time, instead of scattered time-outs."""

    at_ns: int

    @classmethod
    def after(cls, mono_ns: int, delay_s: float) -> Deadline:
        return cls(mono_ns + int(delay_s * NS_PER_S))

    def passed(self, mono_ns: int) -> bool:
        return mono_ns >= self.at_ns

    def left_s(self, mono_ns: int) -> float:
        return max(0.0, (self.at_ns - mono_ns) / NS_PER_S)


def boot_id(storage: Storage, path: str = BOOT_ID_FILE) -> str:
    """Return the kernel's name for this boot: one life of the monotonic clock. Raises OSError."""
    return storage.read(path).decode("ascii", "replace").strip()


def next_start(storage: Storage, directory: str, *, seen: int) -> int:
    """Raise the start number and return it, durable in two copies `start.0`, `start.1` before this returns.

    seen: the highest start number found elsewhere (the spool), 0 for none. When both copies are gone or
    damaged though something ran here before, the number jumps above any that was seen.
    Raises StartNumberError when the medium refuses.
    """
    copies = TwoCopies(storage, directory, "start")
    try:
        newest = copies.read()
        last = int.from_bytes(newest[1], "big") if newest else 0
        lost = seen > last or (newest is None and copies.damaged())
        start = max(last, seen) + (START_JUMP if lost else 1)
        if start > START_MAX:
            raise StartNumberError(f"start number {start} is out of range", where=f"{directory}/start.0")
        copies.write(start.to_bytes(8, "big"))
    except OSError as error:
        raise StartNumberError(
            f"cannot raise the start number: {error.strerror or error}",
            where=directory,
            mend="make the directory writable and leave it a few KiB of room",
        ) from error
    return start
