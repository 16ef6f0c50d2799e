"""Journeys and charge sessions as records: what was driven, charged and used. Never judges a cell, no IO.

Bodies of kind "journey": {"record": "journey" | "charge", "event": "start" | "update" | "end", ...}. An
update comes every few minutes, so that a cut of power costs little of a long one. Sums run over the time in
which their values were known; `gap_s` tells of holes in time. Current and power are positive into the pack.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np

from tbox.edge.mode import CHARGING_AC, CHARGING_DC, CHARGING_PLUGGED, CHARGING_UNPLUGGED, Context, Mode
from tbox.model import NS_PER_MS, NS_PER_S, Draft, Level, Now, PackSnapshot

PERIOD_NS = 100 * NS_PER_MS  # sums advance this often, whatever the rate of calls
GAP_NS_MAX = 5 * NS_PER_S  # a longer hole in the values is not bridged
DISTANCE_KM_MIN = 0.2  # below this no energy per km is told (Traccar's shortest trip)
WH_PER_J = 1 / 3600
CLOSED = 2.0  # contactor_state

Seconds = Annotated[float, msgspec.Meta(ge=1, le=86_400)]
Points = Annotated[float, msgspec.Meta(gt=0, le=100)]


class JourneySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a charge counts as complete, stalled or odd."""

    update_s: Seconds = 300.0
    full_percent: Points = 99.0  # a charge that ends here or above is complete
    plugged_idle_s: Seconds = 300.0  # plugged in for so long without a charge: an event
    charging_kw_min: Annotated[float, msgspec.Meta(gt=0, le=10)] = 0.1
    soc_drop_points: Points = 3.0  # lost while parked or charging: an event
    standby_points_per_day: Annotated[float, msgspec.Meta(ge=0, le=20)] = 1.0  # what a parked car may use


class _Range:
    """The lowest, highest, first and last of a value, and its mean over time."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.last: float | None = None
        self.low: float | None = None
        self.high: float | None = None
        self._sum = self._s = 0.0

    def add(self, value: float | None, dt_s: float) -> None:
        if value is None:
            return
        self.first = value if self.first is None else self.first
        self.last = value
        self.low = value if self.low is None else min(self.low, value)
        self.high = value if self.high is None else max(self.high, value)
        self._sum += value * dt_s
        self._s += dt_s

    @property
    def mean(self) -> float | None:
        return self._sum / self._s if self._s else self.last

    def change(self) -> float | None:
        return None if self.first is None or self.last is None else self.last - self.first


class _Integral:
    """The time integral of a value by trapezoids, parted into what flowed in and what flowed out."""

    def __init__(self) -> None:
        self.into = self.out = self.known_s = 0.0
        self._before: float | None = None

    def add(self, value: float | None, dt_s: float) -> None:
        before, self._before = self._before, value
        if value is None or before is None:
            return
        area = (value + before) / 2 * dt_s
        self.known_s += dt_s
        if area >= 0:
            self.into += area
        else:
            self.out -= area


class _Stretch:
    """What is summed over a journey or a charge session."""

    def __init__(self, number: int, now: Now) -> None:
        self.number = number
        self.begun_ns = self.last_ns = now.mono_ns
        self.told_ns = now.mono_ns
        self.gap_ns = 0
        self.meters = _Integral()  # speed in m/s
        self.joules = _Integral()  # pack power in W
        self.charger_joules = _Integral()
        self.soc, self.odometer, self.range_km, self.speed = _Range(), _Range(), _Range(), _Range()
        self.ambient, self.battery_w, self.charger_w = _Range(), _Range(), _Range()
        self.coldest, self.hottest, self.cell_low, self.cell_high = _Range(), _Range(), _Range(), _Range()

    def add(self, now: Now, snapshot: PackSnapshot) -> None:
        """Take a snapshot in; a hole in time breaks every integral."""
        dt_ns = now.mono_ns - self.last_ns
        self.last_ns = now.mono_ns
        dt_s = dt_ns / NS_PER_S
        hole = dt_ns > GAP_NS_MAX
        self.gap_ns += dt_ns if hole else 0
        scalars = snapshot.scalars
        speed, power_w = scalars.get("speed"), _pack_power_w(snapshot)
        charger_kw = scalars.get("charging_power")
        charger_w = None if charger_kw is None else charger_kw * 1000
        for integral, value in (
            (self.meters, None if speed is None else abs(speed) / 3.6),
            (self.joules, power_w),
            (self.charger_joules, charger_w),
        ):
            if hole:
                integral.add(None, 0.0)
            integral.add(value, dt_s)
        weight_s = 0.0 if hole else dt_s
        for range_, role in (
            (self.soc, "soc"), (self.odometer, "odometer"), (self.range_km, "range"), (self.speed, "speed"),
            (self.ambient, "ambient_temperature"),
        ):  # fmt: skip
            range_.add(scalars.get(role), weight_s)
        self.battery_w.add(power_w, weight_s)
        self.charger_w.add(charger_w, weight_s)
        self._add_cells(snapshot, weight_s)

    def _add_cells(self, snapshot: PackSnapshot, dt_s: float) -> None:
        probes = snapshot.probe_c[snapshot.probe_ok]
        if len(probes):
            self.coldest.add(float(probes.min()), dt_s)
            self.hottest.add(float(probes.max()), dt_s)
        else:
            self.coldest.add(snapshot.scalars.get("temperature_min"), dt_s)
            self.hottest.add(snapshot.scalars.get("temperature_max"), dt_s)
        cells = snapshot.cell_v[snapshot.cell_ok]
        if len(cells):
            self.cell_low.add(float(cells.min()), dt_s)
            self.cell_high.add(float(cells.max()), dt_s)

    def body(self, kind: str, event: str, until_ns: int) -> dict[str, Any]:
        """Return what a journey and a charge have in common."""
        return {
            "record": kind,
            "event": event,
            "begun_ns": self.begun_ns,
            "until_ns": until_ns,
            "duration_s": _rounded((until_ns - self.begun_ns) / NS_PER_S, 1),
            "gap_s": _rounded(self.gap_ns / NS_PER_S, 1),
            "soc_start_percent": _rounded(self.soc.first, 2),
            "soc_end_percent": _rounded(self.soc.last, 2),
            "battery_min_c": _rounded(self.coldest.low, 1),
            "battery_max_c": _rounded(self.hottest.high, 1),
            "ambient_mean_c": _rounded(self.ambient.mean, 1),
            "cell_min_v": _rounded(self.cell_low.low, 4),
            "cell_max_v": _rounded(self.cell_high.high, 4),
        }

    @property
    def distance_km(self) -> float:
        return self.meters.into / 1000

    @property
    def used_kwh(self) -> float | None:
        """What left the battery less what came back, None when it was never known."""
        return _kwh(self.joules.out - self.joules.into) if self.joules.known_s else None

    def journey_body(self, event: str, until_ns: int) -> dict[str, Any]:
        used, distance = self.used_kwh, self.distance_km
        per_km = None if used is None or distance < DISTANCE_KM_MIN else used / distance
        soc, range_km = self.soc.change(), self.range_km.change()
        mean_kmh = distance / (self.meters.known_s / 3600) if self.meters.known_s else None
        return self.body("journey", event, until_ns) | {
            "journey": self.number,
            "distance_km": _rounded(distance, 3),
            "odometer_start_km": _rounded(self.odometer.first, 1),
            "odometer_end_km": _rounded(self.odometer.last, 1),
            "speed_mean_kmh": _rounded(mean_kmh, 1),
            "speed_max_kmh": _rounded(self.speed.high, 1),
            "energy_kwh": _rounded(used, 3),
            "regenerated_kwh": _rounded(_kwh(self.joules.into), 3) if self.joules.known_s else None,
            "kwh_per_km": _rounded(per_km, 4),
            "soc_used_points": _rounded(None if soc is None else -soc, 2),
            "range_start_km": _rounded(self.range_km.first, 1),
            "range_end_km": _rounded(self.range_km.last, 1),
            "range_used_km": _rounded(None if range_km is None else -range_km, 1),
        }

    def charge_body(self, event: str, until_ns: int) -> dict[str, Any]:
        peak_w = self.charger_w.high if self.charger_w.high is not None else self.battery_w.high
        return self.body("charge", event, until_ns) | {
            "session": self.number,
            "battery_kwh": _rounded(_kwh(self.joules.into), 3) if self.joules.known_s else None,
            "charger_kwh": _rounded(_kwh(self.charger_joules.into), 3)
            if self.charger_joules.known_s
            else None,
            "peak_kw": _rounded(None if peak_w is None else peak_w / 1000, 2),
            "soc_gained_points": _rounded(self.soc.change(), 2),
        }


class Journeys:
    """Sums up each journey and each charge session; tells of charges that do not happen and of SOC lost."""

    def __init__(self, settings: JourneySettings | None = None) -> None:
        self._settings = settings or JourneySettings()
        self._journey: _Stretch | None = None
        self._charge: _Stretch | None = None
        self._charges = 0
        self._charge_modes: list[str] = []
        self._charging_ns = 0  # when the open charge was last seen to charge
        self._next_ns: int | None = None
        self._plug = _Plug(self._settings)
        self._loss = _SocLoss(self._settings)

    def step(self, now: Now, snapshot: PackSnapshot, context: Context) -> list[Draft]:
        """Return journey records (start, update, end) and events."""
        journey = self._journey.number if self._journey else 0
        changed = context.journey_id != journey or context.mode.is_charging != (self._charge is not None)
        if not changed and self._next_ns is not None and now.mono_ns < self._next_ns:
            return []
        self._next_ns = now.mono_ns + PERIOD_NS
        drafts = self._follow_journey(now, snapshot, context) + self._follow_charge(now, snapshot, context)
        for watch in (self._plug, self._loss):
            body = watch.step(now, snapshot.scalars, context)
            if body:
                drafts.append(Draft("event", Level.WARNING, now.mono_ns, body | {"context": context.body()}))
        return drafts

    def flush(self, now: Now) -> list[Draft]:
        """End what is open, at stop; the record says so."""
        drafts = []
        if self._journey:
            drafts.append(_draft(now, self._journey.journey_body("end", now.mono_ns) | {"reason": "stop"}))
        if self._charge:
            drafts.append(self._end_charge(now, self._charge, "stop"))
        self._journey = self._charge = None
        return drafts

    def status(self) -> dict[str, Any] | None:
        """Return the open journey or charge session so far as plain values, or None."""
        if self._journey:
            return self._journey.journey_body("open", self._journey.last_ns)
        if self._charge:
            return self._charge.charge_body("open", self._charge.last_ns)
        return None

    def _follow_journey(self, now: Now, snapshot: PackSnapshot, context: Context) -> list[Draft]:
        drafts: list[Draft] = []
        journey = self._journey
        if journey and journey.number != context.journey_id:
            reason = "charging" if context.mode.is_charging else "parked"
            drafts.append(_draft(now, journey.journey_body("end", now.mono_ns) | {"reason": reason}))
            journey = self._journey = None
        if not context.journey_id:
            return drafts
        if journey is None:
            journey = self._journey = _Stretch(context.journey_id, now)
            journey.add(now, snapshot)
            return [*drafts, _draft(now, journey.journey_body("start", now.mono_ns))]
        journey.add(now, snapshot)
        if self._update_due(now, journey):
            drafts.append(_draft(now, journey.journey_body("update", now.mono_ns)))
        return drafts

    def _follow_charge(self, now: Now, snapshot: PackSnapshot, context: Context) -> list[Draft]:
        charge = self._charge
        if charge and not context.mode.is_charging:
            self._charge = None
            charge.add(now, snapshot)
            return [self._end_charge(now, charge, self._why_ended(snapshot.scalars, context))]
        if not context.mode.is_charging:
            return []
        if snapshot.scalars.get("charging_state", CHARGING_DC) in (CHARGING_AC, CHARGING_DC):
            self._charging_ns = now.mono_ns
        if charge is None:
            self._charges += 1
            charge = self._charge = _Stretch(self._charges, now)
            charge.add(now, snapshot)
            self._charge_modes = [str(context.mode)]
            return [_draft(now, charge.charge_body("start", now.mono_ns) | {"modes": self._charge_modes[:]})]
        if str(context.mode) not in self._charge_modes:
            self._charge_modes.append(str(context.mode))
        charge.add(now, snapshot)
        if self._update_due(now, charge):
            return [_draft(now, charge.charge_body("update", now.mono_ns) | {"modes": self._charge_modes[:]})]
        return []

    def _update_due(self, now: Now, stretch: _Stretch) -> bool:
        if now.mono_ns - stretch.told_ns < self._settings.update_s * NS_PER_S:
            return False
        stretch.told_ns = now.mono_ns
        return True

    def _why_ended(self, scalars: dict[str, float], context: Context) -> str:
        """Return the reason a charge stopped, the most telling first."""
        soc, state = scalars.get("soc"), scalars.get("charging_state")
        if context.mode.is_driving:
            return "driven_off"
        if soc is not None and soc >= self._settings.full_percent:
            return "complete"
        if scalars.get("contactor_state", CLOSED) != CLOSED and state != CHARGING_UNPLUGGED:
            return "contactors_open"
        if state == CHARGING_UNPLUGGED:
            return "unplugged"
        if state == CHARGING_PLUGGED:
            return "stopped_plugged"
        return "power_gone" if "charging_power" in scalars else "bus_silent"

    def _end_charge(self, now: Now, charge: _Stretch, reason: str) -> Draft:
        until_ns = min(now.mono_ns, max(self._charging_ns, charge.begun_ns))
        body = charge.charge_body("end", until_ns) | {"modes": self._charge_modes[:], "reason": reason}
        return _draft(now, body)


class _Plug:
    """Plugged in and no charge for long: told once a plugging."""

    def __init__(self, settings: JourneySettings) -> None:
        self._settings = settings
        self._since_ns: int | None = None
        self._done = False  # this plugging has charged, or was told

    def step(self, now: Now, scalars: dict[str, float], _: Context) -> dict[str, Any] | None:
        state, soc = scalars.get("charging_state"), scalars.get("soc")
        power_kw = scalars.get("charging_power")
        if state == CHARGING_UNPLUGGED:
            self._since_ns, self._done = None, False
        if state in (None, CHARGING_UNPLUGGED) or self._done:
            return None
        flows = power_kw is None or power_kw >= self._settings.charging_kw_min
        if (state in (CHARGING_AC, CHARGING_DC) and flows) or (soc or 0) >= self._settings.full_percent:
            self._done = True
            return None
        if self._since_ns is None:
            self._since_ns = now.mono_ns
        waited_s = (now.mono_ns - self._since_ns) / NS_PER_S
        if waited_s < self._settings.plugged_idle_s:
            return None
        self._done = True
        return {"event": "plugged_not_charging", "for_s": _rounded(waited_s, 1), "soc_percent": soc}


class _SocLoss:
    """SOC that falls while nothing drives: the charge's own highest, or the value at parking, is held."""

    def __init__(self, settings: JourneySettings) -> None:
        self._settings = settings
        self._highest: tuple[float, int] | None = None  # percent, since when
        self._mode: Mode | None = None

    def step(self, now: Now, scalars: dict[str, float], context: Context) -> dict[str, Any] | None:
        soc = scalars.get("soc")
        if context.mode is not self._mode:
            self._mode, self._highest = context.mode, None
        if soc is None or context.mode.is_driving:
            return None
        if self._highest is None or soc > self._highest[0]:
            self._highest = soc, now.mono_ns
            return None
        highest, since_ns = self._highest
        over_s = (now.mono_ns - since_ns) / NS_PER_S
        allowed = self._settings.soc_drop_points + self._settings.standby_points_per_day * over_s / 86_400
        if highest - soc < allowed:
            return None
        self._highest = soc, now.mono_ns
        return {
            "event": "soc_drop", "from_percent": _rounded(highest, 2), "to_percent": _rounded(soc, 2),
            "over_s": _rounded(over_s, 1),
        }  # fmt: skip


def _draft(now: Now, body: dict[str, Any]) -> Draft:
    return Draft("journey", Level.INFO, now.mono_ns, body)


def _pack_power_w(snapshot: PackSnapshot) -> float | None:
    """Return the pack's power, positive into the battery; the cells' sum stands in for a missing voltage."""
    current, volts = snapshot.scalars.get("pack_current"), snapshot.scalars.get("pack_voltage")
    if volts is None and len(snapshot.cell_v) and bool(np.all(snapshot.cell_ok)):
        volts = float(snapshot.cell_v.sum())
    return None if current is None or volts is None else current * volts


def _kwh(joules: float) -> float:
    return joules * WH_PER_J / 1000


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits) + 0.0  # -0.0 is 0.0
