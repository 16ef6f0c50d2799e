"""The battery pack's physics: cells in series, heat, coolant, isolation, and the faults that act on them.

No sensors and no frames here: what is in this file is the truth, and only the ECUs (with noise) and the
judge read it. Current and power are positive into the battery.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tbox.sim.cell import CHEMISTRIES, Cells, Chemistry, Floats, ocv_v
from tbox.sim.faults import Fault
from tbox.sim.layout import (
    CELLS,
    CELLS_PER_MODULE,
    MODULES,
    PROBES,
    PROBES_PER_MODULE,
)

CELLS_PER_PROBE = CELLS // PROBES

# Spread of a matched new pack (standard deviations). Its BMS balances at the top, where the voltage tells
# most, and holds the cells within 10 mV there (LibreSolar); below, each is as far down as its capacity says.
CAPACITY_SPREAD = 0.008
RESISTANCE_SPREAD = 0.03
BALANCED_V = 0.003
TOP_SOC = np.array([0.98, 1.0])

# Thermal nodes: each cell's core, each bus bar that carries a probe, and one coolant loop.
CELL_J_PER_K = 1900.0  # 1.9 kg at 1000 J/(kg K)
BAR_J_PER_K = 40.0
BAR_W_PER_K = 4.0  # a bus bar to its four cells: it follows them with a lag of 10 s
NEIGHBOUR_W_PER_K = 1.5
MODULE_GAP_W_PER_K = 0.2
COOLANT_W_PER_K = 1.2  # a cell to the coolant in its module
COOLANT_J_PER_K = 28_000.0
COOLANT_FLOW_W_PER_K = 525.0  # 0.15 kg/s: how much heat warms the coolant on its way by one kelvin
RADIATOR_W_PER_K = 250.0
CHILLER_ON_C, CHILLER_W_PER_K, CHILLER_W_MAX = 35.0, 400.0, 4000.0
HEATER_ON_C, HEATER_W_PER_K, HEATER_W_MAX = 5.0, 400.0, 3000.0

# A neighbour of a burning cell catches fire itself above this.
RUNAWAY_ONSET_C = 180.0
RUNAWAY_RISE_S = 3.0  # the reaction gathers pace over this
PROPAGATED_W, PROPAGATED_J, PROPAGATED_COLLAPSE_S = 60_000.0, 1_000_000.0, 4.0

ISOLATION_HEALTHY_KOHM = 5000.0


def _balanced_soc(made_of: Chemistry) -> float:
    """Return by how much of its charge a cell may be off (standard deviation) and count as balanced."""
    low_v, high_v = ocv_v(made_of, TOP_SOC)
    return float(BALANCED_V * (TOP_SOC[1] - TOP_SOC[0]) / (high_v - low_v))


def module_of_probe(probe: int) -> int:
    return probe // PROBES_PER_MODULE


class Pack:
    """State and one step of it. Arrays: cells (192,), probes (48,)."""

    def __init__(
        self,
        chemistry: str,
        *,
        soc: float,
        soh: float,
        temperature_c: float,
        capacity_ah: float | None,
        faults: Sequence[Fault],
        rng: np.random.Generator,
    ) -> None:
        made_of = CHEMISTRIES[chemistry]
        capacity = made_of.capacity_ah if capacity_ah is None else capacity_ah
        ageing = 1.0 + 2.0 * (1.0 - soh)  # resistance grows about twice as fast as capacity fades
        per_ah = made_of.capacity_ah / capacity  # a smaller cell has more resistance
        spread = 1.0 + RESISTANCE_SPREAD * rng.standard_normal(CELLS)
        unbalanced = _balanced_soc(made_of) * rng.standard_normal(CELLS)
        fit = 1.0 + CAPACITY_SPREAD * rng.standard_normal(CELLS)
        self.cells = Cells(
            made_of,
            soc=np.clip(1.0 - (1.0 - soc) / fit + unbalanced, 0.0, 1.0),
            capacity_ah=capacity * soh * fit,
            r0_ohm=made_of.r0_ohm * per_ah * ageing * spread,
            r1_ohm=made_of.r1_ohm * per_ah * ageing * spread,
        )
        self.soh = soh
        self.core_c = np.full(CELLS, temperature_c) + 0.3 * rng.standard_normal(CELLS)
        self.bar_c = self.core_c.reshape(PROBES, CELLS_PER_PROBE).mean(axis=1)
        self.coolant_c = temperature_c
        self.cell_v = self.cells.ocv_v.copy()
        self.current_a = 0.0
        self.isolation_kohm = ISOLATION_HEALTHY_KOHM
        self.joule_j = 0.0  # heat made by current in all cells so far, for the energy balance
        self._faults = tuple(fault for fault in faults if not fault.kind.bus)
        self._applied: set[Fault] = set()
        self._link_w_per_k = np.full(CELLS - 1, NEIGHBOUR_W_PER_K)
        self._link_w_per_k[CELLS_PER_MODULE - 1 :: CELLS_PER_MODULE] = MODULE_GAP_W_PER_K
        self._burn_age_s = np.full(CELLS, -1.0)  # < 0: intact
        self._burn_left_j = np.zeros(CELLS)
        self._burn_w = np.zeros(CELLS)
        self._collapse_s = np.ones(CELLS)
        self._burning = False

    @property
    def voltage_v(self) -> float:
        return float(self.cell_v.sum())

    @property
    def soc(self) -> float:
        """The usable state of charge, 0..1: what the weakest cell lets out of what fits in all."""
        cells = self.cells
        return float(cells.soc @ cells.capacity_ah / cells.capacity_ah.sum())

    def step(self, t_ns: int, dt_s: float, power_w: float, ambient_c: float, *, closed: bool) -> None:
        """Advance by dt_s to t_ns with power_w (positive in) at the terminals; none flows unless closed."""
        leak_a, cell_w, bar_w, coolant_share = self._act_faults(t_ns, closed=closed)
        self.current_a = self.cells.solve_current(power_w, self.core_c) if closed and power_w else 0.0
        through_a: Floats = self.current_a - leak_a
        volts, joule_w = self.cells.step(through_a, self.core_c, dt_s)
        self.joule_j += float(joule_w.sum()) * dt_s
        cell_w += joule_w + leak_a * volts  # what leaks inside stays inside, as heat
        if self._burning:
            volts = self._burn(volts, cell_w, dt_s)
        self.cell_v = volts
        self._heat(cell_w, bar_w, coolant_share, ambient_c, dt_s)

    def _act_faults(self, t_ns: int, *, closed: bool) -> tuple[Floats, Floats, Floats, Floats]:
        """Return leak (cells,) A, heat (cells,) W, heat (probes,) W and coolant share (modules,)."""
        leak_a, cell_w, bar_w = np.zeros(CELLS), np.zeros(CELLS), np.zeros(PROBES)
        coolant_share = np.ones(MODULES)
        self.isolation_kohm = ISOLATION_HEALTHY_KOHM
        for fault in self._faults:
            if not fault.active(t_ns):
                continue
            if fault.name == "cell-drift":
                cell = fault.whole("cell")
                ramp = fault.params["ramp"]
                leak_a[cell] += fault.params["leak"] * (min(1.0, fault.age_s(t_ns) / ramp) if ramp else 1.0)
                if self._first(fault):
                    self.cells.capacity_ah[cell] *= fault.params["capacity"]
            elif fault.name == "module-overheat":
                module = fault.whole("module")
                coolant_share[module] = min(coolant_share[module], fault.params["coolant"])
                if closed or not fault.params["hv"]:
                    bars = slice(module * PROBES_PER_MODULE, (module + 1) * PROBES_PER_MODULE)
                    bar_w[bars] += fault.params["power"] / PROBES_PER_MODULE
            elif fault.name == "cell-runaway" and self._first(fault):
                params = fault.params
                self._ignite(fault.whole("cell"), params["power"], params["energy"], params["collapse"])
            elif fault.name == "isolation-loss":
                ramp = fault.params["ramp"]
                share = min(1.0, fault.age_s(t_ns) / ramp) if ramp else 1.0
                # The leak's conductance grows; resistances in parallel.
                siemens = share / max(fault.params["kohm"], 1e-3) + 1.0 / ISOLATION_HEALTHY_KOHM
                self.isolation_kohm = min(self.isolation_kohm, 1.0 / siemens)
        return leak_a, cell_w, bar_w, coolant_share

    def _first(self, fault: Fault) -> bool:
        fresh = fault not in self._applied
        self._applied.add(fault)
        return fresh

    def _ignite(self, cell: int, power_w: float, energy_j: float, collapse_s: float) -> None:
        if self._burn_age_s[cell] < 0:
            self._burn_age_s[cell] = 0.0
            self._burn_w[cell], self._burn_left_j[cell] = power_w, energy_j
            self._collapse_s[cell] = collapse_s
            self._burning = True

    def _burn(self, volts: Floats, cell_w: Floats, dt_s: float) -> Floats:
        """Let burning cells heat (into cell_w) and collapse; return the voltages that are left."""
        for cell in np.flatnonzero((self.core_c > RUNAWAY_ONSET_C) & (self._burn_age_s < 0)).tolist():
            self._ignite(cell, PROPAGATED_W, PROPAGATED_J, PROPAGATED_COLLAPSE_S)
        lit = self._burn_age_s >= 0
        self._burn_age_s[lit] += dt_s
        rise = 1.0 - np.exp(-np.maximum(self._burn_age_s, 0.0) / RUNAWAY_RISE_S)
        heat_j = np.minimum(self._burn_w * rise * dt_s, self._burn_left_j)
        self._burn_left_j -= heat_j
        cell_w += heat_j / dt_s
        return np.where(lit, volts * np.exp(-np.maximum(self._burn_age_s, 0.0) / self._collapse_s), volts)

    def _heat(
        self, cell_w: Floats, bar_w: Floats, coolant_share: Floats, ambient_c: float, dt_s: float
    ) -> None:
        """Advance the temperatures: neighbours, bus bars, coolant on its way through the modules."""
        between = self._link_w_per_k * np.diff(self.core_c)
        cell_w[:-1] += between
        cell_w[1:] -= between
        per_probe = self.core_c.reshape(PROBES, CELLS_PER_PROBE)
        to_bar = (BAR_W_PER_K / CELLS_PER_PROBE) * (per_probe - self.bar_c[:, None])
        cell_w -= to_bar.ravel()
        bar_w += to_bar.sum(axis=1)

        warmth = self.core_c.reshape(MODULES, CELLS_PER_MODULE)
        module_w = COOLANT_W_PER_K * coolant_share * (warmth.sum(axis=1) - CELLS_PER_MODULE * self.coolant_c)
        upstream_k = (np.cumsum(module_w) - module_w) / COOLANT_FLOW_W_PER_K
        local_c = self.coolant_c + upstream_k
        to_coolant = COOLANT_W_PER_K * coolant_share[:, None] * (warmth - local_c[:, None])
        cell_w -= to_coolant.ravel()
        self._cool(float(to_coolant.sum()), ambient_c, dt_s)
        self.core_c += cell_w * (dt_s / CELL_J_PER_K)
        self.bar_c += bar_w * (dt_s / BAR_J_PER_K)

    def _cool(self, taken_w: float, ambient_c: float, dt_s: float) -> None:
        """Advance the coolant loop: radiator to the ambient air, chiller above its limit, heater below."""
        coolant_c = self.coolant_c
        watts = taken_w - RADIATOR_W_PER_K * (coolant_c - ambient_c)
        watts -= min(max(0.0, coolant_c - CHILLER_ON_C) * CHILLER_W_PER_K, CHILLER_W_MAX)
        watts += min(max(0.0, HEATER_ON_C - coolant_c) * HEATER_W_PER_K, HEATER_W_MAX)
        self.coolant_c = coolant_c + watts * dt_s / COOLANT_J_PER_K
