"""Temperatures: extremes, spread, slope, sensors that lie, and the thermal-runaway condition. No alarms."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tbox.edge.readings import NO_ITEM, NOTHING, Floats, Items, Reading, Scalar, items
from tbox.model import NS_PER_MS, NS_PER_S

# The slope is a least-squares line over this time: 0.1 degC of noise at 5 Hz then leaves 0.05 degC/s, and one
# step of a 1 degC sensor at most 0.75 degC/s.
SLOPE_WINDOW_NS = 2 * NS_PER_S
SLOPE_ROWS_MIN = 3  # probes sent slower than 1 Hz get a longer window, of so many scans
SLOPE_ROW_NS_MIN = 180 * NS_PER_MS
SLOPE_GAP_NS_MAX = 30 * NS_PER_S
# A cell's "initial value" of the runaway rule: its highest in the last five minutes.
COLLAPSE_STEP_NS = 30 * NS_PER_S
COLLAPSE_STEPS = 10
# A collapsed cell often stops being readable; what was seen still counts for this long.
COLLAPSE_REMEMBERED_NS = 60 * NS_PER_S
NEAR_C_PER_S = 0.5  # half the slope of the runaway condition: from here on time may become short
# A pack has hot spots but no cold ones: a probe so far below the median (as rule probe-open has it) is open
# or broken, and its degrees are none. If more than this share of them are, the pack itself may be so.
OPEN_K = 20.0
OPEN_SHARE_MAX = 1 / 8


class Thermal:
    """Follows the probes, scan by scan. names: what each probe is called."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._rows: deque[tuple[int, Floats]] = deque()
        self._last: Floats = np.full(len(names), np.nan)
        self._still = np.zeros(len(names))
        self._median_at_move: Floats = np.full(len(names), np.nan)
        self.hottest_c: float | None = None
        self.rise: Floats | None = None  # degC/s, NaN where unknown

    def step(self, t_ns: int, probe_c: Floats, known: npt.NDArray[np.bool_]) -> dict[str, Reading]:
        """Take a complete scan (degC, and which are known); return a reading of each watch of probes."""
        degrees = probe_c if known.all() else np.where(known, probe_c, np.nan)
        probes = items(degrees, both=True)
        if probes.high < 0:
            self.hottest_c = None
            return {"probe_temperature": probes, "temperature_spread": NOTHING}
        self.hottest_c = probes.highest
        median_c = _median(degrees if probe_c is degrees else probe_c[known])
        likely = degrees
        if median_c - probes.lowest >= OPEN_K:
            likely = _without_open(degrees, median_c)
            probes = items(likely, both=True)
        self.rise = self._slope(t_ns, likely)
        spread = probes.highest - probes.lowest
        return {
            "probe_temperature": probes,
            "temperature_spread": Scalar(spread, probes.high, detail=self._spread_text(probes)),
            "probe_rise": NOTHING if self.rise is None else items(self.rise),
            "probe_cold": items(median_c - degrees),
            **self._standing(degrees, median_c),
        }

    def _spread_text(self, probes: Items) -> Callable[[int], str]:
        def text(_: int) -> str:
            low, high = self._names[probes.low], self._names[probes.high]
            return f"{low} {probes.lowest:.1f} degC, {high} {probes.highest:.1f} degC"

        return text

    def _slope(self, t_ns: int, degrees: Floats) -> Floats | None:
        rows = self._rows
        if rows and (t_ns < rows[-1][0] or t_ns - rows[-1][0] > SLOPE_GAP_NS_MAX):
            rows.clear()
        if rows and t_ns - rows[-1][0] < SLOPE_ROW_NS_MIN:
            return self.rise
        rows.append((t_ns, degrees))
        while len(rows) > SLOPE_ROWS_MIN and t_ns - rows[1][0] >= SLOPE_WINDOW_NS:
            rows.popleft()
        if len(rows) < SLOPE_ROWS_MIN or t_ns - rows[0][0] < SLOPE_WINDOW_NS // 2:
            return None
        times_s = (np.array([at for at, _ in rows], dtype=np.int64) - t_ns) / NS_PER_S
        centred = times_s - times_s.mean()
        slope: Floats = (centred / np.dot(centred, centred)) @ np.stack([row for _, row in rows])
        return slope

    def _standing(self, degrees: Floats, median_c: float) -> dict[str, Reading]:
        """Find probes that stand still to the last digit while the others move."""
        moved = degrees != self._last  # NaN moves too: what is unknown is not stuck
        self._last = degrees
        self._median_at_move[moved] = median_c
        if np.count_nonzero(moved) * 2 >= len(degrees):
            self._still += 1.0
        self._still[moved] = 0.0
        return {
            "probe_still": items(self._still.copy()),
            "probe_lag": items(np.abs(median_c - self._median_at_move)),
        }


def _without_open(degrees: Floats, median_c: float) -> Floats:
    """Return the probes with those NaN that read what no cell can be."""
    is_open = median_c - degrees >= OPEN_K
    if np.count_nonzero(is_open) > max(1, int(len(degrees) * OPEN_SHARE_MAX)):
        return degrees
    return np.where(is_open, np.nan, degrees)


def _median(values: Floats) -> float:
    """Return the upper median; exact halves do not matter here, and it is ten times quicker."""
    return float(np.partition(values, len(values) // 2)[len(values) // 2])


class Runaway:
    """The condition of GB 38031-2025 C.5.3.7: a cell's voltage fell by more than its share, or a probe is
    over its limit; and a probe has risen fast for long enough. The slope alone never counts.

    params: voltage_drop (percent), temperature (degC), sustained (s). near: a probe rises fast just now.
    """

    def __init__(self, params: Mapping[str, float], cells: Sequence[str], probes: Sequence[str]) -> None:
        self._left = 1.0 - params["voltage_drop"] / 100.0
        self._temperature_c = params["temperature"]
        self._sustained_ns = int(params["sustained"] * NS_PER_S)
        self._cells, self._probes = cells, probes
        self.near = False
        self._highs: deque[tuple[int, Floats]] = deque(maxlen=COLLAPSE_STEPS)
        self._before: Floats = np.zeros(0)  # the highest of all but the last
        self._collapse: tuple[int, str] | None = None  # when it was last seen, and its text
        self._rises: deque[tuple[int, Floats]] = deque()

    def see_cells(self, t_ns: int, volts: Floats) -> None:
        """Take a scan of cell voltages, NaN where unknown."""
        if self._highs:
            initial = np.fmax(self._before, self._highs[-1][1])
            fallen = volts < initial * self._left
            if fallen.any():
                cell = int(np.flatnonzero(fallen)[0])
                text = f"{self._cells[cell]} collapsed from {initial[cell]:.2f} V to {volts[cell]:.2f} V"
                self._collapse = (t_ns, text)
        if not self._highs or t_ns - self._highs[-1][0] >= COLLAPSE_STEP_NS or t_ns < self._highs[-1][0]:
            self._before = np.fmax.reduce([high for _, high in self._highs][1 - COLLAPSE_STEPS :] or [volts])
            self._highs.append((t_ns, volts.copy()))
        else:
            at, high = self._highs[-1]
            self._highs[-1] = (at, np.fmax(high, volts))

    def see_probes(self, t_ns: int, degrees: Floats, rise: Floats | None) -> Scalar:
        """Take a scan of probes and their slopes; return the slope that lasted, 0 if nothing else is off."""
        self.near = rise is not None and bool((rise >= NEAR_C_PER_S).any())
        lasting = self._lasting(t_ns, rise)
        if lasting is None or lasting.high < 0:
            return NOTHING
        cause = self._cause(t_ns, degrees)
        if cause is None:
            return Scalar(0.0)
        probe = lasting.high
        return Scalar(float(lasting.values[probe]), probe, self._probes[probe], lambda _: cause)

    def _lasting(self, t_ns: int, rise: Floats | None) -> Items | None:
        """Return each probe's least slope over the sustained time, None until that much was seen."""
        if rise is None or (self._rises and t_ns < self._rises[-1][0]):
            self._rises.clear()
            return None
        if not self._rises or rise is not self._rises[-1][1]:
            self._rises.append((t_ns, rise))
        while len(self._rises) > 1 and t_ns - self._rises[1][0] >= self._sustained_ns:
            self._rises.popleft()
        if t_ns - self._rises[0][0] < self._sustained_ns:
            return None
        return items(np.minimum.reduce([row for _, row in self._rises]))

    def _cause(self, t_ns: int, degrees: Floats) -> str | None:
        if self._collapse and 0 <= t_ns - self._collapse[0] <= COLLAPSE_REMEMBERED_NS:
            return self._collapse[1]
        hot = items(degrees)
        if hot.high != NO_ITEM and degrees[hot.high] >= self._temperature_c:
            return f"{self._probes[hot.high]} is at {degrees[hot.high]:.1f} degC"
        return None
