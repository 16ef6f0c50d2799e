"""Cells behave as an equivalent circuit must: energy is kept, voltage rises with charge, cold costs volts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbox.sim.cell import CHEMISTRIES, LFP, NMC, Cells, Chemistry, ocv_v

BOTH = pytest.mark.parametrize("chemistry", CHEMISTRIES.values(), ids=lambda c: c.name)
N = 8


def cells(chemistry: Chemistry, soc: float = 0.6) -> Cells:
    ones = np.ones(N)
    return Cells(
        chemistry, soc * ones, chemistry.capacity_ah * ones, chemistry.r0_ohm * ones, chemistry.r1_ohm * ones
    )


@BOTH
def test_the_open_circuit_voltage_rises_with_charge_and_stays_in_the_chemistrys_limits(
    chemistry: Chemistry,
) -> None:
    curve = ocv_v(chemistry, np.linspace(0.0, 1.0, 1001))
    assert (np.diff(curve) > 0).all()
    assert curve[-1] <= chemistry.v_max
    assert curve[100] > chemistry.v_min


def test_lfp_is_flat_where_nmc_slopes() -> None:
    middle = np.array([0.3, 0.7])
    assert np.ptp(ocv_v(LFP, middle)) < 0.06 < np.ptp(ocv_v(NMC, middle))


@pytest.mark.slow
@BOTH
@settings(deadline=None)
@given(amps=st.floats(-400, 400), seconds=st.integers(5, 60))
def test_what_leaves_the_charge_is_what_the_terminals_the_heat_and_the_rc_hold(
    chemistry: Chemistry, amps: float, seconds: int
) -> None:
    pack, dt_s, warm = cells(chemistry), 0.1, np.full(N, 25.0)
    terminal_j = heat_j = stored_j = 0.0
    for _ in range(int(seconds / dt_s)):
        before_v = pack.ocv_v.copy()
        volts, watts = pack.step(np.full(N, amps), warm, dt_s)
        terminal_j += float(volts.sum()) * amps * dt_s
        heat_j += float(watts.sum()) * dt_s
        stored_j += float((before_v + pack.ocv_v).sum()) / 2 * amps * dt_s
    capacitor_j = float((pack.u1_v**2 * chemistry.tau_s / chemistry.r1_ohm / 2).sum())
    assert heat_j >= 0
    assert terminal_j == pytest.approx(stored_j + heat_j + capacitor_j, rel=2e-3, abs=1.0)


@BOTH
def test_charge_is_counted_exactly(chemistry: Chemistry) -> None:
    pack = cells(chemistry)
    for _ in range(3600):
        pack.step(np.full(N, -11.0), np.full(N, 25.0), 1.0)
    assert pack.soc == pytest.approx(0.6 - 11.0 / chemistry.capacity_ah)


@BOTH
def test_a_load_drops_the_voltage_at_once_then_slowly_and_rest_brings_it_back(chemistry: Chemistry) -> None:
    pack, warm = cells(chemistry), np.full(N, 25.0)
    first, _ = pack.step(np.full(N, -200.0), warm, 0.1)
    for _ in range(300):
        later, _ = pack.step(np.full(N, -200.0), warm, 0.1)
    rest, _ = pack.step(np.zeros(N), warm, 0.1)
    for _ in range(3000):
        relaxed, _ = pack.step(np.zeros(N), warm, 0.1)
    assert later[0] < first[0] < ocv_v(chemistry, np.array([0.6]))[0]
    assert rest[0] < relaxed[0]
    assert relaxed == pytest.approx(ocv_v(chemistry, pack.soc), abs=1e-4)


def test_a_cold_cell_drops_more() -> None:
    drops = [cells(NMC).step(np.full(N, -100.0), np.full(N, c), 0.1)[0][0] for c in (-20.0, 0.0, 25.0, 45.0)]
    assert drops == sorted(drops)


@settings(deadline=None)
@given(kw=st.floats(-300, 150))
def test_the_current_that_is_solved_for_gives_the_power_that_was_asked_for(kw: float) -> None:
    pack, warm = cells(NMC), np.full(N, 25.0)
    amps = pack.solve_current(kw * 100.0, warm)
    volts, _ = pack.step(np.full(N, amps), warm, 1e-6)
    assert amps * float(volts.sum()) == pytest.approx(kw * 100.0, rel=1e-3, abs=0.1)


def test_more_than_the_pack_can_give_is_not_given() -> None:
    pack, warm = cells(NMC), np.full(N, 25.0)
    most = pack.solve_current(-1e9, warm)
    assert most == pytest.approx(-float(pack.ocv_v.sum()) / (2 * float(pack.r0_ohm.sum())))
