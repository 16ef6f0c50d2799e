"""Proposes what the signals of a DBC mean, as the text of a mapping file. A person has the last word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from tbox.decode.database import Database
from tbox.decode.roles import RoleMap, conversion
from tbox.model import ROLE_UNITS

FAMILY_MIN = 3  # numbered signals that make a series of cells or probes
OTHERS_TOLD_MAX = 5

# role -> what its signal's name holds, and must not hold (regular expressions, any case).
_NO_VALUE = r"num|id|index|lim"
_NOT_PACK = r"cell|brick|min|max|lim|12v|lv|target|request|req|set|desired|dcdc|charger|ac_"
_NOT_LOW_VOLTAGE = _NO_VALUE + r"|cell|brick|target|curr|_i|amp|temp|state|high_?volt"
_NOT_MOTOR = r"fan|blower|hvac|comp|cmp|pump|wheel|lim|target|desired"
_HINTS: tuple[tuple[str, str, str], ...] = (
    ("cell_voltage_min", r"min.*(cell|brick).*v|(cell|brick).*v.*min", _NO_VALUE + "|temp"),
    ("cell_voltage_max", r"max.*(cell|brick).*v|(cell|brick).*v.*max", _NO_VALUE + "|temp"),
    ("temperature_min", r"min.*(cell|batt|pack|bms).*temp|(cell|batt|pack|bms).*temp.*min", _NO_VALUE),
    ("temperature_max", r"max.*(cell|batt|pack|bms).*temp|(cell|batt|pack|bms).*temp.*max", _NO_VALUE),
    ("pack_voltage", r"(pack|batt|hv|bms).*(volt|_u\b|_v\b)|^v_?(batt|pack)", _NOT_PACK),
    ("pack_current", r"(pack|batt|hv|bms).*(curr|amp|_i\b)|^i_?(batt|pack)", _NOT_PACK),
    ("soc", r"soc|state_?of_?charge", r"lim|target|min|max|12v"),
    ("soh", r"soh|state_?of_?health", r"lim|12v"),
    ("isolation_resistance", r"(iso|insul|riso)", r"err|fault|warn|flag|enable|monitor"),
    ("coolant_temperature", r"(cool|inlet).*temp|temp.*cool", r"motor|inv|target|req"),
    ("speed", r"(veh|car|ui).*speed|^speed|speed.*(kph|kmh)", r"wheel|motor|fan|unit|check|count|wiper"),
    ("motor_speed", r"(mot|rotor|axle).*(speed|rpm)|speed_signed|rpm", _NOT_MOTOR),
    ("motor_temperature", r"(motor|stator|rotor).*temp", r"lim|cool"),
    ("odometer", r"odo", r"trip"),
    ("ambient_temperature", r"(ambient|outside|exterior).*temp|temp.*(ambient|outside)", ""),
    ("low_voltage", r"(12v|\blv|_lv|low_?volt).*(volt|_v|u)|voltage_?12v|v_?bat", _NOT_LOW_VOLTAGE),
    ("charging_power", r"charg.*power", r"lim|max|avail|budget"),
    ("range", r"range", r"lim|gear|prnd|lane|view|radar|soft"),
    ("latitude", r"latitude|gps_?lat", ""),
    ("longitude", r"longitude|gps_?lon", r"accel"),
)  # fmt: skip
_OF_THE_PACK = frozenset({"pack_voltage", "pack_current", "soc", "soh"})
_TWELVE_VOLT = r"twelve|12v"  # a message of the other battery
# role -> what makes one of several candidates the likelier.
_LIKELY: dict[str, str] = {
    "low_voltage": r"12v.*volt|low_?volt",
    "coolant_temperature": r"bat|bms|pack",
    "motor_speed": r"motor|rotor|speed_signed",
    "ambient_temperature": r"filt",
}
_SERIES: tuple[tuple[str, str, str], ...] = (
    ("cell_voltage", r"cell|brick|volt|zelle", r"flag|invalid|valid|bal|temp|min|max|err"),
    ("probe_temperature", r"temp|probe|ntc|therm", r"flag|invalid|valid|err|min|max|volt"),
)
# A series is proposed where message or signal say that it is the battery's; else it is only named: a tyre
# sensor's battery or a charger's lines taken for cells would raise alarms.
_OF_BATTERY = r"cell|brick|zelle|batt|akku|bms|pack|modul|probe|ntc"
_NOT_BATTERY = r"tpms|tyre|tire|12v|charg"


class _Candidate(NamedTuple):
    message: str
    signal: str
    unit: str


def propose(database: Database, roles: RoleMap) -> str:
    """Return a mapping file: as comments what is mapped already, as entries what looks like a role."""
    mapped: dict[str, list[str]] = {}
    free: list[_Candidate] = []
    for definition in database.definitions:
        for signal in definition.message.signals:
            bound = roles.bind(definition.message.name, signal.name, signal.unit or "", definition.channel)
            if bound.role:
                mapped.setdefault(bound.role, []).append(f"{definition.message.name}.{signal.name}")
            elif _is_number(signal):
                free.append(_Candidate(definition.message.name, signal.name, signal.unit or ""))
    lines = [
        "# Proposed by `tbox dbc map`: check every entry. The format is described in tbox/decode/roles.py."
    ]
    lines += _mapped_lines(mapped)
    for role, pattern, against in _SERIES:
        if role not in mapped:
            lines += _series(role, _matching(free, role, pattern, against))
    for role, pattern, against in _HINTS:
        if role not in mapped:
            lines += _scalar(role, _matching(free, role, pattern, against))
    return "\n".join(lines) + "\n"


def _is_number(signal: Any) -> bool:
    return signal.length > 1 and not signal.is_multiplexer


def _mapped_lines(mapped: dict[str, list[str]]) -> Iterator[str]:
    for role in ROLE_UNITS:
        if names := mapped.get(role):
            count = f" … ({len(names)})" if len(names) > 1 else ""
            yield f"# mapped: {role} = {names[0]}{count}"


def _matching(free: Iterable[_Candidate], role: str, pattern: str, against: str) -> list[_Candidate]:
    return [
        one
        for one in free
        if re.search(pattern, one.signal, re.I)
        and not (against and re.search(against, one.signal, re.I))
        and not (role in _OF_THE_PACK and re.search(_TWELVE_VOLT, one.message, re.I))
        and (conversion(one.unit, role) is not None or not one.unit)
    ]


def _scalar(role: str, found: list[_Candidate]) -> Iterator[str]:
    if not found:
        return
    likely = _LIKELY.get(role)  # a unit that fits says more than a name
    found = sorted(
        found, key=lambda one: (not one.unit, not (likely and re.search(likely, one.signal, re.I)))
    )
    best, others = found[0], found[1 : 1 + OTHERS_TOLD_MAX]
    yield ""
    if others:
        yield "# or: " + ", ".join(f"{one.message}.{one.signal}" for one in others)
    yield from _entry(role, best.message, f'"{best.signal}"', best.unit)


def _series(role: str, found: list[_Candidate]) -> Iterator[str]:
    """Numbered signals: one entry for all that differ in their last number only."""
    families: dict[tuple[str, str, str], list[tuple[int, _Candidate]]] = {}
    for one in found:
        if match := re.fullmatch(r"(.*?)(\d+)(\D*)", one.signal):
            key = (match[1], match[3], one.unit)
            families.setdefault(key, []).append((int(match[2]), one))
    for (head, tail, unit), members in families.items():
        numbers = {number for number, _ in members}
        if len(numbers) < FAMILY_MIN or not unit:
            continue
        messages = {one.message for _, one in members}
        if not any(_is_of_battery(one) for _, one in members):
            first = members[0][1]
            yield f"# perhaps {role}: {first.message}.{first.signal} … ({len(numbers)})"
            continue
        message = messages.pop() if len(messages) == 1 else "*"
        pattern = f"'{re.escape(head)}(?P<index>\\d+){re.escape(tail)}'"
        yield ""
        yield from _entry(role, message, pattern, unit)
        if lowest := min(numbers):
            yield f"index_offset = {-lowest}"


def _is_of_battery(one: _Candidate) -> bool:
    name = f"{one.message} {one.signal}"
    return bool(re.search(_OF_BATTERY, name, re.I)) and not re.search(_NOT_BATTERY, name, re.I)


def _entry(role: str, message: str, signal: str, unit: str) -> Iterator[str]:
    yield "[[signal]]"
    yield f'message = "{message}"'
    yield f"signal = {signal}"
    yield f'role = "{role}"'
    if not unit and conversion("", role) is None:
        yield f'unit = "{ROLE_UNITS[role]}"  # the DBC gives none'
