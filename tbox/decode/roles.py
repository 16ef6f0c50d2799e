"""Binds DBC signals to the roles of model.ROLE_UNITS by mapping files of patterns. Decodes nothing.

A mapping file is TOML. `[[signal]]` says what signals mean, `[[message]]` how messages are protected.
Entries are tried in order, the user's files before the shipped tbox/decode/default_map.toml; for each signal
and each message the first entry that matches wins. A signal no entry matches is sampled under its DBC name.

    [[signal]]
    message = "BMS_Cells_M*"                    # shell pattern over message names; "*" when left out
    signal = 'CellVoltage_(?P<index>\\d+)'       # regular expression over the whole signal name
    role = "cell_voltage"                       # a name of model.ROLE_UNITS

That is all most signals need: the unit comes from the DBC and is converted to the role's (mV, degF, mph, Ohm
and their kin are known), the range and the SNA values come from the DBC and the role. What else can be said:

    channel = 0                         # only on this bus
    unit = "mV"                         # where the DBC's unit is missing or wrong
    invert = true                       # the DBC counts the other way (a current out of the battery > 0)
    index_weights = { bank = 24, mux = 3, letter = 1 }  # index = sum of weight * named group + index_offset;
    index_offset = -24                  #   letters count from A = 0; default { index = 1 } and 0
    module_weights = { module = 1 }     # the same for the module a probe or cell sits in
    module_offset = 0
    per_module = 6                      # or: module = index div per_module
    values = { "1" = 0, "4" = 3 }       # raw enum value -> the role's code; any other raw value is SNA
    sna = [255, 65535]                  # raw values that say "not available", beside the DBC's own
    all_ones_is_sna = false             # all ones is a reading here. Default: SNA in unsigned signals of a
                                        #   role from 8 bits up, and in any signal when outside its range
    range = [0.0, 5.0]                  # physical range in the role's unit, instead of the DBC's and role's
    glitch = 0.5                        # a single-sample spike larger than this is refused; 0: never
    invalid_flag = "CellVoltage_{index}_invalidFlag"  # a signal of the same message; {group} = matched text
    invalid_when = [1]                  # raw values of that flag that refuse the sample; default: all but 0
    vss = "Vehicle.Cabin.…"             # a VSS name for a signal, with or without a role
    ignore = true                       # leave the signal unbound though a later entry matches

    [[message]]
    message = "BMS_*"
    profile = "e2e-p1"                  # e2e-p1 | e2e-p5 | crc8 | counter
    crc = "CRC"                         # name of the CRC signal; it must fill whole bytes
    counter = "AliveCounter"            # name of the counter signal
    data_id = 0x1234                    # a number, "can_id", or the name of a DBC message attribute

Profiles: `e2e-p1` AUTOSAR E2E profile 1 (CRC-8 SAE J1850 polynomial, start and XOR 0, counter 0 to 14;
data_id of 16 bits, low byte first, before the data), `e2e-p5` profile 5 (CRC-16 CCITT, start 0xFFFF, counter
0 to 255; data_id after the data), `counter` an alive counter without CRC, `crc8` any CRC-8 over the payload
without the CRC byte, to be described by

    poly = 0x1D
    init = 0xFF
    xor_out = 0xFF
    reflect = false                     # reflected input and output
    data_id_at = "end"                  # "start" | "end"; without data_id there is none
    data_id_bytes = 1                   # 1 | 2, low byte first
    include_can_id = false              # the two low bytes of the CAN id, low first, go before all else

`counter_modulo = 15` (the values the counter takes; default: the profile's, else all its bits can say) may
stand in every profile. A frame whose CRC is wrong gives samples with validity CRC; a counter that does not
move gives COUNTER, or DUPLICATE when the payload is the same too; lost frames are counted, what follows them
is valid.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec

from tbox import toml
from tbox.errors import TboxError
from tbox.model import ROLE_UNITS

DEFAULT_MAP = Path(__file__).with_name("default_map.toml")
INDEX_MAX = 4095
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class MappingError(TboxError):
    """A mapping file that says something impossible; `where` is file:line."""


class SignalRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[signal]]` entry of a mapping file."""

    message: str = "*"
    signal: str
    channel: int | None = None
    role: str = ""
    unit: str = ""
    invert: bool = False
    index_weights: dict[str, int] = {}
    index_offset: int = 0
    module_weights: dict[str, int] = {}
    module_offset: int = 0
    per_module: Annotated[int, msgspec.Meta(ge=1)] | None = None
    values: dict[str, float] = {}
    sna: list[int] = []
    all_ones_is_sna: bool | None = None
    range: tuple[float, float] | None = None
    glitch: Annotated[float, msgspec.Meta(ge=0)] | None = None
    invalid_flag: str = ""
    invalid_when: list[int] = []
    vss: str = ""
    ignore: bool = False


class MessageRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[message]]` entry of a mapping file."""

    message: str
    profile: Literal["e2e-p1", "e2e-p5", "crc8", "counter"]
    channel: int | None = None
    crc: str = ""
    counter: str = ""
    data_id: int | str | None = None
    data_id_at: Literal["start", "end"] = "end"
    data_id_bytes: Annotated[int, msgspec.Meta(ge=1, le=2)] = 1
    poly: Annotated[int, msgspec.Meta(ge=0, le=0xFF)] = 0x1D
    init: Annotated[int, msgspec.Meta(ge=0, le=0xFF)] = 0xFF
    xor_out: Annotated[int, msgspec.Meta(ge=0, le=0xFF)] = 0xFF
    reflect: bool = False
    include_can_id: bool = False
    counter_modulo: Annotated[int, msgspec.Meta(ge=2, le=1 << 16)] | None = None


class Mapping(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole mapping file."""

    signal: list[SignalRule] = []
    message: list[MessageRule] = []


# --- units --------------------------------------------------------------------------------------------

# role unit -> unit as DBC files write it (folded by _fold) -> (factor, offset) to the role's unit.
_SAME = (1.0, 0.0)
_MILE = (1.609344, 0.0)
_MILLI = (0.001, 0.0)
UNITS: dict[str, dict[str, tuple[float, float]]] = {
    "V": {"v": _SAME, "volt": _SAME, "volts": _SAME, "mv": _MILLI, "kv": (1000.0, 0.0)},
    "A": {"a": _SAME, "amp": _SAME, "amps": _SAME, "ampere": _SAME, "ma": _MILLI},
    "degC": {
        "degc": _SAME, "c": _SAME, "celsius": _SAME, "deg": _SAME,
        "degf": (5 / 9, -160 / 9), "f": (5 / 9, -160 / 9), "k": (1.0, -273.15),
    },
    "percent": {"%": _SAME, "percent": _SAME, "": _SAME},
    "kOhm": {"kohm": _SAME, "kω": _SAME, "ohm": _MILLI, "ω": _MILLI},
    "km/h": {"km/h": _SAME, "kph": _SAME, "kmh": _SAME, "mph": _MILE, "m/s": (3.6, 0.0)},
    "rpm": {"rpm": _SAME, "1/min": _SAME, "u/min": _SAME, "min-1": _SAME},
    "km": {"km": _SAME, "m": _MILLI, "mi": _MILE, "miles": _MILE},
    "kW": {"kw": _SAME, "w": _MILLI},
    "deg": {"deg": _SAME, "°": _SAME, "degree": _SAME, "degrees": _SAME},
}  # fmt: skip


def _fold(unit: str) -> str:
    """Return a unit in one spelling. A degree sign may have been lost to a wrong encoding."""
    folded = unit.strip().lower().replace("º", "°").replace("\ufffd", "°").replace("ohms", "ohm")
    return folded if folded == "°" else folded.replace("°", "deg")


def conversion(unit: str, role: str) -> tuple[float, float] | None:
    """Return (factor, offset) from a DBC's unit to the role's, None when the unit is not known."""
    wanted = ROLE_UNITS[role]
    if not wanted:
        return 1.0, 0.0
    return UNITS[wanted].get(_fold(unit))


# --- VSS names ----------------------------------------------------------------------------------------

# COVESA VSS 6.0, only where unit and meaning are the same: an odometer in km is no TraveledDistance in m.
_BATTERY = "Vehicle.Powertrain.TractionBattery."
VSS_NAMES: dict[str, str] = {
    "cell_voltage": _BATTERY + "CellVoltage.CellVoltages[{index}]",
    "cell_voltage_min": _BATTERY + "CellVoltage.Min",
    "cell_voltage_max": _BATTERY + "CellVoltage.Max",
    "probe_temperature": _BATTERY + "Temperature.CellTemperature[{index}]",
    "temperature_min": _BATTERY + "Temperature.Min",
    "temperature_max": _BATTERY + "Temperature.Max",
    "pack_voltage": _BATTERY + "CurrentVoltage",
    "pack_current": _BATTERY + "CurrentCurrent",
    "soc": _BATTERY + "StateOfCharge.Current",
    "soh": _BATTERY + "StateOfHealth",
    "speed": "Vehicle.Speed",
    "motor_speed": "Vehicle.Powertrain.ElectricMotor.Speed",
    "motor_temperature": "Vehicle.Powertrain.ElectricMotor.Temperature",
    "ambient_temperature": "Vehicle.Exterior.AirTemperature",
    "low_voltage": "Vehicle.LowVoltageBattery.CurrentVoltage",
    "latitude": "Vehicle.CurrentLocation.Latitude",
    "longitude": "Vehicle.CurrentLocation.Longitude",
}


# --- binding ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Binding:
    """What a mapping entry makes of one signal. factor, offset: from the DBC's unit to the role's."""

    role: str = ""
    index: int = 0
    module: int = 0
    vss: str = ""
    factor: float = 1.0
    offset: float = 0.0
    values: tuple[tuple[int, float], ...] = ()
    sna: tuple[int, ...] = ()
    all_ones_is_sna: bool | None = None
    span: tuple[float, float] | None = None
    glitch: float | None = None
    invalid_flag: str = ""
    invalid_when: tuple[int, ...] = ()
    shipped: bool = False  # by the mapping shipped with tbox, which may not fit everything that has its names


UNBOUND = Binding()


@dataclass(frozen=True, slots=True)
class _Rule:
    """A signal rule ready to match, and where it stands."""

    rule: SignalRule
    pattern: re.Pattern[str]
    where: str
    shipped: bool


class Protection(NamedTuple):
    """The `[[message]]` entry that holds for a message, where it stands, and whether tbox ships it."""

    rule: MessageRule
    where: str
    shipped: bool


@dataclass(frozen=True, slots=True)
class RoleMap:
    """All mapping files in force, in order of precedence."""

    _signals: tuple[_Rule, ...] = ()
    _messages: tuple[Protection, ...] = ()

    @classmethod
    def load(cls, files: Sequence[str] = (), *, defaults: bool = True) -> RoleMap:
        """Read mapping files, the shipped one last. Raises toml.TomlError or MappingError."""
        paths = [*files, *([str(DEFAULT_MAP)] if defaults else [])]
        return cls.parse([(toml.read(path), path) for path in paths])

    @classmethod
    def parse(cls, texts: Sequence[tuple[str, str]]) -> RoleMap:
        """The same from (text, file name) pairs."""
        signals: list[_Rule] = []
        messages: list[Protection] = []
        for text, path in texts:
            mapping = toml.parse(text, Mapping, path)
            signals += [_compile(rule, text, path, n) for n, rule in enumerate(mapping.signal)]
            for n, message in enumerate(mapping.message):
                where = f"{path}:{toml.line_of(text, ['message', n])}"
                _check_message(message, where)
                messages.append(Protection(message, where, path == str(DEFAULT_MAP)))
        return cls(tuple(signals), tuple(messages))

    def bind(self, message: str, signal: str, unit: str, channel: int) -> Binding:
        """Return what the first matching entry says of a signal, UNBOUND when none matches.

        Raises MappingError when the entry matches and cannot be: an unknown unit, an index out of range.
        """
        for entry in self._signals:
            rule = entry.rule
            if rule.channel is not None and rule.channel != channel:
                continue
            found = entry.pattern.fullmatch(signal)
            if found and _glob(rule.message, message):
                if rule.ignore:
                    return UNBOUND
                try:
                    return _bind(entry, found, f"{message}.{signal}", unit)
                except MappingError:
                    if not entry.shipped:
                        raise
        return UNBOUND

    def protection(self, message: str, channel: int) -> Protection | None:
        """Return the first `[[message]]` entry for a message, None when there is none."""
        for entry in self._messages:
            if entry.rule.channel in (None, channel) and _glob(entry.rule.message, message):
                return entry
        return None


@lru_cache(maxsize=4096)
def _glob(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern)


def _compile(rule: SignalRule, text: str, path: str, n: int) -> _Rule:
    """Check what a struct cannot say. Raises MappingError."""

    def refuse(key: str, what: str, mend: str) -> MappingError:
        return MappingError(what, where=f"{path}:{toml.line_of(text, ['signal', n, key])}", mend=mend)

    if rule.role and rule.role not in ROLE_UNITS:
        raise refuse("role", f"unknown role {rule.role!r}", did_you_mean(rule.role, ROLE_UNITS))
    if not (rule.role or rule.vss or rule.ignore or rule.sna or rule.invalid_flag):
        raise refuse("signal", "the entry says nothing about its signals", "add role = … or ignore = true")
    try:
        pattern = re.compile(rule.signal)
    except re.error as error:
        raise refuse("signal", f"is no regular expression: {error}", "correct the pattern") from None
    for key, weights in (("index_weights", rule.index_weights), ("module_weights", rule.module_weights)):
        if missing := set(weights) - set(pattern.groupindex):
            raise refuse(key, f"no group {min(missing)!r} in the pattern", f"name it: (?P<{min(missing)}>…)")
    if bad := [raw for raw in rule.values if not re.fullmatch(r"-?\d+", raw)]:
        raise refuse("values", f"{bad[0]!r} is no raw value", "write the integer in quotes")
    if rule.range is not None and not rule.range[0] < rule.range[1]:
        raise refuse("range", "the range is empty", "write [low, high]")
    where = f"{path}:{toml.line_of(text, ['signal', n])}"
    return _Rule(rule, pattern, where, path == str(DEFAULT_MAP))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a mend: the nearest known name, or all of them."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"


def _check_message(rule: MessageRule, where: str) -> None:
    if rule.profile == "counter":
        if not rule.counter:
            raise MappingError("profile 'counter' without a counter", where=where, mend="add counter = …")
    elif not rule.crc:
        raise MappingError(f"profile {rule.profile!r} without a CRC signal", where=where, mend="add crc = …")
    if rule.profile.startswith("e2e") and rule.data_id is None:
        raise MappingError(
            f"profile {rule.profile!r} without a data id",
            where=where,
            mend="add data_id = a number or 'can_id'",
        )


def _bind(entry: _Rule, found: re.Match[str], name: str, unit: str) -> Binding:
    rule, where = entry.rule, entry.where
    groups = {key: text for key, text in found.groupdict().items() if text is not None}
    index_weights = rule.index_weights or ({"index": 1} if "index" in groups else {})
    module_weights = rule.module_weights or ({"module": 1} if "module" in groups else {})
    index = rule.index_offset + sum(w * _number(groups.get(g, "0")) for g, w in index_weights.items())
    module = rule.module_offset + sum(w * _number(groups.get(g, "0")) for g, w in module_weights.items())
    if rule.per_module is not None:
        module += index // rule.per_module
    if not (0 <= index <= INDEX_MAX and 0 <= module <= INDEX_MAX):
        raise MappingError(
            f"{name} gets index {index}, module {module}", where=where, mend="correct the weights and offsets"
        )
    factor, offset = _factor(rule, name, unit, where)
    low, high = rule.range or (0.0, 0.0)
    return Binding(
        role=rule.role,
        index=index,
        module=module,
        vss=rule.vss or VSS_NAMES.get(rule.role, "").format(index=index),
        factor=factor,
        offset=offset,
        values=tuple((int(raw), value) for raw, value in rule.values.items()),
        sna=tuple(rule.sna),
        all_ones_is_sna=rule.all_ones_is_sna,
        span=(low, high) if rule.range else None,
        glitch=rule.glitch,
        invalid_flag=rule.invalid_flag.format_map(groups),
        invalid_when=tuple(rule.invalid_when),
        shipped=entry.shipped,
    )


def _factor(rule: SignalRule, name: str, unit: str, where: str) -> tuple[float, float]:
    if not rule.role:
        return 1.0, 0.0
    known = conversion(rule.unit or unit, rule.role)
    if known is None:
        raise MappingError(
            f"{name} has the unit {rule.unit or unit!r}, {rule.role!r} needs {ROLE_UNITS[rule.role]}",
            where=where,
            mend=f"add unit = one of {', '.join(k for k in UNITS[ROLE_UNITS[rule.role]] if k)}",
        )
    sign = -1.0 if rule.invert else 1.0
    return sign * known[0], sign * known[1]


def _number(text: str) -> int:
    """Return the number a group matched; a letter counts from A = 0."""
    if text.isdigit():
        return int(text)
    return LETTERS.find(text.upper()) if len(text) == 1 and text.upper() in LETTERS else 0
