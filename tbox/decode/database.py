"""Loads DBC files, tolerantly, and says what is wrong, where, and what was mended. Decodes nothing.

cantools parses; when a file does not load as it is, tbox.decode.mend puts right what is certain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import cantools.database
import msgspec

from tbox.decode.mend import EXTENDED_ID_FLAG, Mend, is_template, mend, message_lines
from tbox.errors import TboxError
from tbox.model import CAN_EFF_FLAG

DBC_BYTES_MAX = 64 << 20
LOST_NAMED_MAX = 5  # signals that a line of `lint` names
# cantools' name for signals that belong to no message; it drops them itself.
INDEPENDENT = "VECTOR__INDEPENDENT_SIG_MSG"


class DecodeSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The [decode] section of tbox.toml.

    strict: a DBC that does not load stops the start; else it is reported and the others go on, if one loads.
    mapping: mapping files, tried before the shipped one (tbox/decode/roles.py describes them).
    unmapped: sample signals without a role too. counter_gap_ms: after such a silence a counter may stand
    anywhere.
    """

    strict: bool = False
    mapping: list[str] = []
    default_mapping: bool = True
    unmapped: bool = True
    glitch: bool = True
    mux_cycle: bool = True
    counter_gap_ms: Annotated[int, msgspec.Meta(ge=10, le=600_000)] = 2_000


class DbcError(TboxError):
    """A DBC file that cannot be used; `where` is file:line."""


class DbcFile(NamedTuple):
    """A DBC file and the bus (index in the configuration) it describes."""

    path: str
    channel: int = 0


@dataclass(frozen=True, slots=True)
class Definition:
    """One message of one bus, as cantools holds it, and where it stands."""

    channel: int
    message: Any  # cantools.database.can.Message
    path: str
    line: int

    @property
    def can_id(self) -> int:
        """The id as frames carry it: with CAN_EFF_FLAG for 29 bits."""
        return int(self.message.frame_id) | (CAN_EFF_FLAG if self.message.is_extended_frame else 0)

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(slots=True)
class Database:
    """All messages of all buses. mends: (file, line, what). errors: the files that were left out, and why."""

    definitions: list[Definition] = field(default_factory=list)
    mends: list[tuple[str, int, str]] = field(default_factory=list)
    errors: list[DbcError] = field(default_factory=list)

    @property
    def channels(self) -> list[int]:
        return sorted({d.channel for d in self.definitions})


@dataclass(frozen=True, slots=True)
class Parsed:
    """One file as loaded. lines: id as the DBC writes it -> 1-based line of its BO_."""

    path: str
    database: Any  # cantools.database.can.Database
    mends: list[Mend]
    lines: dict[int, int]
    text: str

    def line_of(self, message: Any) -> int:
        """Return the line of a message's BO_, by id: cantools puts long names from attributes in place."""
        flag = EXTENDED_ID_FLAG if message.is_extended_frame else 0
        return self.lines.get(message.frame_id | flag, 1)


def load_database(files: Sequence[DbcFile], *, strict: bool = False) -> Database:
    """Load DBC files. Raises DbcError (file, line, mend) for the first bad one when strict, else only when
    none loads; the others are in `errors`. Unless strict, what is certain is mended and listed in `mends`.
    """
    result = Database()
    parsed: dict[str, Parsed | DbcError] = {}
    for file in files:
        if file.path not in parsed:
            parsed[file.path] = _try_parse(file.path, strict)
            _report(result, parsed[file.path])
        one = parsed[file.path]
        error = one if isinstance(one, DbcError) else _add(result, one, file.channel)
        if error is not None and strict:
            raise error
        if error is not None and error not in result.errors:
            result.errors.append(error)
    if not result.definitions and result.errors:
        raise result.errors[0]
    return result


def _try_parse(path: str, strict: bool) -> Parsed | DbcError:
    try:
        return parse_file(path, strict=strict)
    except DbcError as error:
        return error


def _report(result: Database, one: Parsed | DbcError) -> None:
    if isinstance(one, Parsed):
        result.mends += [(one.path, m.line, m.what) for m in one.mends]


def _add(result: Database, one: Parsed, channel: int) -> DbcError | None:
    """Add a file's messages to a bus; return an error and add none when an id is taken there already."""
    taken = {d.can_id: d for d in result.definitions if d.channel == channel}
    fresh = [
        Definition(channel, message, one.path, one.line_of(message)) for message in one.database.messages
    ]
    for definition in fresh:
        if other := taken.get(definition.can_id):
            return DbcError(
                f"id 0x{definition.can_id & ~CAN_EFF_FLAG:X} ({definition.message.name}) is defined twice on "
                f"bus {channel}: here and in {other.where} ({other.message.name})",
                where=definition.where,
                mend="remove one of them, or put the files on different buses",
            )
    result.definitions += fresh
    return None


def parse_file(path: str, *, strict: bool = False) -> Parsed:
    """Load one DBC file, mended where needed unless strict. Raises DbcError naming file, line and mend."""
    return parse_text(path, _read(path), strict=strict)


def parse_text(path: str, text: str, *, strict: bool = False) -> Parsed:
    """The same from text; `path` is for the messages only."""
    _refuse_twice(path, text)
    try:
        return _parse(path, text, [])
    except DbcError:
        if strict:
            raise
    mended, mends = mend(text)
    _refuse_twice(path, mended)
    return _parse(path, mended, mends)


def _read(path: str) -> str:
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DbcError(
            f"cannot be read: {error.strerror}",
            where=path,
            mend="name a DBC file that exists and is readable",
        ) from error
    if len(raw) > DBC_BYTES_MAX:
        raise DbcError(f"is larger than {DBC_BYTES_MAX} bytes", where=path, mend="name a DBC file")
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return raw.decode("utf-16", errors="replace")
    raw = raw.removeprefix(b"\xef\xbb\xbf").replace(b"\0", b" ")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")  # what Vector's tools write


def _refuse_twice(path: str, text: str) -> None:
    for written, places in message_lines(text).items():
        named = [(line, name) for line, name in places if name != INDEPENDENT]
        if len(named) > 1:
            (first, one), (second, other) = named[:2]
            can_id = written & ~EXTENDED_ID_FLAG
            raise DbcError(
                f"id 0x{can_id:X} ({other}) is defined twice: here and in {path}:{first} ({one})",
                where=f"{path}:{second}",
                mend="remove one of them",
            )


def _parse(path: str, text: str, mends: list[Mend]) -> Parsed:
    try:
        database = cantools.database.can.Database(strict=False)
        database.add_dbc_string(text)
    except Exception as error:  # cantools raises many kinds, KeyError and AssertionError among them
        raise _explain(path, text, error) from error
    lines = {written: places[0][0] for written, places in message_lines(text).items()}
    if not database.messages:
        raise DbcError("defines no message", where=path, mend="name a DBC file with BO_ lines")
    return Parsed(path, database, mends, lines, text)


def _explain(path: str, text: str, error: Exception) -> DbcError:
    """Turn what cantools raised into file, line and mend."""
    message = " ".join(str(error).split()) or type(error).__name__
    lines = text.split("\n")
    if found := re.search(r"[Ii]nvalid syntax at line (\d+), column (\d+)", message):
        number = int(found[1])
        line = lines[number - 1].strip() if number <= len(lines) else ""
        if is_template(line):
            return DbcError("is a template", where=f"{path}:{number}", mend="render it first")
        return DbcError(
            f"is not DBC at column {found[2]}: {line[:80]!r}",
            where=f"{path}:{number}",
            mend="correct the line",
        )
    if found := re.search(r"(VAL_|SIG_VALTYPE_) (\d+) (\w+)", message):
        number = _line_with(lines, rf"\s*{found[1]}\s+{found[2]}\s+{found[3]}\b")
        return DbcError(f"{found[0]} refers to nothing", where=f"{path}:{number}", mend="remove the line")
    for name in re.findall(r"\b(?:message|signal) (\w+)", message, re.I)[::-1]:
        if number := _line_with(lines, rf"\s*(?:BO_\s+\S+|SG_)\s+{re.escape(name)}\b"):
            return DbcError(message.rstrip("."), where=f"{path}:{number}", mend="correct the line")
    return DbcError(f"does not load: {message}", where=path, mend="correct the file")


def _line_with(lines: list[str], pattern: str) -> int:
    return next((n for n, line in enumerate(lines, 1) if re.match(pattern, line)), 0)


# --- lint ---------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """One thing worth knowing about a file that loads. line: 1-based, 0 when it is about the whole file."""

    line: int
    what: str


def lint(parsed: Parsed) -> list[Finding]:
    """Return what is wrong in a file that loads: what was mended, and what will not decode as it seems to."""
    findings = [Finding(m.line, f"mended: {m.what}") for m in parsed.mends]
    seen: dict[str, int] = {}
    for message in parsed.database.messages:
        line = parsed.line_of(message)
        findings += [Finding(line, what) for what in _lint_message(message)]
        if message.name in seen:
            findings.append(
                Finding(line, f"the name {message.name} is used in line {seen[message.name]} too")
            )
        seen.setdefault(message.name, line)
    return sorted(findings)


def _lint_message(message: Any) -> Iterator[str]:
    try:
        message.refresh(strict=True)
    except Exception as error:
        what = " ".join(str(error).split()).rstrip(".")
        yield f"{what}; cantools reads such a message otherwise than it is drawn"
    names = [signal.name for signal in message.signals]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield f"{message.name} has two signals {twice[0]}"
    selectors = {signal.name for signal in message.signals if signal.is_multiplexer}
    if lost := [
        s.name for s in message.signals if s.multiplexer_ids and s.multiplexer_signal not in selectors
    ]:
        named = ", ".join(lost[:LOST_NAMED_MAX]) + (", …" if len(lost) > LOST_NAMED_MAX else "")
        yield f"{message.name}: {len(lost)} signals are multiplexed, and no signal selects them: {named}"
    for signal in message.signals:
        if signal.minimum is not None and signal.maximum is not None and signal.minimum > signal.maximum:
            yield f"{message.name}.{signal.name} has the empty range [{signal.minimum}|{signal.maximum}]"
        if signal.conversion.scale == 0:
            yield f"{message.name}.{signal.name} has the factor 0"
        if signal.conversion.is_float and signal.length not in (16, 32, 64):
            yield f"{message.name}.{signal.name} is a float of {signal.length} bits"
