"""The life of an alarm as a table, and the drafts that tell of it: raised, updated, cleared. Reads no signal.

An alarm is one rule about one thing (a cell, a probe, the pack). What changes its state is in this file.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tbox.edge.bands import Debounce
from tbox.edge.rules import Rule
from tbox.model import NS_PER_S, Draft, Level


class State(StrEnum):
    QUIET = "quiet"
    PENDING = "pending"  # past a limit, not for long enough yet
    RAISED = "raised"
    RECOVERING = "recovering"  # past the clear level, not for long enough yet
    LATCHED = "latched"  # the cause is gone, the alarm stays until it is reset
    DAMPED = "damped"  # it flaps: raised without a break until it has been calm for long


class Event(StrEnum):
    TRIP = "trip"  # a limit is passed
    CONFIRM = "confirm"  # for long enough
    CONFIRM_FLAPPING = "confirm_flapping"  # the same, once too often
    RELEASE = "release"  # no limit is passed (pending) or every clear level is (raised)
    SETTLE = "settle"  # released for long enough
    HOLD = "hold"  # the same, but the rule latches
    LOSE = "lose"  # the value became unknown
    RESET = "reset"  # somebody with the right to do so ended it


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.QUIET: {Event.TRIP: State.PENDING},
    State.PENDING: {
        Event.CONFIRM: State.RAISED,
        Event.CONFIRM_FLAPPING: State.DAMPED,
        Event.RELEASE: State.QUIET,
        Event.LOSE: State.QUIET,
        Event.RESET: State.QUIET,
    },
    State.RAISED: {Event.RELEASE: State.RECOVERING, Event.RESET: State.QUIET},
    State.RECOVERING: {
        Event.TRIP: State.RAISED,
        Event.LOSE: State.RAISED,  # not knowing is not recovery
        Event.SETTLE: State.QUIET,
        Event.HOLD: State.LATCHED,
        Event.RESET: State.QUIET,
    },
    State.LATCHED: {Event.TRIP: State.RAISED, Event.RESET: State.QUIET},
    State.DAMPED: {Event.SETTLE: State.QUIET, Event.HOLD: State.LATCHED, Event.RESET: State.QUIET},
}
TOLD = frozenset({State.RAISED, State.RECOVERING, State.LATCHED, State.DAMPED})  # the receiver knows of it

# An alarm raised so often within this time flaps; it then counts as over only after it was calm for so long.
FLAP_RAISES = 3
FLAP_WINDOW_NS = 600 * NS_PER_S
FLAP_CALM_NS = 120 * NS_PER_S


class IllegalEvent(Exception):
    """An event that means nothing in this state: a bug, never the world."""


def next_state(state: State, event: Event) -> State:
    """Return where `event` leads from `state`; raise IllegalEvent if the table has no such entry."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalEvent(f"{event} while {state}") from None


class Told(StrEnum):
    """What an alarm record says."""

    RAISE = "raise"
    UPDATE = "update"
    CLEAR = "clear"


@dataclass(slots=True)
class History:
    """What is remembered of an alarm that is over, for minimum repeat and flap damping."""

    raised_ns: deque[int]
    level: Level


class Alarm:
    """One rule about one thing. `step` takes a value and returns what is to be told, if anything.

    key: "cell 37", "pack". item: its index, or -1. began_ns: when the condition began.
    """

    __slots__ = (
        "_band", "_debounce", "_easing_ns", "_escalated", "_raised_ns", "_told_ns", "_told_value",
        "began_ns", "history", "item", "key", "level", "limit", "peak", "rule", "state", "value", "why",
    )  # fmt: skip

    def __init__(self, rule: Rule, key: str, item: int, history: History) -> None:
        self.rule, self.key, self.item = rule, key, item
        self.state = State.QUIET
        self.level = self.peak = Level.INFO
        self.value = self.limit = float("nan")
        self.began_ns = 0
        self.why = ""  # what an update is about, for the text: "escalated after 10 min", ...
        self._band = -1
        self._debounce = Debounce(rule.ladder)
        self._easing_ns: int | None = None  # since when a lower band would do
        self._escalated = 0
        self.history = history
        self._raised_ns = self._told_ns = 0
        self._told_value = float("nan")

    @property
    def told(self) -> bool:
        return self.state in TOLD

    def step(self, t_ns: int, value: float | None, shift: float = 0.0) -> Told | None:
        """Take a value (None: unknown) at t_ns. shift: by how much the limits stand further out right now."""
        if value is None or value != value:
            self._lose()
            return None
        self.why = ""
        ladder = self.rule.ladder
        inner = value - ladder.sign * shift
        reached = ladder.reached(inner)
        confirmed = self._debounce.step(t_ns, reached)
        if not self.told:
            return self._rise(t_ns, value, shift, reached, confirmed)
        self.value = value
        if confirmed > self._band or (self.state is State.LATCHED and confirmed >= 0):
            return self._worsen(t_ns, shift, confirmed)
        return self._ease(t_ns, inner, shift, ladder.held(inner, self._band))

    def tick(self, t_ns: int) -> Told | None:
        """Let time pass: a raised alarm may escalate, whatever is known."""
        steps = self.rule.escalate
        if self.state not in (State.RAISED, State.DAMPED) or self._escalated >= len(steps):
            return None
        step = steps[self._escalated]
        if t_ns - self._raised_ns < step.after_ns:
            return None
        self._escalated += 1
        if step.level <= self.level:
            return None
        self.level = step.level
        self.why = f"for {_span(t_ns - self.began_ns)}, escalated to {step.level.name.lower()}"
        return self._tell(t_ns, Told.UPDATE)

    def reset(self, t_ns: int, why: str) -> Told | None:
        """End it, whatever its cause does; return CLEAR if the receiver knew of it."""
        told = self.told
        if self.state is not State.QUIET:
            self._move(Event.RESET)
        self._debounce.restart()
        self.why = why
        return self._tell(t_ns, Told.CLEAR) if told else None

    def ignore(self, t_ns: int, shift: float = 0.0) -> Told | None:
        """The rule does not apply now and its alarms end by that: count as a value past every clear level."""
        self.why = "no longer applies"
        self._debounce.restart()
        if self.state is State.PENDING:
            self._move(Event.RELEASE)
        return self._settle(t_ns) if self.told else None

    # --- the moves, in the order in which they happen ------------------------------------------------------

    def _rise(self, t_ns: int, value: float, shift: float, reached: int, confirmed: int) -> Told | None:
        if reached < 0:
            if self.state is State.PENDING:
                self._move(Event.RELEASE)
            return None
        if self.state is State.QUIET:
            self._move(Event.TRIP)
            self.began_ns = t_ns
        if confirmed < 0 or not self._may_repeat(t_ns, confirmed):
            return None
        self.value = value
        self._enter(confirmed, shift)
        flapping = self._count_raise(t_ns)
        self._move(Event.CONFIRM_FLAPPING if flapping else Event.CONFIRM)
        if flapping:
            self.why = (
                f"flapping, raised {len(self.history.raised_ns)} times in {_span(FLAP_WINDOW_NS)}: "
                f"now held until calm for {_span(FLAP_CALM_NS)}"
            )
        self._raised_ns, self._escalated, self._easing_ns = t_ns, 0, None
        return self._tell(t_ns, Told.RAISE)

    def _may_repeat(self, t_ns: int, band: int) -> bool:
        history = self.history
        if not history.raised_ns or self.rule.ladder.bands[band].level > history.level:
            return True
        return t_ns - history.raised_ns[-1] >= self.rule.repeat_ns or t_ns < history.raised_ns[-1]

    def _count_raise(self, t_ns: int) -> bool:
        raised_ns = self.history.raised_ns
        raised_ns.append(t_ns)
        while t_ns - raised_ns[0] > FLAP_WINDOW_NS:
            raised_ns.popleft()
        self.history.level = self.level
        return len(raised_ns) >= FLAP_RAISES

    def _worsen(self, t_ns: int, shift: float, band: int) -> Told | None:
        if self.state in (State.RECOVERING, State.LATCHED):
            self._move(Event.TRIP)
        self._easing_ns = None
        before = self.level
        self._enter(band, shift)
        self.level = max(before, self.level) if self._escalated else self.level
        if self.level > before:
            self.why = f"risen to {self.level.name.lower()}"
        self.history.level = max(self.history.level, self.level)
        return self._tell(t_ns, Told.UPDATE)

    def _ease(self, t_ns: int, inner: float, shift: float, held: int) -> Told | None:
        if held < 0:
            return self._settle(t_ns)
        if self.state is State.RECOVERING:
            self._move(Event.TRIP)
            self._easing_ns = None
        if self.state is State.LATCHED:
            return None
        if held < self._band:
            self._easing_ns = t_ns if self._easing_ns is None else self._easing_ns
            if t_ns - self._easing_ns >= self.rule.ladder.bands[self._band].clear_for_ns:
                return self._step_down(t_ns, shift, held)
            return None
        self._easing_ns = None
        return self._worse_than_told(t_ns)

    def _settle(self, t_ns: int) -> Told | None:
        if self.state is State.LATCHED:
            return None
        if self.state is State.RAISED:
            self._move(Event.RELEASE)
            self._easing_ns = t_ns
        if self._easing_ns is None:
            self._easing_ns = t_ns
        wait_ns = self.rule.ladder.bands[max(self._band, 0)].clear_for_ns
        if t_ns - self._easing_ns < (max(wait_ns, FLAP_CALM_NS) if self.state is State.DAMPED else wait_ns):
            return None
        if self.rule.latch:
            self._move(Event.HOLD)
            self.why = "the cause is gone; held until it is reset"
            return self._tell(t_ns, Told.UPDATE)
        self._move(Event.SETTLE)
        self.why = self.why or "cleared"
        return self._tell(t_ns, Told.CLEAR)

    def _step_down(self, t_ns: int, shift: float, band: int) -> Told | None:
        before = self.level
        self._enter(band, shift)
        if self._escalated:
            self.level = max(self.level, self.rule.escalate[self._escalated - 1].level)
        self._easing_ns = None
        if self.level == before:
            return None
        self.why = f"eased to {self.level.name.lower()}"
        return self._tell(t_ns, Told.UPDATE)

    def _worse_than_told(self, t_ns: int) -> Told | None:
        sign = self.rule.ladder.sign
        if sign * self.value > sign * self._told_value and t_ns - self._told_ns >= self.rule.update_ns:
            return self._tell(t_ns, Told.UPDATE)
        return None

    def _lose(self) -> None:
        self._debounce.restart()
        if self.state in (State.PENDING, State.RECOVERING):
            self._move(Event.LOSE)
        self._easing_ns = None

    def _enter(self, band: int, shift: float) -> None:
        ladder = self.rule.ladder
        self._band = band
        self.level = ladder.bands[band].level
        self.limit = ladder.bands[band].limit + ladder.sign * shift

    def _move(self, event: Event) -> None:
        self.state = next_state(self.state, event)

    def _tell(self, t_ns: int, told: Told) -> Told:
        self._told_ns, self._told_value = t_ns, self.value
        self.peak = self.level if told is Told.RAISE else max(self.peak, self.level)
        return told


# --- drafts -------------------------------------------------------------------------------------------

DECIMALS = {"V": 3, "degC/s": 2, "A": 1, "degC": 1, "K": 1, "s": 1, "percent": 1, "": 0}


def shown(value: float, rule: Rule) -> str:
    """Return a value of the rule's watch as people read it: "4.312 V", "85 mV"."""
    number = value / rule.per_unit
    return f"{number:.{DECIMALS.get(rule.unit, 0)}f} {rule.unit}".strip()


def draft_of(
    alarm: Alarm, told: Told, t_ns: int, context: dict[str, Any], item_name: str, detail: str
) -> Draft:
    """Return the record of what an alarm has to tell. detail: what the watch adds to the text."""
    rule = alarm.rule
    text = rule.text.format(
        item=item_name, value=shown(alarm.value, rule), limit=shown(alarm.limit, rule),
        level=alarm.level.name.lower(), since_s=_span(t_ns - alarm.began_ns), detail=detail,
    )  # fmt: skip
    if told is Told.CLEAR:
        lasted = _span(t_ns - alarm.began_ns)
        text = f"{rule.name} cleared after {lasted}: {item_name} at {shown(alarm.value, rule)}"
    if alarm.why and alarm.why != "cleared":
        text = f"{text} ({alarm.why})"
    body: dict[str, Any] = {
        "alarm": rule.name,
        "event": str(told),
        "key": alarm.key,
        "text": text,
        "value": round(alarm.value / rule.per_unit, 6),
        "limit": round(alarm.limit / rule.per_unit, 6),
        "unit": rule.unit,
        "since_ns": alarm.began_ns,
        "state": str(alarm.state),
        "context": context,
    }
    # A clear travels with the priority its alarm had at its worst, or the receiver would show it too long.
    return Draft("alarm", alarm.peak if told is Told.CLEAR else alarm.level, t_ns, body)


def _span(duration_ns: int) -> str:
    seconds = duration_ns / NS_PER_S
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
