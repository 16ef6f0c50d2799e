"""Own estimates of state of charge and health, held against the BMS's. Never replaces the BMS's figures.

SOC: coulomb counting, corrected by the open-circuit voltage (OCV) whenever the pack rests. What was believed
when the rest began is weighed against its best look at the voltage, over the whole curve (Bayes): on LFP's
plateau a voltage says next to nothing, and beside a knee it says more to one side (the sigma then stays wide,
honestly).
SOH: a scalar Kalman filter on the capacity, fed with the charge that flowed between two long rests and the
SOC their voltages differ by.
Current is positive into the battery; SOC and SOH in percent.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from tbox.edge.mode import Context
from tbox.model import NS_PER_S, Draft, Level, Now, PackSnapshot

# Percent SOC and volts of a cell at rest, typical of large automotive cells at 25 degC. A pack whose cells
# differ gives its own in the settings.
OCV_V: dict[str, tuple[tuple[float, float], ...]] = {
    "nmc": (
        (0, 3.000), (2, 3.200), (5, 3.350), (10, 3.450), (15, 3.510), (20, 3.550), (30, 3.610), (40, 3.650),
        (50, 3.705), (60, 3.790), (70, 3.885), (80, 3.980), (90, 4.085), (100, 4.200),
    ),
    "lfp": (
        (0, 2.500), (2, 2.850), (5, 3.050), (10, 3.195), (15, 3.225), (20, 3.250), (30, 3.283), (40, 3.293),
        (50, 3.298), (60, 3.310), (70, 3.329), (80, 3.334), (90, 3.338), (95, 3.360), (98, 3.430),
        (100, 3.600),
    ),
}  # fmt: skip

# A cell's resistances scale with its size: volts at a current of 1 C. The relaxation is one exponential.
OHMIC_V_PER_C = 0.085
POLARISATION_V_PER_C = 0.06
RELAX_S = 40.0
MODEL_ERROR = 0.5  # how far these are believed: temperature and age move them by this share
UNKNOWN_PAST_C = 0.5  # the current that may have flowed before the first look

REST_C = 0.05  # below this a pack rests: 12 V supply and climate, not driving
OCV_ERROR_V = 0.005  # of the curve itself, the same at every look
VOLT_NOISE_V = 0.002  # of the mean of the cells, after quantisation
CURRENT_GAIN_ERROR = 0.01
CORRECT_EVERY_NS = NS_PER_S
GAP_NS_MAX = 5 * NS_PER_S  # a longer silence: what flowed in it is unknown
GAP_POINTS_PER_S = 100 * 0.02 / 3600  # the SOC sigma it adds: 0.02 C
SOC_SIGMA_MIN, SOC_SIGMA_MAX = 0.3, 30.0  # points
SOC_GRID = np.linspace(0.0, 100.0, 1001)  # finer than the least sigma

ANCHOR_REST_NS = 300 * NS_PER_S
ANCHOR_SIGMA_MAX = 1.5  # points
ANCHOR_DELTA_MIN = 15.0  # points between two anchors
ANCHOR_THROUGHPUT_MAX = 3.0  # capacities; the current's error grows with what flowed

SOH_FIRST_SIGMA = 10.0
SOH_DRIFT_PER_CYCLE = 0.5  # points of sigma that a full cycle adds: a pack ages, and the filter must follow
SOH_MIN, SOH_MAX = 30.0, 120.0

Points = Annotated[float, msgspec.Meta(gt=0, le=100)]


class EstimatorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The pack's capacity and open-circuit curve, and how far the BMS may be off before it is told."""

    chemistry: Literal["nmc", "lfp"] = "nmc"
    capacity_ah: Annotated[float, msgspec.Meta(gt=0, le=10_000)] = 110.0  # of the new pack
    ocv_percent_v: tuple[tuple[float, float], ...] = ()  # instead of the chemistry's own curve
    soc_first_sigma: Points = 10.0  # how far the BMS's SOC is believed at first
    soc_divergence_points: Points = 5.0
    soh_divergence_points: Points = 5.0
    divergence_for_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 60.0

    def __post_init__(self) -> None:
        curve = self.ocv_percent_v
        rising = all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(curve))
        if curve and not (len(curve) > 1 and rising):
            raise ValueError("ocv_percent_v must hold two or more pairs, both rising")


class OcvCurve:
    """Open-circuit voltage of a cell against its SOC in percent, both rising."""

    def __init__(self, points: tuple[tuple[float, float], ...]) -> None:
        table = np.array(points, dtype=np.float64)
        self._percent, self._v = table[:, 0], table[:, 1]
        self._grid_v = np.interp(SOC_GRID, self._percent, self._v)

    def weigh(self, volts: float, sigma_v: float, percent: float, sigma: float) -> tuple[float, float]:
        """Return SOC and its sigma, of a belief (percent, sigma) that learns of a voltage at rest.

        The likeliest SOC, not the mean: beside a knee most of what fits lies out on the plateau, and a belief
        that was right would be led there.
        """
        doubt = ((self._grid_v - volts) / sigma_v) ** 2 + ((SOC_GRID - percent) / sigma) ** 2
        weight = np.exp((doubt.min() - doubt) / 2)
        weight /= weight.sum()
        likeliest = float(SOC_GRID[doubt.argmin()])
        return likeliest, max(math.sqrt(float(weight @ (SOC_GRID - likeliest) ** 2)), SOC_SIGMA_MIN)

    def percent(self, volts: float, sigma_v: float) -> tuple[float, float]:
        """Return SOC and its sigma, from where the curve lies two sigmas to either side of the voltage."""
        low, high = np.interp([volts - 2 * sigma_v, volts + 2 * sigma_v], self._v, self._percent)
        return float(low + high) / 2, max(float(high - low) / 4, SOC_SIGMA_MIN)


class SocFilter:
    """State of charge of the mean cell. `step` with every current, at least every GAP_NS_MAX."""

    def __init__(self, curve: OcvCurve, capacity_ah: float, percent: float, sigma: float) -> None:
        self._curve = curve
        self.capacity_ah = capacity_ah
        self.percent, self.sigma = percent, sigma
        self._t_ns: int | None = None
        self._current_a = 0.0
        self._polarised_a = 0.0  # the current, as slow as the relaxation
        self._past_a = UNKNOWN_PAST_C * capacity_ah  # what of it is not known; decays
        self._before: tuple[float, float] | None = None  # percent and sigma believed before this rest's looks
        self._moved = 0.0  # points counted since
        self._best_v = math.inf  # sigma of this rest's best look
        self.rest_since_ns: int | None = None
        self.ocv: tuple[float, float] | None = None  # SOC the voltage tells at this rest, and its sigma

    def step(self, mono_ns: int, current_a: float) -> float:
        """Count the charge since the last step; return it in Ah."""
        before_ns, self._t_ns = self._t_ns, mono_ns
        before_a, self._current_a = self._current_a, current_a
        if abs(current_a) > REST_C * self.capacity_ah:
            self.rest_since_ns, self.ocv, self._before = None, None, None
        elif self.rest_since_ns is None:
            self.rest_since_ns = mono_ns
        if before_ns is None:
            return 0.0
        dt_s = (mono_ns - before_ns) / NS_PER_S
        decay = math.exp(-dt_s / RELAX_S)
        self._past_a *= decay
        if mono_ns - before_ns > GAP_NS_MAX:
            self._polarised_a *= decay
            self._widen(GAP_POINTS_PER_S * dt_s)
            return 0.0
        mean_a = (before_a + current_a) / 2
        self._polarised_a = self._polarised_a * decay + mean_a * (1 - decay)
        ah = mean_a * dt_s / 3600
        moved = 100 * ah / self.capacity_ah
        self.percent = min(max(self.percent + moved, 0.0), 100.0)
        self._moved += moved
        self._widen(CURRENT_GAIN_ERROR * abs(moved))
        return ah

    def _widen(self, points: float) -> None:
        self.sigma = min(self.sigma + points, SOC_SIGMA_MAX)

    def look(self, cell_v: float) -> None:
        """Correct by the mean cell's voltage, if the pack rests; of each rest its best look counts."""
        if self.rest_since_ns is None:
            return
        per_a = 1 / self.capacity_ah
        ohmic = OHMIC_V_PER_C * self._current_a * per_a
        polarised = POLARISATION_V_PER_C * self._polarised_a * per_a
        unknown = POLARISATION_V_PER_C * self._past_a * per_a
        sigma_v = math.hypot(MODEL_ERROR * (abs(ohmic) + abs(polarised)) + unknown, VOLT_NOISE_V)
        rest_v = cell_v - ohmic - polarised
        look_v = math.hypot(sigma_v, OCV_ERROR_V)
        self.ocv = self._curve.percent(rest_v, look_v)
        if self._before is None:
            self._before, self._moved, self._best_v = (self.percent, self.sigma), 0.0, math.inf
        if look_v >= self._best_v:
            return
        self._best_v = look_v
        percent, sigma = self._before
        floor = self._curve.percent(rest_v, OCV_ERROR_V)[1]
        self.percent, self.sigma = self._curve.weigh(rest_v, look_v, percent + self._moved, sigma)
        self.sigma = max(self.sigma, min(floor, sigma))


class SohFilter:
    """State of health as the share of the new pack's capacity, from pairs of long rests (anchors)."""

    def __init__(self, capacity_ah: float) -> None:
        self._new_ah = capacity_ah
        self.percent, self.sigma = 100.0, SOH_FIRST_SIGMA
        self.pairs = 0
        self._anchor: tuple[float, float] | None = None  # SOC by OCV, its sigma
        self._ah = self._throughput_ah = 0.0  # since the anchor

    @property
    def capacity_ah(self) -> float:
        return self._new_ah * self.percent / 100

    def count(self, ah: float) -> None:
        self._ah += ah
        self._throughput_ah += abs(ah)

    def forget(self) -> None:
        """What flowed is not known: the anchor is worth nothing now."""
        self._anchor = None

    def anchor(self, percent: float, sigma: float) -> None:
        """Take a long rest's SOC; with an anchor far enough away it measures the capacity."""
        if sigma > ANCHOR_SIGMA_MAX:
            return
        if self._anchor is not None:
            delta = percent - self._anchor[0]
            if abs(delta) >= ANCHOR_DELTA_MIN:
                self._measure(delta, math.hypot(sigma, self._anchor[1]))
            elif self._throughput_ah < ANCHOR_THROUGHPUT_MAX * self._new_ah:
                return
        self._anchor = percent, sigma
        self._ah = self._throughput_ah = 0.0

    def _measure(self, delta: float, delta_sigma: float) -> None:
        soh = 100 * (self._ah / self._new_ah) / (delta / 100)
        if not SOH_MIN <= soh <= SOH_MAX:
            return
        share = float(
            math.hypot(delta_sigma / abs(delta), CURRENT_GAIN_ERROR * self._throughput_ah / abs(self._ah))
        )
        cycles = self._throughput_ah / (2 * self._new_ah)
        variance, noise = self.sigma**2 + SOH_DRIFT_PER_CYCLE**2 * cycles, (soh * share) ** 2
        gain = variance / (variance + noise)
        self.percent += gain * (soh - self.percent)
        self.sigma = max(math.sqrt((1 - gain) * variance), 100 * CURRENT_GAIN_ERROR)
        self.pairs += 1


class Estimators:
    """SOC and SOH beside the BMS's; an event when they part for long, and when they agree again."""

    def __init__(self, settings: EstimatorSettings | None = None) -> None:
        self._settings = settings or EstimatorSettings()
        self._curve = OcvCurve(self._settings.ocv_percent_v or OCV_V[self._settings.chemistry])
        self._soc: SocFilter | None = None
        self._soh = SohFilter(self._settings.capacity_ah)
        self._last_ns: int | None = None
        self._look_ns = 0
        self._anchored_ns: int | None = None  # the rest that was taken as an anchor
        self._parted = {"soc": _Parting(), "soh": _Parting()}

    def step(self, now: Now, snapshot: PackSnapshot, context: Context) -> list[Draft]:
        """Return an event when own and BMS figures part for long, and when they agree again."""
        current_a = snapshot.scalars.get("pack_current")
        if current_a is None:
            return []
        soc = self._soc or self._first(snapshot)
        if soc is None:
            return []
        if (
            self._last_ns is not None
            and now.mono_ns - self._last_ns > GAP_NS_MAX
            and soc.rest_since_ns is None
        ):
            self._soh.forget()
        self._last_ns = now.mono_ns
        self._soh.count(soc.step(now.mono_ns, current_a))
        if now.mono_ns - self._look_ns < CORRECT_EVERY_NS:
            return []
        self._look_ns = now.mono_ns
        cells = snapshot.cell_v[snapshot.cell_ok]
        if len(cells) and 2 * len(cells) >= len(snapshot.cell_v):
            soc.look(float(cells.mean()))
            self._take_anchor(now, soc)
        return self._compare(now, snapshot.scalars, context)

    def _first(self, snapshot: PackSnapshot) -> SocFilter | None:
        percent = snapshot.scalars.get("soc")
        if percent is None:
            return None
        sigma = self._settings.soc_first_sigma
        self._soc = SocFilter(self._curve, self._settings.capacity_ah, percent, sigma)
        return self._soc

    def _take_anchor(self, now: Now, soc: SocFilter) -> None:
        """Take a rest once, when it is long enough for the cells to have relaxed."""
        since_ns = soc.rest_since_ns
        if since_ns is None or soc.ocv is None or since_ns == self._anchored_ns:
            return
        if now.mono_ns - since_ns < ANCHOR_REST_NS:
            return
        self._anchored_ns = since_ns
        self._soh.anchor(*soc.ocv)
        soc.capacity_ah = self._soh.capacity_ah

    def _compare(self, now: Now, scalars: dict[str, float], context: Context) -> list[Draft]:
        assert self._soc is not None
        settings = self._settings
        drafts = []
        for name, own, limit in (
            ("soc", self._soc, settings.soc_divergence_points),
            ("soh", self._soh if self._soh.pairs else None, settings.soh_divergence_points),
        ):
            bms = scalars.get(name)
            if bms is None or own is None:
                continue
            off = abs(own.percent - bms)
            wide = limit + 2 * own.sigma
            change = self._parted[name].step(
                now.mono_ns, off > wide, off < wide / 2, settings.divergence_for_s
            )
            if change is not None:
                drafts.append(Draft("event", Level.WARNING if change else Level.INFO, now.mono_ns, {
                    "event": f"{name}_divergence" if change else f"{name}_agreement",
                    "own_percent": round(own.percent, 2),
                    "own_sigma": round(own.sigma, 2),
                    "bms_percent": bms,
                    "context": context.body(),
                }))  # fmt: skip
        return drafts

    def status(self) -> dict[str, Any]:
        """Return soc_percent, soc_sigma, soh_percent, soh_sigma and capacity_ah, None while unknown."""
        soc, soh = self._soc, self._soh if self._soh.pairs else None
        return {
            "soc_percent": None if soc is None else round(soc.percent, 2),
            "soc_sigma": None if soc is None else round(soc.sigma, 2),
            "soh_percent": None if soh is None else round(soh.percent, 2),
            "soh_sigma": None if soh is None else round(soh.sigma, 2),
            "capacity_ah": None if soh is None else round(soh.capacity_ah, 2),
        }


class _Parting:
    """Whether two figures have parted: after a time outside, until they are well inside again."""

    def __init__(self) -> None:
        self._parted = False
        self._since_ns: int | None = None

    def step(self, mono_ns: int, outside: bool, inside: bool, for_s: float) -> bool | None:
        """Return True when they have parted, False when they agree again, None while nothing changed."""
        if not (inside if self._parted else outside):
            self._since_ns = None
            return None
        if self._since_ns is None:
            self._since_ns = mono_ns
        if mono_ns - self._since_ns < for_s * NS_PER_S:
            return None
        self._parted, self._since_ns = not self._parted, None
        return self._parted
