"""bus → decode → edge → records: the one way through, and the threads that run it. Opens nothing.

`Flow` knows no thread and no clock, so the virtual-time world runs the very same steps as the daemon.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import structlog

from tbox.bus.frames import concatenated
from tbox.bus.spec import GATHER_MS_CALM, BusReader, Pace
from tbox.bus.writer import BusWriter
from tbox.clock import Deadline
from tbox.decode.stage import DecodeStage
from tbox.edge.stage import EdgeStage
from tbox.errors import TboxError
from tbox.health import Heart
from tbox.ledger import StageLedger
from tbox.model import (
    CanSend,
    Draft,
    EdgeOutput,
    FrameBatch,
    Now,
    Record,
    SampleBatch,
)
from tbox.record.codec import Minter, PayloadTooLargeError
from tbox.record.privacy import PrivacyFilter
from tbox.threads import Ask

log = structlog.get_logger()

T = TypeVar("T")

HANDOVER_BATCHES_MAX = 256  # a full hand-over leaves the frames in the kernel, which counts what it drops
RX_WAIT_S = 0.2
HOLD_S = GATHER_MS_CALM / 1000
HOLD_FRAMES_MAX = 1024  # 10 ms of work on a slow machine
HOLD_FRAMES_HURRIED = 256  # a frame that presses would have to wait for them
RX_DRAIN_S = 1.0

NO_SAMPLES = SampleBatch(
    np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float64), np.empty(0, np.uint8)
)


class Scribe:
    """Turns drafts into records: consent first, then the id, then the bytes, all counted.

    Ids follow the order in which records reach the spool, so it belongs to the thread that owns the spool:
    then no record can be lost below an id that was committed.
    """

    def __init__(self, minter: Minter, privacy: PrivacyFilter, account: StageLedger) -> None:
        self._minter, self._privacy, self._account = minter, privacy, account

    def records(self, drafts: Sequence[Draft], now: Now) -> list[Record]:
        """Return the records of the drafts that may leave; the others are counted by cause."""
        kept = []
        for draft in drafts:
            if not self._privacy.admits(draft):
                self._account.into += 1
                self._account.drop("consent")
                continue
            try:
                kept.append(self.record(draft, now))
            except PayloadTooLargeError as error:
                self._account.drop("too_large")
                log.error("record_too_large", kind=draft.kind, why=str(error))
        return kept

    def record(self, draft: Draft, now: Now) -> Record:
        """Return the record of a draft that needs no consent. Raises PayloadTooLargeError."""
        self._account.into += 1
        record = self._minter.mint(draft, now)
        self._account.out += 1
        return record


class Flow:
    """bus → decode → edge, without thread or clock, for the daemon and virtual time."""

    def __init__(self, decode: DecodeStage, edge: EdgeStage) -> None:
        self.decode, self.edge = decode, edge

    def step(
        self, now: Now, batch: FrameBatch | None, send: Callable[[CanSend], None] | None = None
    ) -> EdgeOutput:
        """Take the frames of one bus, None when only time passed; return what to keep and what was sent.

        send: called as soon as the rules have spoken (EdgeStage.step).
        """
        samples = self.decode.step(now, batch) if batch is not None else NO_SAMPLES
        return self.edge.step(now, samples, batch, send)

    @property
    def hurried(self) -> bool:
        """Whether the next frame may be one an isolation request hangs on. Any thread may ask."""
        return self.edge.isolating or self.edge.isolates_at_once

    def presses(self, batch: FrameBatch) -> bool:
        """Return whether frames must be worked at once, for the isolation request hangs on them.

        Asked from the thread of a bus; nothing is changed by it.
        """
        return self.edge.isolating or self.decode.passes(batch, *self.edge.isolation_limits)

    def flush(self, now: Now) -> EdgeOutput:
        """Close what is open: windows, journeys, captures."""
        return self.edge.flush(now)


class BusThread:
    """Reads one bus into the pipeline's hand-over.

    Waking costs more than reading, and a step of the pipeline about the same for few frames as for some more,
    so frames wait for each other up to HOLD_S or HOLD_FRAMES_MAX: in the kernel while nothing presses, here
    while it may. presses: whether a batch may not wait. It goes by itself behind what was held, for the edge
    looks closely at all that comes together with a value past a limit. hurried: whether the next frame may be
    one that presses.
    """

    def __init__(
        self, reader: BusReader, inbox: queue.Queue[FrameBatch | Ask[Any]],
        presses: Callable[[FrameBatch], bool], hurried: Callable[[], bool], heart: Heart,
    ) -> None:  # fmt: skip
        self.reader = reader
        self._inbox = inbox
        self._presses, self._hurried = presses, hurried
        self._heart = heart
        self._held: list[FrameBatch] = []
        self._due = Deadline(0)  # when what is held goes
        self.span_ns: tuple[int, int] | None = None  # monotonic ns of the first and the last frame
        self._stopping = threading.Event()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"can-rx-{reader.channel}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Hand over what the bus has received so far, then end."""
        self._stopping.set()
        self._thread.join()
        self.reader.close()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._read(RX_WAIT_S)
                self._heart.beat()
            drained = Deadline.after(time.monotonic_ns(), RX_DRAIN_S)
            while self._read(0.0) and not drained.passed(time.monotonic_ns()):
                pass
            self._hand_over()
        except BaseException as error:
            self.failure = error
            log.exception("bus_thread_died", bus=self.reader.name)

    def _read(self, wait_s: float) -> bool:
        if self._held:
            wait_s = min(wait_s, self._due.left_s(time.monotonic_ns()))
        self.reader.pace = self._pace()
        batch = self.reader.recv_batch(wait_s)
        if batch is not None:
            self._take(batch)
        if self._due.passed(time.monotonic_ns()):
            self._hand_over()
        return batch is not None

    def _pace(self) -> Pace:
        if self._hurried():
            return Pace.HURRIED
        return Pace.USUAL if self._held else Pace.CALM

    def _take(self, batch: FrameBatch) -> None:
        first_ns = int(batch.t_ns[0]) if self.span_ns is None else self.span_ns[0]
        self.span_ns = first_ns, int(batch.t_ns[-1])
        presses = self._presses(batch)
        if presses:
            self._hand_over()
        if not self._held:
            self._due = Deadline.after(int(batch.t_ns[0]), HOLD_S)
        self._held.append(batch)
        held_max = HOLD_FRAMES_HURRIED if self.reader.pace is Pace.HURRIED else HOLD_FRAMES_MAX
        if presses or sum(map(len, self._held)) >= held_max:
            self._hand_over()

    def _hand_over(self) -> None:
        held, self._held = self._held, []
        if held:
            self._inbox.put(_joined(held))


def _joined(batches: list[FrameBatch]) -> FrameBatch:
    if len(batches) == 1:
        return batches[0]
    frames = concatenated([batch.frames for batch in batches])
    return FrameBatch(batches[0].channel, frames, np.concatenate([batch.t_ns for batch in batches]))


class PipelineThread:
    """Owns the Flow: takes batches in, hands drafts to the spool's thread and frames to the writers."""

    def __init__(
        self, flow: Flow, writers: Sequence[BusWriter], keep: Callable[[Sequence[Draft], Now], None],
        now: Callable[[], Now], heart: Heart,
    ) -> None:  # fmt: skip
        self.inbox: queue.Queue[FrameBatch | Ask[Any]] = queue.Queue(HANDOVER_BATCHES_MAX)
        self._flow, self._writers, self._keep = flow, writers, keep
        self._now, self._heart = now, heart
        self._wake = Deadline(0)  # when the edge wants its next step
        self._stopping = threading.Event()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="pipeline", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ask(self, work: Callable[[Flow], T]) -> T:
        """Run `work` in the pipeline's thread and return what it returns, or raise what it raises."""
        ask = Ask(lambda: work(self._flow))
        self.inbox.put(ask)
        return ask.wait()

    def reset_alarms(self, rule: str | None) -> int:
        """End the alarms of a rule (None: of all), latched ones too; return how many that were."""

        def work(flow: Flow) -> int:
            now = self._now()
            output = flow.edge.reset_alarms(now, rule)
            for frame in output.sends:
                self._send(frame)
            self._keep(output.drafts, now)
            return sum(draft.kind == "alarm" for draft in output.drafts)

        return self.ask(work)

    def stop(self) -> None:
        """Work off what was handed over, close what is open, end. Called when no bus thread is left."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not (self._stopping.is_set() and self.inbox.empty()):
                self._step()
                self._heart.beat()
            now = self._now()
            self._keep(self._flow.flush(now).drafts, now)
        except BaseException as error:
            self.failure = error
            log.exception("pipeline_thread_died")

    def _step(self) -> None:
        item: FrameBatch | Ask[Any] | None = None
        with contextlib.suppress(queue.Empty):
            item = self.inbox.get(timeout=self._wake.left_s(time.monotonic_ns()))
        if isinstance(item, Ask):
            item.run()
            return
        now = self._now()
        output = self._flow.step(now, item, self._send)
        self._wake = Deadline(output.next_wake_ns or now.mono_ns)
        self._keep(output.drafts, now)

    def _send(self, frame: CanSend) -> None:
        try:
            self._writers[frame.channel].send(frame)
        except TboxError as error:
            log.warning("frame_not_sent", can_id=hex(frame.can_id), why=str(error))
