"""The DBC files in dbc/ are what the layout says, load strictly, and leave every SNA outside its range."""

from __future__ import annotations

from pathlib import Path

import cantools
import pytest

from tbox.bus.frames import FD_LENGTHS
from tbox.decode.roles import RoleMap
from tbox.model import ROLE_UNITS
from tbox.sim import layout
from tbox.sim.packing import signal_bits

DBC = Path(__file__).parents[2] / "dbc"
EVERY = [(name, msg) for name, messages in layout.DATABASES.items() for msg in messages]


@pytest.mark.parametrize("name", layout.DATABASES)
def test_a_file_is_what_the_layout_writes(name: str) -> None:
    assert (DBC / name).read_text() == layout.dbc_text(name)


@pytest.mark.parametrize("name", layout.DATABASES)
def test_cantools_loads_a_file_strictly_and_sees_frame_format_cycle_and_data_id(name: str) -> None:
    database = cantools.database.load_file(DBC / name, strict=True)
    for msg in layout.DATABASES[name]:
        seen = database.get_message_by_name(msg.name)
        assert (seen.frame_id, seen.length, seen.is_fd) == (msg.can_id, msg.length, msg.fd)
        assert seen.cycle_time == msg.cycle_ms
        assert seen.dbc.attributes["E2EDataId"].value == msg.can_id & 0xFF
        assert {signal.name for signal in seen.signals} == {sig.name for sig in msg.signals}


@pytest.mark.parametrize(("name", "msg"), EVERY)
def test_every_length_is_one_that_can_fd_has(name: str, msg: layout.Msg) -> None:
    assert msg.length in FD_LENGTHS


@pytest.mark.parametrize(("name", "msg"), EVERY)
def test_sna_lies_outside_the_physical_range_and_the_range_within_the_raw_one(
    name: str, msg: layout.Msg
) -> None:
    for sig in msg.signals:
        raw_low, raw_high = (sig.lo - sig.offset) / sig.scale, (sig.hi - sig.offset) / sig.scale
        assert sig.raw_min <= round(raw_low) <= round(raw_high) <= sig.raw_max, sig.name
        if sig.sna is not None:
            assert not round(raw_low) <= sig.sna <= round(raw_high), sig.name


@pytest.mark.parametrize(("name", "msg"), EVERY)
def test_no_two_signals_of_a_frame_share_a_bit(name: str, msg: layout.Msg) -> None:
    for mux in {sig.mux for sig in msg.signals}:
        present = [sig for sig in msg.signals if sig.mux in (None, mux)]
        bits = [bit for sig in present for bit in signal_bits(msg, sig)]
        assert len(bits) == len(set(bits))
        assert max(byte for byte, _ in bits) < msg.length


@pytest.mark.parametrize(
    "names", [("tbox_bms.dbc", "tbox_vehicle.dbc"), ("tbox_bms_mux.dbc", "tbox_vehicle.dbc")]
)
def test_files_that_share_a_bus_share_no_id(names: tuple[str, ...]) -> None:
    ids = [msg.can_id for name in names for msg in layout.DATABASES[name]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("name", ["tbox_bms.dbc", "tbox_bms_mux.dbc"])
def test_each_battery_has_192_cells_and_48_probes(name: str) -> None:
    names = {sig.name for msg in layout.DATABASES[name] for sig in msg.signals}
    assert {layout.cell_name(i) for i in range(192)} <= names
    assert {layout.probe_name(j) for j in range(48)} <= names


# The signals that mean nothing to the edge by themselves.
UNBOUND = {
    "CRC", "AliveCounter", "ModuleVoltage", "Module", "LinkVoltage", "DischargeCurrentLimit",
    "ChargeCurrentLimit", "BmsState", "IsolationAckIndex", "IsolationRequestsRefused", "CellVoltageMinId",
    "CellVoltageMaxId", "TemperatureMinId", "TemperatureMaxId", "BrakePedal", "AcceleratorPedal",
    "ChargeTargetSoc", "FixState", "Heading", "Hdop", "Satellites", "Altitude",
}  # fmt: skip


@pytest.mark.parametrize("battery", ["tbox_bms.dbc", "tbox_bms_mux.dbc"])
def test_the_shipped_map_binds_every_role_and_protects_every_message(battery: str) -> None:
    roles = RoleMap.load()
    bound: dict[tuple[str, int], int] = {}
    for msg in (*layout.DATABASES[battery], *layout.DATABASES["tbox_vehicle.dbc"]):
        if msg is layout.ISOLATION_REQUEST:
            continue
        protection = roles.protection(msg.name, 0)
        assert protection is not None and protection[0].data_id == "E2EDataId"
        for sig in msg.signals:
            binding = roles.bind(msg.name, sig.name, sig.unit, 0)
            assert bool(binding.role) == (sig.name not in UNBOUND), sig.name
            bound[binding.role, binding.index] = binding.module
    assert {role for role, _ in bound} - {""} == set(ROLE_UNITS)
    assert all(bound["cell_voltage", i] == i // 24 for i in range(192))
    assert all(bound["probe_temperature", j] == j // 6 for j in range(48))
