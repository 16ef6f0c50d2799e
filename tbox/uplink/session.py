"""The link's mind: when to connect, how much to have in flight, when to give a link up. No socket, no clock.

A shell (mqtt.py, or the simulator's virtual link) tells it what happened and carries out the actions that
`step` returns. The port is the spool's side: records come from `offer`, leave by `ack` after their PUBACK,
and go back by `requeue` when a link dies with records in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, Protocol

import msgspec

from tbox.model import NS_PER_MS, NS_PER_S, RECORD_PAYLOAD_BYTES_MAX, Record

PORT_PLAIN = 1883
PORT_TLS = 8883
# A PUBACK that never comes while others do: after so many deadlines the link is given up all the same.
STUCK_DEADLINES = 4
# One place in the broker's window stays free for the state message.
ANNOUNCE_RESERVE = 1
BACKOFF_DOUBLINGS_MAX = 30
IDLE_POLL_MS = 1_000  # a port with nothing left speaks up when it has more; this is for one that forgets to
NUDGE_INTERVAL_MS_MIN = 1_000  # a bearer that flaps must not turn into a storm of connections


class SessionSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How patient the link is. Defaults: PITFALLS, link and time; DESIGN, facts (paho's window)."""

    window: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 50
    window_bytes: Annotated[int, msgspec.Meta(ge=RECORD_PAYLOAD_BYTES_MAX, le=1 << 24)] = 1024 * 1024
    backoff_base_ms: Annotated[int, msgspec.Meta(ge=10, le=60_000)] = 1_000
    backoff_max_ms: Annotated[int, msgspec.Meta(ge=100, le=3_600_000)] = 120_000
    refused_retry_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)] = 900
    connect_deadline_ms: Annotated[int, msgspec.Meta(ge=100, le=300_000)] = 20_000
    ack_deadline_ms: Annotated[int, msgspec.Meta(ge=100, le=300_000)] = 15_000
    probe_idle_ms: Annotated[int, msgspec.Meta(ge=100, le=3_600_000)] = 30_000
    resume_probe_ms: Annotated[int, msgspec.Meta(ge=100, le=60_000)] = 1_000
    stable_ms: Annotated[int, msgspec.Meta(ge=0, le=3_600_000)] = 30_000
    leave_deadline_ms: Annotated[int, msgspec.Meta(ge=100, le=60_000)] = 2_000
    poll_ms: Annotated[int, msgspec.Meta(ge=5, le=5_000)] = 100


class UplinkSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the broker is and how to speak to it. port 0: 8883 with TLS, else 1883."""

    host: str = "127.0.0.1"
    port: Annotated[int, msgspec.Meta(ge=0, le=65_535)] = 0
    mqtt: Literal["5", "3.1.1"] = "5"
    client_id: str = ""  # empty: tbox-<vehicle>
    username: str = ""
    password_file: str = ""
    tls: bool = False
    tls_ca: str = ""  # empty: the machine's own authorities
    tls_cert: str = ""
    tls_key: str = ""
    keepalive_s: Annotated[int, msgspec.Meta(ge=5, le=3_600)] = 30
    session: SessionSettings = msgspec.field(default_factory=SessionSettings)

    @property
    def port_in_use(self) -> int:
        return self.port or (PORT_TLS if self.tls else PORT_PLAIN)


class SpoolPort(Protocol):
    """The spool as the uplink sees it.

    more: whether records may be left that the last offer did not give: for want of room or of their turn.
    Without, the next offer waits for a `look`.
    """

    @property
    def more(self) -> bool: ...

    def offer(self, room: int) -> list[Record]:
        """Return at most `room` records to send, in drain order; they count as in flight from now on."""
        ...

    def ack(self, ids: Sequence[int]) -> None:
        """These records were PUBACKed: they may be deleted."""
        ...

    def requeue(self) -> None:
        """The link died: whatever is in flight must be offered again, under its old id."""
        ...


class State(StrEnum):
    STOPPED = "stopped"
    WAITING = "waiting"  # backing off
    CONNECTING = "connecting"
    ONLINE = "online"
    DRAINING = "draining"  # asked to stop, still sending
    LEAVING = "leaving"  # the offline message is in flight
    REFUSED = "refused"  # the broker knows us and says no: a person must act; tried again slowly


class Event(StrEnum):
    START = "start"
    STOP = "stop"
    WAKE = "wake"  # the wait is over
    CONNECTED = "connected"
    DENIED = "denied"  # authentication or authorisation failed
    LOST = "lost"  # could not connect, or the connection ended
    STALLED = "stalled"  # our own deadline passed: connected, but nothing comes back
    NUDGED = "nudged"  # the machine resumed from suspend, or the bearer changed
    DRAINED = "drained"  # nothing left to send, or no time left for it
    LEFT = "left"  # the offline message was acknowledged


# Everything that changes the state is in this table. What is not in it is illegal and raises.
TABLE: dict[tuple[State, Event], State] = {
    (State.STOPPED, Event.START): State.CONNECTING,
    (State.WAITING, Event.WAKE): State.CONNECTING,
    (State.WAITING, Event.NUDGED): State.CONNECTING,
    (State.WAITING, Event.STOP): State.STOPPED,
    (State.CONNECTING, Event.CONNECTED): State.ONLINE,
    (State.CONNECTING, Event.DENIED): State.REFUSED,
    (State.CONNECTING, Event.LOST): State.WAITING,
    (State.CONNECTING, Event.STALLED): State.WAITING,
    (State.CONNECTING, Event.NUDGED): State.CONNECTING,
    (State.CONNECTING, Event.STOP): State.STOPPED,
    (State.ONLINE, Event.DENIED): State.REFUSED,
    (State.ONLINE, Event.LOST): State.WAITING,
    (State.ONLINE, Event.STALLED): State.WAITING,
    (State.ONLINE, Event.NUDGED): State.ONLINE,
    (State.ONLINE, Event.STOP): State.DRAINING,
    (State.DRAINING, Event.DRAINED): State.LEAVING,
    (State.DRAINING, Event.DENIED): State.STOPPED,
    (State.DRAINING, Event.LOST): State.STOPPED,
    (State.DRAINING, Event.STALLED): State.STOPPED,
    (State.DRAINING, Event.NUDGED): State.DRAINING,
    (State.LEAVING, Event.LEFT): State.STOPPED,
    (State.LEAVING, Event.DENIED): State.STOPPED,
    (State.LEAVING, Event.LOST): State.STOPPED,
    (State.LEAVING, Event.STALLED): State.STOPPED,
    (State.LEAVING, Event.NUDGED): State.LEAVING,
    (State.REFUSED, Event.WAKE): State.CONNECTING,
    (State.REFUSED, Event.NUDGED): State.REFUSED,
    (State.REFUSED, Event.STOP): State.STOPPED,
}

LINKED = frozenset({State.CONNECTING, State.ONLINE, State.DRAINING, State.LEAVING})
SENDING = frozenset({State.ONLINE, State.DRAINING})


class IllegalEvent(Exception):
    """An event that cannot happen in this state: a bug in the shell, never the world."""


# --- what the shell has to do -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connect:
    """Open link number `link` and report connected, denied or lost."""

    link: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Close the link at once, without a word; nothing it still says counts."""

    link: int


@dataclass(frozen=True, slots=True)
class Leave:
    """Say goodbye (so that the Will is not published) and close."""

    link: int


@dataclass(frozen=True, slots=True)
class Send:
    """Publish with QoS 1 and report `acked(link, token)` for its PUBACK."""

    link: int
    token: int
    record: Record


@dataclass(frozen=True, slots=True)
class Announce:
    """Publish the retained state message with QoS 1 and report `acked(link, token)`."""

    link: int
    token: int
    state: Literal["online", "offline"]


Action = Connect | Drop | Leave | Send | Announce


@dataclass(slots=True)
class Counters:
    """offered = acked + requeued + what is in flight."""

    offered: int = 0
    acked: int = 0
    requeued: int = 0
    connects: int = 0
    links: int = 0
    losses: int = 0
    stalls: int = 0
    denials: int = 0
    probes: int = 0
    stale_reports: int = 0


@dataclass(frozen=True, slots=True)
class _Flight:
    sent_ns: int
    size_bytes: int


class Session:
    """One vehicle's link to its broker. Single-threaded: whoever owns it calls everything.

    random: a function returning floats in [0, 1), for the jitter.
    """

    def __init__(self, settings: SessionSettings, port: SpoolPort, random: Callable[[], float]) -> None:
        self._settings = settings
        self._port = port
        self._random = random
        self.state = State.STOPPED
        self.counters = Counters()
        self.why = ""  # the last thing that went wrong, for a person
        self.drained = False  # whether everything offered was acknowledged before the end
        self.link = 0
        self._actions: list[Action] = []
        self._in_flight: dict[int, _Flight] = {}  # by token; record ids, negative for state messages
        self._bytes = 0
        self._window = settings.window
        self._announced = 0
        self._attempt = 0
        self._wake_ns = 0  # end of the wait, or the deadline of connecting or leaving
        self._progress_ns = 0
        self._online_ns = 0
        self._deadline_ms = settings.ack_deadline_ms
        self._nudged_ns = -NUDGE_INTERVAL_MS_MIN * NS_PER_MS
        self._offered_none = False
        self._ask_ns = 0  # when the port is asked for records again

    # --- reports from the shell -----------------------------------------------------------------------

    def start(self, mono_ns: int) -> None:
        self._fire(Event.START, mono_ns)

    def stop(self, mono_ns: int) -> None:
        """Send what there is, say offline, stop. Idle or already stopping: does what is left to do."""
        if self.state not in (State.STOPPED, State.DRAINING, State.LEAVING):
            self._fire(Event.STOP, mono_ns)

    def hurry(self, mono_ns: int) -> None:
        """The time to drain is over: leave with what is still in flight."""
        if self.state is State.DRAINING:
            self._fire(Event.DRAINED, mono_ns)

    def connected(self, link: int, mono_ns: int, window_granted: int | None = None) -> None:
        """The broker accepted us; window_granted: its Receive Maximum where it told one."""
        if self._current(link):
            granted = self._settings.window + ANNOUNCE_RESERVE if window_granted is None else window_granted
            self._window = max(1, min(self._settings.window, granted - ANNOUNCE_RESERVE))
            self._fire(Event.CONNECTED, mono_ns)

    def denied(self, link: int, mono_ns: int, why: str) -> None:
        """Authentication or authorisation failed."""
        if self._current(link):
            self._fire(Event.DENIED, mono_ns, why)

    def lost(self, link: int, mono_ns: int, why: str) -> None:
        """The link could not be made, or ended."""
        if self._current(link):
            self._fire(Event.LOST, mono_ns, why)

    def acked(self, link: int, tokens: Sequence[int], mono_ns: int) -> None:
        """PUBACKs came in. Those of a link already given up do not count: its records were requeued."""
        if not self._current(link):
            return
        known = [token for token in tokens if token in self._in_flight]
        for token in known:
            self._bytes -= self._in_flight.pop(token).size_bytes
        ids = [token for token in known if token > 0]
        if ids:
            self.counters.acked += len(ids)
            self._port.ack(ids)
        if known:
            self._progress_ns = mono_ns
            self._deadline_ms = self._settings.ack_deadline_ms
        if self.state is State.LEAVING and -self._announced in known:
            self._fire(Event.LEFT, mono_ns)

    def look(self) -> None:
        """The port has new records: ask it at the next step."""
        self._ask_ns = 0

    def nudge(self, mono_ns: int) -> None:
        """The machine resumed, or the bearer changed: find out now whether the link still stands."""
        if self.state is not State.STOPPED and mono_ns - self._nudged_ns >= NUDGE_INTERVAL_MS_MIN * NS_PER_MS:
            self._nudged_ns = mono_ns
            self._fire(Event.NUDGED, mono_ns)

    # --- the step -------------------------------------------------------------------------------------

    def step(self, mono_ns: int) -> tuple[list[Action], int | None]:
        """Look at the deadlines, fill the window; return what to do and when to be called at the latest."""
        self._check_deadlines(mono_ns)
        if self.state in SENDING:
            self._fill_window(mono_ns)
            self._probe_if_idle(mono_ns)
        if self.state is State.DRAINING and self._offered_none and not self._in_flight:
            self.drained = True
            self._fire(Event.DRAINED, mono_ns)
        actions, self._actions = self._actions, []
        return actions, self._next_wake_ns(mono_ns)

    @property
    def in_flight(self) -> int:
        """Records handed to the link and not yet acknowledged."""
        return sum(token > 0 for token in self._in_flight)

    def status(self) -> dict[str, Any]:
        return {
            "state": str(self.state),
            "why": self.why,
            "in_flight": self.in_flight,
            "window": self._window,
            **asdict(self.counters),
        }

    def _check_deadlines(self, mono_ns: int) -> None:
        if self.state in (State.WAITING, State.REFUSED):
            if mono_ns >= self._wake_ns:
                self._fire(Event.WAKE, mono_ns)
        elif self.state in (State.CONNECTING, State.LEAVING):
            if mono_ns >= self._wake_ns:
                self._fire(Event.STALLED, mono_ns, f"no answer from the broker while {self.state}")
        elif self.state in SENDING and self._in_flight and mono_ns >= self._stall_ns():
            self._fire(Event.STALLED, mono_ns, "the link stalled: connected, but no acknowledgement came")

    def _stall_ns(self) -> int:
        """When what is in flight counts as lost: no PUBACK at all for a while, or one never for longer."""
        oldest = next(iter(self._in_flight.values()))
        patience_ns = self._deadline_ms * NS_PER_MS
        return min(
            max(self._progress_ns, oldest.sent_ns) + patience_ns,
            oldest.sent_ns + STUCK_DEADLINES * self._settings.ack_deadline_ms * NS_PER_MS,
        )

    def _fill_window(self, mono_ns: int) -> None:
        """Take records while there is room; by bytes too, since any record may be of the largest size."""
        while mono_ns >= self._ask_ns and (room := self._room()) > 0:
            records = self._port.offer(room)
            self._offered_none = not records
            assert len(records) <= room, "the port offered more than there is room for"
            for record in records:
                self.counters.offered += 1
                self._fly(record.id, len(record.payload), mono_ns)
                self._actions.append(Send(self.link, record.id, record))
            if len(records) < room:
                self._ask_ns = 0 if self._port.more else mono_ns + IDLE_POLL_MS * NS_PER_MS
                break

    def _room(self) -> int:
        by_bytes = (self._settings.window_bytes - self._bytes) // RECORD_PAYLOAD_BYTES_MAX
        return min(self._window - len(self._in_flight), by_bytes)

    def _probe_if_idle(self, mono_ns: int) -> None:
        if not self._in_flight and mono_ns >= self._progress_ns + self._settings.probe_idle_ms * NS_PER_MS:
            self._probe(mono_ns)

    def _probe(self, mono_ns: int) -> None:
        """A state message with QoS 1 proves the way there and back, and freshens what it says."""
        self.counters.probes += 1
        self._announce("online", mono_ns)

    def _announce(self, state: Literal["online", "offline"], mono_ns: int) -> None:
        self._announced += 1
        self._fly(-self._announced, 0, mono_ns)
        self._actions.append(Announce(self.link, -self._announced, state))

    def _fly(self, token: int, size_bytes: int, mono_ns: int) -> None:
        assert token not in self._in_flight, "the port offered a record that is in flight"
        self._in_flight[token] = _Flight(mono_ns, size_bytes)
        self._bytes += size_bytes

    def _next_wake_ns(self, mono_ns: int) -> int | None:
        if self.state is State.STOPPED:
            return None
        if self.state not in SENDING:
            return self._wake_ns
        poll_ns = max(self._ask_ns, mono_ns + self._settings.poll_ms * NS_PER_MS)
        return min(poll_ns, self._stall_ns()) if self._in_flight else poll_ns

    # --- transitions ----------------------------------------------------------------------------------

    def _current(self, link: int) -> bool:
        """Whether a report is about the link in use; an old link's last words are counted and ignored."""
        if link == self.link and self.state in LINKED:
            return True
        self.counters.stale_reports += 1
        return False

    def _fire(self, event: Event, mono_ns: int, why: str = "") -> None:
        source = self.state
        if (source, event) not in TABLE:
            raise IllegalEvent(f"{event} while {source}")
        self.state = TABLE[source, event]
        self.why = why or ("" if event is Event.CONNECTED else self.why)
        self._count(event)
        if source in LINKED and self.state not in LINKED - {State.CONNECTING}:
            self._end_link(source, event, mono_ns)
        self._enter(source, event, mono_ns)

    def _count(self, event: Event) -> None:
        self.counters.losses += event is Event.LOST
        self.counters.stalls += event is Event.STALLED
        self.counters.denials += event is Event.DENIED
        self.counters.connects += event is Event.CONNECTED

    def _end_link(self, source: State, event: Event, mono_ns: int) -> None:
        """Close the link; what was in flight on it goes back to the spool under its old ids."""
        self._actions = [action for action in self._actions if action.link != self.link]
        self._actions.append(Leave(self.link) if event is Event.LEFT else Drop(self.link))
        if source in SENDING and mono_ns - self._online_ns >= self._settings.stable_ms * NS_PER_MS:
            self._attempt = 0
        lost = self.in_flight
        self._in_flight.clear()
        self._bytes = 0
        if lost:
            self.counters.requeued += lost
            self._port.requeue()

    def _enter(self, source: State, event: Event, mono_ns: int) -> None:
        settings = self._settings
        self._ask_ns = 0
        match self.state:
            case State.CONNECTING:
                if event is Event.NUDGED:
                    self._attempt = 0
                self.link += 1
                self.counters.links += 1
                self._wake_ns = mono_ns + settings.connect_deadline_ms * NS_PER_MS
                self._actions.append(Connect(self.link))
            case State.WAITING:
                self._wake_ns = mono_ns + self._backoff_ns()
            case State.REFUSED:
                if event is not Event.NUDGED:
                    self._wake_ns = mono_ns + settings.refused_retry_s * NS_PER_S
            case State.ONLINE | State.DRAINING if event is Event.NUDGED:
                self._hasten(mono_ns)
            case State.ONLINE:
                self._online_ns = self._progress_ns = mono_ns
                self._deadline_ms = settings.ack_deadline_ms
                self._announce("online", mono_ns)
            case State.DRAINING:
                self._offered_none = False
            case State.LEAVING if source is State.DRAINING:
                self._wake_ns = mono_ns + settings.leave_deadline_ms * NS_PER_MS
                self._announce("offline", mono_ns)

    def _hasten(self, mono_ns: int) -> None:
        """Expect an answer soon: of what is in flight, else of a probe."""
        self._progress_ns = mono_ns
        self._deadline_ms = self._settings.resume_probe_ms
        if not self._in_flight:
            self._probe(mono_ns)

    def _backoff_ns(self) -> int:
        """Full jitter: uniform between 0 and a bound that doubles with each attempt."""
        bound_ms = self._settings.backoff_base_ms << min(self._attempt, BACKOFF_DOUBLINGS_MAX)
        self._attempt += 1
        return int(self._random() * min(bound_ms, self._settings.backoff_max_ms) * NS_PER_MS)
