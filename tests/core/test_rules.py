"""Rule files: the shipped ones load, an error names file, line and mend, and overriding is key by key."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbox.edge.rules import (
    CHEMISTRIES,
    RuleError,
    RuleSet,
    RuleText,
    load_rules,
    main,
    parse_rules,
    table_lines,
)
from tbox.model import Level

GOOD = """\
# a comment
[rule.hot]
watch = "probe_temperature"
when = "above"
for = "2 s"
bands = [
  { level = "warning", limit = "50 degC", clear = "45 degC" },
  { level = "critical", limit = "60 degC", clear = "55 degC", for = "500 ms" },
]
text = "{item} is at {value}, over {limit}"
"""


def parsed(*texts: str) -> RuleSet:
    return parse_rules([RuleText(f"{i}.toml", text) for i, text in enumerate(texts)], "nmc")


def broken(old: str, new: str) -> str:
    assert old in GOOD
    with pytest.raises(RuleError) as refused:
        parsed(GOOD.replace(old, new))
    return str(refused.value)


@pytest.mark.parametrize("chemistry", CHEMISTRIES)
def test_the_shipped_rules_load_and_each_names_its_source(chemistry: str) -> None:
    rules = load_rules(chemistry).rules
    assert len(rules) >= 35
    assert [rule.name for rule in rules if not rule.source] == []
    assert len({rule.name for rule in rules}) == len(rules)


def test_the_chemistries_differ_in_voltage_and_in_nothing_else() -> None:
    lfp, nmc = load_rules("lfp"), load_rules("nmc")
    other = {rule.name for rule in lfp.rules if rule != nmc.named(rule.name)}
    knees = {"imbalance", "imbalance-rest", "imbalance-sigma", "cell-drift"}
    limits = {"cell-over-voltage", "cell-under-voltage", "pack-over-voltage", "pack-under-voltage"}
    assert other == limits | knees
    for name in knees:
        of_lfp, of_nmc = lfp.named(name), nmc.named(name)
        assert of_lfp and of_nmc and replace(of_lfp, knee_v=of_nmc.knee_v) == of_nmc


def test_the_slope_alone_never_is_more_than_a_warning() -> None:
    for rule in load_rules("nmc").rules:
        if rule.watch == "probe_rise":
            assert max(band.level for band in rule.ladder.bands) <= Level.WARNING and not rule.isolate


def test_quantities_come_in_the_unit_of_the_watch_and_are_shown_as_written() -> None:
    rule = load_rules("nmc").named("imbalance")
    assert rule
    assert rule.ladder.bands[0].limit == 0.15
    assert (rule.unit, rule.per_unit) == ("mV", 0.001)
    assert rule.load_allowance_v_per_a == pytest.approx(0.0003)


def test_a_band_takes_its_times_from_the_rule_unless_it_has_its_own() -> None:
    warning, critical = parsed(GOOD).rules[0].ladder.bands
    assert (warning.for_ns, critical.for_ns) == (2_000_000_000, 500_000_000)


def test_a_later_file_overrides_key_by_key_and_may_switch_a_rule_off() -> None:
    [rule] = parsed(GOOD, '[rule.hot]\nfor = "5 s"\n').rules
    assert rule.ladder.bands[0].for_ns == 5_000_000_000
    assert rule.text == "{item} is at {value}, over {limit}"
    assert parsed(GOOD, "[rule.hot]\nenabled = false\n").rules == ()


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ('"50 degC"', '"50 V"', 7, "is a voltage, not a temperature"),
        ('"50 degC"', '"50"', 7, "has no unit"),
        ('"55 degC", for', '"65 degC", for', 8, "safe side of limit"),
        ('limit = "60 degC"', 'limit = "48 degC"', 8, "safe side"),
        ('"60 degC", clear = "55 degC"', '"49 degC", clear = "40 degC"', 8, "bands must rise"),
        ('level = "critical"', 'level = "awful"', 8, "level 'awful' is unknown"),
        ('watch = "probe_temperature"', 'watch = "probe_temprature"', 3, "did you mean 'probe_temperature'?"),
        ('when = "above"', 'when = "over"', 4, "when = 'over' is unknown"),
        ('for = "2 s"', 'for = "2"', 5, "has no unit"),
        ('for = "2 s"', 'for = "-2 s"', 5, "negative"),
        ('for = "2 s"', 'for = "48 h"', 5, "longer than a day"),
        ('for = "2 s"', 'fro = "2 s"', 5, "did you mean 'for'?"),
        ("{value}", "{vlaue}", 10, "text names 'vlaue'"),
        ("{value}", "it", 10, "does not give the value"),
        ("{limit}", "{limit", 10, "text: "),
        ('clear = "45 degC"', 'claer = "45 degC"', 7, "did you mean 'clear'?"),
        ('for = "2 s"', 'latch = "yes"', 5, "neither true nor false"),
        ('for = "2 s"', 'only = "parked"', 5, "only = 'parked' is unknown"),
        ('for = "2 s"', 'unless = ["hott"]', 5, "there is no other rule 'hott'"),
        ('for = "2 s"', 'unless = ["hot"]', 5, "there is no other rule 'hot'"),
        ('for = "2 s"', 'unless = "hot"', 5, "no list of names"),
        ('for = "2 s"', 'knee = "3.4 V"', 5, "knows no knee"),
        ('for = "2 s"', 'load_allowance = "0.3 mV/A"', 5, "does not depend on the current"),
        ('for = "2 s"', "params = { depth = 3 }", 5, "unknown key 'depth'"),
        ('for = "2 s"', 'escalate = [ { after = "1 min" } ]', 5, "needs after and level"),
        ("[rule.hot]", "[rules.hot]", 2, "unknown table 'rules'"),
        ('for = "2 s"', "for = 2 s", 5, "not TOML"),
    ],
)  # fmt: skip
def test_a_bad_rule_is_one_line_with_file_line_and_mend(old: str, new: str, line: int, says: str) -> None:
    error = broken(old, new)
    assert re.match(rf"0\.toml:{line}: ", error), error
    assert says in error
    assert "; " in error
    assert "\n" not in error


def test_the_error_names_the_file_a_key_came_from_last() -> None:
    with pytest.raises(RuleError, match=r"^1\.toml:3: rule hot"):
        parsed(GOOD, '\n[rule.hot]\nfor = "2 V"\n')
    with pytest.raises(RuleError, match=r"^0\.toml:10: rule hot"):
        parsed(GOOD.replace("{value}", "x"), '\n[rule.hot]\nfor = "2 s"\n')


def test_two_rules_cannot_share_the_runaway_watch() -> None:
    rule = """
[rule.{name}]
watch = "thermal_runaway"
when = "above"
params = {{ voltage_drop = "25 %", temperature = "60 degC", sustained = "3 s" }}
bands = [ {{ level = "critical", limit = "1 degC/s", clear = "0 degC/s" }} ]
text = "{{value}}"
"""
    with pytest.raises(RuleError, match="a watches thermal_runaway already"):
        parsed(rule.format(name="a") + rule.format(name="b"))
    with pytest.raises(RuleError, match="params lacks temperature"):
        parsed(rule.format(name="a").replace('temperature = "60 degC", ', ""))


def test_files_are_read_after_the_shipped_ones(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[rule.soh-low]\nenabled = false\n[rule.hvil-open]\nfor = "1 s"\n', encoding="utf-8")
    rules = load_rules("lfp", [own])
    assert rules.named("soh-low") is None
    hvil = rules.named("hvil-open")
    assert hvil and hvil.ladder.bands[0].for_ns == 1_000_000_000
    with pytest.raises(RuleError, match="cannot read the rules"):
        load_rules("lfp", [tmp_path / "absent.toml"])
    with pytest.raises(RuleError, match="choose one of lfp, nmc"):
        load_rules("lead")


@given(st.lists(st.sampled_from(GOOD.splitlines()), max_size=14), st.text(max_size=8))
def test_a_mangled_file_is_read_or_refused_with_a_place_never_more(lines: list[str], noise: str) -> None:
    try:
        parsed("\n".join(lines) + noise)
    except RuleError as error:
        assert str(error).startswith(("0.toml", "rule "))


def test_the_table_for_people_has_a_line_for_each_rule(capsys: pytest.CaptureFixture[str]) -> None:
    rules = load_rules("nmc")
    assert len(list(table_lines(rules))) == len(rules.rules) + 2
    assert main(["lfp"]) == 0
    assert "| cell-over-voltage (asks for isolation) | warning >= 3.7 V" in capsys.readouterr().out
    assert main(["lead"]) == 2
    assert "unknown chemistry" in capsys.readouterr().err
