"""The ECUs: the BMS's own rules and the sensors and frames of both ECUs. They read the physics, with noise.

Nothing here is wall time or IO: every function is told the time. A `Stream` is one message (or a set that
shares a layout) and its schedule; it turns the recorded history of the physics into frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from tbox.model import NS_PER_S, CanSend
from tbox.sim.faults import Fault
from tbox.sim.layout import COUNTER_VALUES, ISOLATION_REQUEST, ISOLATION_REQUEST_ID
from tbox.sim.packing import Floats, Ints, Packer, crc8

Flags = npt.NDArray[np.bool_]

# --- the BMS's own rules --------------------------------------------------------------------------------


class BmsState(IntEnum):
    SLEEP = 0
    PRECHARGE = 1
    OPERATE = 2
    DERATE = 3
    ISOLATED = 4


class BmsEvent(IntEnum):
    KEY_ON = 0
    KEY_OFF = 1
    PRECHARGED = 2
    REQUEST = 3
    WITHDRAWN = 4
    CURRENT_LOW = 5
    DERATE_TIMEOUT = 6
    REJOIN = 7


# From (state, event) to state; what is not here is a programmer's error.
TRANSITIONS: dict[tuple[BmsState, BmsEvent], BmsState] = {
    (BmsState.SLEEP, BmsEvent.KEY_ON): BmsState.PRECHARGE,
    (BmsState.SLEEP, BmsEvent.REQUEST): BmsState.ISOLATED,
    (BmsState.PRECHARGE, BmsEvent.PRECHARGED): BmsState.OPERATE,
    (BmsState.PRECHARGE, BmsEvent.KEY_OFF): BmsState.SLEEP,
    (BmsState.PRECHARGE, BmsEvent.REQUEST): BmsState.ISOLATED,
    (BmsState.OPERATE, BmsEvent.KEY_OFF): BmsState.SLEEP,
    (BmsState.OPERATE, BmsEvent.REQUEST): BmsState.DERATE,
    (BmsState.DERATE, BmsEvent.CURRENT_LOW): BmsState.ISOLATED,
    (BmsState.DERATE, BmsEvent.DERATE_TIMEOUT): BmsState.ISOLATED,
    (BmsState.DERATE, BmsEvent.WITHDRAWN): BmsState.OPERATE,
    (BmsState.ISOLATED, BmsEvent.REJOIN): BmsState.PRECHARGE,
    (BmsState.ISOLATED, BmsEvent.KEY_OFF): BmsState.SLEEP,
}

PRECHARGE_S = 0.5
DERATE_RAMP_S = 1.0  # current limits fall to 0 over this
DERATE_S_MAX = 3.0  # then the contactors open whatever flows (foxBMS waits 3 s, for the fuse)
BREAK_CURRENT_A = 10.0  # below this they may open at once
REJOIN_S = 3.0  # withdrawn and standing still for so long: the BMS closes again
COUNTER_STEP_MAX = 5  # a larger step in the request's counter is a loss too many
COUNTER_FORGET_S = 2.0  # after so long a silence any counter is a fresh start

CONTACTOR_OPEN, CONTACTOR_PRECHARGE, CONTACTOR_CLOSED, CONTACTOR_FAILED = 0, 1, 2, 3


def decode_request(frame: CanSend) -> tuple[int, int, int] | None:
    """Return (counter, request, index) of a sound isolation request, None for anything else."""
    data = frame.data
    if frame.can_id != ISOLATION_REQUEST_ID or len(data) != ISOLATION_REQUEST.length:
        return None
    if crc8(data[1:] + bytes([ISOLATION_REQUEST.data_id])) != data[0]:
        return None
    counter, request = data[1] & 0x0F, data[2]
    if counter >= COUNTER_VALUES or request > 1:
        return None
    return counter, request, int.from_bytes(data[4:6], "little")


class Bms:
    """Contactors, current limits, and the answer to the T-Box. A table and a few timers."""

    def __init__(self, *, stuck_closed: Sequence[Fault] = ()) -> None:
        self.state = BmsState.SLEEP
        self.ack = False
        self.ack_index = 0
        self.refused = 0
        self.accepted = 0
        self.opened_ns: list[int] = []  # each time the contactors opened on request
        self.limit_share = 0.0
        self._entered_ns = 0
        self._request = False
        self._withdrawn_ns = 0
        self._counter: int | None = None
        self._heard_ns = 0
        self._stuck_closed = tuple(stuck_closed)
        self._welded = False

    def receive(self, frame: CanSend, t_ns: int) -> None:
        """Hear a frame of the bus. A request with a wrong CRC or counter is refused and counted."""
        if frame.can_id != ISOLATION_REQUEST_ID:
            return
        request = decode_request(frame)
        if request is None:
            self.refused += 1
            return
        counter, wanted, index = request
        fresh = self._counter is None or t_ns - self._heard_ns > COUNTER_FORGET_S * NS_PER_S
        step = 1 if fresh or self._counter is None else (counter - self._counter) % COUNTER_VALUES
        self._counter, self._heard_ns = counter, t_ns
        if not 1 <= step <= COUNTER_STEP_MAX:
            self.refused += 1
            return
        self.accepted += 1
        if wanted:
            self._request, self.ack, self.ack_index = True, True, index
        elif self._request:
            self._request, self.ack, self._withdrawn_ns = False, False, t_ns

    def control(self, t_ns: int, *, awake: bool, standing: bool, current_a: float) -> None:
        """Run the BMS's rules at t_ns. awake: high voltage is wanted. current_a: as measured now."""
        event = self._event(t_ns, awake=awake, standing=standing, current_a=current_a)
        if event is not None:
            before, self.state = self.state, TRANSITIONS[self.state, event]
            self._entered_ns = t_ns
            if self.state == BmsState.ISOLATED and before != BmsState.SLEEP:
                self.opened_ns.append(t_ns)
        self._welded = any(fault.active(t_ns) for fault in self._stuck_closed)
        age_s = (t_ns - self._entered_ns) / NS_PER_S
        if self.state == BmsState.OPERATE:
            self.limit_share = 1.0
        elif self.state == BmsState.DERATE:
            self.limit_share = max(0.0, 1.0 - age_s / DERATE_RAMP_S)
        else:
            self.limit_share = 0.0

    def _event(self, t_ns: int, *, awake: bool, standing: bool, current_a: float) -> BmsEvent | None:
        """Return what happened to the present state, None while nothing did."""
        age_s = (t_ns - self._entered_ns) / NS_PER_S
        state = self.state
        if state == BmsState.ISOLATED:
            if self._request:
                return None
            if not awake:
                return BmsEvent.KEY_OFF
            waited = t_ns - self._withdrawn_ns >= REJOIN_S * NS_PER_S
            return BmsEvent.REJOIN if waited and standing else None
        if state == BmsState.DERATE:
            if not self._request:
                return BmsEvent.WITHDRAWN
            if age_s >= DERATE_S_MAX:
                return BmsEvent.DERATE_TIMEOUT
            return BmsEvent.CURRENT_LOW if age_s > 0 and abs(current_a) < BREAK_CURRENT_A else None
        if self._request:
            return BmsEvent.REQUEST
        if state == BmsState.SLEEP:
            return BmsEvent.KEY_ON if awake else None
        if not awake:
            return BmsEvent.KEY_OFF
        return BmsEvent.PRECHARGED if state == BmsState.PRECHARGE and age_s >= PRECHARGE_S else None

    @property
    def command(self) -> int:
        return int(self.state in (BmsState.PRECHARGE, BmsState.OPERATE, BmsState.DERATE))

    @property
    def closed(self) -> bool:
        """Whether current can flow."""
        return self._welded or self.state in (BmsState.OPERATE, BmsState.DERATE)

    @property
    def contactor_state(self) -> int:
        if self._welded and not self.command:
            return CONTACTOR_FAILED
        if self.state == BmsState.PRECHARGE:
            return CONTACTOR_PRECHARGE
        return CONTACTOR_CLOSED if self.closed else CONTACTOR_OPEN


# --- sensors --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SensorKind:
    """sigma: noise. rail: what an open input reads. low, high: the converter's range. All in its unit.

    noticed_s: the BMS takes so long to see that an input is open.
    """

    key: str
    sigma: float
    rail: float
    low: float
    high: float
    noticed_s: float


class Sensors:
    """A bank of equal sensors: truth in, readings out; NaN where the BMS itself declares one unusable."""

    def __init__(self, kind: SensorKind, faults: Sequence[Fault], rng: np.random.Generator) -> None:
        self._kind = kind
        self._rng = rng
        own = (fault for fault in faults if fault.name.startswith("sensor-"))
        self._faults = tuple((fault, index) for fault in own if (index := fault.whole(kind.key)) >= 0)
        self._held: dict[Fault, float] = {}

    def read(self, t_ns: Ints, truth: Floats) -> Floats:
        """Return readings (scans, sensors) of truth of the same shape at times t_ns (scans,)."""
        kind = self._kind
        readings = truth + kind.sigma * self._rng.standard_normal(truth.shape)
        np.clip(readings, kind.low, kind.high, out=readings)
        for fault, index in self._faults:
            active = active_at(fault, t_ns)
            if not active.any():
                continue
            if fault.name == "sensor-stuck":
                first = float(readings[int(active.argmax()), index])
                readings[active, index] = self._held.setdefault(fault, first)
            else:
                noticed = t_ns >= fault.start_ns + round(kind.noticed_s * NS_PER_S)
                readings[active, index] = kind.rail
                readings[active & noticed, index] = math.nan
        return readings


# --- frames ---------------------------------------------------------------------------------------------


def active_at(fault: Fault, t_ns: Ints) -> Flags:
    """Return whether a fault is active at each of many times."""
    active: Flags = t_ns >= fault.start_ns
    return active if fault.end_ns is None else active & (t_ns < fault.end_ns)


# (scan times (scans,), history rows (scans,)) -> values (scans, frames a scan, signals)
Measure = Callable[[Ints, Ints], Floats]


class Stream:
    """One schedule: at every scan time, `per_scan` frames, spaced apart; values are measured once a scan."""

    def __init__(
        self, packers: Sequence[Packer], ids: Sequence[int], measure: Measure,
        *, period_ns: int, phase_ns: int, spacing_ns: int = 0,
    ) -> None:  # fmt: skip
        assert len(ids) in (1, len(packers)) or len(packers) == 1
        self._packers = tuple(packers)
        self._ids = np.array(ids, dtype=np.uint32)
        self._shared_id = len(ids) == 1 and len(packers) > 1
        self.per_scan = max(len(ids), len(packers))
        self.period_ns = period_ns
        self.phase_ns = phase_ns
        self._spacing_ns = min(spacing_ns, period_ns // self.per_scan)
        self._measure = measure
        self._sent = 0  # frames so far, in order over all scans
        self._values: Floats | None = None  # of the last scan measured, until all its frames are out
        self.has_sna = np.array([sig.sna is not None for sig in packers[0].signals])

    def due(self, t_ns: int) -> int:
        """How many frames are due up to and including t_ns."""
        if t_ns < self.phase_ns:
            return 0
        scans, rest = divmod(t_ns - self.phase_ns, self.period_ns)
        part = rest // self._spacing_ns + 1 if self._spacing_ns else self.per_scan
        return scans * self.per_scan + min(part, self.per_scan)

    def until(
        self,
        t_ns: int,
        row_of: Callable[[Ints], Ints],
        sentinel: Callable[[Ints], Flags],
        stuck: Sequence[Fault] = (),
    ) -> tuple[npt.NDArray[np.void], Ints] | None:
        """Return frames due and not yet sent, with their times; None when there are none.

        row_of: times to rows of the history. sentinel: whether a frame at a time carries no values. stuck:
        the faults that hold the alive counter.
        """
        begin, end = self._sent, self.due(t_ns)
        if end <= begin:
            return None
        n = self.per_scan
        first_scan, last_scan = begin // n, (end - 1) // n
        values = self._scan_values(first_scan, last_scan, begin % n != 0, row_of)
        order = np.arange(begin, end, dtype=np.int64)
        scan, slot = np.divmod(order, n)
        times = self.phase_ns + scan * self.period_ns + slot * self._spacing_ns
        chosen = values[scan - first_scan, slot]
        hidden = sentinel(times)
        if hidden.any():
            chosen = np.where(hidden[:, None] & self.has_sna, np.nan, chosen)
        counters = order if self._shared_id else scan
        for fault in stuck:
            counters = np.where(self._hits(fault, times), self._count_at(fault.start_ns), counters)
        counters = counters % COUNTER_VALUES
        self._sent = end
        return self._pack(slot, counters, chosen), times

    def _hits(self, fault: Fault, times: Ints) -> Flags:
        message = fault.whole("message")
        return active_at(fault, times) & (message < 0 or message in self._ids)

    def _count_at(self, t_ns: int) -> int:
        """The unwrapped alive counter last sent up to t_ns."""
        if self._shared_id:
            return max(0, self.due(t_ns) - 1)
        return max(0, t_ns - self.phase_ns) // self.period_ns

    def _scan_values(self, first: int, last: int, resumed: bool, row_of: Callable[[Ints], Ints]) -> Floats:
        """Return values of scans first..last; a scan whose first frames are out keeps its values."""
        fresh_from = first + 1 if resumed else first
        parts = [self._values] if resumed and self._values is not None else []
        if fresh_from <= last:
            scan_ns = self.phase_ns + np.arange(fresh_from, last + 1, dtype=np.int64) * self.period_ns
            parts.append(self._measure(scan_ns, row_of(scan_ns)))
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self._values = values[-1:]
        return values

    def _pack(self, slot: Ints, counters: Ints, values: Floats) -> npt.NDArray[np.void]:
        if len(self._packers) == 1:
            return self._packers[0].pack(self._ids[slot], counters, values)
        ids = np.broadcast_to(self._ids[:1], slot.shape) if self._shared_id else self._ids[slot]
        frames = self._packers[0].pack(ids, counters, values)
        for index in range(1, self.per_scan):
            mine = slot == index
            if mine.any():
                frames[mine] = self._packers[index].pack(ids[mine], counters[mine], values[mine])
        return frames


CRC_ERROR_XOR = 0xA5


class BusFaults:
    """Loses, silences and damages frames on their way to the bus."""

    def __init__(self, faults: Sequence[Fault], rng: np.random.Generator) -> None:
        self.stuck_counters = tuple(fault for fault in faults if fault.name == "counter-stuck")
        acting = [fault for fault in faults if fault.name in ("bus-silent", "frame-loss", "crc-errors")]
        # A generator each, so that what one draws does not depend on how time is cut for the other.
        self._faults = tuple(zip(acting, rng.spawn(len(acting)), strict=True))
        self.lost = 0
        self.damaged = 0

    def apply(self, frames: npt.NDArray[np.void], t_ns: Ints) -> tuple[npt.NDArray[np.void], Ints]:
        """Return what reaches the bus of frames in the order of their times. Counts what it does."""
        keep = np.ones(len(t_ns), dtype=np.bool_)
        damaged = np.zeros(len(t_ns), dtype=np.bool_)
        for fault, rng in self._faults:
            hit = active_at(fault, t_ns)
            if fault.whole("message") >= 0:
                hit &= frames["id"] == fault.whole("message")
            if "rate" in fault.params and hit.any():
                hit[hit] = rng.random(int(hit.sum())) < fault.params["rate"]
            if fault.name == "crc-errors":
                damaged |= hit
            else:
                keep &= ~hit
        frames["data"][damaged, 0] ^= CRC_ERROR_XOR
        self.damaged += int((damaged & keep).sum())
        self.lost += int((~keep).sum())
        return (frames, t_ns) if keep.all() else (frames[keep], t_ns[keep])
