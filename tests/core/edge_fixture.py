"""A noisy pack for the edge's tests: sample batches of a catalog of 192 cells and 48 probes. Judges nothing.

It is not the simulator but a few lines of arithmetic, so that edge and simulator cannot share an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tbox.edge.engine import Engine
from tbox.edge.mode import Context
from tbox.edge.rules import RuleSet, load_rules
from tbox.ledger import StageLedger
from tbox.model import NS_PER_S, ROLE_UNITS, Draft, Now, SampleBatch, Signal, Validity

CELLS, PROBES = 192, 48
SINGLE = tuple(role for role in ROLE_UNITS if role not in ("cell_voltage", "probe_temperature"))
CATALOG = (
    *(Signal(f"CellVoltage_{i}", "Cells", 0, "V", "cell_voltage", i, i // 24) for i in range(CELLS)),
    *(Signal(f"Probe_{i}", "Temps", 0, "degC", "probe_temperature", i, i // 6) for i in range(PROBES)),
    *(Signal(role, "Pack", 0, ROLE_UNITS[role], role) for role in SINGLE),
)
COLUMNS = np.arange(len(CATALOG), dtype=np.int64)
COLUMN_OF = {signal.role: column for column, signal in enumerate(CATALOG) if column >= CELLS + PROBES}
ALL_VALID = np.zeros(len(CATALOG), dtype=np.uint8)

Floats = npt.NDArray[np.float64]
RULES = {chemistry: load_rules(chemistry) for chemistry in ("nmc", "lfp")}


def ocv_v(soc: Floats) -> Floats:
    """A round NMC curve: steep at the empty end, 8 mV a percent beyond."""
    return 3.40 + 0.8 * soc - 0.4 * np.exp(-soc / 0.03)


@dataclass
class NoisyPack:
    """Rows of values in the catalog's order, with the spread, noise and steps of a real, matched pack."""

    rng: np.random.Generator
    soc: float = 0.9
    noise_v: float = 0.001
    noise_c: float = 0.1
    ambient_c: float = 22.0
    capacity_ah: float = 110.0
    singles: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._fit = 1.0 + 0.008 * self.rng.standard_normal(CELLS)
        self._soc_offset = 0.002 * self.rng.standard_normal(CELLS)
        self._ohm = 0.0012 * (1.0 + 0.03 * self.rng.standard_normal(CELLS))
        self._probe_offset = 0.4 * self.rng.standard_normal(PROBES)
        self.pack_c = self.ambient_c

    def rows(self, current_a: Floats, period_s: float, **singles: float) -> Floats:
        """Return one row for each current (A, positive in), period_s apart."""
        n = len(current_a)
        passed_ah = np.cumsum(current_a) * period_s / 3600.0
        soc = np.clip(self.soc + passed_ah / self.capacity_ah, 0.01, 1.0)
        heat = np.convolve(current_a**2, _decay(period_s), "full")[:n] * 6e-4
        warmth = (
            self.ambient_c + heat + (self.pack_c - self.ambient_c) * np.exp(-np.arange(n) * period_s / 3000.0)
        )
        self.soc, self.pack_c = float(soc[-1]), float(warmth[-1])
        deep = (soc[:, None] - 1.0) / self._fit[None, :] + 1.0 + self._soc_offset[None, :]
        volts = ocv_v(deep) + current_a[:, None] * self._ohm[None, :]
        rows = np.empty((n, len(CATALOG)))
        rows[:, :CELLS] = np.round(volts + self.noise_v * self.rng.standard_normal((n, CELLS)), 3)
        degrees = warmth[:, None] + self._probe_offset[None, :]
        rows[:, CELLS : CELLS + PROBES] = np.round(
            degrees + self.noise_c * self.rng.standard_normal((n, PROBES)), 1
        )
        for role, value in (HEALTHY | self.singles | singles).items():
            rows[:, COLUMN_OF[role]] = value
        rows[:, COLUMN_OF["soc"]] = np.round(soc * 100.0, 2)
        rows[:, COLUMN_OF["pack_current"]] = np.round(current_a + 0.2 * self.rng.standard_normal(n), 1)
        rows[:, COLUMN_OF["pack_voltage"]] = np.round(
            volts.sum(axis=1) + 0.2 * self.rng.standard_normal(n), 2
        )
        return rows


HEALTHY: dict[str, float] = {
    **dict.fromkeys(SINGLE, 0.0),
    "cell_voltage_min": 3.6, "cell_voltage_max": 3.7, "temperature_min": 22.0, "temperature_max": 25.0,
    "soh": 96.0, "isolation_resistance": 5000.0, "contactor_state": 2.0, "contactor_command": 1.0,
    "hvil": 1.0, "low_voltage": 13.8, "ignition": 2.0, "motor_temperature": 60.0, "speed": 50.0,
    "ambient_temperature": 22.0,
}  # fmt: skip


def _decay(period_s: float) -> Floats:
    steps = np.arange(0.0, 6000.0, period_s)
    weights: Floats = np.exp(-steps / 3000.0) * (period_s / 3000.0)
    return weights


def batch(t_ns: int, row: Floats, validity: npt.NDArray[np.uint8] = ALL_VALID) -> SampleBatch:
    return SampleBatch(np.full(len(row), t_ns, dtype=np.int64), COLUMNS, row, validity)


def sentinels(t_ns: int) -> SampleBatch:
    """Every signal says "not available", as at key-on; the decoder marked them so."""
    row = np.full(len(CATALOG), 65.535)
    return batch(t_ns, row, np.full(len(CATALOG), Validity.SNA, dtype=np.uint8))


def empty() -> SampleBatch:
    none = np.empty(0, dtype=np.int64)
    return SampleBatch(none, none, none.astype(np.float64), none.astype(np.uint8))


def drive(rng: np.random.Generator, n: int, period_s: float) -> Floats:
    """A lively drive: accelerations to -300 A, regeneration to +100 A, mean about -40 A."""
    at_s = np.arange(n) * period_s
    turns_s = np.arange(0.0, n * period_s + 20.0, 10.0)
    slow = np.interp(at_s, turns_s, rng.normal(-40.0, 90.0, len(turns_s)))
    current: Floats = np.clip(slow + rng.normal(0.0, 15.0, n), -300.0, 100.0)
    return current


class Bench:
    """An engine with its account, stepped row by row. `drafts` are all alarm records so far."""

    def __init__(self, rules: RuleSet | None = None, catalog: tuple[Signal, ...] = CATALOG) -> None:
        self.account = StageLedger("pack", "samples")
        self.engine = Engine(catalog, rules or RULES["nmc"], self.account)
        self.drafts: list[Draft] = []
        self.t_ns = 0

    def take(self, samples: SampleBatch) -> list[Draft]:
        drafts = self.engine.step(Now(self.t_ns), samples, Context())
        self.drafts += drafts
        self.account.check()
        return drafts

    def run(
        self, rows: Floats, period_s: float, change: Callable[[float, Floats], None] | None = None
    ) -> None:
        """Feed rows; change(seconds since the first row, row) may alter each before it is sent."""
        begin_ns = self.t_ns
        for row in rows:
            self.t_ns += int(period_s * NS_PER_S)
            if change:
                change((self.t_ns - begin_ns) / NS_PER_S, row)
            self.take(batch(self.t_ns, row))

    def idle(self, seconds: float, period_s: float = 0.1) -> None:
        """Let time pass on a silent bus."""
        for _ in range(round(seconds / period_s)):
            self.t_ns += int(period_s * NS_PER_S)
            self.take(empty())

    def told(self, rule: str, event: str | None = None) -> list[Draft]:
        return [d for d in self.drafts if d.body["alarm"] == rule and event in (None, d.body["event"])]


def warm_up(
    bench: Bench, pack: NoisyPack, seconds: float = 45.0, period_s: float = 0.1, current_a: float = -40.0
) -> None:
    """Run healthily for long enough that every watch has learnt what it needs."""
    bench.run(pack.rows(np.full(int(seconds / period_s), current_a), period_s), period_s)


def chunks(schedule: list[tuple[str, float, float]]) -> Iterator[tuple[str, int, float]]:
    """Cut (what, hours, period_s) into pieces of at most 1000 rows, so that memory stays small."""
    for what, hours, period_s in schedule:
        left = round(hours * 3600.0 / period_s)
        while left > 0:
            yield what, min(left, 1000), period_s
            left -= 1000
