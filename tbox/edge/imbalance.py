"""How the cells of a series stand against each other: spread, sigma, sudden drops, slow drift. No alarms.

All of it is vectors over the series; the healthy path has no Python for a single cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from tbox.edge.readings import NOTHING, Floats, Items, Reading, Scalar, items
from tbox.model import NS_PER_MS, NS_PER_S

# OVMS discards a series whose mean moved by more than this since the one before: the load is changing.
GRADIENT_V_MAX = 0.010
# A cell's usual place in its series, for sudden drops: followed with this time constant, but never faster
# than the rate, so that neither a spike nor the drop itself becomes usual while it is looked at.
DROP_BASE_S = 30.0
DROP_BASE_V_PER_S_MAX = 0.001
# Drift: where a cell stands is learnt first, then followed very slowly (balancing moves it over days).
DRIFT_LEARN_S = 30.0
DRIFT_LESSON_V_MAX = 0.020  # what one look may teach: a fault meanwhile must not become the usual
DRIFT_BASE_S = 24 * 3600.0
# What a cell may depart from its place before the CUSUM counts: balancing holds 10 mV (LibreSolar), and
# five sigma of all departures, which grow together with load, cold and a low state of charge. The few worst
# are left out of the sigma, or in a short series a sick cell would excuse itself.
DRIFT_ALLOWED_V = 0.010
DRIFT_ALLOWED_SIGMAS = 5.0
DRIFT_WORST_SHARE = 1 / 48  # and at least two, of a series of eight or more
DRIFT_FADE_S = 60.0  # a cell back in its place is forgiven with this time constant
DRIFT_CUSUM_VS_MAX = 36.0  # 600 mV*min: further the sum does not grow, so that it can come back
STEP_S_MAX = 2.0  # a gap in the data counts as no more than this
SLOW_NS = 900 * NS_PER_MS  # sigma and drift are looked at once a second
STILL_NS_MIN = 180 * NS_PER_MS  # what stands still, five times a second
GAP_S = 10.0  # after a longer one, what happened meanwhile is unknown
SERIES_MIN = 4  # fewer cells are no series to stand against


class Imbalance:
    """Follows one series of cells, scan by scan. names: what each cell is called.

    knee_v: below it nothing is learnt or counted of drift, for there healthy cells part too. ocv_v: the mean
    of the last scan, the load's sag added.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._done_ns: dict[str, int] = {}
        self._mean_v = np.nan
        self._base_v: Floats = np.full(len(names), np.nan)  # each cell's deviation, of late
        self._base_whole = False  # that of every cell is known
        self._place_v: Floats = np.full(len(names), np.nan)  # each cell's deviation, for long
        self._learnt_s = 0.0
        self._cusum_vs: Floats = np.zeros(len(names))
        self._last_v: Floats = np.full(len(names), np.nan)
        self._still = np.zeros(len(names))
        worst = max(min(2, len(names) // 4), int(len(names) * DRIFT_WORST_SHARE))
        self._usual = max(1, len(names) - worst)  # so many departures make the sigma of drift
        self.spread_v: float | None = None
        self.knee_v = -np.inf
        self.ocv_v = np.nan

    def step(
        self, t_ns: int, cell_v: Floats, known: npt.NDArray[np.bool_], sag_v: float = 0.0
    ) -> dict[str, Reading]:
        """Take a complete scan (V, and which are known); return a reading of each watch of cells.

        sag_v: what the load takes from each cell's voltage.
        """
        everything = bool(known.all())
        volts = cell_v if everything else np.where(known, cell_v, np.nan)
        cells = items(volts, both=True)
        if cells.high < 0:
            self.spread_v, self.ocv_v = None, np.nan
            return {"cell_voltage": cells, "cell_spread": NOTHING}
        self.spread_v = cells.highest - cells.lowest
        readings: dict[str, Reading] = {
            "cell_voltage": cells,
            "cell_spread": Scalar(self.spread_v, cells.low, detail=self._spread_text(cells)),
        }
        if self._due(t_ns, "still", STILL_NS_MIN) is not None:
            readings["cell_still"] = self._standing(volts)
        if (len(volts) if everything else int(known.sum())) >= SERIES_MIN:
            mean_v = float(np.add.reduce(volts)) / len(volts) if everything else float(cell_v[known].mean())
            self.ocv_v = mean_v + sag_v
            readings |= self._against_series(t_ns, volts - mean_v, mean_v, everything)
        return readings

    def _standing(self, volts: Floats) -> Items:
        """Count the scans in which most cells moved and one stood still to the last digit."""
        moved = volts != self._last_v  # NaN moves too: what is unknown is not stuck
        self._last_v = volts
        if np.count_nonzero(moved) * 2 >= len(volts):
            self._still += 1.0
        self._still[moved] = 0.0
        return items(self._still.copy())

    def _spread_text(self, cells: Items) -> Callable[[int], str]:
        def text(_: int) -> str:
            low, high = self._names[cells.low], self._names[cells.high]
            return f"{low} {cells.lowest:.3f} V, {high} {cells.highest:.3f} V"

        return text

    def _against_series(
        self, t_ns: int, deviation_v: Floats, mean_v: float, everything: bool
    ) -> dict[str, Reading]:
        readings: dict[str, Reading] = {}
        step_s = self._due(t_ns, "drop", 0)
        if step_s is not None:
            readings["cell_drop"] = self._drop(deviation_v, step_s, everything)
        step_s = self._due(t_ns, "slow", SLOW_NS)
        if step_s is not None:
            steady = abs(mean_v - self._mean_v) <= GRADIENT_V_MAX and step_s < GAP_S
            self._mean_v = mean_v
            readings["cell_deviation"] = self._sigma(deviation_v, everything) if steady else NOTHING
            readings["cell_drift"] = self._drift(deviation_v, min(step_s, STEP_S_MAX), everything)
        return readings

    def _due(self, t_ns: int, what: str, period_ns: int) -> float | None:
        """Return the seconds since `what` was last done if that is at least its period, else None."""
        last_ns = self._done_ns.get(what)
        if last_ns is not None and 0 <= t_ns - last_ns < period_ns:
            return None
        self._done_ns[what] = t_ns
        return GAP_S if last_ns is None else max(0.0, (t_ns - last_ns) / NS_PER_S)

    def _sigma(self, deviation_v: Floats, everything: bool) -> Items:
        sigma_v = _sigma_of(deviation_v, everything)

        def text(cell: int) -> str:
            return f"{deviation_v[cell] * 1000:+.0f} mV from the mean, sigma {sigma_v * 1000:.1f} mV"

        return items(np.abs(deviation_v) - sigma_v, text)

    def _drop(self, deviation_v: Floats, step_s: float, everything: bool) -> Items:
        """How far each cell has fallen below its usual place of late."""
        if step_s >= GAP_S or not self._base_whole:
            fresh = np.isnan(self._base_v) | (step_s >= GAP_S)
            self._base_v = np.where(fresh, deviation_v, self._base_v)
            self._base_whole = everything
        dropped = self._base_v - deviation_v
        most_v = DROP_BASE_V_PER_S_MAX * step_s
        moved = np.clip(dropped * -min(1.0, step_s / DROP_BASE_S), -most_v, most_v)
        self._base_v = self._base_v + (moved if everything else np.where(np.isnan(moved), 0.0, moved))
        return items(dropped)

    def _drift(self, deviation_v: Floats, step_s: float, everything: bool) -> Reading:
        """One-sided CUSUM (Page) of each cell's distance from where it used to stand."""
        if self.ocv_v < self.knee_v:
            return NOTHING
        fresh = np.isnan(self._place_v)
        if fresh.any():
            self._place_v = np.where(fresh, deviation_v, self._place_v)
        departed_v = deviation_v - self._place_v
        departed_v = departed_v if everything else np.where(np.isnan(departed_v), 0.0, departed_v)
        if self._learnt_s < DRIFT_LEARN_S:
            self._learnt_s += step_s
            lesson_v = np.clip(departed_v, -DRIFT_LESSON_V_MAX, DRIFT_LESSON_V_MAX)
            self._place_v = self._place_v + lesson_v * (step_s / max(self._learnt_s, step_s, 1e-9))
            return NOTHING
        distance_v = np.abs(departed_v)
        usual_v = np.partition(distance_v, self._usual - 1)[: self._usual]
        allowed_v = max(DRIFT_ALLOWED_V, DRIFT_ALLOWED_SIGMAS * _sigma_of(usual_v, True))
        excess_v = distance_v - allowed_v
        inside = excess_v <= 0.0
        self._cusum_vs += np.where(inside, -self._cusum_vs * (step_s / DRIFT_FADE_S), excess_v * step_s)
        np.minimum(self._cusum_vs, DRIFT_CUSUM_VS_MAX, out=self._cusum_vs)
        self._place_v = self._place_v + departed_v * (step_s / DRIFT_BASE_S)

        def text(cell: int) -> str:
            return f"{departed_v[cell] * 1000:+.0f} mV from its place, {allowed_v * 1000:.0f} mV allowed"

        return items(self._cusum_vs.copy(), text)


def _sigma_of(deviation_v: Floats, everything: bool) -> float:
    if not everything:
        deviation_v = deviation_v[~np.isnan(deviation_v)]
    return float(np.sqrt(np.dot(deviation_v, deviation_v) / len(deviation_v)))
