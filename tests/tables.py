"""Walks state tables: each (state, event) leads where the table says or raises. It knows no table itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, TypeVar

import pytest

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)
Table = Mapping[Any, Any]  # {(state, event): state} or {state: {event: state}}


def flat(table: Table) -> dict[tuple[Enum, Enum], Enum]:
    """Return either shape of a table as {(state, event): state}."""
    found: dict[tuple[Enum, Enum], Enum] = {}
    for key, value in table.items():
        if isinstance(key, tuple):
            found[key] = value
        else:
            found |= {(key, event): after for event, after in value.items()}
    return found


def every_pair(states: type[Enum], events: type[Enum]) -> pytest.MarkDecorator:
    """Run a test, which takes `state` and `event`, for each pair there is."""
    pairs = [(state, event) for state in states for event in events]
    return pytest.mark.parametrize(("state", "event"), pairs, ids=lambda member: str(member.value))


def check_pair(table: Table, state: S, event: E, step: Callable[[S, E], S], illegal: type[Exception]) -> None:
    """Hold one step against the table."""
    after = flat(table).get((state, event))
    if after is None:
        with pytest.raises(illegal):
            step(state, event)
    else:
        assert step(state, event) is after


def check_whole(table: Table, states: type[Enum], events: type[Enum], *, begins: Enum | None = None) -> None:
    """Every state can be reached (or is the beginning) and left, and every event happens somewhere."""
    pairs = flat(table)
    assert set(pairs.values()) | {begins or next(iter(states))} == set(states)
    assert {state for state, _ in pairs} == set(states)
    assert {event for _, event in pairs} == set(events)
