"""Asks the BMS, over CAN, to open the contactors while a critical alarm stands. It asks; the BMS decides.

It only makes CanSend values; whether they reach the bus is for the writer's allow-list. The frame (classic
CAN, 8 bytes, dbc/ TBOX_IsolationRequest):

    byte 0    CRC-8/SAE-J1850 over bytes 1..7 and then the data id 0xF0
    byte 1    low nibble: counter, 0..14, one further with each frame
    byte 2    0 withdrawn, 1 open the contactors
    byte 3    reason (REASONS)
    byte 4-5  cell or probe it is about, little-endian, 0xFFFF for none
    byte 6-7  0
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import msgspec

from tbox.model import NS_PER_MS, NS_PER_S, CanSend, Draft, Level

REQUEST_ID = 0x6F0
DATA_ID = 0xF0
COUNTER_VALUES = 15  # 0..14; 15 says "error" in AUTOSAR E2E profile 1
NO_INDEX = 0xFFFF

REASONS = {
    "thermal-runaway": 1,
    "over-temperature-discharge": 2,
    "over-temperature-charge": 3,
    "cell-over-voltage": 4,
    "cell-under-voltage": 5,
}
REASON_OTHER = 255

_CRC_POLYNOMIAL, _CRC_START, _CRC_FINAL = 0x1D, 0xFF, 0xFF


class IsolationSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """mode: "off" never asks, "dry_run" tells what it would ask, "send" sends (if the allow-list has it)."""

    mode: Literal["off", "dry_run", "send"] = "dry_run"
    channel: Annotated[int, msgspec.Meta(ge=0, le=15)] = 0
    can_id: Annotated[int, msgspec.Meta(ge=0, le=0x9FFF_FFFF)] = REQUEST_ID
    repeat_ms: Annotated[int, msgspec.Meta(ge=20, le=10_000)] = 200  # until acknowledged
    fast_frames: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 50  # so many at that rate, then
    slow_ms: Annotated[int, msgspec.Meta(ge=100, le=60_000)] = 1000  # at this one; it never gives up
    withdraw_frames: Annotated[int, msgspec.Meta(ge=1, le=20)] = 3
    unanswered_s: Annotated[float, msgspec.Meta(gt=0, le=600)] = 5.0


class Demand(NamedTuple):
    """A critical alarm that asks for isolation. place: the cell or probe as the vehicle counts it, or -1."""

    rule: str
    key: str
    place: int


class State(StrEnum):
    IDLE = "idle"
    REQUESTED = "requested"
    ACKNOWLEDGED = "acknowledged"
    WITHDRAWING = "withdrawing"


class Event(StrEnum):
    DEMAND = "demand"
    ACK = "ack"
    ACK_LOST = "ack_lost"  # the BMS no longer says that it has taken the request
    CLEAR = "clear"  # no alarm asks any more
    DONE = "done"  # the withdrawal was sent often enough


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.IDLE: {Event.DEMAND: State.REQUESTED},
    State.REQUESTED: {Event.ACK: State.ACKNOWLEDGED, Event.CLEAR: State.WITHDRAWING},
    State.ACKNOWLEDGED: {Event.ACK_LOST: State.REQUESTED, Event.CLEAR: State.WITHDRAWING},
    State.WITHDRAWING: {Event.DEMAND: State.REQUESTED, Event.DONE: State.IDLE},
}


class IllegalEvent(Exception):
    """An event that means nothing in this state: a bug, never the world."""


def next_state(state: State, event: Event) -> State:
    """Return where `event` leads from `state`; raise IllegalEvent if the table has no such entry."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalEvent(f"{event} while {state}") from None


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte << 1) ^ _CRC_POLYNOMIAL if byte & 0x80 else byte << 1
        table.append(byte & 0xFF)
    return tuple(table)


_CRC_TABLE = _crc_table()


def crc8_j1850(data: bytes) -> int:
    """Return the CRC-8/SAE-J1850 of data; of b"123456789" it is 0x4B."""
    crc = _CRC_START
    for byte in data:
        crc = _CRC_TABLE[crc ^ byte]
    return crc ^ _CRC_FINAL


def request_frame(counter: int, request: int, reason: int, index: int) -> bytes:
    """Return the 8 bytes of one request; index -1 for none."""
    assert 0 <= counter < COUNTER_VALUES and request in (0, 1) and 0 <= reason <= 255
    about = index if 0 <= index < NO_INDEX else NO_INDEX
    body = bytes((counter, request, reason)) + about.to_bytes(2, "little") + bytes(2)
    return bytes((crc8_j1850(body + bytes((DATA_ID,))),)) + body


class Isolation:
    """The request's life. `step` takes the alarms that ask and the BMS's answer, and returns what to send."""

    def __init__(self, settings: IsolationSettings | None = None) -> None:
        self._settings = settings or IsolationSettings()
        self.state = State.IDLE
        self._counter = 0
        self._sent = 0  # frames of this request, or of its withdrawal
        self._next_ns = -(1 << 62)
        self._ask_ns = -(1 << 62)  # before that no other demand is due: the BMS has just heard the last
        self._since_ns = 0
        self._warned = False
        self._reason, self._index = 0, -1
        self._rule = ""

    def step(self, t_ns: int, demands: list[Demand], ack: bool | None) -> tuple[list[CanSend], list[Draft]]:
        """ack: the role isolation_ack, None while unknown. Drafts are events."""
        if self._settings.mode == "off":
            return [], []
        drafts: list[Draft] = []
        self._follow(t_ns, demands, ack, drafts)
        if self.state in (State.REQUESTED, State.ACKNOWLEDGED) and not self._warned:
            self._warn_unanswered(t_ns, drafts)
        return self._frames(t_ns, drafts), drafts

    @property
    def next_ns(self) -> int | None:
        """When `step` has something to send, None while it has not."""
        return self._next_ns if self.state in (State.REQUESTED, State.WITHDRAWING) else None

    def status(self) -> dict[str, Any]:
        return {
            "state": str(self.state),
            "mode": self._settings.mode,
            "rule": self._rule,
            "frames": self._sent,
        }

    def _follow(self, t_ns: int, demands: list[Demand], ack: bool | None, drafts: list[Draft]) -> None:
        if demands and self.state in (State.IDLE, State.WITHDRAWING):
            first = min(demands, key=lambda demand: REASONS.get(demand.rule, REASON_OTHER))
            self._reason, self._index = REASONS.get(first.rule, REASON_OTHER), first.place
            self._rule = first.rule
            self._since_ns, self._warned = t_ns, False
            self._move(Event.DEMAND, t_ns)
            drafts.append(
                self._event(
                    t_ns, "requested", f"asks the BMS to open the contactors: {first.rule}, {first.key}"
                )
            )
        if not demands and self.state in (State.REQUESTED, State.ACKNOWLEDGED):
            self._move(Event.CLEAR, t_ns)
            drafts.append(self._event(t_ns, "withdrawn", "no alarm asks for isolation any more"))
        elif ack and self.state is State.REQUESTED and (self._sent or self._settings.mode == "dry_run"):
            self._move(Event.ACK, t_ns)
            drafts.append(self._event(t_ns, "acknowledged", "the BMS has taken the request"))
        elif ack is False and self.state is State.ACKNOWLEDGED:
            self._move(Event.ACK_LOST, t_ns)
            drafts.append(self._event(t_ns, "repeated", "the BMS has dropped the request; it is asked again"))

    def _frames(self, t_ns: int, drafts: list[Draft]) -> list[CanSend]:
        settings = self._settings
        if self.state not in (State.REQUESTED, State.WITHDRAWING) or t_ns < self._next_ns:
            return []
        asking = self.state is State.REQUESTED
        data = request_frame(
            self._counter, int(asking), self._reason if asking else 0, self._index if asking else -1
        )
        self._counter = (self._counter + 1) % COUNTER_VALUES
        self._sent += 1
        slow = asking and self._sent >= settings.fast_frames
        self._next_ns = t_ns + (settings.slow_ms if slow else settings.repeat_ms) * NS_PER_MS
        if asking:
            self._ask_ns = t_ns + settings.repeat_ms * NS_PER_MS
        elif self._sent >= settings.withdraw_frames:
            self._move(Event.DONE, t_ns)
        return [CanSend(settings.channel, settings.can_id, data, fd=False)] if settings.mode == "send" else []

    def _warn_unanswered(self, t_ns: int, drafts: list[Draft]) -> None:
        if self.state is State.REQUESTED and t_ns - self._since_ns >= self._settings.unanswered_s * NS_PER_S:
            self._warned = True
            drafts.append(
                self._event(t_ns, "unanswered", f"the BMS has not answered {self._sent} requests; asking on")
            )

    def _move(self, event: Event, t_ns: int) -> None:
        self.state = next_state(self.state, event)
        if event in (Event.DEMAND, Event.CLEAR, Event.ACK_LOST):
            self._sent = 0
            # A change is told at once, but never faster than the rate allows; a new demand does not wait
            # for the slots of a withdrawal.
            self._next_ns = max(t_ns, self._ask_ns if event is Event.DEMAND else self._next_ns)

    def _event(self, t_ns: int, state: str, text: str) -> Draft:
        dry = self._settings.mode == "dry_run"
        body = {
            "event": "isolation_request", "state": state, "rule": self._rule, "reason": self._reason,
            "index": self._index, "dry_run": dry, "text": f"dry run: {text}" if dry else text,
        }  # fmt: skip
        return Draft(
            "event", Level.CRITICAL if state in ("requested", "unanswered") else Level.ALARM, t_ns, body
        )


# --- the warning output -------------------------------------------------------------------------------


class WarningOutput(Protocol):
    """A lamp, a buzzer, an instrument cluster: whatever warns the people in the vehicle.

    `show` is called when what is to be shown changes; level None: nothing to warn of. It must not block.
    """

    def show(self, level: Level | None, text: str) -> None: ...


class NoWarning:
    """No output is fitted."""

    def show(self, level: Level | None, text: str) -> None:
        """Show nothing."""
