"""What no agent heard: from a bus's last frame of one start to its first of a later one. Stops nothing.

`resumed` is the core. `FrameGaps` keeps when each bus was last heard, in two copies `frames.0`, `frames.1`
that outlive the process: what is lost with them is told as unknown, never as no gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import structlog

from tbox.clock import boot_id
from tbox.durable import DurableError, Storage, TwoCopies
from tbox.model import NS_PER_S, Now, TimeQuality

log = structlog.get_logger()

STEM = "frames"

# By bus: monotonic ns of the first and the last frame of this start, None before the first.
Spans = Mapping[str, tuple[int, int] | None]


class LastFrame(msgspec.Struct, frozen=True, kw_only=True):
    """The newest frame known of a bus.

    boot_id: the machine's boot whose monotonic clock mono_ns is of, "" where it cannot be told.
    final: noted when its start stopped; otherwise frames may have come after it.
    """

    start: int
    boot_id: str
    mono_ns: int
    wall_ns: int | None
    quality: TimeQuality
    final: bool


def resumed(last: LastFrame | None, boot_id: str, first_ns: int, now: Now) -> dict[str, Any]:
    """Return what is told of the gap that the frame at first_ns, monotonic, has ended.

    The monotonic clock runs on through a restart of the process, but not of the machine; there the wall
    clocks of both starts must be vouched for. gap_s None: unknown. upper_bound: the gap may be shorter.
    """
    if last is None:
        return {"since": None, "gap_s": None, "clock": None, "upper_bound": False}
    gap_ns, clock = None, None
    if boot_id and boot_id == last.boot_id:
        gap_ns, clock = first_ns - last.mono_ns, "monotonic"
    elif min(last.quality, now.quality) >= TimeQuality.NTP:
        wall_ns = _wall_ns(first_ns, now)
        if last.wall_ns is not None and wall_ns is not None:
            gap_ns, clock = wall_ns - last.wall_ns, "wall"
    if gap_ns is None or gap_ns < 0:  # a clock that ran backwards measures nothing
        return {"since": last.start, "gap_s": None, "clock": None, "upper_bound": False}
    gap_s = round(gap_ns / NS_PER_S, 3)
    return {"since": last.start, "gap_s": gap_s, "clock": clock, "upper_bound": not last.final}


def last_frames(spans: Spans, now: Now) -> dict[str, dict[str, int | None] | None]:
    """Return what a stop record says of when each bus was last heard in this start; None: never."""
    return {
        bus: None if span is None else {"mono_ns": span[1], "wall_ns": _wall_ns(span[1], now)}
        for bus, span in spans.items()
    }


def _wall_ns(mono_ns: int, now: Now) -> int | None:
    return None if now.wall_ns is None else now.wall_ns - now.mono_ns + mono_ns


class FrameGaps:
    """Notes last frames and tells of gaps. Used by one thread; a medium that refuses is only logged."""

    def __init__(self, storage: Storage, directory: str, start: int) -> None:
        self._copies = TwoCopies(storage, directory, STEM)
        self._start = start
        self._boot_id = _boot_id(storage)
        self._before = self._read()
        self._heard: set[str] = set()
        self._unmeasured: dict[str, int] = {}  # first frames whose gap no clock could tell so far

    def tell(self, spans: Spans, now: Now) -> list[dict[str, Any]]:
        """Return the body of a record for each bus that was heard for the first time in this start, and
        again for one whose gap was unknown until the wall clock was vouched for."""
        new = {bus: span[0] for bus, span in spans.items() if span is not None and bus not in self._heard}
        if new:
            self._heard |= new.keys()
            # At once: a start that is killed now must not let the next one measure from before it.
            self.note(spans, now)
        if self._start == 1:
            return []  # the device's very first frames resume nothing
        told = {bus: self._resumed(bus, first_ns, now) for bus, first_ns in new.items()}
        if now.quality >= TimeQuality.NTP:
            again = {bus: self._resumed(bus, first_ns, now) for bus, first_ns in self._unmeasured.items()}
            told |= {bus: body for bus, body in again.items() if body["gap_s"] is not None}
            self._unmeasured.clear()
        else:
            self._unmeasured |= {bus: new[bus] for bus, body in told.items() if body["gap_s"] is None}
        return [{"event": "frames_resumed", "bus": bus} | body for bus, body in told.items()]

    def _resumed(self, bus: str, first_ns: int, now: Now) -> dict[str, Any]:
        return resumed(self._before.get(bus), self._boot_id, first_ns, now)

    def note(self, spans: Spans, now: Now, *, final: bool = False) -> None:
        """Note when each bus was last heard; one not heard in this start keeps what was known of it."""
        known = {bus: self._last(bus, span, now, final) for bus, span in spans.items()}
        payload = msgspec.msgpack.encode({bus: last for bus, last in known.items() if last is not None})
        try:
            self._copies.write(payload)
        except (OSError, DurableError) as error:
            log.warning("last_frames_not_noted", why=str(error))

    def _last(self, bus: str, span: tuple[int, int] | None, now: Now, final: bool) -> LastFrame | None:
        if span is None:
            return self._before.get(bus)
        return LastFrame(
            start=self._start, boot_id=self._boot_id, mono_ns=span[1],
            wall_ns=_wall_ns(span[1], now), quality=now.quality, final=final,
        )  # fmt: skip

    def _read(self) -> dict[str, LastFrame]:
        try:
            newest = self._copies.read()
            return msgspec.msgpack.decode(newest[1], type=dict[str, LastFrame]) if newest else {}
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("last_frames_unreadable", why=str(error))
            return {}


def _boot_id(storage: Storage) -> str:
    try:
        return boot_id(storage)
    except OSError:
        return ""
