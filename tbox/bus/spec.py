"""What a bus is told to be (BusSpec) and what it tells of itself (BusCounters). Opens and reads nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Annotated, Any, Protocol

import msgspec

from tbox.errors import TboxError
from tbox.model import BusState, CanSend, FrameBatch

# After the first frame a reader gathers this long, so that a batch pays for the work done once per batch.
GATHER_MS_MAX = 10
GATHER_MS_HURRIED = 3  # while an isolation request may hang on the next frame
GATHER_MS_CALM = 160  # while nothing presses: just within the time in which the edge wants its steps
# Gathering may fill a third of the kernel's buffer at the highest rate of a CAN-FD bus: a stall of 200 ms
# still fits beside it in a pipe of 1 MiB.
LINE_RATE_HZ = 23_800  # 8-byte frames at 1M/8M (FACTS)
BUFFER_SHARE = 1 / 3
# A batch never grows beyond this: 20 ms of a CAN-FD bus saturated with short frames (FACTS: 23,800/s).
BATCH_FRAMES_MAX = 512
# 200 ms at 23,000 frames/s are 4,600 frames, in the kernel's books 4 MiB.
RCVBUF_BYTES = 8 * 1024 * 1024
RCVBUF_BYTES_MIN = 64 * 1024
RCVBUF_BYTES_MAX = 256 * 1024 * 1024
BIT_RATE_MAX = 12_000_000
CHANNEL_CHARS_MAX = 1024


class BusError(TboxError):
    """A bus that cannot be opened as asked, or a frame it would not take."""


class Pace(Enum):
    """How long a reader may gather: as short as can be, the usual `gather_ms`, or long, to wake seldom."""

    HURRIED = "hurried"
    USUAL = "usual"
    CALM = "calm"


class BusSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One bus of the configuration.

    interface: python-can's name ("socketcan", "virtual", "tbox", "pcan", ...). options: handed to the
    interface as they are. bitrate and data_bitrate in bit/s are for interfaces that set them by themselves
    (SocketCAN's are set with `ip link`). filter: let the kernel pass only the ids the DBCs know.
    """

    interface: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9_\-]+$", max_length=64)]
    channel: Annotated[str, msgspec.Meta(min_length=1, max_length=CHANNEL_CHARS_MAX)]
    fd: bool = True
    bitrate: Annotated[int, msgspec.Meta(gt=0, le=BIT_RATE_MAX)] | None = None
    data_bitrate: Annotated[int, msgspec.Meta(gt=0, le=BIT_RATE_MAX)] | None = None
    rcvbuf_bytes: Annotated[int, msgspec.Meta(ge=RCVBUF_BYTES_MIN, le=RCVBUF_BYTES_MAX)] = RCVBUF_BYTES
    gather_ms: Annotated[int, msgspec.Meta(ge=0, le=GATHER_MS_MAX)] = GATHER_MS_MAX
    filter: bool = False
    options: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return f"{self.interface}:{self.channel}"

    def gather_s(self, pace: Pace, buffer_frames: int = 0) -> float:
        """Return how long a reader gathers. buffer_frames: what the kernel holds, which bounds a calm one."""
        if pace is Pace.CALM:
            borne_ms = 1000 * BUFFER_SHARE * buffer_frames / LINE_RATE_HZ
            return max(self.gather_ms, min(GATHER_MS_CALM, borne_ms)) / 1000
        return (min(self.gather_ms, GATHER_MS_HURRIED) if pace is Pace.HURRIED else self.gather_ms) / 1000


def parse_bus_url(text: str, *, fd: bool = True) -> BusSpec:
    """Return the bus that INTERFACE:CHANNEL names, such as "socketcan:can0" or "tbox:/tmp/bus".

    Raises BusError when the text is not of that form.
    """
    interface, colon, channel = text.strip().partition(":")
    if not (interface and colon and channel):
        raise BusError(
            "a bus is written INTERFACE:CHANNEL",
            where=repr(text),
            mend="for example socketcan:can0, virtual:x or tbox:/tmp/bus",
        )
    try:
        # Through msgspec, so that a URL obeys the same bounds as the configuration.
        return msgspec.convert({"interface": interface.lower(), "channel": channel, "fd": fd}, BusSpec)
    except msgspec.ValidationError as error:
        raise BusError(f"not a bus: {error}", where=repr(text), mend="write INTERFACE:CHANNEL") from error


@dataclass(slots=True)
class BusCounters:
    """What became of every frame of one bus since it was opened; only ever grows, but for `state`.

    received: what the bus handed over, error and remote frames among them. kernel_dropped: what it lost
    before that and said so. errors: error frames; error_frames: the same by class (one frame may be of
    several). malformed: what the driver handed over that is no frame. reopened: times the bus came back.
    rcvbuf_bytes/rcvbuf_forced: the receive buffer the kernel granted, and whether by privilege.
    """

    received: int = 0
    kernel_dropped: int = 0
    errors: int = 0
    error_frames: dict[str, int] = field(default_factory=dict)
    remote: int = 0
    malformed: int = 0
    sent: int = 0
    send_failed: int = 0
    reopened: int = 0
    state: BusState = BusState.DOWN
    rcvbuf_bytes: int | None = None
    rcvbuf_forced: bool | None = None

    @property
    def into(self) -> int:
        """Frames the ledger's "bus" account takes in."""
        return self.received + self.kernel_dropped

    @property
    def out(self) -> int:
        """Frames handed on in batches."""
        return self.received - self.errors - self.remote - self.malformed

    @property
    def dropped(self) -> dict[str, int]:
        """Frames not handed on, by cause, as the ledger names them."""
        return {
            "kernel": self.kernel_dropped,
            "error": self.errors,
            "remote": self.remote,
            "malformed": self.malformed,
        }

    def copy(self) -> BusCounters:
        """Return a copy of its own; any thread may ask."""
        return replace(self, error_frames=dict(self.error_frames))


class BusReader(Protocol):
    """One bus, read in batches. `recv_batch` and `close` belong to one thread; `send` may be another's.

    pace: set by its owner before each call; USUAL unless told otherwise.
    """

    name: str
    channel: int
    pace: Pace

    def recv_batch(self, timeout_s: float) -> FrameBatch | None:
        """Wait for a frame, gather what follows as the pace allows, and return all of it in order.

        None on time-out and while the bus is down: it reopens by itself, and the world's faults are
        counted, never raised.
        """

    def send(self, frame: CanSend) -> None:
        """Put one frame on the bus; BusError if it would not take it. Called by BusWriter alone."""

    def counters(self) -> BusCounters:
        """Return a copy of the counters."""

    def close(self) -> None:
        """Let go of the bus; wakes a waiting recv_batch within its gathering time."""
