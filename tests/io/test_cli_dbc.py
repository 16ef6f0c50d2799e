"""`tbox dbc`: what loads, what was mended, what does not and where; and proposed mappings that work."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tbox.cli.dbc import dbc
from tbox.decode.database import DbcFile, DecodeSettings, load_database
from tbox.decode.roles import RoleMap
from tbox.decode.stage import DecodeStage
from tbox.ledger import Ledger
from tests.data import data_file

REPO = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(dbc, list(arguments), catch_exceptions=False)


def test_lint_says_that_the_kona_file_was_mended_and_where() -> None:
    path = data_file("dbc", "kona-pcan.dbc")
    result = run("lint", str(path))
    assert result.exit_code == 0
    assert f"{path}:6: mended: BS_: is missing" in result.output
    assert "107 messages, 445 signals, 1 places mended" in result.output


def test_lint_goes_on_after_a_file_that_does_not_load_and_exits_1(tmp_path: Path) -> None:
    bad = tmp_path / "bad.dbc"
    bad.write_text('VERSION ""\nBO_ 1 A: 8 E\n SG_ X : nonsense\n')
    good = REPO / "dbc" / "tbox_vehicle.dbc"
    result = run("lint", str(bad), str(good))
    assert result.exit_code == 1
    assert f"{bad}:3: is not DBC" in result.output and f"{good}: loads: 5 messages" in result.output


@pytest.mark.parametrize("name", ["tbox_bms.dbc", "tbox_bms_mux.dbc", "tbox_vehicle.dbc"])
def test_our_own_files_have_nothing_to_mend(name: str) -> None:
    path = REPO / "dbc" / name
    result = run("lint", "--strict", str(path))
    assert result.exit_code == 0 and result.output.count("\n") == 1


def test_map_shows_what_is_mapped() -> None:
    output = run("map", str(REPO / "dbc" / "tbox_bms.dbc")).output
    assert "# mapped: cell_voltage = BMS_Cells_M0.CellVoltage_000 … (192)" in output
    assert "[[signal]]" not in output


def test_a_proposed_mapping_loads_and_binds(tmp_path: Path) -> None:
    """A BMS nobody has mapped yet: series by their numbers, single values by their names and units."""
    cells = "".join(f' SG_ CellVolt{n} : {(n - 1) * 16}|16@1+ (1,0) [0|5000] "mV" E\n' for n in range(1, 13))
    text = (
        'VERSION ""\nBS_:\nBU_: E\nBO_ 1 Cells: 24 E\n' + cells + "BO_ 2 Pack: 8 E\n"
        ' SG_ BattVoltage : 0|16@1+ (0.1,0) [0|1000] "V" E\n SG_ PackCurrent : 16|16@1- (0.1,0) [0|0] "A" E\n'
        ' SG_ SOC : 32|8@1+ (0.5,0) [0|100] "%" E\n SG_ VehicleSpeed : 40|16@1+ (0.1,0) [0|300] "mph" E\n'
    )
    path, proposal = tmp_path / "x.dbc", tmp_path / "map.toml"
    path.write_text(text)
    proposal.write_text(run("map", str(path)).output)
    roles = RoleMap.load([str(proposal)])
    stage = DecodeStage(load_database([DbcFile(str(path))]), roles, Ledger(), DecodeSettings())
    bound = {(s.role, s.index): s.message for s in stage.catalog if s.role}
    assert {index for role, index in bound if role == "cell_voltage"} == set(range(12))
    assert {role for role, _ in bound} == {"cell_voltage", "pack_voltage", "pack_current", "soc", "speed"}


def test_the_letters_lv_within_a_word_propose_no_low_voltage(tmp_path: Path) -> None:
    path = tmp_path / "x.dbc"
    signals = ("MinimumCellVoltageModuleIndex", "HV_12vVoltageTarget", "LV_BusVoltage")
    rows = "".join(f' SG_ {name} : {8 * n}|8@1+ (1,0) [0|0] "" E\n' for n, name in enumerate(signals))
    path.write_text('VERSION ""\nBS_:\nBU_: E\nBO_ 1 Pack: 8 E\n' + rows)
    proposal = run("map", str(path)).output
    assert 'signal = "LV_BusVoltage"' in proposal and "# or:" not in proposal


def test_the_model_3s_tyres_chargers_and_lanes_are_not_its_battery() -> None:
    """Taken for cells, the batteries of its tyre sensors would be alarmed at 3 V."""
    proposal = tomllib.loads(run("map", str(data_file("dbc", "model3.dbc"))).output)["signal"]
    proposed = [(entry["role"], entry["message"], entry["signal"]) for entry in proposal]
    cells = [entry for entry in proposed if entry[0] in ("cell_voltage", "probe_temperature")]
    assert cells == [("cell_voltage", "ID401CellVoltages", r"Cell(?P<index>\d+)")]
    single = {role: signal for role, _, signal in proposed}
    assert single["low_voltage"] == "v12vBattVoltage261"
    assert single["coolant_temperature"] == "VCFRONT_tempCoolantBatInlet"
    assert single["range"] == "UI_Range"
    assert single["motor_speed"] == "DIF_axleSpeed"


def test_the_konas_12_v_battery_is_not_its_pack() -> None:
    assert "soh" not in run("map", str(data_file("dbc", "kona-pcan.dbc"))).output


def test_lint_names_many_signals_of_one_damage_in_one_line() -> None:
    output = run("lint", str(data_file("dbc", "model3.dbc"))).output
    (line,) = [line for line in output.splitlines() if "no signal selects" in line]
    assert ":2976: ID201VCFRONT_loggingAndVitals10Hz: 47 signals are multiplexed" in line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kona-pcan.dbc", "foxbms.dbc", "model3.dbc", "gm-hv-cells.dbc"])
def test_a_proposal_for_any_public_dbc_loads(tmp_path: Path, name: str) -> None:
    path, proposal = data_file("dbc", name), tmp_path / "map.toml"
    proposal.write_text(run("map", str(path)).output)
    roles = RoleMap.load([str(proposal)])
    DecodeStage(load_database([DbcFile(str(path))]), roles, Ledger(), DecodeSettings())
