"""Runs one rule over its watch's readings and keeps its alarms. Knows no signal, frame or clock.

The healthy path is one comparison with the outermost value; Python looks at single cells only once that
passes a limit, and then only at those that do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tbox.edge.alarms import Alarm, History, State, Told, draft_of
from tbox.edge.readings import NO_ITEM, Items, Reading, Scalar
from tbox.edge.rules import Rule
from tbox.model import Draft, Level

# So many things of one kind are alarmed one by one, worst first; the rest are counted in the text. A thing in
# a worse band than all of those is always taken.
ITEMS_MAX = 4
HISTORIES_MAX = 1024

PACK_KEY = "pack"


class Judge:
    """One rule at work. names: what each item of the watch is called, by its place."""

    def __init__(self, rule: Rule, names: Sequence[str]) -> None:
        self.rule = rule
        self.others: Sequence[Judge] = ()  # those of rule.unless
        self._names = names
        self._alarms: dict[int, Alarm] = {}
        self._histories: dict[int, History] = {}
        self._sign = rule.ladder.sign
        self._outward_limit = self._sign * rule.ladder.bands[0].limit
        self._place = NO_ITEM  # which item the pack's alarm last pointed at
        self._detail: dict[int, tuple[str, str]] = {}  # item -> its name and detail at the last look

    @property
    def alarms(self) -> list[Alarm]:
        """The alarms the receiver knows of."""
        return [alarm for alarm in self._alarms.values() if alarm.told]

    @property
    def busy(self) -> bool:
        return bool(self._alarms)

    def _told_elsewhere(self) -> set[int]:
        """Return the items of which another rule tells already, so that one fault is one alarm."""
        return {alarm.item for judge in self.others for alarm in judge.alarms}

    def place_of(self, alarm: Alarm) -> int:
        """Return the place in its series of what the alarm is about, NO_ITEM for the pack as a whole."""
        return alarm.item if alarm.item != NO_ITEM else self._place

    def text_of(self, alarm: Alarm) -> str:
        """Return the alarm's text as of now, for status."""
        name, detail = self._detail.get(alarm.item, (alarm.key, ""))
        return str(draft_of(alarm, Told.UPDATE, alarm.began_ns, {}, name, detail).body["text"])

    # --- looking at readings ------------------------------------------------------------------------------

    def judge(self, t_ns: int, reading: Reading, shift: float, context: Callable[[], Any]) -> list[Draft]:
        """Hold a reading against the rule. shift: by how much the limits stand further out just now."""
        if isinstance(reading, Scalar):
            outermost = reading.value
            if not self._alarms and (
                outermost is None or not self._sign * outermost - shift >= self._outward_limit
            ):
                return []
            if self.rule.item:
                return self.unknown(t_ns, context())
            return self._scalar(t_ns, reading, shift, context())
        outermost = reading.highest if self._sign > 0 else reading.lowest
        if not self._alarms and not self._sign * outermost - shift >= self._outward_limit:
            return []
        return self._items(t_ns, reading, shift, context())

    def _scalar(self, t_ns: int, reading: Scalar, shift: float, context: dict[str, Any]) -> list[Draft]:
        value = reading.value
        alarm = self._alarm(NO_ITEM, PACK_KEY)
        told = alarm.step(t_ns, value, shift)
        if value is not None:
            detail = reading.detail(reading.item)
            if (
                detail or NO_ITEM not in self._detail
            ):  # once the cause is gone, its last trace still tells most
                self._detail[NO_ITEM] = (reading.name or PACK_KEY, detail)
            if reading.item != NO_ITEM:
                self._place = reading.item
        return self._told([(alarm, told)], t_ns, context)

    def _items(self, t_ns: int, reading: Items, shift: float, context: dict[str, Any]) -> list[Draft]:
        offenders = self._offenders(reading, shift)
        if hushed := self._told_elsewhere():
            offenders = [item for item in offenders if item not in hushed]
            for item in hushed & self._alarms.keys():
                if not self._alarms[item].told:
                    self._alarms.pop(item)
        told: list[tuple[Alarm, Told | None]] = []
        for item in list(self._alarms):
            alarm = self._alarms[item]
            told.append((alarm, alarm.step(t_ns, float(reading.values[item]), shift)))
        for item in self._newcomers(offenders, reading, shift):
            alarm = self._alarm(item, self._names[item])
            told.append((alarm, alarm.step(t_ns, float(reading.values[item]), shift)))
        more = sum(1 for item in offenders if item not in self._alarms)
        for item in self._alarms:
            self._detail[item] = (self._names[item], reading.detail(item))
        return self._told(told, t_ns, context, f"and {more} more" if more else "")

    def _offenders(self, reading: Items, shift: float) -> list[int]:
        """Return the items past the first limit, worst first."""
        outward = self._sign * reading.values - shift
        over = np.flatnonzero(outward >= self._outward_limit)
        ordered: list[int] = over[np.argsort(-outward[over], kind="stable")].tolist()
        return ordered

    def _newcomers(self, offenders: list[int], reading: Items, shift: float) -> list[int]:
        fresh = [item for item in offenders if item not in self._alarms]
        room = max(0, ITEMS_MAX - len(self._alarms))
        if room or not fresh:
            return fresh[:room]
        ladder = self.rule.ladder

        def band(item: int) -> int:
            value = float(reading.values[item])
            return ladder.reached(value - ladder.sign * shift) if value == value else -1

        return fresh[:1] if band(fresh[0]) > max(band(item) for item in self._alarms) else []

    def unknown(self, t_ns: int, context: dict[str, Any]) -> list[Draft]:
        """The reading is not known just now: nothing is confirmed by that and nothing recovers."""
        return self._told([(alarm, alarm.step(t_ns, None)) for alarm in self._alarms.values()], t_ns, context)

    # --- time, guards and resets ---------------------------------------------------------------------------

    def tick(self, t_ns: int, context: dict[str, Any]) -> list[Draft]:
        """Let time pass for what is raised."""
        if not self.rule.escalate:
            return []
        return self._told([(alarm, alarm.tick(t_ns)) for alarm in self._alarms.values()], t_ns, context)

    def stand_aside(self, t_ns: int, context: dict[str, Any]) -> list[Draft]:
        """The rule does not look now (`only`): its alarms hold or end, as the rule says."""
        if self.rule.otherwise == "clear":
            return self._told([(alarm, alarm.ignore(t_ns)) for alarm in self._alarms.values()], t_ns, context)
        return self.unknown(t_ns, context)

    def reset(self, t_ns: int, why: str, context: dict[str, Any]) -> list[Draft]:
        """End all alarms of this rule."""
        return self._told([(alarm, alarm.reset(t_ns, why)) for alarm in self._alarms.values()], t_ns, context)

    def adopt(self, before: Judge) -> None:
        """Take over the alarms of the same rule before a reload that changed nothing about it."""
        self._alarms, self._histories, self._detail = before._alarms, before._histories, before._detail

    # --- keeping -------------------------------------------------------------------------------------------

    def _alarm(self, item: int, key: str) -> Alarm:
        alarm = self._alarms.get(item)
        if alarm is None:
            history = self._histories.get(item) or History(deque(), Level.INFO)
            alarm = self._alarms[item] = Alarm(self.rule, key, item, history)
        return alarm

    def _told(
        self, steps: list[tuple[Alarm, Told | None]], t_ns: int, context: dict[str, Any], more: str = ""
    ) -> list[Draft]:
        drafts: list[Draft] = []
        for alarm, told in steps:
            if told:
                name, detail = self._detail.get(alarm.item, (alarm.key, ""))
                if more and told is not Told.CLEAR:
                    alarm.why = f"{alarm.why}; {more}" if alarm.why else more
                drafts.append(draft_of(alarm, told, t_ns, context, name, detail))
            if alarm.state is State.QUIET:
                self._forget(alarm)
        return drafts

    def _forget(self, alarm: Alarm) -> None:
        self._alarms.pop(alarm.item, None)
        if alarm.history.raised_ns:
            self._histories[alarm.item] = alarm.history
            if len(self._histories) > HISTORIES_MAX:
                self._histories.pop(next(iter(self._histories)))
