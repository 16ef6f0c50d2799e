"""The spool's thread: the only one that touches the spool. Nobody else ever waits for flash.

The uplink's `offer` waits a bounded time for an answer; `keep`, `ack` and `requeue` return at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import structlog

from tbox.health import Heart
from tbox.model import NS_PER_MS, NS_PER_S, Draft, Now, Record
from tbox.spool.store import Spool
from tbox.threads import Ask

log = structlog.get_logger()

T = TypeVar("T")

OFFER_WAIT_S = 0.05  # how long the uplink's pump waits for records before it looks after its socket again


class SpoolRunner:
    """Owns a Spool from `start()` to `stop()`. Implements the uplink's SpoolPort.

    mint turns drafts into records; kept is told of them. Both are called in the spool's thread only, so that
    ids follow the order of appending.
    """

    def __init__(
        self,
        spool: Spool,
        mint: Callable[[Sequence[Draft], Now], list[Record]],
        kept: Callable[[list[Record]], None],
        now: Callable[[], Now],
        heart: Heart,
        tick_ms: int,
    ) -> None:
        self._spool = spool
        self._mint = mint
        self._kept = kept
        self._now = now
        self._heart = heart
        self._tick_ns = tick_ms * NS_PER_MS
        self._wake = threading.Condition()
        self._drafts: list[tuple[Sequence[Draft], Now]] = []
        self._acked: list[int] = []
        self._requeue = False
        self._room = 0  # what the uplink asked for and was not answered yet
        self._offered: list[Record] | None = None  # the answer
        self.more = True  # whether the next offer may give something (SpoolPort)
        self._calls: deque[Ask[Any]] = deque()
        self._stopping = False
        self.failure: BaseException | None = None
        self.acked = threading.Event()  # something was acknowledged since it was last cleared
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)

    # --- from any thread ------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def keep(self, drafts: Sequence[Draft], now: Now) -> None:
        """Hand drafts over; their records belong to the open tick from here on."""
        if drafts:
            with self._wake:
                self._drafts.append((drafts, now))
                self._wake.notify()

    def ack(self, ids: Sequence[int]) -> None:
        """Take PUBACKs, to be worked with what comes next: they must reach the tick, and no sooner."""
        with self._wake:
            self._acked.extend(ids)
        self.acked.set()

    def requeue(self) -> None:
        with self._wake:
            self._requeue = True
            self._wake.notify()

    def offer(self, room: int) -> list[Record]:
        """Return up to `room` records to send now, in drain order; [] when there are none. One caller only.

        Waits a bounded time: when the spool is busy with flash, its answer is given at the next call.
        """
        with self._wake:
            if not self._offered:
                self._room, self._offered = room, None
                self._wake.notify()
                self._wake.wait_for(lambda: self._offered is not None or self._stopping, OFFER_WAIT_S)
            offered, self._offered = self._offered, None
            self.more = offered is None or self._spool.more
            return offered or []

    def call(self, work: Callable[[Spool], T]) -> T:
        """Run `work` in the spool's thread and return what it returns, or raise what it raises."""
        ask = Ask(lambda: work(self._spool))
        with self._wake:
            self._calls.append(ask)
            self._wake.notify()
        return ask.wait()

    def stop(self) -> None:
        """Commit what was handed over and end the thread. The spool itself stays open for its owner."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # --- the spool's own thread -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            next_tick_ns = self._now().mono_ns + self._tick_ns
            while True:
                stopping = self._take(next_tick_ns)
                now = self._now()
                if now.mono_ns >= next_tick_ns or self._spool.wants_commit or stopping:
                    self._spool.tick(now)
                    next_tick_ns = now.mono_ns + self._tick_ns
                    if self._spool.more:  # a tick may bring records of its own, and some back from flash
                        self._kept([])
                self._heart.beat()
                if stopping:
                    return
        except BaseException as error:  # the agent sees it, stops in order and exits non-zero
            self.failure = error
            log.exception("spool_thread_died")

    def _take(self, next_tick_ns: int) -> bool:
        """Wait for something to do, do it, and return whether this was the last time."""
        with self._wake:
            wait_s = max(0.0, (next_tick_ns - self._now().mono_ns) / NS_PER_S)
            self._wake.wait_for(self._has_work, wait_s)
            handed, self._drafts = self._drafts, []
            acked, self._acked = self._acked, []
            requeue, self._requeue = self._requeue, False
            room, self._room = self._room, 0
            calls, self._calls = self._calls, deque()
            stopping = self._stopping
        for drafts, made in handed:
            records = self._mint(drafts, made)
            self._spool.append(records)
            self._kept(records)
        if acked:
            self._spool.ack(acked)
        if requeue:
            with self._wake:
                self._offered = None  # never given out: still in flight for the spool, and so they come back
            self._spool.requeue()
        for call in calls:
            call.run()
        if room:
            offered = self._spool.offer(self._now(), room)
            with self._wake:
                self._offered = offered
                self._wake.notify_all()
        return stopping

    def _has_work(self) -> bool:
        return bool(self._drafts or self._requeue or self._room or self._calls or self._stopping)
