"""DBC damage is mended where the meaning is certain, said with its line, and refused where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tbox.decode.database import DbcError, DbcFile, lint, load_database, parse_text
from tbox.decode.mend import mend

HEAD = 'VERSION ""\n\nNS_ :\n\nBS_:\n\nBU_: ECU\n\n'
GOOD = HEAD + 'BO_ 256 Msg: 8 ECU\n SG_ Speed : 0|16@1+ (0.1,0) [0|300] "km/h" ECU\n'


def message_of(text: str) -> object:
    return parse_text("x.dbc", text).database.messages[0]


DAMAGE = {
    "no BS_ line": (
        GOOD.replace("BS_:\n\nBU_: ECU\n\n", "  NS_DESC_\n"), 6, "BS_: is missing",
    ),
    "a 29-bit id without its flag": (GOOD.replace("BO_ 256", "BO_ 419361024"), 9, "29 bits"),
    "a value text for a signal that is not there": (GOOD + '\nVAL_ 256 Gear 0 "P" ;\n', 12, "'Gear'"),
    "a type for a signal that is not there": (GOOD + "\nSIG_VALTYPE_ 256 Gear : 1;\n", 12, "'Gear'"),
    "a signal name that starts with a digit": (GOOD.replace("SG_ Speed", "SG_ 2ndSpeed"), 10, "'2ndSpeed'"),
    "a message name that starts with a digit": (GOOD.replace("256 Msg", "256 1Msg"), 9, "'1Msg'"),
    "a dash in a name": (GOOD.replace("SG_ Speed", "SG_ Speed-km"), 10, "'Speed-km'"),
    "a line of a template": (GOOD + "{% endfor %}\n", 11, "template"),
    "a hexadecimal id": (GOOD.replace("BO_ 256", "BO_ 0x100"), 9, "decimal"),
    "no sender": (GOOD.replace("8 ECU\n", "8\n"), 9, "sender"),
    "no receiver": (GOOD.replace('"km/h" ECU', '"km/h"') + 'CM_ "bus";\n', 10, "receivers"),
    "a trailing comma after the receivers": (GOOD.replace('"km/h" ECU', '"km/h" ECU,'), 10, "receivers"),
    "no unit": (GOOD.replace(' "km/h" ECU', " ECU"), 10, "unit"),
    "no range": (GOOD.replace(" [0|300]", ""), 10, "range"),
    "a number that starts with its point": (GOOD.replace("(0.1,0)", "(.1,0)"), 10, "digit before the point"),
    "a value text without a value": (GOOD + 'VAL_ 256 Speed "km/h" ;\n', 11, "cannot be read"),
    "an open comment": (GOOD + 'CM_ SG_ 256 Speed "12" wheel";\nCM_ "bus";\n', 11, "cannot be read"),
    "an attribute without a value": (GOOD + 'BA_ "Cycle" BO_ 256 ;\n', 11, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_of_the_wild_is_mended_and_told(name: str) -> None:
    text, line, what = DAMAGE[name]
    with pytest.raises(DbcError):
        parse_text("x.dbc", text, strict=True)
    parsed = parse_text("x.dbc", text)
    assert [m.line for m in parsed.mends] == [line]
    assert what in parsed.mends[0].what
    (message,) = parsed.database.messages
    (signal,) = message.signals
    assert (signal.start, signal.length, signal.conversion.scale) == (0, 16, 0.1)
    assert any(f.line == line and f.what.startswith("mended") for f in lint(parsed))


def test_references_follow_what_was_renamed() -> None:
    text = GOOD.replace("BO_ 256", "BO_ 419361024").replace("SG_ Speed", "SG_ 2nd")
    text += 'VAL_ 419361024 2nd 65535 "SNA" ;\nCM_ SG_ 419361024 2nd "the second";\n'
    (message,) = parse_text("x.dbc", text).database.messages
    (signal,) = message.signals
    assert message.is_extended_frame and message.frame_id == 419361024
    assert signal.name == "_2nd" and signal.conversion.choices and signal.comment == "the second"


def test_a_reference_that_lost_the_flag_of_a_29_bit_id_finds_its_message() -> None:
    text = GOOD.replace("BO_ 256", f"BO_ {419361024 | 1 << 31}") + 'VAL_ 419361024 Speed 1 "one" ;\n'
    (message,) = parse_text("x.dbc", text).database.messages
    assert message.signals[0].conversion.choices


REFUSED = {
    "a template": (GOOD.replace("0|16@1+", "{{start}}|16@1+"), "x.dbc:10", "render it first"),
    "no byte order": (GOOD.replace("@1+", "@+"), "x.dbc:10", "correct the line"),
    "an id twice": (GOOD + "\nBO_ 256 Other: 8 ECU\n", "x.dbc:12", "remove one"),
    "no message": (HEAD, "x.dbc", "BO_"),
    "an impossible id": (GOOD.replace("BO_ 256", "BO_ 4026531839"), "x.dbc:9", "correct"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_certain_is_refused_with_line_and_mend(name: str) -> None:
    text, where, end = REFUSED[name]
    with pytest.raises(DbcError) as caught:
        parse_text("x.dbc", text)
    assert caught.value.where == where and end in caught.value.mend
    assert "\n" not in str(caught.value)


def test_an_id_defined_twice_names_both_places() -> None:
    with pytest.raises(DbcError, match=r"x\.dbc:12: id 0x100 \(Other\) .* x\.dbc:9 \(Msg\)"):
        parse_text("x.dbc", GOOD + "\nBO_ 256 Other: 8 ECU\n")


@settings(max_examples=300, deadline=None)
@given(
    cut=st.integers(0, len(GOOD)),
    insert=st.text(st.sampled_from('{}%"|@:;,BO_SG_VAL_ 0123\n\0é'), max_size=12),
)
def test_no_text_raises_anything_but_a_dbc_error(cut: int, insert: str) -> None:
    try:
        parse_text("x.dbc", GOOD[:cut] + insert + GOOD[cut:])
    except DbcError as error:
        assert error.where.startswith("x.dbc") and error.mend


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=300))
def test_mending_keeps_the_number_of_lines(text: str) -> None:
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    assert mend(text)[0].count("\n") == plain.count("\n")


def write(tmp_path: Path, name: str, text: str | bytes) -> str:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_one_bad_file_does_not_stop_the_others(tmp_path: Path) -> None:
    good, bad = write(tmp_path, "good.dbc", GOOD), write(tmp_path, "bad.dbc", "nonsense")
    database = load_database([DbcFile(bad), DbcFile(good), DbcFile("/nowhere.dbc")])
    assert [d.message.name for d in database.definitions] == ["Msg"]
    assert [e.where.split(":")[0] for e in database.errors] == [bad, "/nowhere.dbc"]


def test_strict_stops_at_the_first_bad_file(tmp_path: Path) -> None:
    good, bad = write(tmp_path, "good.dbc", GOOD), write(tmp_path, "bad.dbc", "nonsense")
    with pytest.raises(DbcError):
        load_database([DbcFile(good), DbcFile(bad)], strict=True)


def test_nothing_that_loads_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DbcError):
        load_database([DbcFile(write(tmp_path, "bad.dbc", "nonsense"))])


def test_the_same_id_may_stand_on_two_buses_but_not_twice_on_one(tmp_path: Path) -> None:
    one = write(tmp_path, "one.dbc", GOOD)
    two = write(tmp_path, "two.dbc", GOOD.replace("Msg", "Other"))
    apart = load_database([DbcFile(one, 0), DbcFile(two, 1)])
    assert [(d.channel, d.message.name) for d in apart.definitions] == [(0, "Msg"), (1, "Other")]
    together = load_database([DbcFile(one), DbcFile(two)])
    assert [d.message.name for d in together.definitions] == ["Msg"]
    assert f"{one}:9" in str(together.errors[0]) and together.errors[0].where == f"{two}:9"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_units_survive_the_encodings_in_use(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path, "x.dbc", GOOD.replace("km/h", "°C").encode(encoding))
    (definition,) = load_database([DbcFile(path)]).definitions
    assert definition.message.signals[0].unit == "°C"


def test_lint_tells_what_will_not_decode_as_drawn() -> None:
    text = GOOD + ' SG_ Other : 8|16@1+ (1,0) [5|1] "" ECU\n SG_ Zero : 32|8@1+ (0,0) [0|0] "" ECU\n'
    told = " ".join(f.what for f in lint(parse_text("x.dbc", text)))
    for expected in ("overlapping", "empty range", "factor 0"):
        assert expected in told
