"""Mapping files bind signals to roles by patterns and convert units; a mistake is named with its line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.decode.roles import DEFAULT_MAP, UNBOUND, UNITS, VSS_NAMES, MappingError, RoleMap, conversion
from tbox.model import ROLE_UNITS
from tbox.toml import TomlError


def roles(text: str) -> RoleMap:
    return RoleMap.parse([(text, "map.toml")])


def test_a_pattern_binds_cells_by_the_number_in_their_name() -> None:
    mapping = roles("[[signal]]\nsignal = 'Cell_(?P<index>\\d+)'\nrole = 'cell_voltage'\nindex_offset = -1\n")
    bound = mapping.bind("Any", "Cell_12", "mV", 0)
    assert (bound.role, bound.index, bound.factor) == ("cell_voltage", 11, 0.001)
    assert bound.vss.endswith("CellVoltage.CellVoltages[11]")
    assert mapping.bind("Any", "Cell_12_flag", "", 0) is UNBOUND


def test_an_index_may_be_made_of_several_numbers_and_letters() -> None:
    """GM: 4 messages, 8 banks each, 3 cells A to C in a bank."""
    shipped = RoleMap.load()
    names = [f"Voltage_{m}_{b}_{c}" for m in range(1, 5) for b in range(8) for c in "ABC"]
    bound = [shipped.bind(f"Battery_Module_{name[8]}", name, "V", 0) for name in names]
    assert [b.index for b in bound] == list(range(96))
    assert [b.module for b in bound] == [n // 24 for n in range(96)]


def test_probes_know_the_module_they_sit_in() -> None:
    text = "[[signal]]\nsignal = 'T(?P<index>\\d+)'\nrole = 'probe_temperature'\nper_module = 6\n"
    assert [roles(text).bind("M", f"T{n}", "degC", 0).module for n in (0, 5, 6, 47)] == [0, 0, 1, 7]


def test_the_first_entry_that_matches_wins_and_ignore_stops_the_search() -> None:
    text = (
        "[[signal]]\nmessage = 'Aux*'\nsignal = 'SOC'\nignore = true\n"
        "[[signal]]\nsignal = 'SOC'\nrole = 'soc'\nchannel = 0\n[[signal]]\nsignal = 'SO.'\nrole = 'soh'\n"
    )
    assert roles(text).bind("Aux1", "SOC", "%", 0) is UNBOUND
    assert roles(text).bind("Main", "SOC", "%", 0).role == "soc"
    assert roles(text).bind("Main", "SOC", "%", 1).role == "soh"


def test_the_users_file_goes_before_the_shipped_one() -> None:
    own = "[[signal]]\nmessage = 'BMS_Pack'\nsignal = 'Soc'\nrole = 'soh'\n"
    both = RoleMap.parse([(own, "own.toml"), (DEFAULT_MAP.read_text(), str(DEFAULT_MAP))])
    assert both.bind("BMS_Pack", "Soc", "%", 0).role == "soh"
    assert both.bind("BMS_Pack", "Soh", "%", 0).role == "soh"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("[[signal]]\nsignal = 'A'\nrole = 'cell_volts'\n", 3, "cell_voltage"),
        ("[[signal]]\nsignal = '('\nrole = 'soc'\n", 2, "regular expression"),
        ("[[signal]]\nsignal = 'A'\nrole = 'soc'\nindex_weights = { n = 1 }\n", 4, "no group 'n'"),
        ("[[signal]]\nsignal = 'A'\nrole = 'gear'\nvalues = { P = 0 }\n", 4, "no raw value"),
        ("[[signal]]\nsignal = 'A'\nrole = 'soc'\nrange = [5.0, 1.0]\n", 4, "empty"),
        ("[[signal]]\nsignal = 'A'\n", 2, "says nothing"),
    ],
)
def test_a_mistake_in_a_mapping_is_named_with_its_line_and_mend(text: str, line: int, what: str) -> None:
    with pytest.raises(MappingError) as caught:
        roles(text)
    assert caught.value.where == f"map.toml:{line}" and what in str(caught.value) and caught.value.mend


def test_an_unknown_key_is_a_mistake() -> None:
    with pytest.raises(TomlError, match=r"map\.toml:3"):
        roles("[[signal]]\nsignal = 'A'\nroel = 'soc'\n")


def test_a_unit_that_does_not_fit_is_a_mistake_in_a_users_file_and_no_match_in_ours() -> None:
    with pytest.raises(MappingError, match="unit 'bar'"):
        roles("[[signal]]\nsignal = 'SOC'\nrole = 'soc'\n").bind("M", "SOC", "bar", 0)
    assert RoleMap.load().bind("BMS_Pack", "Soc", "bar", 0) is UNBOUND


@given(
    unit=st.sampled_from([u for units in UNITS.values() for u in units]),
    role=st.sampled_from(list(ROLE_UNITS)),
)
def test_known_units_convert_whatever_their_case(unit: str, role: str) -> None:
    assert conversion(unit, role) == conversion(f" {unit.upper()} ", role)


@pytest.mark.parametrize(
    ("unit", "role", "value", "expected"),
    [
        ("mV", "cell_voltage", 3700, 3.7), ("°C", "probe_temperature", 25, 25),
        ("degF", "ambient_temperature", 212, 100), ("K", "coolant_temperature", 300, 26.85),
        ("mph", "speed", 100, 160.9344), ("m", "odometer", 1500, 1.5),
        ("Ohm", "isolation_resistance", 500_000, 500), ("W", "charging_power", 11_000, 11),
    ],
)  # fmt: skip
def test_units_are_converted_to_the_roles(unit: str, role: str, value: float, expected: float) -> None:
    factor_offset = conversion(unit, role)
    assert factor_offset is not None
    assert value * factor_offset[0] + factor_offset[1] == pytest.approx(expected)


def test_vss_names_are_those_of_roles() -> None:
    assert set(VSS_NAMES) <= set(ROLE_UNITS)
