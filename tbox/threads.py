"""Asking a thread that owns something: the work runs there, the answer comes back here. Starts no thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from tbox.errors import TboxError

T = TypeVar("T")

ANSWER_WAIT_S = 10.0


class BusyError(TboxError):
    """The owner did not get round to answering in time."""

    exit_code = 1


class Ask(Generic[T]):
    """A question to the owner of some state: made by the asker, run by the owner, waited for by the asker."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._done = threading.Event()
        self._answer: list[T] = []
        self._error: Exception | None = None

    def run(self) -> None:
        """Do the work, in the owner's thread. What it raises goes to the asker."""
        try:
            self._answer.append(self._work())
        except Exception as error:
            self._error = error
        self._done.set()

    def wait(self, timeout_s: float = ANSWER_WAIT_S) -> T:
        """Return the answer or raise what the work raised; BusyError after the time-out."""
        if not self._done.wait(timeout_s):
            raise BusyError(f"no answer within {timeout_s:g} s", mend="ask again; look at the agent's log")
        if self._error is not None:
            raise self._error
        return self._answer[0]
