"""A ring of full-rate frames, sealed into capture records around an alarm. Never writes a file.

Frames lie in chunks of one channel, cut to the widest payload seen there, so that classic traffic takes a
third of CAN-FD's room. A capture is a numbered series of drafts of kind "capture":

    part 0      {"event": "begin", "capture", "part", "trigger", "context", "before_s", "short", ...}
    part 1..n   {"event": "frames", "capture", "part", "channel", "count", "width", "first_ns", "frames"}
    part n + 1  {"event": "end", "capture", "part", "parts", "frames", "lost", "after_s", "short", ...}

"frames" is zstd over five arrays, little-endian: i8 time deltas in ns (the first is 0, from first_ns), u4 ids
with SocketCAN's flag bits, u1 lengths, u1 CAN-FD flags, u1 data of count x width.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
import zstandard

from tbox.errors import TboxError
from tbox.ledger import StageLedger
from tbox.model import FRAME_BYTES, FRAME_DTYPE, NS_PER_MS, NS_PER_S, Draft, FrameBatch, Level, Now

CHUNK_BYTES = 128 * 1024  # of frames; mostly compresses below one part
PART_BYTES_MAX = 60 * 1024  # compressed frames of a part; leaves room for the rest of a 64 KiB record
PARTS_PER_STEP_MAX = 2  # about 1 ms of packing: an alarm must not wait for the black box
ROOM_BYTES = 4 * CHUNK_BYTES  # a ring with less is sealed from at once, before it drops anything
LATE_NS = 200 * NS_PER_MS  # a window waits so long for its last frames to come from the reader
SEAL_EVERY_NS = NS_PER_S  # while a capture is open no frame waits longer than this to be sealed
HEAD_BYTES = 8  # id, len, flags and padding in front of a frame's data
LEN_AT = 4  # where in them
DATA_BYTES_MAX = FRAME_BYTES - HEAD_BYTES
TRIGGERS_TOLD_MAX = 16
ALL = sys.maxsize  # chunks: when a capture must end here and now
ZSTD_LEVEL = 1

Seconds = Annotated[float, msgspec.Meta(ge=0, le=600)]
Bytes = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]


class CaptureDamaged(TboxError):
    """A capture part whose frames cannot be read."""


class BlackBoxSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much is kept, and how much of it an alarm seals. 30 s before and after: GB/T 32960; 26 MB hold 30 s
    of 64-byte frames at 10,000/s (measured)."""

    ring_bytes_max: Annotated[int, msgspec.Meta(ge=1_000_000, le=1_000_000_000)] = 26_000_000
    before_s: Seconds = 30.0
    after_s: Seconds = 30.0
    capture_s_max: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 180.0  # however often it is extended
    captures_per_hour_max: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 10  # flash wears


class _Chunk:
    """Frames of one channel in order of arrival: rows (capacity, 8 + width) bytes, t_ns (capacity,)."""

    def __init__(self, channel: int, width: int, rows: Bytes, t_ns: I64, n: int) -> None:
        self.channel, self.width, self.n = channel, width, n
        self._rows, self._t_ns = rows, t_ns

    @classmethod
    def empty(cls, channel: int, width: int) -> _Chunk:
        capacity = CHUNK_BYTES // (2 * HEAD_BYTES + width)
        rows = np.empty((capacity, HEAD_BYTES + width), dtype=np.uint8)
        return cls(channel, width, rows, np.empty(capacity, dtype=np.int64), 0)

    @property
    def bytes(self) -> int:
        return self._rows.nbytes + self._t_ns.nbytes

    @property
    def full(self) -> bool:
        return self.n == len(self._t_ns)

    @property
    def rows(self) -> Bytes:
        return self._rows[: self.n]

    @property
    def t_ns(self) -> I64:
        return self._t_ns[: self.n]

    def add(self, rows: Bytes, t_ns: I64) -> int:
        """Take as many frames as there is room for; return how many."""
        n = min(len(t_ns), len(self._t_ns) - self.n)
        self._rows[self.n : self.n + n] = rows[:n, : HEAD_BYTES + self.width]
        self._t_ns[self.n : self.n + n] = t_ns[:n]
        self.n += n
        return n

    def only(self, which: npt.NDArray[np.bool_]) -> _Chunk:
        """Return a chunk of its own with just these frames."""
        n = int(np.count_nonzero(which))
        return _Chunk(self.channel, self.width, self.rows[which], self.t_ns[which], n)

    def halves(self) -> tuple[_Chunk, _Chunk]:
        low = np.arange(self.n) < self.n // 2
        return self.only(low), self.only(~low)


@dataclass(slots=True)
class _Capture:
    number: int
    begun_ns: int  # the first trigger
    from_ns: int
    until_ns: int
    asked_until_ns: int
    active: set[tuple[str, str]]
    triggers: list[dict[str, Any]]
    short: list[str] = field(default_factory=list)  # why it is shorter than asked
    cut: str | None = None  # why it ended early
    parts: int = 1  # the header
    frames: int = 0
    lost: int = 0
    left: int | None = None  # once it is over: chunks still to look through
    rests: list[_Chunk] = field(default_factory=list)  # what was found in them after its end


class BlackBox:
    """Keeps the last seconds of frames; `trigger` seals them and what follows, `step` gives the parts out.

    A capture ends `after_s` after its last trigger, or when every alarm that asked for it has cleared. Sealed
    frames leave the ring, so a capture soon after another begins where that one ended and says so ("short").
    account: ledger.stage("blackbox", "frames"), opened by the caller; a frame that grew too old unasked for
    is dropped as "aged", one that made room for newer ones as "limit", one unasked for at the end as "stop".
    """

    def __init__(self, account: StageLedger, settings: BlackBoxSettings | None = None) -> None:
        self._settings = settings or BlackBoxSettings()
        self._account = account
        self._closed: deque[_Chunk] = deque()
        self._open: dict[int, _Chunk] = {}
        self._bytes = 0
        self._kept_from: tuple[int, str] | None = None  # (ns, why there is nothing before)
        self._capture: _Capture | None = None
        self._captures = 0
        self._active: set[tuple[str, str]] = set()  # alarms that have had their capture and stand on
        self._recent_ns: deque[int] = deque()  # begins of the last hour's captures
        self._refused = 0

    # --- in --------------------------------------------------------------------------------------------

    def step(self, now: Now, frames: FrameBatch | None) -> list[Draft]:
        """Take the frames in; return the capture parts that are due (a bounded number a step)."""
        if self._kept_from is None:
            first_ns = now.mono_ns if not frames else min(now.mono_ns, int(frames.t_ns.min()))
            self._kept_from = first_ns, "start"
        if frames:
            self._push(frames)
        if self._capture is None:
            self._forget_aged(now)
            return []
        return self._seal(now, PARTS_PER_STEP_MAX)

    def _push(self, batch: FrameBatch) -> None:
        self._account.into += len(batch)
        self._account.held += len(batch)
        rows = np.ascontiguousarray(batch.frames).view(np.uint8).reshape(len(batch), FRAME_BYTES)
        longest = int(rows[:, LEN_AT].max())
        if longest > DATA_BYTES_MAX:  # no frame is; as it stands its whole part could not be read back
            rows = rows.copy()
            longest = int(np.minimum(rows[:, LEN_AT], DATA_BYTES_MAX, out=rows[:, LEN_AT]).max())
        width = max(8, -(-longest // 8) * 8)
        done = 0
        while done < len(batch):
            chunk = self._writable(batch.channel, width)
            done += chunk.add(rows[done:], batch.t_ns[done:])
            if chunk.full:
                self._close(batch.channel)
        while self._bytes > self._settings.ring_bytes_max and self._closed:
            self._drop_oldest("limit")

    def _writable(self, channel: int, width: int) -> _Chunk:
        chunk = self._open.get(channel)
        if chunk is not None and chunk.width < width:
            self._close(channel)
            chunk = None
        if chunk is None:
            chunk = self._open[channel] = _Chunk.empty(channel, width)
            self._bytes += chunk.bytes
        return chunk

    def _close(self, channel: int) -> None:
        self._closed.append(self._open.pop(channel))

    def _drop_oldest(self, cause: str) -> None:
        chunk = self._closed.popleft()
        self._bytes -= chunk.bytes
        self._account.held -= chunk.n
        self._account.drop(cause, chunk.n)
        if cause == "limit":
            self._kept_from = int(chunk.t_ns.max()) + 1, "ring_limit"
            if self._capture is not None:
                self._capture.lost += chunk.n
                if self._capture.left:
                    self._capture.left -= 1

    def _forget_aged(self, now: Now) -> None:
        horizon_ns = now.mono_ns - int(self._settings.before_s * NS_PER_S)
        while self._closed and int(self._closed[0].t_ns[-1]) < horizon_ns:
            self._drop_oldest("aged")

    # --- triggers --------------------------------------------------------------------------------------

    def trigger(self, now: Now, alarm: Draft) -> list[Draft]:
        """Begin a capture for an alarm of level 3 or more, or extend the open one.

        Any other draft is ignored, and so is the update of an alarm that has had its capture.
        """
        event, key = alarm.body.get("event"), _key(alarm)
        if alarm.level < Level.ALARM or event == "clear" or (event == "update" and key in self._active):
            return []
        self._active.add(key)
        drafts: list[Draft] = []
        if self._capture is not None:
            if now.mono_ns < self._end_max_ns(self._capture):
                self._extend(self._capture, now, alarm)
                return []
            drafts += self._seal(now, ALL)
        while self._recent_ns and self._recent_ns[0] <= now.mono_ns - 3600 * NS_PER_S:
            self._recent_ns.popleft()
        if len(self._recent_ns) < self._settings.captures_per_hour_max:
            self._recent_ns.append(now.mono_ns)
            drafts.append(self._begin(now, alarm))
            if self._bytes > self._settings.ring_bytes_max - ROOM_BYTES:  # else the alarm goes first
                drafts += self._seal(now, PARTS_PER_STEP_MAX)
            return drafts
        self._refused += 1
        body = {
            "event": "capture_refused",
            "limit_per_hour": len(self._recent_ns),
            "trigger": _trigger(alarm),
        }
        return [*drafts, Draft("event", Level.WARNING, now.mono_ns, body)]

    def _end_max_ns(self, capture: _Capture) -> int:
        return capture.begun_ns + int(self._settings.capture_s_max * NS_PER_S)

    def _begin(self, now: Now, alarm: Draft) -> Draft:
        settings = self._settings
        kept_ns, why = self._kept_from or (now.mono_ns, "start")
        wanted_ns = now.mono_ns - int(settings.before_s * NS_PER_S)
        from_ns = min(max(wanted_ns, kept_ns), now.mono_ns)
        until_ns = now.mono_ns + int(settings.after_s * NS_PER_S)
        self._captures += 1
        capture = self._capture = _Capture(
            self._captures, now.mono_ns, from_ns, until_ns, until_ns, {_key(alarm)}, [_trigger(alarm)]
        )
        if from_ns > wanted_ns:
            capture.short.append(why)
        for channel in list(self._open):
            self._close(channel)
        return Draft("capture", Level.INFO, now.mono_ns, {
            "event": "begin",
            "capture": capture.number,
            "part": 0,
            "trigger": capture.triggers[0],
            "context": alarm.body.get("context"),
            "before_s": (now.mono_ns - from_ns) / NS_PER_S,
            "asked_before_s": settings.before_s,
            "asked_after_s": settings.after_s,
            "short": list(capture.short),
        })  # fmt: skip

    def _extend(self, capture: _Capture, now: Now, alarm: Draft) -> None:
        if _key(alarm) not in capture.active and len(capture.triggers) < TRIGGERS_TOLD_MAX:
            capture.triggers.append(_trigger(alarm))
        capture.active.add(_key(alarm))
        wanted_ns = now.mono_ns + int(self._settings.after_s * NS_PER_S)
        capture.asked_until_ns = max(capture.asked_until_ns, wanted_ns)
        capture.until_ns = max(capture.until_ns, min(wanted_ns, self._end_max_ns(capture)))
        capture.cut = capture.left = None
        self._take_back(capture)

    def clear(self, now: Now, alarm: Draft) -> None:
        """The alarm (same "alarm" and "key") is over: when none is left the open capture ends now."""
        self._active.discard(_key(alarm))
        capture = self._capture
        if capture is None or _key(alarm) not in capture.active:
            return
        capture.active.discard(_key(alarm))
        if not capture.active and now.mono_ns < capture.until_ns:
            capture.until_ns, capture.cut = now.mono_ns, "cleared"

    # --- out -------------------------------------------------------------------------------------------

    def flush(self, now: Now) -> list[Draft]:
        """Seal what is open, at stop; the rest of the ring ends with the process and is counted."""
        drafts: list[Draft] = []
        capture = self._capture
        if capture is not None:
            if now.mono_ns < capture.until_ns:
                capture.until_ns, capture.cut = now.mono_ns, "stop"
            drafts = self._seal(now, ALL)
        for channel in list(self._open):
            self._close(channel)
        while self._closed:
            self._drop_oldest("stop")
        return drafts

    def _seal(self, now: Now, chunks_max: int) -> list[Draft]:
        """Give out up to `chunks_max` chunks of the open capture, and its end once it is over."""
        capture = self._capture
        assert capture is not None
        over = chunks_max == ALL or now.mono_ns > capture.until_ns + LATE_NS
        for channel, chunk in list(self._open.items()):
            waited = chunk.n > 0 and now.mono_ns - int(chunk.t_ns[0]) >= SEAL_EVERY_NS
            if waited or (over and capture.left is None):
                self._close(channel)
        if over and capture.left is None:
            capture.left = len(self._closed)
        drafts: list[Draft] = []
        for _ in range(min(chunks_max, len(self._closed) if capture.left is None else capture.left)):
            chunk = self._closed.popleft()
            self._bytes -= chunk.bytes
            drafts += self._seal_chunk(capture, chunk)
            if capture.left:
                capture.left -= 1
        if capture.left == 0:
            drafts.append(self._end(capture))
        return drafts

    def _seal_chunk(self, capture: _Capture, chunk: _Chunk) -> list[Draft]:
        """Return the parts of a chunk's frames inside the window; those after it go back to the ring."""
        early, late = chunk.t_ns < capture.from_ns, chunk.t_ns > capture.until_ns
        aged = int(np.count_nonzero(early))
        inside, rest = chunk.only(~(late | early)), chunk.only(late)
        if rest.n:
            capture.rests.append(rest)
        self._account.held -= aged + inside.n
        self._account.drop("aged", aged)
        self._account.out += inside.n
        capture.frames += inside.n
        drafts = []
        for first_ns, body in _pack(inside) if inside.n else ():
            head = {"event": "frames", "capture": capture.number, "part": capture.parts}
            drafts.append(Draft("capture", Level.INFO, first_ns, head | body))
            capture.parts += 1
        return drafts

    def _take_back(self, capture: _Capture) -> None:
        for rest in reversed(capture.rests):
            self._closed.appendleft(rest)
            self._bytes += rest.bytes
        capture.rests.clear()

    def _end(self, capture: _Capture) -> Draft:
        self._capture = None
        self._take_back(capture)
        self._kept_from = capture.until_ns + 1, f"continues {capture.number}"
        if capture.cut:
            capture.short.append(capture.cut)
        elif capture.until_ns < capture.asked_until_ns:
            capture.short.append("capture_limit")
        if capture.lost:
            capture.short.append("ring_limit")
        return Draft("capture", Level.INFO, capture.until_ns, {
            "event": "end",
            "capture": capture.number,
            "part": capture.parts,
            "parts": capture.parts + 1,
            "frames": capture.frames,
            "lost": capture.lost,
            "from_ns": capture.from_ns,
            "until_ns": capture.until_ns,
            "before_s": (capture.begun_ns - capture.from_ns) / NS_PER_S,
            "after_s": (capture.until_ns - capture.begun_ns) / NS_PER_S,
            "short": capture.short,
            "triggers": capture.triggers,
        })  # fmt: skip

    def status(self) -> dict[str, Any]:
        """Return ring bytes, frames, captures so far, refused triggers, and the open capture or None."""
        return {
            "ring_bytes": self._bytes,
            "ring_frames": self._account.held,
            "captures": self._captures,
            "refused": self._refused,
            "open_capture": None if self._capture is None else self._capture.number,
        }


def _key(alarm: Draft) -> tuple[str, str]:
    return str(alarm.body.get("alarm", "")), str(alarm.body.get("key", ""))


def _trigger(alarm: Draft) -> dict[str, Any]:
    """Return what a capture tells of the alarm that asked for it."""
    told = {name: alarm.body.get(name) for name in ("alarm", "key", "text", "since_ns")}
    return {**told, "level": int(alarm.level), "mono_ns": alarm.mono_ns}


def _pack(chunk: _Chunk) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (time of the first frame, body) for a chunk: one part, or more where it does not compress."""
    rows, first_ns = chunk.rows, int(chunk.t_ns[0])
    arrays = (
        np.diff(chunk.t_ns, prepend=chunk.t_ns[:1]).astype("<i8"),
        rows[:, :4], rows[:, 4], rows[:, 5], rows[:, HEAD_BYTES:],
    )  # fmt: skip
    packed = zstandard.compress(b"".join(array.tobytes() for array in arrays), ZSTD_LEVEL)
    if len(packed) > PART_BYTES_MAX and chunk.n > 1:
        for half in chunk.halves():
            yield from _pack(half)
        return
    shape = {"channel": chunk.channel, "count": chunk.n, "width": chunk.width}
    yield first_ns, {**shape, "first_ns": first_ns, "frames": packed}


def unpack_part(body: dict[str, Any]) -> FrameBatch:
    """Return the frames of a capture part ("event": "frames"); nothing in it is believed.

    Raises CaptureDamaged.
    """
    try:
        count, width = int(body["count"]), int(body["width"])
        if not (0 < count <= CHUNK_BYTES and width in range(8, 65, 8)):
            raise ValueError(f"{count} frames of {width} bytes")
        size = count * (8 + 4 + 1 + 1 + width)
        raw = zstandard.ZstdDecompressor().decompress(body["frames"], max_output_size=size)
        if len(raw) != size:
            raise ValueError(f"{len(raw)} of {size} bytes")
        deltas = np.frombuffer(raw, "<i8", count)
        frames = np.zeros(count, dtype=FRAME_DTYPE)
        frames["id"] = np.frombuffer(raw, "<u4", count, 8 * count)
        frames["len"] = np.frombuffer(raw, "u1", count, 12 * count)
        frames["flags"] = np.frombuffer(raw, "u1", count, 13 * count)
        frames["data"][:, :width] = np.frombuffer(raw, "u1", count * width, 14 * count).reshape(count, width)
        if int(frames["len"].max()) > width:
            raise ValueError("a frame longer than the part's width")
        return FrameBatch(int(body["channel"]), frames, np.cumsum(deltas) + int(body["first_ns"]))
    except (KeyError, TypeError, ValueError, OverflowError, zstandard.ZstdError) as error:
        raise CaptureDamaged(f"damaged capture part {body.get('part')}: {error}") from error
