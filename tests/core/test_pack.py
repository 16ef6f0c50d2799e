"""The pack's heat goes where heat goes, and each fault does to the physics what its name says."""

from __future__ import annotations

import numpy as np
import pytest

from tbox.model import NS_PER_S
from tbox.sim import pack as pack_module
from tbox.sim.faults import Fault, make_fault
from tbox.sim.pack import Pack

DT_S = 0.1
RUNAWAY_C_PER_S = 1.0  # GB 38031: what a probe must see for more than three seconds


def make(
    *faults: Fault, chemistry: str = "NMC", temperature_c: float = 27.0, seed: int = 1, soc: float = 0.78
) -> Pack:
    return Pack(
        chemistry, soc=soc, soh=0.96, temperature_c=temperature_c, capacity_ah=None, faults=faults,
        rng=np.random.default_rng(seed),
    )  # fmt: skip


def run(
    pack: Pack, seconds: float, power_w: float = 0.0, ambient_c: float = 21.0, *, closed: bool = True,
    begin_s: float = 0.0, dt_s: float = DT_S,
) -> None:  # fmt: skip
    for step in range(1, round(seconds / dt_s) + 1):
        t_ns = round((begin_s + step * dt_s) * NS_PER_S)
        pack.step(t_ns, dt_s, power_w, ambient_c, closed=closed)


@pytest.mark.parametrize("chemistry", ["NMC", "LFP"])
def test_a_matched_pack_at_rest_holds_its_cells_within_50_mv(chemistry: str) -> None:
    for soc in (0.20, 0.45, 0.78, 0.95, 0.99, 1.0):
        pack = make(chemistry=chemistry, soc=soc)
        run(pack, 10)
        assert np.ptp(pack.cell_v) < 0.050, soc
        assert pack.soc == pytest.approx(soc, abs=0.002)


@pytest.mark.parametrize("chemistry", ["NMC", "LFP"])
def test_wherever_a_day_begins_the_cells_meet_again_at_the_top(chemistry: str) -> None:
    """Level at 45 %, LFP cells of any real spread of capacity would stand 180 mV apart when full."""
    pack = make(chemistry=chemistry, soc=0.45)
    while pack.soc < 0.985:
        run(pack, 60, power_w=20_000.0, dt_s=10.0)
    run(pack, 600, closed=False)
    assert np.ptp(pack.cell_v) < 0.030


def test_power_flows_only_through_closed_contactors() -> None:
    pack = make()
    run(pack, 1, -50_000)
    assert pack.current_a == pytest.approx(-50_000 / pack.voltage_v, rel=1e-3)
    run(pack, 1, -50_000, closed=False)
    assert pack.current_a == 0.0


def test_a_hot_pack_cools_towards_the_air_and_never_past_it() -> None:
    pack = make(temperature_c=45.0)
    last = pack.core_c.mean()
    for _ in range(6):
        run(pack, 1200, ambient_c=20.0, dt_s=1.0)
        assert 20.0 < pack.core_c.mean() < last
        assert pack.core_c.max() <= 47.0
        last = pack.core_c.mean()
    assert last < 26.0


def test_no_heat_is_made_or_lost_inside_the_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "RADIATOR_W_PER_K", 0.0)
    pack = make(temperature_c=20.0)
    pack.core_c += np.random.default_rng(2).uniform(-5, 5, pack.core_c.shape)

    def held_j() -> float:
        cores = pack.core_c.sum() * pack_module.CELL_J_PER_K
        bars = pack.bar_c.sum() * pack_module.BAR_J_PER_K
        return float(cores + bars + pack.coolant_c * pack_module.COOLANT_J_PER_K)

    before_j = held_j()
    run(pack, 300, -60_000)
    assert pack.joule_j > 1e5
    assert held_j() - before_j == pytest.approx(pack.joule_j, rel=1e-6)


def test_coolant_warms_on_its_way_so_the_last_module_runs_warmer() -> None:
    pack = make(temperature_c=25.0)
    run(pack, 1800, -120_000, ambient_c=25.0, dt_s=0.5)
    modules = pack.core_c.reshape(8, 24).mean(axis=1)
    assert modules[7] > modules[0] + 0.2


def test_a_probe_follows_its_cells_with_a_lag() -> None:
    pack = make(temperature_c=25.0)
    pack.core_c += 10.0
    run(pack, 10)
    assert 4.0 < pack.bar_c.mean() - 25.0 < 8.0


def test_an_overheating_module_is_seen_within_ten_seconds_and_cools_when_the_contactors_open() -> None:
    pack = make(make_fault("module-overheat", 5.0, module=3))
    run(pack, 5)
    run(pack, 10, begin_s=5)
    own, others = pack.bar_c[18:24], np.delete(pack.bar_c, np.s_[18:24])
    assert own.min() > 55.0
    assert others.max() < 29.0
    run(pack, 25, begin_s=15, closed=False)
    assert pack.bar_c[18:24].max() < 40.0


def test_an_overheating_module_heats_faster_than_the_runaway_rule_asks_for_more_than_three_seconds() -> None:
    pack = make(make_fault("module-overheat", 0.0, module=0))
    for second in range(8):
        before_c = pack.bar_c[0]
        run(pack, 1, begin_s=second)
        assert pack.bar_c[0] - before_c > RUNAWAY_C_PER_S


def test_a_cell_in_runaway_loses_its_voltage_and_heats_the_probe_of_its_group() -> None:
    pack = make(make_fault("cell-runaway", 1.0, cell=37))
    run(pack, 1)
    healthy_v = pack.cell_v[37]
    run(pack, 8, begin_s=1)
    assert pack.cell_v[37] < 0.75 * healthy_v
    assert pack.bar_c.argmax() == 37 // 4
    before_c = pack.bar_c[9]
    run(pack, 1, begin_s=9)
    assert pack.bar_c[9] - before_c > RUNAWAY_C_PER_S


def test_a_runaway_burns_what_the_cell_holds_and_spreads_to_its_neighbours_in_minutes() -> None:
    pack = make(make_fault("cell-runaway", 0.0, cell=100, energy=3e6, power=100_000))
    run(pack, 30, dt_s=0.5)
    assert int((pack.cell_v < 2.0).sum()) == 1
    run(pack, 400, begin_s=30, dt_s=0.5)
    lost = np.flatnonzero(pack.cell_v < 2.0)
    assert 1 < len(lost) < 30
    assert {99, 101} & set(lost.tolist())


def test_a_leaking_cell_falls_away_from_its_series_and_only_it() -> None:
    healthy, leaking = make(), make(make_fault("cell-drift", 0.0, cell=101))
    run(healthy, 20)
    run(leaking, 20)
    gap_v = healthy.cell_v - leaking.cell_v
    assert gap_v[101] > 0.100
    assert np.abs(np.delete(gap_v, 101)).max() < 1e-3


def test_a_cell_that_lost_capacity_swings_further_under_load() -> None:
    healthy = make()
    weak = make(make_fault("cell-drift", 0.0, cell=5, leak=0, capacity=0.5))
    run(healthy, 600, -60_000, dt_s=1.0)
    run(weak, 600, -60_000, dt_s=1.0)
    assert weak.cells.soc[5] < healthy.cells.soc[5] - 0.05
    assert np.abs(np.delete(weak.cells.soc - healthy.cells.soc, 5)).max() < 0.002


def test_isolation_falls_to_what_is_left_and_comes_back_with_the_faults_end() -> None:
    pack = make(make_fault("isolation-loss", 1.0, duration_s=10, kohm=40))
    run(pack, 1)
    assert pack.isolation_kohm > 40
    run(pack, 5, begin_s=1)
    assert pack.isolation_kohm == pytest.approx(40, rel=0.02)
    run(pack, 6, begin_s=6)
    assert pack.isolation_kohm == pack_module.ISOLATION_HEALTHY_KOHM


def test_the_same_seed_makes_the_same_pack_and_another_seed_another() -> None:
    one, same, other = make(seed=3), make(seed=3), make(seed=4)
    for pack in (one, same, other):
        run(pack, 2, -30_000)
    assert np.array_equal(one.cell_v, same.cell_v)
    assert not np.array_equal(one.cell_v, other.cell_v)
