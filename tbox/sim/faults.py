"""Faults by name: what can go wrong in the simulated vehicle, when, and how hard. Describes; never acts.

`NAME@START[s][:key=value,...]`, for example `module-overheat@30s:module=3,duration=20s`. The physics
(pack.py) and the ECUs (ecus.py) act on them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from tbox.errors import TboxError
from tbox.model import NS_PER_S
from tbox.sim.layout import CELLS, DATABASES, MODULES, PROBES


class FaultError(TboxError):
    """A fault that does not exist, or whose time or keys cannot be read."""


@dataclass(frozen=True, slots=True)
class Key:
    """A parameter: default, bounds (inclusive) and what it means. A whole number where `whole`."""

    default: float
    low: float
    high: float
    text: str
    whole: bool = False


@dataclass(frozen=True, slots=True)
class FaultKind:
    """One name on the list. `bus`: it acts on frames; else on the physics or on a sensor."""

    text: str
    keys: Mapping[str, Key] = field(default_factory=dict)
    bus: bool = False
    duration_s: float = math.inf


def _cell(default: int) -> Key:
    return Key(default, 0, CELLS - 1, "cell, from 0", whole=True)


def _one_of(text: str, last: int) -> Key:
    return Key(-1, -1, last, text, whole=True)


_MESSAGE = Key(-1, -1, 0x7FF, "CAN id of the message, -1 for all", whole=True)
_SENSOR = {
    "probe": _one_of("temperature probe, from 0; -1 for none", PROBES - 1),
    "cell": _one_of("cell tap, from 0; -1 for none", CELLS - 1),
}

KINDS: dict[str, FaultKind] = {
    "module-overheat": FaultKind(
        "a heater relay sticks beside a module and its coolant branch runs dry; off with the contactors",
        {
            "module": Key(3, 0, MODULES - 1, "module, from 0", whole=True),
            "power": Key(1500, 1, 100_000, "heat into the module's bus bars, W"),
            "coolant": Key(0.1, 0, 1, "share of the module's coolant flow that is left"),
            "hv": Key(1, 0, 1, "1: fed by the high-voltage bus; 0: burns on without it", whole=True),
        },
    ),
    "cell-runaway": FaultKind(
        "a cell decomposes exothermically while an internal short collapses its voltage",
        {
            "cell": _cell(37),
            "power": Key(60_000, 1, 1_000_000, "heat while it burns, W"),
            "energy": Key(1_000_000, 1, 100_000_000, "heat in total, J"),
            "collapse": Key(4, 0.1, 3600, "time constant of the voltage collapse, s"),
        },
    ),
    "cell-drift": FaultKind(
        "an internal leak drains one cell, and may cost it capacity",
        {
            "cell": _cell(101),
            "leak": Key(150, 0, 5000, "leak current, A"),
            "ramp": Key(8, 0, 1e6, "time until the leak is whole, s"),
            "capacity": Key(1, 0.05, 1, "share of the cell's capacity that is left"),
        },
    ),
    "sensor-stuck": FaultKind("a sensor repeats its last reading", _SENSOR),
    "sensor-open": FaultKind(
        "a sensor's wire breaks: the input goes to its rail, then the BMS notices", _SENSOR
    ),
    "isolation-loss": FaultKind(
        "a leak from the high-voltage circuit to the body",
        {"kohm": Key(40, 0, 50_000, "resistance that is left, kOhm"), "ramp": Key(3, 0, 1e6, "fall time, s")},
    ),
    "hvil-open": FaultKind("the high-voltage interlock loop is interrupted"),
    "contactor-failed": FaultKind("the contactors stay closed whatever is commanded (welded)"),
    "low-voltage-lost": FaultKind("the DC-DC converter fails and the 12 V battery drains"),
    "sentinels": FaultKind('every value is "signal not available", as at key-on', bus=True, duration_s=0.3),
    "frame-loss": FaultKind(
        "frames are lost before the bus",
        {"rate": Key(0.1, 0, 1, "share of frames"), "message": _MESSAGE},
        bus=True,
    ),
    "crc-errors": FaultKind(
        "frames carry a wrong CRC", {"rate": Key(0.1, 0, 1, "share of frames"), "message": _MESSAGE}, bus=True
    ),
    "counter-stuck": FaultKind("the alive counter stands still", {"message": _MESSAGE}, bus=True),
    "bus-silent": FaultKind("no frame is sent", {"message": _MESSAGE}, bus=True),
}

DURATION = "duration"
_WHEN = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>ms|s|min|h)?")
_UNITS_S = {None: 1.0, "s": 1.0, "ms": 0.001, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, eq=False)
class Fault:
    """One fault of a run. Active from start_ns to end_ns (None: to the end of the run).

    Two faults spelled alike are two faults: they compare by identity.
    """

    name: str
    start_ns: int
    end_ns: int | None
    params: Mapping[str, float]

    @property
    def kind(self) -> FaultKind:
        return KINDS[self.name]

    def active(self, t_ns: int) -> bool:
        return self.start_ns <= t_ns and (self.end_ns is None or t_ns < self.end_ns)

    def age_s(self, t_ns: int) -> float:
        """Seconds since its start; negative before it."""
        return (t_ns - self.start_ns) / NS_PER_S

    def whole(self, key: str) -> int:
        return int(self.params[key])


def make_fault(name: str, start_s: float, *, duration_s: float | None = None, **params: float) -> Fault:
    """Return a fault from values; raises FaultError as `parse_fault` does."""
    kind = KINDS.get(name)
    if kind is None:
        raise FaultError(
            f"there is no fault {name!r}", where="fault", mend=f"one of {', '.join(sorted(KINDS))}"
        )
    values = {key: spec.default for key, spec in kind.keys.items()}
    for key, value in params.items():
        spec = kind.keys.get(key)
        if spec is None:
            known = ", ".join([*kind.keys, DURATION])
            raise FaultError(f"{name} has no key {key!r}", where="fault", mend=f"it takes {known}")
        if not spec.low <= value <= spec.high or (spec.whole and value != int(value)):
            number = "a whole number" if spec.whole else "a number"
            raise FaultError(
                f"{name}: {key}={value:g} is out of range",
                where="fault",
                mend=f"{spec.text}: {number} from {spec.low:g} to {spec.high:g}",
            )
        values[key] = value
    if kind.keys is _SENSOR and (values["probe"] < 0) == (values["cell"] < 0):
        if values["probe"] >= 0:
            raise FaultError(f"{name} takes a probe or a cell, not both", where="fault", mend="leave one out")
        values["probe"] = 11
    length_s = kind.duration_s if duration_s is None else duration_s
    start_ns = round(start_s * NS_PER_S)
    end_ns = None if math.isinf(length_s) else start_ns + round(length_s * NS_PER_S)
    return Fault(name, start_ns, end_ns, values)


def parse_fault(text: str) -> Fault:
    """Read `NAME@START[ms|s|min|h][:key=value,...]`; `duration` is a key of every fault.

    Raises FaultError naming what is wrong and what would be right.
    """
    head, _, tail = text.strip().partition(":")
    name, at, when = head.partition("@")
    if name not in KINDS:
        make_fault(name, 0.0)  # raises, listing the names that exist
    if not at:
        raise FaultError(f"{text!r} does not say when", where="fault", mend=f"write {name}@30s")
    params: dict[str, float] = {}
    for part in filter(None, tail.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key in params:
            raise FaultError(
                f"{part!r} in {text!r} is not one key=value", where="fault", mend="write key=value,..."
            )
        params[key] = _seconds(text, value) if key == DURATION else _number(text, value)
    duration_s = params.pop(DURATION, None)
    return make_fault(name, _seconds(text, when), duration_s=duration_s, **params)


def known_messages() -> frozenset[int]:
    """CAN ids a bus fault may name."""
    return frozenset(msg.can_id for messages in DATABASES.values() for msg in messages)


def _seconds(text: str, when: str) -> float:
    match = _WHEN.fullmatch(when.strip())
    if match is None:
        raise FaultError(
            f"{when!r} in {text!r} is not a time", where="fault", mend="write 30s, 500ms, 2min or 1h"
        )
    return float(match["number"]) * _UNITS_S[match["unit"]]


def _number(text: str, value: str) -> float:
    try:
        number = float(int(value, 0)) if value.lower().startswith("0x") else float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise FaultError(f"{value!r} in {text!r} is not a number", where="fault", mend="write key=number")
    return number
