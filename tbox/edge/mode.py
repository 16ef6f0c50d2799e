"""Driving mode and journey ids as a table with hysteresis: the context of every record. No IO, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import msgspec

from tbox.model import NS_PER_MS, NS_PER_S, Draft, Level, Now, PackSnapshot


class Mode(StrEnum):
    IDLE = "idle"
    CITY = "city"
    HIGHWAY = "highway"
    CHARGING_AC = "charging_ac"
    CHARGING_DC = "charging_dc"

    @property
    def is_charging(self) -> bool:
        return self in (Mode.CHARGING_AC, Mode.CHARGING_DC)

    @property
    def is_driving(self) -> bool:
        return self in (Mode.CITY, Mode.HIGHWAY)


class Event(StrEnum):
    """What the tracker may conclude from a snapshot; each must hold for its time before it counts."""

    MOVE = "move"  # faster than a walk
    FAST = "fast"  # at highway speed
    SLOW = "slow"  # below it again
    PARK = "park"  # standing for long, or standing with the ignition off
    AC = "ac"
    DC = "dc"
    STOP_CHARGE = "stop_charge"  # unplugged, or plugged and idle


# (mode, event) -> mode; within a mode the first event that has held long enough wins.
TRANSITIONS: dict[Mode, dict[Event, Mode]] = {
    Mode.IDLE: {Event.DC: Mode.CHARGING_DC, Event.AC: Mode.CHARGING_AC, Event.MOVE: Mode.CITY},
    Mode.CITY: {
        Event.DC: Mode.CHARGING_DC,
        Event.AC: Mode.CHARGING_AC,
        Event.FAST: Mode.HIGHWAY,
        Event.PARK: Mode.IDLE,
    },
    Mode.HIGHWAY: {
        Event.DC: Mode.CHARGING_DC,
        Event.AC: Mode.CHARGING_AC,
        Event.SLOW: Mode.CITY,
        Event.PARK: Mode.IDLE,
    },
    Mode.CHARGING_AC: {
        Event.DC: Mode.CHARGING_DC,
        Event.MOVE: Mode.CITY,
        Event.STOP_CHARGE: Mode.IDLE,
    },
    Mode.CHARGING_DC: {
        Event.AC: Mode.CHARGING_AC,
        Event.MOVE: Mode.CITY,
        Event.STOP_CHARGE: Mode.IDLE,
    },
}


class IllegalTransition(Exception):
    """An event that means nothing in this mode: a bug of the caller, never the world."""


def next_mode(mode: Mode, event: Event) -> Mode:
    """Return where `event` leads from `mode`; raise IllegalTransition if the table has no such entry."""
    try:
        return TRANSITIONS[mode][event]
    except KeyError:
        raise IllegalTransition(f"{event} in mode {mode}") from None


PERIOD_NS = 100 * NS_PER_MS  # how often it looks, whatever the rate of calls
STANDING_KMH_MAX = 1.0  # below this the wheels stand: CAN speed signals idle at a few tenths
CHARGING_UNPLUGGED, CHARGING_PLUGGED, CHARGING_AC, CHARGING_DC = 0.0, 1.0, 2.0, 3.0  # ROLE_UNITS
IGNITION_OFF_MAX = 1.0  # 0 off, 1 accessory

Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]
Speed = Annotated[float, msgspec.Meta(gt=0, le=300)]
Power = Annotated[float, msgspec.Meta(gt=0, le=1000)]


class ModeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When one mode gives way to another. Sources: Teltonika (movement > 5 km/h), Traccar (180 s standing
    ends a trip), the 60 / 90 km/h split of city and highway; all may be set."""

    move_kmh: Speed = 5.0
    move_for_s: Seconds = 1.0
    highway_kmh: Speed = 90.0
    city_kmh: Speed = 60.0  # back to city below this: between the two the mode stays what it is
    speed_for_s: Seconds = 10.0
    park_for_s: Seconds = 180.0
    ignition_off_for_s: Seconds = 10.0
    charge_for_s: Seconds = 2.0
    stop_charge_for_s: Seconds = 5.0
    silent_for_s: Seconds = 180.0  # a bus that says nothing for so long: the car is taken for parked
    charging_kw: Power = 0.5  # only where no charging state is bound: charging above this power
    dc_kw: Power = 25.0  # and DC above this (three-phase AC ends at 22 kW)


@dataclass(frozen=True, slots=True)
class Context:
    """What surrounds an alarm or a record. journey_id: counts from 1 in each start, 0 outside a journey."""

    mode: Mode = Mode.IDLE
    journey_id: int = 0
    ambient_c: float | None = None
    charging_power_kw: float | None = None

    def body(self) -> dict[str, Any]:
        """Return the context as plain values, for a record's body."""
        return {
            "mode": str(self.mode),
            "journey": self.journey_id,
            "ambient_c": self.ambient_c,
            "charging_power_kw": self.charging_power_kw,
        }


class ModeTracker:
    """Follows the driving mode. `step` is called with each snapshot, on a silent bus too.

    A journey begins when the car moves and ends when it parks or charges; its id rides in the context.
    """

    def __init__(self, settings: ModeSettings | None = None) -> None:
        self._settings = settings or ModeSettings()
        self._since_ns: dict[Event, int] = {}  # events of this mode that hold now -> since when
        self._journeys = 0
        self._next_ns: int | None = None
        self.context = Context()

    def step(self, now: Now, snapshot: PackSnapshot) -> tuple[Context, list[Draft]]:
        """Return the context (at most PERIOD_NS old) and, when the mode changed, an event that says so."""
        if self._next_ns is not None and now.mono_ns < self._next_ns:
            return self.context, []
        self._next_ns = now.mono_ns + PERIOD_NS
        before = self.context.mode
        event = self._due_event(now, snapshot.scalars)
        mode = next_mode(before, event) if event else before
        if event:
            self._since_ns.clear()
        self.context = Context(
            mode, self._journey_id(before, mode),
            snapshot.scalars.get("ambient_temperature"), snapshot.scalars.get("charging_power"),
        )  # fmt: skip
        if mode is before:
            return self.context, []
        body = {"event": "mode", "from": str(before), "to": str(mode), "context": self.context.body()}
        return self.context, [Draft("event", Level.INFO, now.mono_ns, body)]

    def _journey_id(self, before: Mode, mode: Mode) -> int:
        if not mode.is_driving:
            return 0
        if not before.is_driving:
            self._journeys += 1
        return self._journeys

    def _due_event(self, now: Now, scalars: dict[str, float]) -> Event | None:
        holds = self._holding(now, scalars)
        for event in TRANSITIONS[self.context.mode]:
            hold_s = holds.get(event)
            if hold_s is None:
                self._since_ns.pop(event, None)
                continue
            since = self._since_ns.setdefault(event, now.mono_ns)
            if now.mono_ns - since >= hold_s * NS_PER_S:
                return event
        return None

    def _holding(self, now: Now, scalars: dict[str, float]) -> dict[Event, float]:
        """Return the events the snapshot speaks for now, each with the time it must hold, in seconds."""
        s = self._settings
        speed = scalars.get("speed")
        charging = self._charging_state(scalars)
        holds: dict[Event, float] = {}
        moving = speed is not None and speed > s.move_kmh
        if speed is not None:
            if moving:
                holds[Event.MOVE] = s.move_for_s
            if speed >= s.highway_kmh:
                holds[Event.FAST] = s.speed_for_s
            if speed <= s.city_kmh:
                holds[Event.SLOW] = s.speed_for_s
            if speed < STANDING_KMH_MAX:
                off = scalars.get("ignition", 2.0) <= IGNITION_OFF_MAX
                holds[Event.PARK] = min(s.park_for_s, s.ignition_off_for_s) if off else s.park_for_s
        if charging == CHARGING_DC and not moving:
            holds[Event.DC] = s.charge_for_s
        if charging == CHARGING_AC and not moving:
            holds[Event.AC] = s.charge_for_s
        if charging in (CHARGING_UNPLUGGED, CHARGING_PLUGGED):
            holds[Event.STOP_CHARGE] = s.stop_charge_for_s
        if speed is None:
            holds[Event.PARK] = s.silent_for_s
        if charging is None:
            holds[Event.STOP_CHARGE] = s.silent_for_s
        return holds

    def _charging_state(self, scalars: dict[str, float]) -> float | None:
        """Return the charging state as bound, else as the charging power suggests, else None."""
        state = scalars.get("charging_state")
        if state is not None:
            return state
        power_kw = scalars.get("charging_power")
        if power_kw is None:
            return None
        if power_kw < self._settings.charging_kw:
            return CHARGING_UNPLUGGED
        tapering = self.context.mode is Mode.CHARGING_DC  # a DC charge ends at low power and stays DC
        return CHARGING_DC if tapering or power_kw >= self._settings.dc_kw else CHARGING_AC
