"""Watches of single values: jumps, ratios, contradictions, silence; and whether the pack rests. No alarms."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Annotated

import msgspec
import numpy as np

from tbox.edge.pack import NEVER_NS, Pack, Series
from tbox.edge.readings import NO_ITEM, NOTHING, Reading, Scalar, items
from tbox.model import NS_PER_MS, NS_PER_S

# Roles only a BMS sends: when all of them are silent, it is.
BMS_ROLES = frozenset({
    "cell_voltage", "probe_temperature", "cell_voltage_min", "cell_voltage_max", "temperature_min",
    "temperature_max", "pack_voltage", "pack_current", "soc", "soh", "isolation_resistance",
    "contactor_state", "contactor_command", "hvil",
})  # fmt: skip
IGNITION_ON = 2.0
CHARGING_AC = 2.0
CONTACTOR_CLOSED, CONTACTOR_PRECHARGE = 2.0, 1.0

SOC_JUMP_WINDOW_NS = 5 * NS_PER_S
SOC_JUMP_STEP_NS = NS_PER_S // 2
LOST_NS = 900 * NS_PER_MS  # silent cells and probes are searched for once a second
PACK_VOLTAGE_MIN_V = 10.0  # below it the pack is off the bus, and a ratio to it means nothing


class LoadSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What counts as rest and as charging."""

    rest_current_a: Annotated[float, msgspec.Meta(gt=0, le=100)] = 5.0
    rest_after_s: Annotated[float, msgspec.Meta(ge=0, le=7200)] = 60.0
    charge_after_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 30.0  # where no charging state is known
    unknown_current_a: Annotated[float, msgspec.Meta(ge=0, le=5000)] = 300.0  # assumed for allowances
    # Ohmic and slow resistance of a warm cell of about 110 Ah: tells the end of the charge from a load's sag.
    cell_mohm: Annotated[float, msgspec.Meta(ge=0, le=100)] = 1.2


class Load:
    """Whether the pack rests, is loaded, charges or discharges. Unknown current: neither rest nor load."""

    def __init__(self, settings: LoadSettings | None = None) -> None:
        self._settings = settings or LoadSettings()
        self._rest_since_ns: int | None = None
        self._inward_since_ns: int | None = None
        self._conditions = {"any": True, "charge": False, "discharge": True, "rest": False, "load": False}
        self.current_a = self._settings.unknown_current_a  # without its sign

    def step(self, t_ns: int, scalars: Mapping[str, float], *, has_charging_state: bool) -> dict[str, bool]:
        """Return which conditions of a rule's `only` hold."""
        settings = self._settings
        current_a = scalars.get("pack_current")
        known = current_a is not None
        self.current_a = abs(current_a) if current_a is not None else settings.unknown_current_a
        small = known and self.current_a <= settings.rest_current_a
        inward = current_a is not None and current_a > settings.rest_current_a
        self._rest_since_ns = _since(self._rest_since_ns, t_ns, small)
        self._inward_since_ns = _since(self._inward_since_ns, t_ns, inward)
        if has_charging_state:
            state = scalars.get("charging_state")
            charge = self._conditions["charge"] if state is None else state >= CHARGING_AC
        else:
            charge = _lasted(self._inward_since_ns, t_ns, settings.charge_after_s)
        self._conditions = {
            "any": True,
            "charge": charge,
            "discharge": not charge,
            "rest": _lasted(self._rest_since_ns, t_ns, settings.rest_after_s),
            "load": known and not small,
        }
        return self._conditions


def _since(since_ns: int | None, t_ns: int, now: bool) -> int | None:
    return (t_ns if since_ns is None else since_ns) if now else None


def _lasted(since_ns: int | None, t_ns: int, for_s: float) -> bool:
    return since_ns is not None and t_ns - since_ns >= for_s * NS_PER_S


class Watches:
    """The watches that look at a single value of the pack, or at how long something was not heard."""

    def __init__(self, pack: Pack, series_cells: int | None) -> None:
        self._pack = pack
        self._cells_in_series = series_cells or len(pack.cells)
        self._socs: deque[tuple[int, float]] = deque()
        self._first_ns: int | None = None
        self._heard_ns = NEVER_NS

    def heard(self, t_ns: int) -> None:
        """The BMS said something valid at t_ns."""
        self._heard_ns = max(self._heard_ns, t_ns)

    def heard_lately(self, t_ns: int) -> bool:
        """Return whether the BMS was heard within the last second, so that nothing can be said of silence."""
        return t_ns - self._heard_ns < NS_PER_S

    def step(self, t_ns: int, scalars: Mapping[str, float], touched: frozenset[str]) -> dict[str, Reading]:
        """Return readings of what moved: `touched` are the roles heard and believed just now."""
        readings: dict[str, Reading] = {role: Scalar(scalars[role]) for role in touched if role in scalars}
        if "soc" in touched and "soc" in scalars:
            readings["soc_jump"] = self._soc_jump(t_ns, scalars["soc"])
        if "pack_voltage" in touched:
            readings |= self._pack_voltage(t_ns, scalars)
        if "isolation_resistance" in touched:
            readings["isolation_per_volt"] = _per_volt(scalars)
        if "contactor_state" in touched or "contactor_command" in touched:
            readings["contactor_mismatch"] = _mismatch(scalars)
        return readings

    def silence(self, t_ns: int, last: Mapping[str, float]) -> Scalar:
        """Return how long the BMS has been silent, 0 while the vehicle sleeps. last: last known values."""
        self._first_ns = t_ns if self._first_ns is None else self._first_ns
        ignition, charging = last.get("ignition"), last.get("charging_state")
        awake = (
            ignition is None or ignition >= IGNITION_ON or (charging is not None and charging >= CHARGING_AC)
        )
        if self._heard_ns == NEVER_NS and ignition is None:
            return NOTHING  # nobody says that there is a vehicle at all
        if not awake:
            self._first_ns = t_ns
            return Scalar(0.0)
        return Scalar(max(0.0, (t_ns - max(self._heard_ns, self._first_ns)) / NS_PER_S))

    def lost(self, series: Series, t_ns: int) -> Reading:
        """Return for each item of a series how long ago its last valid value is; 0 if it was never heard.

        Unknown while less than half of the series is heard: then it is the BMS that is silent.
        """
        taken_ns = self._pack.t_ns[series.slots]
        ever = taken_ns != NEVER_NS
        fresh = taken_ns >= t_ns - series.stale_ns
        if not ever.any() or np.count_nonzero(fresh) * 2 < np.count_nonzero(ever):
            return NOTHING
        return items(np.where(ever, (t_ns - taken_ns) / NS_PER_S, 0.0))

    def _soc_jump(self, t_ns: int, soc: float) -> Scalar:
        socs = self._socs
        if socs and (t_ns < socs[-1][0] or t_ns - socs[-1][0] > SOC_JUMP_WINDOW_NS):
            socs.clear()  # after a gap the change may be real
        if not socs or t_ns - socs[-1][0] >= SOC_JUMP_STEP_NS:
            socs.append((t_ns, soc))
        while t_ns - socs[0][0] > SOC_JUMP_WINDOW_NS:
            socs.popleft()
        before = max((was for _, was in socs), key=lambda was: abs(soc - was))
        return Scalar(
            abs(soc - before), detail=lambda _: f"from {before:.1f} to {soc:.1f} percent within 5 s"
        )

    def _pack_voltage(self, t_ns: int, scalars: Mapping[str, float]) -> dict[str, Reading]:
        pack_v = scalars.get("pack_voltage")
        if pack_v is None or not self._cells_in_series or pack_v < PACK_VOLTAGE_MIN_V:
            return {"pack_voltage_per_cell": NOTHING, "pack_voltage_mismatch": NOTHING}
        readings: dict[str, Reading] = {"pack_voltage_per_cell": Scalar(pack_v / self._cells_in_series)}
        if len(self._pack.cells) == self._cells_in_series:
            cell_v, known = self._pack.known(self._pack.cells, t_ns)
            sum_v = float(cell_v.sum()) if known.all() else np.nan
            readings["pack_voltage_mismatch"] = (
                Scalar(
                    abs(sum_v - pack_v) / pack_v * 100.0,
                    detail=lambda _: f"pack {pack_v:.1f} V, cells {sum_v:.1f} V",
                )
                if sum_v == sum_v
                else NOTHING
            )
        return readings


def _per_volt(scalars: Mapping[str, float]) -> Scalar:
    resistance, pack_v = scalars.get("isolation_resistance"), scalars.get("pack_voltage")
    if resistance is None or pack_v is None or pack_v < PACK_VOLTAGE_MIN_V:
        return NOTHING
    return Scalar(resistance * 1000.0 / pack_v, detail=lambda _: f"{resistance:.0f} kOhm at {pack_v:.0f} V")


def _mismatch(scalars: Mapping[str, float]) -> Scalar:
    command, state = scalars.get("contactor_command"), scalars.get("contactor_state")
    if command is None or state is None:
        return NOTHING
    wrong = state != CONTACTOR_CLOSED if command else state >= CONTACTOR_PRECHARGE
    return Scalar(
        float(wrong),
        NO_ITEM,
        detail=lambda _: f"commanded {'closed' if command else 'open'}, state {state:.0f}",
    )
