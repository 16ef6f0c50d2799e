"""How each text format of CAN recordings writes one line. Cores: a line in, a frame, nothing or a cause out.

`parse` returns None for a line that is no frame and is not meant to be one (header, comment, event), and
raises Damaged for a line that should be a frame and is not. Channels are numbered from 0.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import NamedTuple, Protocol

from tbox.bus.frames import CLASSIC_BYTES_MAX, DATA_BYTES_MAX, FD_LENGTHS
from tbox.model import CAN_EFF_FLAG, CAN_EFF_MASK, CAN_ERR_FLAG, CAN_SFF_MASK, CANFD_BRS


class Damaged(ValueError):
    """The cause, in two or three words that are counted."""


class ParsedFrame(NamedTuple):
    """One frame of a line. channel: a number, or the name of an interface. stamp: in the dialect's unit."""

    channel: int | str
    stamp: float | None
    can_id: int
    data: bytes
    fd: bool = False
    brs: bool = False
    remote: bool = False
    error: bool = False
    rx: bool = True


class Dialect(Protocol):
    name: str

    def parse(self, line: str) -> ParsedFrame | None: ...


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise Damaged("not hexadecimal") from None


def _number(text: str, base: int = 10) -> int:
    try:
        return int(text, base)
    except ValueError:
        raise Damaged("not a number") from None


def _real(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise Damaged("not a time") from None
    if not abs(value) < 1e18:  # NaN and infinity too
        raise Damaged("not a time")
    return value


def _identity(number: int, extended: bool) -> int:
    if number > (CAN_EFF_MASK if extended else CAN_SFF_MASK) or number < 0:
        raise Damaged("id out of range")
    return number | CAN_EFF_FLAG if extended else number


def _payload(data: bytes, length: int | None, fd: bool) -> bytes:
    """Return the first `length` bytes; Damaged when they are not all there or are more than a frame holds."""
    if length is not None:
        if len(data) < length:
            raise Damaged("data cut short")
        data = data[:length]
    if len(data) > (DATA_BYTES_MAX if fd else CLASSIC_BYTES_MAX):
        raise Damaged("too many bytes")
    return data


def _is_comment(line: str) -> bool:
    return line.startswith(("#", ";", "//"))


class Candump:
    """candump -l / -L: `(1436509052.249713) can0 123#1122`, `##<flags>` for FD; time and name may lack."""

    name = "candump"
    LINE = re.compile(
        r"(?:\(\s*(?P<t>[^)\s]+)\s*\)\s+)?(?:(?P<bus>[^\s#]+)\s+)?(?P<id>[0-9A-Fa-f]+)#(?P<rest>\S*)"
        r"(?:\s+(?P<dir>[RT])\b.*)?"
    )

    def parse(self, line: str) -> ParsedFrame | None:
        if _is_comment(line):
            return None
        match = self.LINE.fullmatch(line)
        if not match or len(match["id"]) not in (3, 8):
            raise Damaged("not a candump line")
        number = int(match["id"], 16)
        rest = match["rest"].replace(".", "")
        error = len(match["id"]) == 8 and bool(number & CAN_ERR_FLAG)
        fd = rest.startswith("#")
        brs = False
        if fd:
            brs = bool(_number(rest[1:2], 16) & CANFD_BRS)
            rest = rest[2:]
        remote = rest[:1] in ("R", "r")
        # After "_" stands the raw DLC of a classic frame (9 to 15 all mean 8 bytes).
        data = b"" if remote else _payload(_hex(rest.partition("_")[0]), None, fd)
        return ParsedFrame(
            channel=match["bus"] or 0,
            stamp=None if match["t"] is None else _real(match["t"]),
            can_id=number if error else _identity(number, len(match["id"]) == 8),
            data=data, fd=fd, brs=brs, remote=remote, error=error, rx=match["dir"] != "T",
        )  # fmt: skip


class CandumpScreen:
    """candump on a terminal: ` (001.234567)  can0  RX - -  123   [8]  11 22 33 44 55 66 77 88`."""

    name = "candump-screen"
    LINE = re.compile(
        r"(?:\((?P<t>[^)]*)\)\s+)?(?P<bus>\S+)\s+(?:(?P<dir>RX|TX)\s+(?P<brs>\S)\s+\S\s+)?"
        r"(?P<id>[0-9A-F]{3}|[0-9A-F]{8})\s+\[(?P<len>\d{1,2})\]\s*(?P<rest>.*)"
    )
    BYTES = re.compile(r"((?:[0-9A-F]{2}\b\s?)*)")

    def parse(self, line: str) -> ParsedFrame | None:
        if _is_comment(line):
            return None
        match = self.LINE.fullmatch(line)
        if not match:
            raise Damaged("not a candump line")
        number = int(match["id"], 16)
        error = len(match["id"]) == 8 and bool(number & CAN_ERR_FLAG)
        remote = "remote request" in match["rest"]
        fd = len(match["len"]) == 2  # candump writes [08] for FD and [8] for classic frames
        found = self.BYTES.match(match["rest"])
        data = _hex(found[1]) if found and not remote else b""
        return ParsedFrame(
            channel=match["bus"],
            stamp=None if match["t"] is None else self._time(match["t"]),
            can_id=number if error else _identity(number, len(match["id"]) == 8),
            data=b"" if remote else _payload(data, int(match["len"]), fd),
            fd=fd, brs=match["brs"] == "B", remote=remote, error=error, rx=match["dir"] != "TX",
        )  # fmt: skip

    @staticmethod
    def _time(text: str) -> float:
        """Seconds, or candump's -t A: a date, taken as UTC since the line does not say."""
        try:
            return dt.datetime.fromisoformat(text.strip()).replace(tzinfo=dt.UTC).timestamp()
        except ValueError:
            return _real(text.strip())


class Gvret:
    """GVRET CSV (SavvyCAN): `Time Stamp,ID,Extended[,Dir],Bus,LEN,D1...`; the stamp's unit is found later."""

    name = "gvret"
    COLUMNS = ("time stamp", "id", "extended", "bus", "len", "d1")

    def __init__(self) -> None:
        self._at = dict(zip(self.COLUMNS, range(len(self.COLUMNS)), strict=True))

    def parse(self, line: str) -> ParsedFrame | None:
        if _is_comment(line):
            return None
        cells = [cell.strip() for cell in line.split(",")]
        if cells[0].lower().startswith("time"):
            self._read_header(cells)
            return None
        at = self._at
        if len(cells) < at["d1"]:
            raise Damaged("too few columns")
        length = _number(cells[at["len"]])
        data = [cell for cell in cells[at["d1"] :] if cell]
        if not 0 <= length <= len(data):
            raise Damaged("data cut short")
        if any(len(cell) > 2 for cell in data):
            raise Damaged("not hexadecimal")
        number = _number(cells[at["id"]], 16)
        # Some loggers write "false" for every id; more than 11 bits can only be an extended one.
        extended = cells[at["extended"]].lower() in ("true", "1") or number > CAN_SFF_MASK
        direction = cells[at["dir"]].lower() if "dir" in at else "rx"
        fd = length > CLASSIC_BYTES_MAX
        return ParsedFrame(
            channel=_number(cells[at["bus"]]),
            stamp=_real(cells[at["time stamp"]]),
            can_id=_identity(number, extended),
            data=_payload(_hex("".join(cell.zfill(2) for cell in data)), length, fd),
            fd=fd, rx=direction != "tx",
        )  # fmt: skip

    def _read_header(self, cells: list[str]) -> None:
        found = {cell.lower(): n for n, cell in enumerate(cells)}
        found["time stamp"] = 0
        if not set(self.COLUMNS) <= found.keys():
            raise Damaged("columns missing in the header")
        self._at = found


class Asc:
    """Vector ASC: `0.015991 1  123x  Rx  d 8 0C 00 ...` and `30.005 CANFD 1 Rx 123 [name] 1 0 d 32 ...`."""

    name = "asc"
    HEADER = re.compile(
        r"(date\b|base\b|internal\b|no\s+internal\b|begin\s+triggerblock|end\s+triggerblock|previous\b|//)",
        re.I,
    )
    FRAME = re.compile(r"(?P<t>[-+]?\d+(?:\.\d*)?)\s+(?P<fd>CANFD\s+)?(?P<bus>\d+)\s+(?P<rest>.+)", re.I)
    EVENT = re.compile(r"[-+]?\d+(?:\.\d*)?\s+[A-Za-z]")
    CLASSIC = re.compile(
        r"(?P<id>[0-9A-Fa-f]+x?)\s+(?P<dir>Rx|Tx|TxRq)\s+(?P<kind>[dr])(?:\s+(?P<dlc>[0-9A-Fa-f]+))?(?P<data>.*)",
        re.I,
    )
    FLEXIBLE = re.compile(
        r"(?P<dir>Rx|Tx|TxRq)\s+(?P<id>[0-9A-Fa-f]+x?)\s+(?:(?P<name>\S*[^\s\d]\S*)\s+)?"
        r"(?P<brs>[01])\s+(?P<esi>[01])\s+(?P<dlc>[0-9A-Fa-f]+)\s+(?P<len>\d+)(?P<data>.*)", re.I
    )  # fmt: skip

    def __init__(self) -> None:
        self._base = 16
        self._relative = False
        self._sum_s = 0.0

    def parse(self, line: str) -> ParsedFrame | None:
        if self.HEADER.match(line):
            if line.lower().startswith("base"):
                self._base = 10 if " dec" in line.lower() else 16
                self._relative = "relative" in line.lower()
            return None
        match = self.FRAME.fullmatch(line)
        if not match:
            if self.EVENT.match(line):  # "Start of measurement", statistics, J1939, LIN, ...
                return None
            raise Damaged("not an ASC line")
        stamp = _real(match["t"])
        if self._relative:  # each to the event before it
            self._sum_s += stamp
            stamp = self._sum_s
        channel = int(match["bus"]) - 1
        rest = match["rest"]
        if re.search(r"\berrorframe\b", rest, re.I):
            return ParsedFrame(channel, stamp, CAN_ERR_FLAG, b"", fd=bool(match["fd"]), error=True)
        if re.match(r"(statistic|status)", rest, re.I):
            return None
        return self._flexible(channel, stamp, rest) if match["fd"] else self._classic(channel, stamp, rest)

    def _classic(self, channel: int, stamp: float, rest: str) -> ParsedFrame | None:
        match = self.CLASSIC.fullmatch(rest)
        if not match:
            raise Damaged("not an ASC line")
        if match["dir"].lower() == "txrq":  # asked for; the frame itself follows as Tx
            return None
        remote = match["kind"].lower() == "r"
        if not remote and match["dlc"] is None:
            raise Damaged("data cut short")
        length = min(_number(match["dlc"] or "0", 16), CLASSIC_BYTES_MAX)
        return ParsedFrame(
            channel, stamp, self._id(match["id"]), b"" if remote else self._data(match["data"], length),
            remote=remote, rx=match["dir"].lower() == "rx",
        )  # fmt: skip

    def _flexible(self, channel: int, stamp: float, rest: str) -> ParsedFrame | None:
        match = self.FLEXIBLE.fullmatch(rest)
        if not match:
            raise Damaged("not an ASC line")
        if match["dir"].lower() == "txrq":
            return None
        length = int(match["len"])
        if length > DATA_BYTES_MAX:
            raise Damaged("too many bytes")
        remote = not length and _number(match["dlc"], 16) > 0
        return ParsedFrame(
            channel, stamp, self._id(match["id"]), self._data(match["data"], length),
            fd=not remote, brs=match["brs"] == "1", remote=remote, rx=match["dir"].lower() == "rx",
        )  # fmt: skip

    def _id(self, text: str) -> int:
        extended = text[-1] in "xX"
        return _identity(_number(text.rstrip("xX"), self._base), extended)

    def _data(self, text: str, length: int) -> bytes:
        cells = text.split()[:length]
        if len(cells) < length:
            raise Damaged("data cut short")
        values = [_number(cell, self._base) for cell in cells]
        if any(not 0 <= value <= 0xFF for value in values):
            raise Damaged("not a byte")
        return bytes(values)


class Trc:
    """PCAN TRC 1.0 to 1.3 (`1) 1059.9 Rx 0300 7 00 ...`) and 2.x (columns named in `;$COLUMNS=`)."""

    name = "trc"
    OLD = re.compile(
        r"\d+\)\s+(?P<t>-?\d+(?:\.\d+)?)\s+(?:(?:(?P<bus>\d+)\s+)?(?P<kind>[A-Z][a-z]+)\s+)?"
        r"(?P<id>[0-9A-Fa-f]{4}|[0-9A-Fa-f]{8})\s+(?:-\s+)?(?P<len>\d+)\b\s*(?P<rest>.*)"
    )
    FD_KINDS = ("FD", "FB", "FE", "BI")

    def __init__(self) -> None:
        self._columns: list[str] = []

    def parse(self, line: str) -> ParsedFrame | None:
        if line.startswith(";"):
            name, _, value = line[1:].partition("=")
            if name.strip() == "$COLUMNS":
                self._columns = [column.strip() for column in value.split(",")]
            return None
        return self._new(line) if self._columns else self._old(line)

    def _old(self, line: str) -> ParsedFrame | None:
        match = self.OLD.fullmatch(line)
        if not match:
            raise Damaged("not a TRC line")
        if match["kind"] not in (None, "Rx", "Tx") or match["id"] == "FFFFFFFF":  # warnings, bus information
            return None
        remote = match["rest"].startswith("RTR")
        length = int(match["len"])
        return ParsedFrame(
            channel=int(match["bus"]) - 1 if match["bus"] else 0,
            stamp=_real(match["t"]) / 1000,
            can_id=_identity(int(match["id"], 16), len(match["id"]) > 4),
            data=b"" if remote else _payload(_bytes_ahead(match["rest"], length), length, fd=False),
            remote=remote, rx=match["kind"] != "Tx",
        )  # fmt: skip

    def _new(self, line: str) -> ParsedFrame | None:
        cells = line.split(maxsplit=len(self._columns) - 1)
        cell = dict(zip(self._columns, cells, strict=False))
        if not {"O", "T", "I"} <= cell.keys():
            raise Damaged("too few columns")
        kind = cell["T"]
        if kind in ("ST", "EC", "EV"):  # status, counters, events
            return None
        if kind not in (*self.FD_KINDS, "DT", "RR", "ER"):
            raise Damaged("unknown type")
        fd = kind in self.FD_KINDS
        # "l" is a length in bytes, "L" a DLC. In an error frame the id tells the kind of error.
        length = _number(cell.get("l") or cell.get("L", "0"))
        if "l" not in cell and length < len(FD_LENGTHS):
            length = FD_LENGTHS[length] if fd else min(length, CLASSIC_BYTES_MAX)
        error, remote = kind == "ER", kind == "RR"
        number = _number(cell["I"], 16) if cell["I"] != "-" else 0
        return ParsedFrame(
            channel=_number(cell.get("B", "1")) - 1,
            stamp=_real(cell["O"]) / 1000,
            can_id=CAN_ERR_FLAG if error else _identity(number, len(cell["I"]) > 4),
            data=b"" if remote or error else _payload(_bytes_ahead(cell.get("D", ""), length), length, fd),
            fd=fd, brs=kind in ("FB", "FE"), remote=remote, error=error, rx=cell.get("d") != "Tx",
        )  # fmt: skip


def _bytes_ahead(text: str, length: int) -> bytes:
    """Return the first `length` bytes of a text of hexadecimal pairs, or what there is of them."""
    return _hex("".join(text.split()[:length]))


class Crtd:
    """OVMS CRTD 1 to 3: `1542473901.020305 1R11 7E8 02 01 00`; where no bus is named it is bus 1."""

    name = "crtd"
    LINE = re.compile(r"(?P<t>\S+)\s+(?P<bus>\d*)(?P<kind>[A-Z]\w{2})\b\s*(?P<rest>.*)")

    def parse(self, line: str) -> ParsedFrame | None:
        match = self.LINE.fullmatch(line)
        if not match:
            raise Damaged("not a CRTD line")
        stamp = _real(match["t"])
        kind = match["kind"]
        if kind.startswith("C"):  # comments, events, statistics
            return None
        if kind not in ("R11", "R29", "T11", "T29"):
            raise Damaged("unknown type")
        number, *data = match["rest"].split() or [""]
        if any(len(byte) != 2 for byte in data):
            raise Damaged("not hexadecimal")
        return ParsedFrame(
            channel=max(int(match["bus"] or "1") - 1, 0),
            stamp=stamp,
            can_id=_identity(_number(number, 16), kind.endswith("29")),
            data=_payload(_hex("".join(data)), None, fd=False),
            rx=kind.startswith("R"),
        )


TEXT_DIALECTS: dict[str, type[Dialect]] = {
    dialect.name: dialect for dialect in (Candump, CandumpScreen, Gvret, Asc, Trc, Crtd)
}


def recognise(lines: list[str]) -> str | None:
    """Return the text dialect in which most of these lines are frames; None if none is."""
    best, most = None, 0
    for name, dialect in TEXT_DIALECTS.items():
        parser, frames = dialect(), 0
        for line in lines:
            try:
                frames += parser.parse(line) is not None
            except Damaged:
                continue
        if frames > most:
            best, most = name, frames
    return best
