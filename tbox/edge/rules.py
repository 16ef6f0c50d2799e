"""Rules as data: reads rule TOMLs into checked, frozen rules, and prints them as a table. Judges nothing.

A rule file holds one table a rule; a later file (chemistry, then the vehicle's own) overrides key by key:

    [rule.cell-over-voltage]
    watch = "cell_voltage"          # what is watched: a name of WATCHES
    when = "above"                  # above | below
    bands = [                       # rising severity; entered at limit, left at clear
      { level = "warning", limit = "4.23 V", clear = "4.20 V", for = "2 s" },
      { level = "critical", limit = "4.30 V", clear = "4.20 V", for = "500 ms" },
    ]
    for = "2 s"                     # default of the bands: the limit passed without a break
    clear_for = "2 s"               # default of the bands: back past clear without a break
    only = "any"                    # any | charge | discharge | rest | load: when the rule looks at all
    otherwise = "hold"              # hold | clear: what becomes of an alarm while it does not look
    load_allowance = "0.3 mV/A"     # widens the limits with the current
    knee = "3.45 V"                 # below this mean of the cells, load aside, it does not look: there their
                                    # voltages part as their capacities do, healthy or not
    unless = ["cell-lost"]          # not raised about a cell or probe of which one of these rules tells
    repeat = "60 s"                 # not raised again sooner, unless more severe
    update = "60 s"                 # a worse value is told at most so often
    latch = false                   # stays until reset, though the cause is gone
    isolate = false                 # a critical asks the BMS to open the contactors
    escalate = [ { after = "10 min", level = "alarm" } ]
    text = "{item} at {value}, over {limit}"
    source = "where the figures come from"
    enabled = true
    params = { ... }                # what the watch itself needs, see WATCHES
"""

from __future__ import annotations

import difflib
import math
import re
import string
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from tbox.edge.bands import Band, Ladder
from tbox.errors import TboxError
from tbox.model import NS_PER_S, ROLE_UNITS, Level
from tbox.units import Quantity, UnitError, parse, parse_ns, parse_quantity

CHEMISTRIES = ("lfp", "nmc")
LEVELS = {level.name.lower(): level for level in Level}
CONDITIONS = ("any", "charge", "discharge", "rest", "load")
OTHERWISE = ("hold", "clear")
TEXT_FIELDS = ("item", "value", "limit", "level", "since_s", "detail")

KNEE_WATCHES = ("cell_spread", "cell_deviation", "cell_drift")  # cells held against each other

BANDS_MAX = 4
RULES_MAX = 256
FOR_S_MAX = 24 * 3600.0


class RuleError(TboxError):
    """A rule file that cannot be read, or a rule that makes no sense; names file, line and mend."""


class Watch(NamedTuple):
    """A quantity rules can watch. item: what it exists once for: "cell", "probe" or "" (the pack)."""

    unit: str
    item: str
    about: str
    params: Mapping[str, str] = {}


# Derived quantities; every role with one value (ROLE_UNITS) can be watched under its own name too.
WATCHES: dict[str, Watch] = {
    "cell_voltage": Watch("V", "cell", "each cell; the BMS's extreme where single cells are unknown"),
    "cell_spread": Watch("V", "", "highest less lowest cell"),
    "cell_deviation": Watch("V", "cell", "distance from the series mean beyond one sigma of the series"),
    "cell_drop": Watch("V", "cell", "fall against the series within seconds"),
    "cell_drift": Watch("V*s", "cell", "CUSUM of a cell's departure from where it used to stand"),
    "cell_still": Watch("", "cell", "scans in which most cells moved and this one did not"),
    "cell_lost": Watch("s", "cell", "time without a valid value while the series is heard"),
    "probe_temperature": Watch("degC", "probe", "each probe; the BMS's extreme where probes are unknown"),
    "temperature_spread": Watch("K", "", "hottest less coldest probe"),
    "probe_rise": Watch("degC/s", "probe", "slope over the last two seconds"),
    "probe_cold": Watch("K", "probe", "how far below the median probe"),
    "probe_still": Watch("", "probe", "scans in which most probes moved and this one did not"),
    "probe_lag": Watch("K", "probe", "how far the median moved since this probe last did"),
    "probe_lost": Watch("s", "probe", "time without a valid value while the series is heard"),
    "thermal_runaway": Watch(
        "degC/s",
        "",
        "least slope of a probe over `sustained`; 0 unless a cell's voltage collapsed or a probe is too hot",
        {"voltage_drop": "percent", "temperature": "degC", "sustained": "s"},
    ),
    "pack_voltage_per_cell": Watch("V", "", "pack voltage over the number of cells in series"),
    "pack_voltage_mismatch": Watch("percent", "", "sum of the cells against the pack voltage"),
    "soc_jump": Watch("percent", "", "change of SOC within 5 s"),
    "isolation_per_volt": Watch("Ohm/V", "", "isolation resistance over pack voltage"),
    "contactor_mismatch": Watch("", "", "1 while contactors do not follow their command"),
    "bms_silent": Watch("s", "", "time since the BMS was heard, while the vehicle is awake"),
    **{
        role: Watch(unit, "", f"the role {role}")
        for role, unit in ROLE_UNITS.items()
        if role not in ("cell_voltage", "probe_temperature", "latitude", "longitude")
    },
}


@dataclass(frozen=True, slots=True)
class Escalation:
    after_ns: int
    level: Level


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule, checked. Numbers are in the watch's unit; `unit` and `per_unit` are for showing them:
    shown = value / per_unit, in `unit` as the rule file writes it."""

    name: str
    watch: str
    ladder: Ladder
    text: str
    unit: str
    per_unit: float
    only: str = "any"
    otherwise: str = "hold"
    load_allowance_v_per_a: float = 0.0
    knee_v: float = -math.inf
    unless: tuple[str, ...] = ()
    repeat_ns: int = 60 * NS_PER_S
    update_ns: int = 60 * NS_PER_S
    latch: bool = False
    isolate: bool = False
    escalate: tuple[Escalation, ...] = ()
    params: Mapping[str, float] | None = None
    source: str = ""

    @property
    def item(self) -> str:
        return WATCHES[self.watch].item


@dataclass(frozen=True, slots=True)
class RuleSet:
    """All rules of one configuration. Names are unique."""

    rules: tuple[Rule, ...]
    chemistry: str

    def named(self, name: str) -> Rule | None:
        return next((rule for rule in self.rules if rule.name == name), None)


class RuleText(NamedTuple):
    """A rule file's text and the name under which errors speak of it."""

    where: str
    text: str


# --- reading ------------------------------------------------------------------------------------------


def load_rules(chemistry: str, files: Sequence[str | Path] = ()) -> RuleSet:
    """Return the shipped defaults of `chemistry` ("lfp", "nmc") overridden by the vehicle's own files.

    The one place here that reads files. Raises RuleError.
    """
    if chemistry not in CHEMISTRIES:
        raise RuleError(f"unknown chemistry {chemistry!r}", mend=f"choose one of {', '.join(CHEMISTRIES)}")
    texts = [_shipped("defaults"), _shipped(chemistry)]
    for path in files:
        try:
            texts.append(RuleText(str(path), Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise RuleError(
                f"cannot read the rules: {error}", where=str(path), mend="give a readable UTF-8 TOML file"
            ) from error
    return parse_rules(texts, chemistry)


def _shipped(name: str) -> RuleText:
    return RuleText(f"{name}.toml", (resources.files("tbox.edge") / f"{name}.toml").read_text("utf-8"))


def parse_rules(texts: Sequence[RuleText], chemistry: str) -> RuleSet:
    """Return the checked rules of several rule files, later ones overriding earlier ones key by key."""
    merged: dict[str, dict[str, Any]] = {}
    places: dict[str, _Places] = {}
    for text in texts:
        for name, table in _tables(text).items():
            lines = _key_lines(text.text, name)
            merged.setdefault(name, {}).update(table)
            places.setdefault(name, _Places(name)).add(text.where, lines, table)
    if len(merged) > RULES_MAX:
        raise RuleError(f"{len(merged)} rules; at most {RULES_MAX} are allowed", where=texts[-1].where)
    rules = [
        _Reader(name, table, places[name]).rule()
        for name, table in merged.items()
        if _enabled(table, places[name])
    ]
    _check_runaway_alone(rules, places)
    _check_unless(rules, merged, places)
    return RuleSet(tuple(rules), chemistry)


def _tables(text: RuleText) -> dict[str, dict[str, Any]]:
    try:
        document = tomllib.loads(text.text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        where = f"{text.where}:{line[1]}" if line else f"{text.where}:{text.text.count(chr(10)) + 1}"
        raise RuleError(
            f"not TOML: {error}", where=where, mend="see the syntax in tbox/edge/rules.py"
        ) from error
    for key in document:
        if key != "rule":
            line_number = _find_line(text.text, rf"\s*\[*\s*{re.escape(key)}\b")
            raise RuleError(
                f"unknown table {key!r}",
                where=f"{text.where}:{line_number}",
                mend="write [rule.NAME] tables only",
            )
    rules = document.get("rule", {})
    for name, table in rules.items() if isinstance(rules, dict) else [("rule", rules)]:
        if not isinstance(table, dict):
            line_number = _find_line(text.text, rf"\s*(\[rule\]|{re.escape(name)}\b|rule\b)")
            raise RuleError(
                f"{name!r} is not a rule",
                where=f"{text.where}:{line_number}",
                mend="write [rule.NAME] tables",
            )
    return dict(rules)


def _enabled(table: dict[str, Any], places: _Places) -> bool:
    enabled = table.get("enabled", True)
    if not isinstance(enabled, bool):
        raise places.error("enabled", "enabled is neither true nor false", "write enabled = true or false")
    return enabled


def _check_runaway_alone(rules: list[Rule], places: dict[str, _Places]) -> None:
    """Its watch is shaped by the rule's own params, so two of them would not know whose."""
    names = [rule.name for rule in rules if rule.watch == "thermal_runaway"]
    if len(names) > 1:
        raise places[names[1]].error(
            "watch", f"{names[0]} watches thermal_runaway already", "keep one of them"
        )


def _check_unless(rules: list[Rule], merged: Mapping[str, Any], places: dict[str, _Places]) -> None:
    for rule in rules:
        for name in rule.unless:
            if name not in merged or name == rule.name:
                near = difflib.get_close_matches(name, merged, 1)
                mend = f"did you mean {near[0]!r}?" if near else "name another rule"
                raise places[rule.name].error("unless", f"there is no other rule {name!r}", mend)


# --- where a key stands, so that an error can name the line -------------------------------------------


def _find_line(text: str, pattern: str, start: int = 0) -> int:
    lines = text.splitlines()
    for number in range(start, len(lines)):
        if re.match(pattern, lines[number]):
            return number + 1
    return start + 1


def _key_lines(text: str, rule: str) -> dict[str, int]:
    """Return the line of each key of [rule.NAME] (and "" for the header), of bands as "bands.0" and so on."""
    header = rf"\s*\[\s*rule\s*\.\s*[\"']?{re.escape(rule)}[\"']?\s*(\.\s*\w+\s*)?\]"
    lines = text.splitlines()
    found = {"": _find_line(text, header)}
    inside, key, entry = False, "", 0
    for number, line in enumerate(lines, 1):
        if re.match(r"\s*\[", line) and not re.match(r"\s*\[\s*\{", line):
            inside = bool(re.match(header, line))
            continue
        if not inside:
            continue
        assignment = re.match(r"\s*([A-Za-z0-9_-]+)\s*=", line)
        if assignment:
            key, entry = assignment[1], 0
            found.setdefault(key, number)
        if key in ("bands", "escalate"):
            for _ in range(line.count("{")):
                found.setdefault(f"{key}.{entry}", number)
                entry += 1
    return found


class _Places:
    """Which file and line each key of one rule came from last."""

    def __init__(self, rule: str) -> None:
        self._rule = rule
        self._of: dict[str, tuple[str, int]] = {}

    def add(self, where: str, lines: dict[str, int], table: Mapping[str, Any]) -> None:
        header = (where, lines[""])
        self._of[""] = header
        for key in table:
            self._of = {known: at for known, at in self._of.items() if not known.startswith(f"{key}.")}
            self._of[key] = (where, lines.get(key, header[1]))
        self._of.update({key: (where, line) for key, line in lines.items() if "." in key})

    def where(self, key: str) -> str:
        """Return "file:line: rule NAME, KEY", by the nearest known place."""
        for known in (key, key.partition(".")[0], ""):
            if known in self._of:
                file, line = self._of[known]
                return f"{file}:{line}: rule {self._rule}"
        return f"rule {self._rule}"

    def error(self, key: str, what: str, mend: str) -> RuleError:
        return RuleError(what, where=self.where(key), mend=mend)


# --- checking -----------------------------------------------------------------------------------------

_KEYS = (
    "watch", "when", "bands", "for", "clear_for", "only", "otherwise", "load_allowance", "knee", "unless",
    "repeat", "update", "latch", "isolate", "escalate", "text", "source", "enabled", "params",
)  # fmt: skip
_BAND_KEYS = ("level", "limit", "clear", "for", "clear_for")


class _Reader:
    """Turns one merged TOML table into a Rule; every refusal names the key's file and line."""

    def __init__(self, name: str, table: dict[str, Any], places: _Places) -> None:
        self._name, self._table, self._places = name, table, places

    def rule(self) -> Rule:
        self._known_keys(self._table, _KEYS, "")
        watch = self._choice("watch", tuple(WATCHES))
        sign = 1 if self._choice("when", ("above", "below")) == "above" else -1
        bands, shown = self._bands(WATCHES[watch].unit, sign)
        return Rule(
            name=self._name, watch=watch, ladder=Ladder(sign, bands), text=self._text(),
            unit=shown.shown, per_unit=shown.factor,
            only=self._choice("only", CONDITIONS, "any"),
            otherwise=self._choice("otherwise", OTHERWISE, "hold"),
            load_allowance_v_per_a=self._load_allowance(watch),
            knee_v=self._knee(watch), unless=self._unless(watch),
            repeat_ns=self._duration(self._table, "repeat", "60 s"),
            update_ns=self._duration(self._table, "update", "60 s"),
            latch=self._flag("latch"), isolate=self._flag("isolate"),
            escalate=self._escalations(), params=self._params(watch),
            source=str(self._table.get("source", "")),
        )  # fmt: skip

    def _known_keys(self, table: Mapping[str, Any], keys: Sequence[str], place: str) -> None:
        for key in table:
            if key not in keys:
                near = difflib.get_close_matches(key, keys, 1)
                mend = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(keys)}"
                raise self._places.error(place or key, f"unknown key {key!r}", mend)

    def _choice(self, key: str, choices: tuple[str, ...], default: str | None = None) -> str:
        value = self._table.get(key, default)
        if value is None:
            raise self._places.error(key, f"{key} is missing", f"add {key} = one of {_some(choices)}")
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, 1)
            mend = f"did you mean {near[0]!r}?" if near else f"choose one of {_some(choices)}"
            raise self._places.error(key, f"{key} = {value!r} is unknown", mend)
        return str(value)

    def _flag(self, key: str) -> bool:
        value = self._table.get(key, False)
        if not isinstance(value, bool):
            raise self._places.error(key, f"{key} is neither true nor false", f"write {key} = true or false")
        return value

    def _quantity(self, table: Mapping[str, Any], key: str, unit: str, place: str) -> Quantity:
        if key not in table:
            raise self._places.error(place, f"{key} is missing", f'add {key} = "… {unit}"')
        try:
            return parse_quantity(table[key], unit, where=key)
        except UnitError as error:
            raise self._places.error(place, f"{key}: {error.what}", error.mend) from None

    def _duration(self, table: Mapping[str, Any], key: str, default: object, place: str = "") -> int:
        try:
            duration_ns = parse_ns(table.get(key, default), where=key)
        except UnitError as error:
            raise self._places.error(place or key, f"{key}: {error.what}", error.mend) from None
        if duration_ns > FOR_S_MAX * NS_PER_S:
            raise self._places.error(place or key, f"{key} is longer than a day", "write at most 24 h")
        return duration_ns

    def _bands(self, unit: str, sign: int) -> tuple[tuple[Band, ...], Quantity]:
        tables = self._list_of_tables("bands")
        if not 1 <= len(tables) <= BANDS_MAX:
            raise self._places.error("bands", f"{len(tables)} bands", f"write 1 to {BANDS_MAX}")
        bands: list[Band] = []
        for index, table in enumerate(tables):
            place = f"bands.{index}"
            self._known_keys(table, _BAND_KEYS, place)
            band = self._band(table, unit, place)
            if not sign * band.clear < sign * band.limit:
                side = "below" if sign > 0 else "above"
                raise self._places.error(
                    place, "clear must lie on the safe side of limit, or the alarm chatters",
                    f"set clear {side} {table['limit']}",
                )  # fmt: skip
            if bands and not (sign * bands[-1].limit <= sign * band.limit and bands[-1].level < band.level):
                raise self._places.error(
                    place, "bands must rise in severity", "order them by level, each limit further out"
                )
            bands.append(band)
        return tuple(bands), self._quantity(tables[0], "limit", unit, "bands.0")

    def _band(self, table: Mapping[str, Any], unit: str, place: str) -> Band:
        level = LEVELS.get(str(table.get("level")))
        if level is None:
            raise self._places.error(
                place, f"level {table.get('level')!r} is unknown", f"use {_some(LEVELS)}"
            )
        return Band(
            level,
            self._quantity(table, "limit", unit, place).value,
            self._quantity(table, "clear", unit, place).value,
            self._duration(table, "for", self._table.get("for", "0 s"), place if "for" in table else "for"),
            self._duration(
                table,
                "clear_for",
                self._table.get("clear_for", "2 s"),
                place if "clear_for" in table else "clear_for",
            ),
        )

    def _list_of_tables(self, key: str) -> list[dict[str, Any]]:
        tables = self._table.get(key, [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise self._places.error(key, f"{key} is not a list of tables", f"write {key} = [ {{ … }} ]")
        return tables

    def _escalations(self) -> tuple[Escalation, ...]:
        steps: list[Escalation] = []
        for index, table in enumerate(self._list_of_tables("escalate")):
            place = f"escalate.{index}"
            self._known_keys(table, ("after", "level"), place)
            level = LEVELS.get(str(table.get("level")))
            if level is None or "after" not in table:
                raise self._places.error(
                    place,
                    "an escalation needs after and level",
                    'write { after = "10 min", level = "alarm" }',
                )
            step = Escalation(self._duration(table, "after", "", place), level)
            if steps and not (steps[-1].after_ns < step.after_ns and steps[-1].level < step.level):
                raise self._places.error(place, "escalations must rise", "order them by time and level")
            steps.append(step)
        return tuple(steps)

    def _text(self) -> str:
        text = self._table.get("text")
        if not isinstance(text, str) or not text.strip():
            raise self._places.error(
                "text", "text is missing", 'add text = "{item} at {value}, over {limit}"'
            )
        try:
            fields = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
            unknown = sorted(fields - set(TEXT_FIELDS))
        except ValueError as error:
            raise self._places.error(
                "text", f"text: {error}", "double a brace that is meant as one"
            ) from None
        if unknown:
            raise self._places.error("text", f"text names {unknown[0]!r}", f"there are {_some(TEXT_FIELDS)}")
        if "value" not in fields:
            raise self._places.error("text", "text does not give the value", "put {value} into it")
        return text

    def _load_allowance(self, watch: str) -> float:
        if "load_allowance" not in self._table:
            return 0.0
        if WATCHES[watch].unit != "V":
            raise self._places.error(
                "load_allowance", f"{watch} does not depend on the current", "leave load_allowance out"
            )
        return self._quantity(self._table, "load_allowance", "V/A", "load_allowance").value

    def _knee(self, watch: str) -> float:
        if "knee" not in self._table:
            return -math.inf
        if watch not in KNEE_WATCHES:
            raise self._places.error(
                "knee", f"{watch} knows no knee", f"leave knee out; it is for {_some(KNEE_WATCHES)}"
            )
        return self._quantity(self._table, "knee", "V", "knee").value

    def _unless(self, watch: str) -> tuple[str, ...]:
        names = self._table.get("unless", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._places.error("unless", "unless is no list of names", 'write unless = ["RULE"]')
        if names and not WATCHES[watch].item:
            raise self._places.error("unless", f"{watch} is of the pack as a whole", "leave unless out")
        return tuple(names)

    def _params(self, watch: str) -> Mapping[str, float] | None:
        wanted = WATCHES[watch].params
        table = self._table.get("params", {})
        if not isinstance(table, dict):
            raise self._places.error("params", "params is not a table", "write params = { NAME = VALUE }")
        self._known_keys(table, tuple(wanted), "params")
        for key in wanted:
            if key not in table:
                raise self._places.error("params", f"params lacks {key}", f"add {key}, in {wanted[key]}")
        values: dict[str, float] = {}
        for key, unit in wanted.items():
            try:
                values[key] = parse(table[key], unit, where=key)
            except UnitError as error:
                raise self._places.error("params", f"{key}: {error.what}", error.mend) from None
        return values or None


def _some(names: Sequence[str] | Mapping[str, Any], most: int = 12) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (", …" if len(listed) > most else "")


# --- the table of the README --------------------------------------------------------------------------


def table_lines(rules: RuleSet) -> Iterator[str]:
    """Yield the rules as a Markdown table."""
    yield "| rule | levels and limits | for | source |"
    yield "|---|---|---|---|"
    for rule in rules.rules:
        mark = ">=" if rule.ladder.sign > 0 else "<="
        limits = ", ".join(
            f"{band.level.name.lower()} {mark} {_shown(rule, band.limit)}" for band in rule.ladder.bands
        )
        times = " / ".join(dict.fromkeys(_time(band.for_ns) for band in rule.ladder.bands))
        notes = [text for text, on in (("latches", rule.latch), ("asks for isolation", rule.isolate)) if on]
        notes += [f"only {rule.only}"] if rule.only != "any" else []
        name = rule.name + (f" ({', '.join(notes)})" if notes else "")
        yield f"| {name} | {limits} | {times} | {rule.source} |"


def _shown(rule: Rule, value: float) -> str:
    return f"{value / rule.per_unit:g} {rule.unit}".strip()


def _time(duration_ns: int) -> str:
    seconds = duration_ns / NS_PER_S
    return next(
        (f"{seconds / size:g} {unit}" for unit, size in (("min", 60.0),) if seconds >= size), f"{seconds:g} s"
    )


def main(arguments: Sequence[str]) -> int:
    """Print the rules of a chemistry: `python -m tbox.edge.rules [lfp|nmc] [FILE…]`."""
    try:
        rules = load_rules(arguments[0] if arguments else "nmc", arguments[1:])
    except RuleError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("\n".join(table_lines(rules)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
