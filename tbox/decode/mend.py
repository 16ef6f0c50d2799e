"""Mends DBC text where the meaning is certain, and says where. It never guesses a bit position or a factor.

Lines are rewritten or blanked in place, so that line numbers stay those of the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

EXTENDED_ID_FLAG = 0x8000_0000  # how a DBC marks a 29-bit id
STANDARD_ID_MAX = 0x7FF
EXTENDED_ID_MAX = 0x1FFF_FFFF
NOBODY = "Vector__XXX"  # the DBC's name for no sender, no receiver


class Mend(NamedTuple):
    """One thing that was put right: 1-based line and what."""

    line: int
    what: str


_KEYWORDS = (
    "VERSION|NS_|BS_|BU_|BO_TX_BU_|BO_|SG_MUL_VAL_|SG_|VAL_TABLE_|VAL_|SIG_VALTYPE_|SIG_GROUP_|SIG_TYPE_REF_|"
    "SGTYPE_VAL_|SGTYPE_|BA_DEF_DEF_REL_|BA_DEF_DEF_|BA_DEF_REL_|BA_DEF_SGTYPE_|BA_DEF_|BA_REL_|BA_SGTYPE_|BA_|"
    "CM_|EV_DATA_|EV_|ENVVAR_DATA_|CAT_DEF_|CAT_|FILTER"
)
_START = re.compile(rf"\s*({_KEYWORDS})(?![A-Za-z0-9_])")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_GOOD_NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:[eE][+-]?\d+)?")
_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_STRING = r'"(?:\\"|[^"])*"'

_BO = re.compile(
    r"(\s*(?:BS_:\s*)?BO_\s+)(0[xX][0-9a-fA-F]+|\d+)(\s+)(\S+?)(\s*:\s*)(\d+)[ \t]*([^\s;]*)\s*;?\s*(//.*)?"
)
_SG = re.compile(
    r"(\s*SG_\s+)(\S+?)(\s+(?:M|m\d+M?))?(\s*:\s*)(\d+)\s*\|\s*(\d+)\s*@\s*([01])\s*([+-])\s*"
    rf"\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)\s*(?:\[\s*({_NUMBER})\s*\|\s*({_NUMBER})\s*\])?\s*"
    rf"({_STRING})?\s*([\w\s,]*?)\s*;?\s*(//.*)?"
)
_TEMPLATE_LINE = re.compile(r"\s*(\{%.*%\}|\{#.*#\}|\{\{.*\}\}|<%.*%>|<\?.*\?>|%%.*)\s*")
_TEMPLATE = re.compile(r"\{\{|\{%|<%|\$\{")

# What cannot be read and does not bear on a value may be left out, and is reported.
_OPTIONAL: dict[str, re.Pattern[str]] = {
    "CM_": re.compile(
        rf"\s*CM_\s+(?:SG_\s+\d+\s+\w+\s+|BO_\s+\d+\s+|BU_\s+\w+\s+|EV_\s+\w+\s+)?{_STRING}\s*;\s*", re.S
    ),
    "VAL_": re.compile(rf"\s*VAL_\s+(?:\d+\s+)?{_NAME}\s*(?:-?\d+\s*{_STRING}\s*)*;\s*", re.S),
    "VAL_TABLE_": re.compile(rf"\s*VAL_TABLE_\s+{_NAME}\s*(?:-?\d+\s*{_STRING}\s*)*;\s*", re.S),
    "BA_": re.compile(
        rf"\s*BA_\s+{_STRING}\s*(?:BO_\s+\d+\b|SG_\s+\d+\s+\w+\b|BU_\s+\w+\b|EV_\s+\w+\b)?"
        rf"\s*(?:{_NUMBER}|{_STRING})\s*;\s*",
        re.S,
    ),
    "SIG_GROUP_": re.compile(r"\s*SIG_GROUP_\s+\d+\s+\w+\s+\d+\s*:\s*[\w\s]*;\s*", re.S),
}
# The ids that statements refer to, and the signal name behind them where there is one.
_REFERENCE = re.compile(
    r"((?:^|(?<=\s))(?:VAL_|SIG_VALTYPE_|SG_MUL_VAL_|SIG_GROUP_|BO_TX_BU_|BO_|SG_)\s+)(\d+)(?:(\s+)([^\s:;\"]+))?"
)
_HAS_SIGNAL = re.compile(r"(VAL_|SIG_VALTYPE_|SG_MUL_VAL_|SG_)\s")


@dataclass
class _Statement:
    """One statement: its keyword and its lines [first, last]."""

    keyword: str
    first: int
    last: int


@dataclass
class _Text:
    """The file as lines, and what was mended so far."""

    lines: list[str]
    mends: list[Mend] = field(default_factory=list)
    ids: dict[int, int] = field(default_factory=dict)  # id as written -> id as it must be
    names: dict[tuple[int, str], str] = field(default_factory=dict)  # (id as written, signal) -> legal name
    signals: dict[int, set[str]] = field(default_factory=dict)  # id as it must be -> its signals

    def get(self, statement: _Statement) -> str:
        return "\n".join(self.lines[statement.first : statement.last + 1])

    def put(self, statement: _Statement, text: str) -> None:
        self.lines[statement.first : statement.last + 1] = text.split("\n")

    def blank(self, statement: _Statement, what: str) -> None:
        self.put(statement, "\n" * (statement.last - statement.first))
        self.say(statement.first, what)

    def say(self, index: int, what: str) -> None:
        self.mends.append(Mend(index + 1, what))


def mend(text: str) -> tuple[str, list[Mend]]:
    """Return the text as cantools can read it, with the same line numbers, and what was put right."""
    state = _Text(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    statements = list(_statements(state))
    _insert_bs(state, statements)
    message = 0
    for statement in statements:
        if statement.keyword == "BO_":
            message = _mend_message(state, statement)
        elif statement.keyword == "SG_":
            _mend_signal(state, statement, message)
    for statement in statements:
        if statement.keyword not in ("BO_", "SG_", "NS_", "BS_", "BU_", "VERSION"):
            _mend_reference(state, statement)
    state.mends.sort()
    return "\n".join(state.lines), state.mends


def message_lines(text: str) -> dict[int, list[tuple[int, str]]]:
    """Return for every id in BO_ lines (as written) where it is defined: (1-based line, name)."""
    found: dict[int, list[tuple[int, str]]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if match := _BO.match(line):
            found.setdefault(_id(match[2]), []).append((number, match[4]))
    return found


def is_template(line: str) -> bool:
    """Whether a line carries a template's marker: the file was never rendered."""
    return bool(_TEMPLATE.search(line))


def _statements(state: _Text) -> Iterator[_Statement]:
    """Split into statements. A string left open ends where a line closes a statement before the next one."""
    current: _Statement | None = None
    in_string = False
    for index, line in enumerate(state.lines):
        start = _START.match(line)
        if in_string and start and state.lines[index - 1].rstrip().endswith('";'):
            in_string = False
        if not in_string and start:
            if current:
                yield current
            current = _Statement(start[1], index, index)
        elif not in_string and _TEMPLATE_LINE.fullmatch(line):
            state.lines[index] = ""
            state.say(index, "a line of a template was left out")
        elif current and (in_string or line.strip()) and current.keyword not in ("BO_", "SG_"):
            current.last = index
        if (line.count('"') - line.count('\\"')) % 2:
            in_string = not in_string
    if current:
        yield current


def _insert_bs(state: _Text, statements: list[_Statement]) -> None:
    """Without `BS_:` the list after NS_ swallows the first message. The section is always empty."""
    keywords = [s.keyword for s in statements]
    if "NS_" not in keywords or "BS_" in keywords:
        return
    for statement in statements[keywords.index("NS_") + 1 :]:
        if statement.keyword in ("BO_", "BU_"):
            state.lines[statement.first] = "BS_: " + state.lines[statement.first]
            state.say(statement.first, "BS_: is missing; it was put before this line")
            return


def _id(text: str) -> int:
    return int(text, 16 if text[:2] in ("0x", "0X") else 10)


def _legal(name: str) -> str:
    name = re.sub(r"[^A-Za-z0-9_]", "_", name)
    return "_" + name if name[:1].isdigit() else name


def _mend_message(state: _Text, statement: _Statement) -> int:
    """Mend a BO_ line and return its id as written, 0 when it cannot be read."""
    match = _BO.fullmatch(state.lines[statement.first])
    if match is None:
        return 0
    written = _id(match[2])
    right, name, sender = written, _legal(match[4]), match[7]
    if not match[2].isdigit():
        state.say(statement.first, f"the id {match[2]} was written in decimal")
    if STANDARD_ID_MAX < written <= EXTENDED_ID_MAX:
        right = state.ids[written] = written | EXTENDED_ID_FLAG
        state.say(statement.first, f"the id {written} has 29 bits; its flag was set")
    if name != match[4]:
        state.say(statement.first, f"the name {match[4]!r} became {name!r}")
    if not sender:
        state.say(statement.first, f"the sender is missing; {NOBODY} was put in")
    state.signals.setdefault(right, set())
    legal_sender = _legal(sender or NOBODY)
    if (right, name, legal_sender) != (written, match[4], sender) or not match[2].isdigit():
        state.lines[statement.first] = f"{match[1]}{right}{match[3]}{name}{match[5]}{match[6]} {legal_sender}"
    return written


def _mend_signal(state: _Text, statement: _Statement, message: int) -> None:
    match = _SG.fullmatch(state.lines[statement.first])
    if match is None:
        return
    name = _legal(match[2])
    right = state.ids.get(message, message)
    state.signals.setdefault(right, set()).add(name)
    said = len(state.mends)
    if name != match[2]:
        state.names[message, match[2]] = name
        state.say(statement.first, f"the name {match[2]!r} became {name!r}")
    numbers = [_good_number(state, statement, text) for text in match.group(9, 10, 11, 12)]
    if match[11] is None:
        state.say(statement.first, "the range is missing; [0|0], none, was put in")
    if match[13] is None:
        state.say(statement.first, "the unit is missing; an empty one was put in")
    receivers = [_legal(r) for r in re.split(r"[\s,]+", match[14]) if r]
    if not receivers or ", ".join(receivers) != ", ".join(re.split(r"\s*,\s*", match[14])):
        state.say(statement.first, f"the receivers were written as {', '.join(receivers) or NOBODY}")
    if len(state.mends) > said:
        scale, offset, low, high = numbers
        unit = match[13] or '""'
        state.lines[statement.first] = (
            f"{match[1]}{name}{match[3] or ''}{match[4]}{match[5]}|{match[6]}@{match[7]}{match[8]} "
            f"({scale},{offset}) [{low}|{high}] {unit} {','.join(receivers) or NOBODY}"
        )


def _good_number(state: _Text, statement: _Statement, text: str | None) -> str:
    """cantools wants a digit before the point."""
    if text is None:
        return "0"
    if _GOOD_NUMBER.fullmatch(text):
        return text
    state.say(statement.first, f"the number {text} was written with a digit before the point")
    return re.sub(r"^([-+]?)\.", r"\g<1>0.", text)


def _mend_reference(state: _Text, statement: _Statement) -> None:
    """Let a statement follow the ids and names that were mended; leave it out when it refers to nothing."""
    text = state.get(statement)
    head, quote, rest = text.partition('"') if statement.keyword == "CM_" else (text, "", "")
    renamed = _REFERENCE.sub(_follow(state), head) + quote + rest
    if renamed != text:
        state.put(statement, renamed)
    pattern = _OPTIONAL.get(statement.keyword)
    if pattern and not pattern.fullmatch(renamed):
        state.blank(statement, f"a {statement.keyword} entry that cannot be read was left out")
    elif statement.keyword in ("VAL_", "SIG_VALTYPE_"):
        target = _REFERENCE.match(renamed.lstrip())
        if target and target[4] not in state.signals.get(int(target[2]), set()):
            what = f"a {statement.keyword} entry for {target[4]!r}, which message {target[2]} does not have"
            state.blank(statement, f"{what}, was left out")


def _follow(state: _Text) -> Callable[[re.Match[str]], str]:
    def replace(match: re.Match[str]) -> str:
        written = int(match[2])
        right = state.ids.get(written, written)
        if right not in state.signals and written | EXTENDED_ID_FLAG in state.signals:
            right = written | EXTENDED_ID_FLAG
        name = match[4] or ""
        if _HAS_SIGNAL.match(match[1]):
            name = state.names.get((written, name), name)
        return f"{match[1]}{right}{match[3] or ''}{name}"

    return replace
