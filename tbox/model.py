"""The nouns that travel between stages: time, frames, samples, records. No behaviour, no IO.

Everything here is a value. Arrays are numpy and are never written to after they were handed on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000

# --- time ---------------------------------------------------------------------------------------------


class TimeQuality(IntEnum):
    """How far the wall clock is to be believed; a later value outranks an earlier one."""

    UNSET = 0
    RTC = 1
    NTP = 2
    GNSS = 3


class Now(NamedTuple):
    """One instant, given to every core as an argument.

    `mono_ns` never runs backwards within a start. `wall_ns` is Unix time in ns, None while unset.
    """

    mono_ns: int
    wall_ns: int | None = None
    quality: TimeQuality = TimeQuality.UNSET


# --- frames -------------------------------------------------------------------------------------------

# The kernel's struct canfd_frame, so that SocketCAN memory is viewed, not parsed (linux/can.h).
FRAME_DTYPE = np.dtype([("id", "<u4"), ("len", "u1"), ("flags", "u1"), ("pad", "u1", 2), ("data", "u1", 64)])
FRAME_BYTES = FRAME_DTYPE.itemsize  # 72

CAN_EFF_FLAG = 0x8000_0000  # 29-bit id
CAN_RTR_FLAG = 0x4000_0000  # remote frame
CAN_ERR_FLAG = 0x2000_0000  # error frame
CAN_EFF_MASK = 0x1FFF_FFFF
CAN_SFF_MASK = 0x7FF
CANFD_BRS = 0x01
CANFD_ESI = 0x02
CANFD_FDF = 0x04  # set on every CAN-FD frame of ours, as Linux >= 6.1 does


@dataclass(frozen=True, slots=True)
class FrameBatch:
    """Frames of one bus in order of reception.

    frames: (n,) FRAME_DTYPE, `id` with the EFF/RTR/ERR flags of SocketCAN, `data` zero beyond `len`.
    t_ns: (n,) int64, monotonic ns of reception (for a recording: as logged, shifted to start at >= 0).
    channel: index of the bus in the configuration.
    """

    channel: int
    frames: npt.NDArray[np.void]
    t_ns: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.t_ns)


# --- signals and samples ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Signal:
    """One column: a signal of one message on one bus, with the role it plays for the edge.

    role: "" when unbound, else a role name such as "cell_voltage", "probe_temperature", "pack_current",
    "speed" (decode/roles.py lists them with their units). index: the i of cell i or probe j, else 0.
    module: the module a cell or a probe sits in. minimum/maximum: the DBC's physical range, None if it
    declares none.
    """

    name: str
    message: str
    channel: int
    unit: str = ""
    role: str = ""
    index: int = 0
    module: int = 0
    vss: str = ""
    minimum: float | None = None
    maximum: float | None = None
    scale: float = 1.0
    offset: float = 0.0
    is_float: bool = False
    cycle_ms: int | None = None


class Validity(IntEnum):
    """Why a sample may not be believed. Only VALID samples reach a threshold; the rest are counted."""

    VALID = 0
    SNA = 1  # "signal not available" sentinel
    RANGE = 2  # outside the DBC's or the role's physical range
    FLAGGED = 3  # the BMS's own invalid flag
    CRC = 4
    COUNTER = 5  # alive counter stuck
    DUPLICATE = 6  # the same counter and payload again
    GLITCH = 7  # a spike of a single sample
    MUX = 8  # the mux cycle is not complete yet


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """Decoded samples in order of reception: parallel arrays of length n.

    t_ns int64 monotonic; column int64 index into the catalog (tuple[Signal, ...]); value float64 in the
    signal's unit; validity uint8 (`Validity`).
    """

    t_ns: npt.NDArray[np.int64]
    column: npt.NDArray[np.int64]
    value: npt.NDArray[np.float64]
    validity: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.t_ns)


# What a signal can mean to the edge, and the unit the edge works in (decode converts on binding).
# Signs and names follow COVESA VSS 6.0: current and power are positive into the battery.
ROLE_UNITS: dict[str, str] = {
    "cell_voltage": "V",  # index = cell, from 0
    "probe_temperature": "degC",  # index = probe, from 0; module = where it sits
    "cell_voltage_min": "V",
    "cell_voltage_max": "V",
    "temperature_min": "degC",
    "temperature_max": "degC",
    "pack_voltage": "V",
    "pack_current": "A",
    "soc": "percent",
    "soh": "percent",
    "isolation_resistance": "kOhm",
    "contactor_state": "",  # 0 open, 1 pre-charge, 2 closed, 3 welded or failed
    "contactor_command": "",  # 0 open, 1 closed
    "isolation_ack": "",  # 1: the BMS has taken the isolation request
    "hvil": "",  # 1 loop closed
    "coolant_temperature": "degC",
    "speed": "km/h",
    "motor_speed": "rpm",
    "motor_temperature": "degC",
    "odometer": "km",
    "gear": "",  # 0 P, 1 R, 2 N, 3 D
    "ignition": "",  # 0 off, 1 accessory, 2 on, 3 start
    "charging_state": "",  # 0 unplugged, 1 plugged and idle, 2 AC, 3 DC
    "charging_power": "kW",
    "ambient_temperature": "degC",
    "low_voltage": "V",
    "range": "km",
    "latitude": "deg",
    "longitude": "deg",
}


@dataclass(frozen=True, slots=True)
class PackSnapshot:
    """The pack as last known: only valid and fresh values count as known.

    cell_v (cells,) V; cell_ok (cells,) bool; probe_c (probes,) degC; probe_ok; probe_module (probes,) int32;
    scalars: role -> last valid, fresh value in the role's unit. scan: number of complete cell scans so far
    (it moves only when every cell was seen anew, so rules never run on half a multiplexer cycle).
    """

    mono_ns: int
    cell_v: npt.NDArray[np.float64]
    cell_ok: npt.NDArray[np.bool_]
    probe_c: npt.NDArray[np.float64]
    probe_ok: npt.NDArray[np.bool_]
    probe_module: npt.NDArray[np.int32]
    scalars: dict[str, float]
    scan: int = 0


@dataclass(frozen=True, slots=True)
class Column:
    """One column of routine telemetry: value = raw * scale + offset. present None: all are."""

    name: str  # VSS name where one exists, with ".min", ".max", ".mean" appended for window statistics
    scale: float
    offset: float
    raw: npt.NDArray[np.int64]  # (k,)
    present: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Columns of one scale that are all present and numbered on: `prefix + str(first + i) + suffix`.

    The cells of a pack as one value: what makes them hundreds of columns is done once, in numpy.
    """

    prefix: str
    first: int
    suffix: str
    scale: float
    offset: float
    raw: npt.NDArray[np.int64]  # (columns, k)


@dataclass(frozen=True, slots=True)
class Series:
    """Columns that share their times. t_ms: (k,) int64, milliseconds after the record's mono_ns."""

    t_ms: npt.NDArray[np.int64]
    columns: tuple[Column, ...]
    blocks: tuple[Block, ...] = ()


# --- records ------------------------------------------------------------------------------------------


class Level(IntEnum):
    INFO = 1
    WARNING = 2
    ALARM = 3  # from here on: alarm priority, alarm table, sent before everything else
    CRITICAL = 4


# Kinds are MQTT topic leaves: tbox/1/<vehicle>/<kind>
KINDS = ("telemetry", "alarm", "event", "capture", "journey", "health", "ota")

RECORD_PAYLOAD_BYTES_MAX = 64 * 1024
COUNTER_BITS = 32
COUNTER_MAX = (1 << COUNTER_BITS) - 1


@dataclass(frozen=True, slots=True)
class Draft:
    """A record without its id: what a stage wants told.

    `body` holds msgpack-able values; the one exception is body["series"], a list of `Series`.
    """

    kind: str
    level: Level
    mono_ns: int
    body: dict[str, Any]


class Record(msgspec.Struct, frozen=True):
    """The unit that is spooled, sent, acknowledged and counted. `payload` is encoded once and opaque.

    id = start << 32 | counter, counter from 1. Order is by id, never by wall clock.
    """

    id: int
    kind: str
    level: int
    payload: bytes

    @property
    def start(self) -> int:
        return self.id >> COUNTER_BITS

    @property
    def counter(self) -> int:
        return self.id & COUNTER_MAX

    @property
    def is_alarm(self) -> bool:
        return self.level >= Level.ALARM


def record_id(start: int, counter: int) -> int:
    """Return the id of the counter-th record of a start."""
    assert 0 < counter <= COUNTER_MAX and start > 0
    return start << COUNTER_BITS | counter


# --- what the edge says -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CanSend:
    """A frame the edge asks to be sent. The writer's allow-list has the last word."""

    channel: int
    can_id: int  # with CAN_EFF_FLAG for 29-bit
    data: bytes
    fd: bool = True


@dataclass(frozen=True, slots=True)
class EdgeOutput:
    """What one edge step yields. next_wake_ns: monotonic ns at which it wants to be called at the latest."""

    drafts: list[Draft] = field(default_factory=list)
    sends: list[CanSend] = field(default_factory=list)
    next_wake_ns: int | None = None


class BusState(IntEnum):
    UP = 0
    DOWN = 1
    GONE = 2  # the interface does not exist
