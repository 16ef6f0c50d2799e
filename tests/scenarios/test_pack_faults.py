"""The simulated pack as bytes on a bus, through decode and edge: silent while healthy, faults told in time.

Both layouts are driven: single frames (0.1 degC a probe) and one multiplexed frame (0.5 degC a probe).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from tbox.agent import build_stages
from tbox.config import BusConfig, Config, RulesConfig, VehicleConfig
from tbox.edge.rules import load_rules
from tbox.flow import Flow
from tbox.ledger import Ledger
from tbox.model import NS_PER_MS, NS_PER_S, Now
from tbox.sim.cell import Floats
from tbox.sim.faults import Fault, parse_fault
from tbox.sim.layout import CELLS
from tbox.sim.simulator import SimSettings, Simulator
from tbox.uplink.session import UplinkSettings

pytestmark = pytest.mark.slow

DBC = Path(__file__).parents[2] / "dbc"
BMS = {"plain": "tbox_bms.dbc", "mux": "tbox_bms_mux.dbc"}
STEP_MS = 100


Alter = Callable[[float, Floats, Floats, dict[str, float]], None]


class Altered(Simulator):
    """A vehicle whose ECUs see another world: alter(seconds of it, cells V, probes degC, other values)."""

    def __init__(self, seed: int, settings: SimSettings, alter: Alter, from_s: float) -> None:
        self._alter, self._from_s = alter, from_s
        super().__init__(seed, settings)

    def _record(self) -> None:
        super()._record()
        age_s = self._tick * self._tick_ns / NS_PER_S - self._from_s
        if age_s >= 0:
            row, history = self._history.rows - 1, self._history
            values = dict(zip(self._scalar_column, history.scalar[row].tolist(), strict=True))
            self._alter(age_s, history.cell_v[row], history.probe_c[row], values)
            history.scalar[row] = list(values.values())


def alarms(
    seconds: float,
    settings: SimSettings,
    faults: Sequence[Fault] = (),
    *,
    seed: int = 5,
    alter: tuple[Alter, float] | None = None,
) -> list[dict[str, Any]]:
    """Drive for some seconds; return the bodies of all alarm records, each with its time `t_s`."""
    ledger = Ledger()
    files = [str(DBC / name) for name in (BMS[settings.frames], "tbox_vehicle.dbc")]
    config = Config(
        vehicle=VehicleConfig(id="v"),
        bus=[BusConfig(interface="virtual", channel="v", dbc=files)],
        rules=RulesConfig(chemistry="lfp" if settings.chemistry == "LFP" else "nmc"),
        uplink=UplinkSettings(),
    )
    flow = Flow(*build_stages(config, ledger))
    simulator = Altered(seed, settings, *alter) if alter else Simulator(seed, settings, faults)
    told: list[dict[str, Any]] = []
    for t_ms in range(STEP_MS, round(seconds * 1000) + 1, STEP_MS):
        now = Now(t_ms * NS_PER_MS)
        steps = [None, *simulator.frames_until(now.mono_ns)]  # time passes on a silent bus too
        drafts = [draft for batch in steps for draft in flow.step(now, batch).drafts]
        told += [d.body | {"t_s": d.mono_ns / NS_PER_S} for d in drafts if d.kind == "alarm"]
    ledger.check()
    return told


class Expected(NamedTuple):
    """fault: as a user writes it, from AT_S on. rule: who must tell of it, within so many seconds."""

    fault: str
    rule: str
    within_s: float
    cycle: str = "mixed"


AT_S = 60
BOTH = {
    "a module overheats": Expected("module-overheat", "over-temperature-discharge", 20),
    "a cell runs away": Expected("cell-runaway", "thermal-runaway", 15),
    "a cell leaks": Expected("cell-drift", "cell-voltage-drop", 20),
    "a cell leaks slowly": Expected("cell-drift:leak=20,ramp=60", "cell-drift", 240),
    "a cell tap is stuck": Expected("sensor-stuck:cell=40", "cell-stuck", 25),
    "a cell's wire breaks": Expected("sensor-open:cell=40", "cell-lost", 15),
    "isolation is lost": Expected("isolation-loss", "isolation-low", 10),
    "isolation is dangerous": Expected("isolation-loss:kohm=20", "isolation-lost", 12),
    "the interlock opens": Expected("hvil-open", "hvil-open", 1),
    "12 V is lost": Expected("low-voltage-lost", "low-voltage-lost", 65),
    "the BMS falls silent": Expected("bus-silent", "bms-silent", 6),
    "every counter sticks": Expected("counter-stuck", "bms-silent", 7),
    "the contactors weld": Expected("contactor-failed", "contactor-failed", 1, "parked"),
    "every CRC is wrong": Expected("crc-errors:rate=1", "bms-silent", 6),
}
# An open probe reads -40 degC: below what tbox_bms.dbc declares, so refused, and at the edge of the other's
# range. A stuck probe of 0.5 degC shows only once the others have moved away; here a fast charge warms them.
OF_PLAIN = {
    "a probe is stuck": Expected("sensor-stuck:probe=11", "probe-stuck", 25),
    "a probe's wire breaks": Expected("sensor-open:probe=11", "probe-lost", 12),
}
OF_MUX = {
    "a probe is stuck": Expected("sensor-stuck:probe=11", "probe-not-following", 330, "charge-dc"),
    "a probe's wire breaks": Expected("sensor-open:probe=11", "probe-open", 5),
}
FAULTS = {"plain": BOTH | OF_PLAIN, "mux": BOTH | OF_MUX}


# What the simulated physics does not bring about by itself, the ECUs are made to see.
# name -> rule, seconds, cycle, what is altered; by chemistry where the limits differ


def value(name: str, number: float) -> Alter:
    def alter(_s: float, _cells: Floats, _probes: Floats, values: dict[str, float]) -> None:
        assert name in values
        values[name] = number

    return alter


def cell(index: int, volts: float) -> Alter:
    return lambda _s, cells, _probes, _values: cells.__setitem__(index, volts)


def cell_off(index: int, volts: float, seconds: float = 0.01) -> Alter:
    """Moved away within so many seconds."""
    return lambda s, cells, _probes, _values: cells.__setitem__(
        index, cells[index] + volts * min(1.0, s / seconds)
    )


def probes(which: int | slice, degrees_c: float, c_per_s: float = 0.0) -> Alter:
    return lambda s, _cells, probes, _values: probes.__setitem__(which, degrees_c + c_per_s * s)


ALL = slice(None)
SEEN: dict[str, tuple[str, float, str, dict[str, Alter] | Alter]] = {
    "a cell is overcharged": (
        "cell-over-voltage", 2.5, "ready", {"NMC": cell(37, 4.30), "LFP": cell(37, 3.85)}
    ),
    "a cell is exhausted": ("cell-under-voltage", 2.5, "ready", {"NMC": cell(5, 2.60), "LFP": cell(5, 2.40)}),
    "the pack is overcharged": (
        "pack-over-voltage", 2.5, "ready",
        {"NMC": value("PackVoltage", 4.26 * CELLS), "LFP": value("PackVoltage", 3.76 * CELLS)},
    ),
    "the pack is exhausted": (
        "pack-under-voltage", 2.5, "ready",
        {"NMC": value("PackVoltage", 2.70 * CELLS), "LFP": value("PackVoltage", 2.50 * CELLS)},
    ),
    "the pack is not its cells": ("pack-voltage-mismatch", 21, "ready", value("PackVoltage", 590.0)),
    "hot while charging": ("over-temperature-charge", 2.5, "charge-dc", probes(7, 48.0)),
    "cold while charging": ("under-temperature-charge", 31, "charge-ac", probes(ALL, -3.0)),
    "cold": ("under-temperature-discharge", 31, "ready", probes(ALL, -22.0)),
    "one hot corner": ("temperature-spread", 11.5, "ready", probes(11, 40.0)),
    "a probe warms": ("temperature-rise", 9, "ready", probes(3, 27.0, 0.9)),
    "a cell is low under load": ("imbalance", 11.5, "city", cell_off(9, -0.5, 2.0)),
    "a cell is low at rest": ("imbalance-rest", 62, "ready", cell_off(9, -0.15)),
    "a cell is apart": ("imbalance-sigma", 62, "ready", cell_off(9, 0.08)),
    "nearly empty": ("soc-low", 11, "ready", value("Soc", 4.0)),
    "more than full": ("soc-high", 11, "ready", value("Soc", 103.0)),
    "the charge jumps": ("soc-jump", 1.5, "ready", value("Soc", 62.0)),
    "worn": ("soh-low", 61.5, "ready", value("Soh", 76.0)),
    "too much is drawn": ("over-current-discharge", 1, "ready", value("PackCurrent", -900.0)),
    "too much is fed": ("over-current-charge", 1, "ready", value("PackCurrent", 550.0)),
    "the contactors do not open": ("contactor-mismatch", 5.5, "ready", value("ContactorCommand", 0.0)),
    "the motor is hot": ("motor-over-temperature", 6, "ready", value("MotorTemperature", 165.0)),
}  # fmt: skip


@pytest.mark.parametrize(("chemistry", "frames"), [("NMC", "plain"), ("LFP", "mux")])
@pytest.mark.parametrize("name", SEEN)
def test_what_the_ecus_see_is_told_within_its_rules_time(name: str, chemistry: str, frames: str) -> None:
    rule, within_s, cycle, alters = SEEN[name]
    alter = alters[chemistry] if isinstance(alters, dict) else alters
    wanted = {"frames": frames, "chemistry": chemistry, "cycle": cycle, "soc_percent": 50.0, "pack_c": 27.0}
    told = alarms(AT_S + within_s, msgspec.convert(wanted, SimSettings), alter=(alter, AT_S))
    assert [body["text"] for body in told if body["t_s"] < AT_S] == []
    raised = [body["t_s"] - AT_S for body in told if body["alarm"] == rule]
    assert raised and raised[0] <= within_s, [(b["alarm"], b["t_s"]) for b in told][:8]


@pytest.mark.parametrize("chemistry", ["NMC", "LFP"])
def test_no_shipped_rule_is_without_its_fault(chemistry: str) -> None:
    told = {expected.rule for faults in FAULTS.values() for expected in faults.values()}
    assert {rule.name for rule in load_rules(chemistry.lower()).rules} == told | {
        rule for rule, *_ in SEEN.values()
    }


def at_s(fault: str) -> Fault:
    name, colon, keys = fault.partition(":")
    return parse_fault(f"{name}@{AT_S}s{colon}{keys}")


@pytest.mark.parametrize(
    ("chemistry", "frames", "name"),
    [
        (chemistry, frames, name)
        for chemistry, frames in (("NMC", "plain"), ("NMC", "mux"), ("LFP", "plain"))
        for name in FAULTS[frames]
    ],
)
def test_each_fault_of_the_vehicle_is_told_within_its_rules_time(
    chemistry: str, frames: str, name: str
) -> None:
    expected = FAULTS[frames][name]
    wanted = {"frames": frames, "chemistry": chemistry, "cycle": expected.cycle, "soc_percent": 50.0}
    told = alarms(AT_S + 2 + expected.within_s, msgspec.convert(wanted, SimSettings), [at_s(expected.fault)])
    assert [body["text"] for body in told if body["t_s"] < AT_S] == []
    raised = [body["t_s"] - AT_S for body in told if body["alarm"] == expected.rule]
    assert raised and raised[0] <= expected.within_s, sorted({(b["alarm"], b["t_s"]) for b in told})[:8]


@pytest.mark.parametrize("chemistry", ["NMC", "LFP"])
def test_a_healthy_pack_that_is_nearly_empty_tells_of_its_charge_alone(chemistry: str) -> None:
    """Its cells stand 140 to 190 mV apart there, as their capacities make them."""
    wanted = {"chemistry": chemistry, "cycle": "ready", "soc_percent": 5.5, "pack_c": 15.0, "ambient_c": 10.0}
    told = alarms(300, msgspec.convert(wanted, SimSettings), seed=3)
    assert {body["alarm"] for body in told} == {"soc-low"}
    assert len(told) == 1, "it falls by a point an hour"


@pytest.mark.parametrize(("frames", "rule"), [("plain", "probe-stuck"), ("mux", "probe-not-following")])
def test_a_stuck_probe_is_one_alarm_however_far_the_pack_warms_meanwhile(frames: str, rule: str) -> None:
    settings = msgspec.convert({"frames": frames, "cycle": "charge-dc", "soc_percent": 30.0}, SimSettings)
    told = alarms(AT_S + 500, settings, [at_s("sensor-stuck:probe=11")])
    assert [(body["alarm"], body["key"]) for body in told if body["event"] == "raise"] == [(rule, "probe 11")]


def test_an_open_probe_is_no_cold_spot_of_the_pack() -> None:
    told = alarms(AT_S + 40, SimSettings(frames="mux"), [at_s("sensor-open:probe=11")])
    rules = {body["alarm"] for body in told}
    assert "probe-open" in rules
    assert rules <= {"probe-open", "probe-lost"}, (
        "noise takes it below -40 degC, what the DBC allows, at times"
    )


@pytest.mark.parametrize("frames", ["plain", "mux"])
@pytest.mark.parametrize(
    "fault",
    ["sentinels:duration=20s", "frame-loss:rate=0.2", "crc-errors:rate=0.2", "bus-silent:duration=2s"],
)
def test_trouble_on_the_wire_is_no_trouble_of_the_pack(fault: str, frames: str) -> None:
    told = alarms(AT_S + 60, msgspec.convert({"frames": frames}, SimSettings), [at_s(fault)])
    assert [body["text"] for body in told if body["alarm"] != "bms-silent"] == []
    assert bool(told) == fault.startswith("sentinels"), "twenty seconds of nothing valid is silence"


@pytest.mark.parametrize("frames", ["plain", "mux"])
@pytest.mark.parametrize("chemistry", ["NMC", "LFP"])
@pytest.mark.parametrize(
    ("cycle", "pack_c", "seed"),
    [("mixed", 27.0, 1), ("city", 8.0, 2), ("charge-dc", 30.0, 3), ("charge-ac", 15.0, 4)],
)
def test_a_healthy_noisy_pack_is_left_in_peace(
    cycle: str, pack_c: float, seed: int, chemistry: str, frames: str
) -> None:
    wanted = {"frames": frames, "chemistry": chemistry, "cycle": cycle, "pack_c": pack_c}
    settings = msgspec.convert(wanted | {"ambient_c": pack_c, "soc_percent": 60.0}, SimSettings)
    assert [body["text"] for body in alarms(600, settings, seed=seed)] == []
