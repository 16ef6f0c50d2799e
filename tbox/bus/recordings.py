"""Reads and writes CAN recordings of any format, gzip'd or not; counts and skips what is damaged. No buses.

Formats: candump (log and terminal, with and without time), GVRET CSV, Vector ASC and BLF, PCAN TRC, OVMS
CRTD, and MF4 where asammdf is installed. A damaged line is never guessed at: it is counted by cause and
kept with its number.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import can
import numpy as np
import numpy.typing as npt

from tbox.bus import load_mf4
from tbox.bus.dialects import TEXT_DIALECTS, Damaged, Dialect, ParsedFrame, recognise
from tbox.bus.frames import FRAME, fd_flags, flagged_id, frames_of
from tbox.bus.spec import BATCH_FRAMES_MAX
from tbox.errors import TboxError
from tbox.model import CAN_EFF_FLAG, CAN_EFF_MASK, CAN_ERR_FLAG, CAN_RTR_FLAG, NS_PER_S, FrameBatch

DAMAGED_KEPT_MAX = 1000  # line numbers kept; all are counted
LINE_BYTES_MAX = 4096  # the longest honest line is an FD frame in ASC, about 400
TIME_S_MAX = 4e9  # Unix time of the year 2096; any difference of two times still fits 64-bit ns
LINES_TO_RECOGNISE = 400
GVRET_FRAMES_TO_JUDGE = 4096
GZIP_MAGIC = b"\x1f\x8b"
BINARY_MAGIC = {b"LOGG": "blf", b"MDF ": "mf4", b"UnFi": "mf4"}
DIALECTS = (*TEXT_DIALECTS, "gvret-us", "gvret-ms", "blf", "mf4")
WRITABLE = ("candump", "asc", "blf")


class RecordingError(TboxError):
    """A recording that cannot be read or written at all."""


class LoggedFrame(NamedTuple):
    """One frame of a recording.

    n counts the frames of its channel from 1. t_s: seconds as logged, None where the format has no time.
    can_id carries CAN_EFF_FLAG for 29 bits. line: its line (or object, in a binary format), from 1.
    """

    n: int
    channel: int
    t_s: float | None
    can_id: int
    fd: bool
    brs: bool
    data: bytes
    remote: bool
    error: bool
    rx: bool
    line: int


class Recording:
    """A recording, read frame by frame as it is iterated; each iteration begins anew.

    dialect: one of DIALECTS; found from the content if None. After (or during) an iteration: `damaged`
    holds (line, cause) of the first DAMAGED_KEPT_MAX damaged lines, `damaged_count` all by cause,
    `channels` the name of each channel seen. Raises RecordingError when nothing can be read.
    """

    def __init__(self, path: str | Path, *, dialect: str | None = None) -> None:
        self.path = Path(path)
        if dialect is not None and dialect not in DIALECTS:
            raise RecordingError(f"unknown format {dialect}", mend=f"formats are {', '.join(DIALECTS)}")
        self._reset()
        if dialect in (None, "blf") and self.path.is_fifo():  # finding the format, or a size, reads it twice
            raise RecordingError(
                "a pipe cannot be read twice",
                where=str(path),
                mend="write it to a file first, or name a text format as dialect",
            )
        try:
            self.dialect = dialect or self._recognise()
        except (OSError, EOFError, zlib.error) as error:
            raise RecordingError(f"cannot read: {error}", where=str(path), mend="check the file") from error

    def _reset(self) -> None:
        self.damaged: list[tuple[int, str]] = []
        self.damaged_count: Counter[str] = Counter()
        self.channels: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        self._frames: Counter[int] = Counter()

    def _recognise(self) -> str:
        with self._open() as file:
            head = file.read(4)
        if head in BINARY_MAGIC:
            return BINARY_MAGIC[head]
        lines = (line for _, line in self._lines())
        name = recognise([line for line in islice(lines, LINES_TO_RECOGNISE) if isinstance(line, str)])
        self._reset()
        if name is None:
            raise RecordingError(
                "no frame in any known format at its beginning",
                where=str(self.path),
                mend=f"formats are {', '.join(DIALECTS)}",
            )
        return name

    def __iter__(self) -> Iterator[LoggedFrame]:
        self._reset()
        if self.dialect in ("blf", "mf4"):
            frames: Iterator[tuple[int, ParsedFrame]] = self._binary()
        elif self.dialect.startswith("gvret"):
            frames = self._gvret()
        else:
            frames = self._text(TEXT_DIALECTS[self.dialect]())
        for line, frame in frames:
            if frame.stamp is not None and not abs(frame.stamp) < TIME_S_MAX:
                self._damage(line, "time out of range")
                continue
            channel = self._channel(frame.channel)
            self._frames[channel] += 1
            yield LoggedFrame(
                self._frames[channel], channel, frame.stamp, frame.can_id, frame.fd, frame.brs, frame.data,
                frame.remote, frame.error, frame.rx, line,
            )  # fmt: skip

    def _channel(self, given: int | str) -> int:
        """Number a channel: its own number, else that in its name ("can1"), else the next free one."""
        if isinstance(given, int):
            self.channels.setdefault(given, str(given))
            return given
        if given not in self._numbers:
            digits = given[len(given.rstrip("0123456789")) :]
            number = int(digits) if digits and len(digits) < 4 else 0
            while number in self.channels:
                number += 1
            self._numbers[given] = number
            self.channels[number] = given
        return self._numbers[given]

    def _damage(self, line: int, cause: str) -> None:
        self.damaged_count[cause] += 1
        if len(self.damaged) < DAMAGED_KEPT_MAX:
            self.damaged.append((line, cause))

    # --- text -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        with self.path.open("rb") as raw:
            if raw.peek(2)[:2] == GZIP_MAGIC:
                with gzip.open(raw) as unzipped:
                    yield cast("IO[bytes]", unzipped)
            else:
                yield raw

    def _lines(self) -> Iterator[tuple[int, str | Damaged]]:
        """Yield the lines that are not empty with their numbers; Damaged for what is no text."""
        with self._open() as file:
            number = 0
            while True:
                number += 1
                try:
                    raw = file.readline(LINE_BYTES_MAX)
                    whole = raw
                    while len(whole) == LINE_BYTES_MAX and not whole.endswith(b"\n"):
                        whole = file.readline(LINE_BYTES_MAX)  # the rest of a line that never ends
                except (OSError, EOFError, zlib.error):
                    yield number, Damaged("gzip cut short")
                    return
                if not raw:
                    return
                if text := _text(raw):
                    yield number, text

    def _text(self, parser: Dialect) -> Iterator[tuple[int, ParsedFrame]]:
        for number, line in self._lines():
            try:
                if isinstance(line, Damaged):
                    raise line
                frame = parser.parse(line)
            except Damaged as cause:
                self._damage(number, str(cause))
                continue
            if frame is not None:
                yield number, frame

    def _gvret(self) -> Iterator[tuple[int, ParsedFrame]]:
        """Stamps in seconds: their unit is judged from the first frames, unless the dialect says it."""
        frames = self._text(TEXT_DIALECTS["gvret"]())
        first = list(islice(frames, GVRET_FRAMES_TO_JUDGE))
        scale = {"gvret-us": 1e-6, "gvret-ms": 1e-3}.get(self.dialect) or gvret_unit_s(
            [frame for _, frame in first]
        )
        for source in (first, frames):
            for number, frame in source:
                stamp = None if frame.stamp is None else round(frame.stamp * scale, 9)
                yield number, frame._replace(stamp=stamp)

    # --- binary -----------------------------------------------------------------------------------

    def _binary(self) -> Iterator[tuple[int, ParsedFrame]]:
        number = 0
        try:
            with self._open() as file:
                for message in self._messages(file):
                    number += 1
                    yield number, _parsed(message)
        except TboxError:
            raise
        except Exception as error:  # the parsers are others', and fed with garbage they raise anything
            # Blocks of a binary format lead from one to the next: after a broken one there is no way on.
            self._damage(number + 1, f"rest unreadable ({type(error).__name__})")

    def _messages(self, file: IO[bytes]) -> Iterator[can.Message]:
        if self.dialect == "mf4":
            yield from self._mf4(file)
            return
        reader = can.BLFReader(cast("Any", file))
        yield from reader
        if self._size_bytes() < reader.file_size:
            raise EOFError

    def _size_bytes(self) -> float:
        """Return the size of a plain file; a gzip that is cut short says so by itself."""
        with self.path.open("rb") as file:
            return float("inf") if file.read(2) == GZIP_MAGIC else self.path.stat().st_size

    def _mf4(self, file: IO[bytes]) -> Iterable[can.Message]:
        try:
            return cast("Iterable[can.Message]", load_mf4().MF4Reader(io.BytesIO(file.read())))
        except NotImplementedError:
            raise RecordingError(
                "reading MF4 needs asammdf", where=str(self.path), mend='pip install "tbox[mf4]"'
            ) from None


def _text(raw: bytes) -> str | Damaged:
    if b"\0" in raw:
        return Damaged("NUL bytes")
    if len(raw) >= LINE_BYTES_MAX:
        return Damaged("line too long")
    try:
        return raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return Damaged("not text")


def _parsed(message: can.Message) -> ParsedFrame:
    return ParsedFrame(
        channel=message.channel if isinstance(message.channel, int) else 0,
        stamp=message.timestamp, can_id=flagged_id(message) & ~CAN_RTR_FLAG, data=bytes(message.data),
        fd=message.is_fd, brs=message.bitrate_switch, remote=message.is_remote_frame,
        error=message.is_error_frame, rx=message.is_rx,
    )  # fmt: skip


# A classic frame takes at least 47 bit times, 47 us at 1 Mbit/s: on one bus two stamps in us are never
# closer, stamps in ms mostly are. And no message of a vehicle is cyclic with less than 1 ms.
GVRET_GAP_US_MIN = 47
GVRET_CYCLE_US_MIN = 1000


def gvret_unit_s(frames: list[ParsedFrame]) -> float:
    """Return the unit of GVRET stamps in seconds: tools write us, ms, or seconds with a fraction."""
    stamps = np.array([frame.stamp for frame in frames if frame.stamp is not None])
    if stamps.size and np.any(stamps != np.rint(stamps)):
        return 1.0 if abs(stamps[-1] - stamps[0]) < len(stamps) else 1e-3
    gaps = _steps(stamps, [frame.channel for frame in frames])
    cycles = _steps(stamps, [(frame.channel, frame.can_id) for frame in frames])
    close = gaps.size and np.mean(gaps < GVRET_GAP_US_MIN) > 0.5
    fast = cycles.size and np.median(cycles) < GVRET_CYCLE_US_MIN
    return 1e-3 if close or fast else 1e-6


def _steps(stamps: npt.NDArray[np.float64], keys: list[Any]) -> npt.NDArray[np.float64]:
    """Return the absolute steps from each stamp to the next with the same key."""
    last: dict[Any, float] = {}
    steps = []
    for stamp, key in zip(stamps.tolist(), keys, strict=True):
        if key in last:
            steps.append(abs(stamp - last[key]))
        last[key] = stamp
    return np.array(steps)


# --- as batches ---------------------------------------------------------------------------------------


def recording_batches(
    recording: Iterable[LoggedFrame], log_channel: int | None, channel: int
) -> Iterator[FrameBatch]:
    """Yield the data frames of one logged channel (None: of all) as batches of the bus `channel`.

    Times are as logged, shifted to begin at 0; a step back in time repeats the time before it.
    """
    frames = (
        frame
        for frame in recording
        if (log_channel is None or frame.channel == log_channel) and not (frame.error or frame.remote)
    )
    first_ns: int | None = None
    last_ns = 0
    while part := list(islice(frames, BATCH_FRAMES_MAX)):
        logged_ns = [None if f.t_s is None else round(f.t_s * NS_PER_S) for f in part]
        if first_ns is None:
            first_ns = next((t for t in logged_ns if t is not None), 0)
        shifted = [last_ns if t is None else t - first_ns for t in logged_ns]
        t_ns = np.maximum.accumulate(np.maximum(np.array(shifted, np.int64), last_ns))
        last_ns = int(t_ns[-1])
        packed = (FRAME.pack(f.can_id, len(f.data), fd_flags(f.fd, f.brs), f.data) for f in part)
        yield FrameBatch(channel, frames_of(packed), t_ns)


# --- writing ------------------------------------------------------------------------------------------


def write_recording(path: str | Path, frames: Iterable[LoggedFrame], dialect: str) -> int:
    """Write frames as candump, ASC or BLF and return how many; text is gzip'd if the name ends in .gz.

    candump keeps times as they are and may lack them. ASC and BLF count from the first frame's time.
    """
    path = Path(path)
    if dialect not in WRITABLE:
        raise RecordingError(f"cannot write {dialect}", mend=f"formats to write are {', '.join(WRITABLE)}")
    zipped = path.suffix == ".gz"
    if zipped and dialect == "blf":
        raise RecordingError("BLF is compressed already", where=str(path), mend="drop the .gz")
    try:
        with gzip.open(path, "wb") if zipped else path.open("wb") as file:
            if dialect == "blf":
                return _log_all(can.BLFWriter(cast("Any", file)), frames)
            with io.TextIOWrapper(cast("IO[bytes]", file), newline="\n") as text:
                if dialect == "asc":
                    return _log_all(can.ASCWriter(text), frames)
                return sum(1 for frame in frames if text.write(candump_line(frame)))
    except OSError as error:
        raise RecordingError(f"cannot write: {error.strerror or error}", where=str(path)) from error


def _log_all(writer: can.BLFWriter | can.ASCWriter, frames: Iterable[LoggedFrame]) -> int:
    """Times below 0, which these formats cannot say, are shifted so that the first frame is at 0."""
    count = 0
    shift_s = 0.0
    with writer:
        for count, frame in enumerate(frames, start=1):
            if count == 1:
                shift_s = max(0.0, -(frame.t_s or 0.0))
            writer.on_message_received(message_of_logged(frame, shift_s))
    return count


def candump_line(frame: LoggedFrame) -> str:
    """Return a frame as `candump -L` writes it, without the time if it has none."""
    time = "" if frame.t_s is None else f"({frame.t_s:.6f}) "
    if frame.error:
        identity = f"{frame.can_id | CAN_ERR_FLAG:08X}"
    elif frame.can_id & CAN_EFF_FLAG:
        identity = f"{frame.can_id & CAN_EFF_MASK:08X}"
    else:
        identity = f"{frame.can_id:03X}"
    kind = "R" if frame.remote else f"#{fd_flags(True, frame.brs):X}" if frame.fd else ""
    return (
        f"{time}can{frame.channel} {identity}#{kind}{frame.data.hex().upper()} {'R' if frame.rx else 'T'}\n"
    )


def message_of_logged(frame: LoggedFrame, shift_s: float = 0.0) -> can.Message:
    """Return a logged frame as a python-can message."""
    return can.Message(
        timestamp=(frame.t_s or 0.0) + shift_s,
        arbitration_id=frame.can_id & CAN_EFF_MASK,
        is_extended_id=bool(frame.can_id & CAN_EFF_FLAG),
        is_remote_frame=frame.remote,
        is_error_frame=frame.error,
        is_fd=frame.fd,
        bitrate_switch=frame.brs,
        data=frame.data,
        is_rx=frame.rx,
        channel=frame.channel,
    )
