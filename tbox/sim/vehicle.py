"""The vehicle around the pack: driving cycles, longitudinal dynamics, motor, 12 V, charging. Knows no bus.

A cycle is what the driver wants; the speed is what the vehicle makes of it: without traction it rolls to a
stop whatever the cycle says. Power is positive into the battery.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tbox.errors import TboxError

# A mid-size electric car.
MASS_KG = 2050.0
ROLLING = 0.009
DRAG_AREA_M2 = 0.62
AIR_KG_PER_M3 = 1.2
GRAVITY = 9.81
WHEEL_RADIUS_M = 0.34
GEAR_RATIO = 9.3
DRIVE_EFFICIENCY = 0.90
REGEN_EFFICIENCY = 0.70
REGEN_W_MAX = 80_000.0
TRACTION_W_MAX = 220_000.0
AUX_W = 900.0
ACCELERATION_MAX, BRAKING_MAX = 3.5, 6.0  # m/s²
ROLL_OUT_MPS2 = 1.5  # what a driver brakes with when the drive is gone
STANDING_MPS = 0.05

MOTOR_J_PER_K, MOTOR_W_PER_K = 45_000.0, 90.0
DCDC_V, BATTERY_12V_FULL, BATTERY_12V_EMPTY = 14.1, 12.6, 8.0
BATTERY_12V_DRAIN_V_PER_S = 1e-6  # key off: about 0.1 V a day
LOST_12V_DRAIN_V_PER_S = 0.06  # key on without the converter
RANGE_WH_PER_KM = 165.0
RANGE_KM_MAX = 1500.0

GEAR_P, GEAR_D = 0, 3
IGNITION_OFF, IGNITION_ON = 0, 2
UNPLUGGED, PLUGGED_IDLE, CHARGING_AC, CHARGING_DC = 0, 1, 2, 3

CSV_BYTES_MAX = 4_000_000
CSV_SPEED_MPS_MAX = 90.0


class CycleError(TboxError):
    """A driving cycle that does not exist or cannot be read."""


class Phase(NamedTuple):
    """A stretch of a cycle: in `seconds`, linearly to speed_kmh."""

    seconds: float
    speed_kmh: float = 0.0
    ignition: int = IGNITION_ON
    charging: int = UNPLUGGED
    charge_kw: float = 0.0


class Wish(NamedTuple):
    """What the driver and the charge point want at one instant."""

    speed_mps: float
    ignition: int
    charging: int
    charge_w: float


class Cycle:
    """Phases in order. After the end it starts anew (`loop`), or stays at its last phase's end."""

    def __init__(self, name: str, phases: Sequence[Phase], *, loop: bool = False) -> None:
        assert phases
        self.name = name
        self.phases = tuple(phases)
        self.loop = loop
        self._end_s = np.cumsum([phase.seconds for phase in phases])
        self._knots_s = np.concatenate([[0.0], self._end_s])
        self._knots_mps = np.concatenate([[0.0], [phase.speed_kmh / 3.6 for phase in phases]])
        self.seconds = float(self._end_s[-1])

    def at(self, t_s: float) -> Wish:
        t_s = t_s % self.seconds if self.loop else min(t_s, self.seconds)
        i = min(int(self._end_s.searchsorted(t_s, side="right")), len(self.phases) - 1)
        begin, speed = self._knots_s[i], self._knots_mps[i]
        phase = self.phases[i]
        share = min(1.0, (t_s - begin) / phase.seconds) if phase.seconds else 1.0
        mps = float(speed + share * (self._knots_mps[i + 1] - speed))
        return Wish(mps, phase.ignition, phase.charging, phase.charge_kw * 1000.0)


_CITY = (
    Phase(5), Phase(8, 48), Phase(18, 50), Phase(6, 20), Phase(4, 18), Phase(7, 50), Phase(12, 52),
    Phase(8, 0), Phase(14, 0), Phase(6, 32), Phase(15, 30), Phase(5, 0), Phase(10, 0), Phase(10, 58),
    Phase(25, 55), Phase(9, 0), Phase(12, 0),
)  # fmt: skip
_HIGHWAY = (
    Phase(4), Phase(14, 80), Phase(10, 105), Phase(60, 112), Phase(8, 95), Phase(20, 100), Phase(10, 128),
    Phase(45, 125), Phase(15, 80), Phase(20, 60), Phase(12, 0), Phase(6, 0),
)  # fmt: skip
_DEMO = (
    Phase(2), Phase(7, 46), Phase(9, 50), Phase(3, 30), Phase(3, 30), Phase(9, 98), Phase(27, 104),
    Phase(9, 50), Phase(5, 48), Phase(7, 0), Phase(5, 0),
)  # fmt: skip
_PARKED = Phase(3600, 0, IGNITION_OFF)
_PLUGGED = Phase(10, 0, IGNITION_OFF, PLUGGED_IDLE)
_HOUR_S = 3600.0

CYCLES: dict[str, tuple[Phase, ...]] = {
    "demo": _DEMO,  # 86 s: city, highway, stop
    "city": _CITY,
    "highway": _HIGHWAY,
    "mixed": (*_CITY, *_CITY, *_HIGHWAY, *_CITY),
    "ready": (Phase(_HOUR_S),),
    "parked": (_PARKED,),
    "charge-ac": (_PLUGGED, Phase(_HOUR_S, 0, IGNITION_OFF, CHARGING_AC, 11)),
    "charge-dc": (_PLUGGED, Phase(_HOUR_S, 0, IGNITION_OFF, CHARGING_DC, 120)),
    "day": (  # 24 h, with a fast charge on the way to work
        Phase(6 * _HOUR_S, 0, IGNITION_OFF), *_CITY * 5, *_HIGHWAY * 4,
        _PLUGGED, Phase(1200, 0, IGNITION_OFF, CHARGING_DC, 120), *_CITY * 3,
        Phase(8 * _HOUR_S, 0, IGNITION_OFF), *_CITY * 3, *_HIGHWAY * 4, *_CITY * 5,
        Phase(60, 0, IGNITION_OFF, PLUGGED_IDLE), Phase(5 * _HOUR_S, 0, IGNITION_OFF, CHARGING_AC, 11),
        Phase(12_154, 0, IGNITION_OFF),
    ),
}  # fmt: skip


def load_cycle(name: str, *, loop: bool = False) -> Cycle:
    """Return a cycle by name, or from a CSV file with columns cycSecs and cycMps (s, m/s).

    Raises CycleError listing the names that exist, or naming file and line.
    """
    if name in CYCLES:
        return Cycle(name, CYCLES[name], loop=loop)
    path = Path(name)
    if path.suffix != ".csv":
        known = ", ".join(CYCLES)
        raise CycleError(f"there is no cycle {name!r}", where="cycle", mend=f"one of {known}, or a .csv file")
    return Cycle(path.stem, _csv_phases(path), loop=loop)


def _csv_phases(path: Path) -> list[Phase]:
    mend = "columns cycSecs and cycMps: rising seconds, metres per second"
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(CSV_BYTES_MAX)
    except (OSError, UnicodeDecodeError) as error:
        raise CycleError(f"cannot read the cycle: {error}", where=str(path), mend=mend) from error
    phases: list[Phase] = []
    last_s: float | None = None
    for line, row in enumerate(csv.DictReader(text.splitlines()), start=2):
        try:
            t_s, mps = float(row["cycSecs"]), float(row["cycMps"])
            step_s = t_s - last_s if last_s is not None else 0.0
            if not (0.0 <= mps <= CSV_SPEED_MPS_MAX) or not (step_s > 0.0 or last_s is None):
                raise ValueError("out of range")
        except (KeyError, TypeError, ValueError) as error:
            raise CycleError(
                f"this is no point of a cycle ({error})", where=f"{path}:{line}", mend=mend
            ) from error
        if last_s is not None:
            phases.append(Phase(step_s, mps * 3.6))
        last_s = t_s
    if not phases:
        raise CycleError("the cycle is empty", where=str(path), mend=mend)
    return phases


class Vehicle:
    """State and one step of it."""

    def __init__(self, cycle: Cycle, *, ambient_c: float, odometer_km: float) -> None:
        self.cycle = cycle
        self.ambient_c = ambient_c
        self.wish = cycle.at(0.0)
        self.speed_mps = self.wish.speed_mps
        self.acceleration = 0.0
        self.distance_m = 0.0
        self.odometer_start_km = odometer_km
        self.motor_c = ambient_c
        self.low_v = BATTERY_12V_FULL
        self._battery_12v = BATTERY_12V_FULL
        self.charging_w = 0.0

    @property
    def standing(self) -> bool:
        return self.speed_mps < STANDING_MPS

    @property
    def awake(self) -> bool:
        """Somebody wants high voltage: the key is on, or a charge session runs."""
        return self.wish.ignition >= IGNITION_ON or self.wish.charging >= CHARGING_AC

    @property
    def gear(self) -> int:
        parked = self.standing and (self.wish.ignition < IGNITION_ON or self.wish.speed_mps < STANDING_MPS)
        return GEAR_P if parked else GEAR_D

    @property
    def motor_rpm(self) -> float:
        return self.speed_mps / WHEEL_RADIUS_M * GEAR_RATIO * 60.0 / (2.0 * math.pi)

    def step(
        self, t_s: float, dt_s: float, *, drive_share: float, closed: bool, charge_share: float, dcdc: bool
    ) -> float:
        """Advance by dt_s to t_s; return the power wanted at the pack's terminals in W, positive in.

        drive_share: 0..1 of the traction the BMS allows. closed: the contactors. charge_share: 0..1 of the
        charge power that the cells still take. dcdc: the converter works.
        """
        self.wish = self.cycle.at(t_s)
        powered = closed and drive_share > 0.0 and self.wish.ignition >= IGNITION_ON
        traction_w = self._move(dt_s, drive_share if powered else 0.0)
        self._warm_motor(abs(traction_w) * (1.0 - DRIVE_EFFICIENCY), dt_s)
        self._feed_12v(dt_s, dcdc=dcdc and closed)
        self.charging_w = 0.0
        if not closed:
            return 0.0
        power_w = -AUX_W
        if self.wish.charging >= CHARGING_AC and self.standing:
            self.charging_w = self.wish.charge_w * charge_share
            power_w += self.charging_w
        if traction_w > 0.0:
            power_w -= traction_w / DRIVE_EFFICIENCY
        elif powered:
            power_w += min(-traction_w * REGEN_EFFICIENCY, REGEN_W_MAX * drive_share)
        return power_w

    def _move(self, dt_s: float, drive_share: float) -> float:
        """Follow the wish as far as power allows; return the power at the wheels, W (< 0: braking)."""
        speed = self.speed_mps
        resistance_n = MASS_KG * GRAVITY * ROLLING + 0.5 * AIR_KG_PER_M3 * DRAG_AREA_M2 * speed * speed
        wanted = min(max((self.wish.speed_mps - speed) / dt_s, -BRAKING_MAX), ACCELERATION_MAX)
        if drive_share <= 0.0:
            wanted = min(wanted, -ROLL_OUT_MPS2)
        force_n = MASS_KG * wanted + (resistance_n if speed > STANDING_MPS or wanted > 0 else 0.0)
        force_max_n = TRACTION_W_MAX * drive_share / max(speed, 8.0)
        if force_n > force_max_n:
            force_n = force_max_n
            wanted = (force_n - resistance_n) / MASS_KG
        after = max(0.0, speed + wanted * dt_s)
        self.acceleration = (after - speed) / dt_s
        travelled_m = 0.5 * (speed + after) * dt_s
        self.speed_mps = after
        self.distance_m += travelled_m
        return force_n * travelled_m / dt_s

    def _warm_motor(self, loss_w: float, dt_s: float) -> None:
        self.motor_c += (loss_w - MOTOR_W_PER_K * (self.motor_c - self.ambient_c)) * dt_s / MOTOR_J_PER_K

    def _feed_12v(self, dt_s: float, *, dcdc: bool) -> None:
        if dcdc:
            self._battery_12v = min(BATTERY_12V_FULL, self._battery_12v + 0.001 * dt_s)
            self.low_v = DCDC_V
            return
        drain = LOST_12V_DRAIN_V_PER_S if self.awake else BATTERY_12V_DRAIN_V_PER_S
        self._battery_12v = max(BATTERY_12V_EMPTY, self._battery_12v - drain * dt_s)
        self.low_v = self._battery_12v
