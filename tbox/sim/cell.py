"""Cells as one-RC equivalent circuits, all of a pack at once in numpy. Knows no bus, no sensors, no faults.

Terminal voltage = OCV(SOC) + I * R0(T) + U1, where U1 follows I * R1 with the time constant tau.
Current is positive into the cell throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

KELVIN = 273.15
REFERENCE_C = 25.0
# How steeply resistance grows in the cold: Arrhenius with about 20 kJ/mol, doubling from 25 to 0 degC.
RESISTANCE_ACTIVATION_K = 2400.0


@dataclass(frozen=True, slots=True)
class Chemistry:
    """What a cell is made of. ocv_v over soc (both rising); resistances at 25 degC, mid SOC, of a new cell.

    Figures are typical of large automotive cells of about 110 Ah; v_min and v_max as in FACTS, Thresholds.
    """

    name: str
    soc: Floats
    ocv_v: Floats
    v_min: float
    v_max: float
    capacity_ah: float
    r0_ohm: float
    r1_ohm: float
    tau_s: float


def _curve(points: list[tuple[float, float]]) -> tuple[Floats, Floats]:
    table = np.array(points, dtype=np.float64)
    return table[:, 0], table[:, 1]


_NMC_SOC, _NMC_OCV = _curve([
    (0.00, 3.000), (0.02, 3.200), (0.05, 3.350), (0.10, 3.450), (0.15, 3.510), (0.20, 3.550), (0.30, 3.610),
    (0.40, 3.650), (0.50, 3.705), (0.60, 3.790), (0.70, 3.885), (0.80, 3.980), (0.90, 4.085), (1.00, 4.200),
])  # fmt: skip
_LFP_SOC, _LFP_OCV = _curve([
    (0.00, 2.500), (0.02, 2.850), (0.05, 3.050), (0.10, 3.195), (0.15, 3.225), (0.20, 3.250), (0.30, 3.283),
    (0.40, 3.293), (0.50, 3.298), (0.60, 3.310), (0.70, 3.329), (0.80, 3.334), (0.90, 3.338), (0.95, 3.360),
    (0.98, 3.430), (1.00, 3.600),
])  # fmt: skip

NMC = Chemistry("NMC", _NMC_SOC, _NMC_OCV, 2.8, 4.25, 110.0, 0.00075, 0.00045, 25.0)
LFP = Chemistry("LFP", _LFP_SOC, _LFP_OCV, 2.8, 3.65, 110.0, 0.00085, 0.00050, 35.0)
CHEMISTRIES = {chemistry.name: chemistry for chemistry in (NMC, LFP)}


def ocv_v(chemistry: Chemistry, soc: Floats) -> Floats:
    """Return the open-circuit voltage at a state of charge 0..1, held at the ends beyond them."""
    return np.interp(soc, chemistry.soc, chemistry.ocv_v)


class Cells:
    """The electrical state of n cells in series. Arrays are (n,)."""

    def __init__(
        self, chemistry: Chemistry, soc: Floats, capacity_ah: Floats, r0_ohm: Floats, r1_ohm: Floats
    ) -> None:
        self.chemistry = chemistry
        self.soc = soc.copy()
        self.capacity_ah = capacity_ah.copy()
        self.r0_ohm = r0_ohm.copy()
        self.r1_ohm = r1_ohm.copy()
        self.u1_v = np.zeros_like(soc)
        self.ocv_v = ocv_v(chemistry, self.soc)
        self._warmth_c = np.full_like(soc, np.nan)
        self._factor = np.ones_like(soc)

    def resistance_factor(self, temperature_c: Floats) -> Floats:
        """Return R(T)/R(25 degC); computed anew only when some cell moved by a tenth of a degree."""
        moved = np.abs(temperature_c - self._warmth_c)
        if not moved.max() < 0.1:
            kelvin = np.clip(temperature_c, -40.0, 120.0) + KELVIN
            inverse = 1.0 / kelvin - 1.0 / (REFERENCE_C + KELVIN)
            self._factor = np.exp(RESISTANCE_ACTIVATION_K * inverse)
            self._warmth_c = temperature_c.copy()
        return self._factor

    def step(self, current_a: Floats, temperature_c: Floats, dt_s: float) -> tuple[Floats, Floats]:
        """Advance by dt_s under current_a (n,), constant over it; return terminal volts and joule watts."""
        factor = self.resistance_factor(temperature_c)
        decay = np.exp(-dt_s / self.chemistry.tau_s)
        self.u1_v *= decay
        self.u1_v += (1.0 - decay) * (current_a * (self.r1_ohm * factor))
        self.soc += current_a * (dt_s / 3600.0) / self.capacity_ah
        np.clip(self.soc, 0.0, 1.02, out=self.soc)
        self.ocv_v = ocv_v(self.chemistry, self.soc)
        r0_ohm, r1_ohm = self.r0_ohm * factor, self.r1_ohm * factor
        volts = self.ocv_v + current_a * r0_ohm + self.u1_v
        return volts, current_a * current_a * r0_ohm + self.u1_v * self.u1_v / r1_ohm

    def solve_current(self, power_w: float, temperature_c: Floats) -> float:
        """Return the current (A, positive in) that takes power_w (positive in) at the pack's terminals.

        Solves P = I * (U + I * R) for the sums over the pack; where the pack cannot give that much, the
        current of its greatest power.
        """
        source_v = float((self.ocv_v + self.u1_v).sum())
        resistance = float((self.r0_ohm * self.resistance_factor(temperature_c)).sum())
        inside = source_v * source_v + 4.0 * resistance * power_w
        if inside <= 0.0:
            return -source_v / (2.0 * resistance)
        return float((-source_v + np.sqrt(inside)) / (2.0 * resistance))
