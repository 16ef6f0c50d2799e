"""Serves a recording as a bus ("recording:FILE"), as fast as it is read. Never sends, never waits."""

from __future__ import annotations

from collections.abc import Iterator

from tbox.bus.recordings import LoggedFrame, Recording, recording_batches
from tbox.bus.spec import BusCounters, BusError, BusSpec, Pace
from tbox.model import BusState, CanSend, FrameBatch

OPTIONS = {"log_channel", "dialect"}


class RecordingReader:
    """A recording behind `recv_batch` (spec.BusReader). Times are as logged and begin at 0.

    Options of the spec: log_channel (all if not given), dialect (found if not given). After the last frame
    every call returns None at once and the state is GONE; damaged lines are counted as malformed.
    """

    def __init__(self, spec: BusSpec, channel: int) -> None:
        if unknown := set(spec.options) - OPTIONS:
            raise BusError(
                f"unknown options {', '.join(sorted(unknown))}",
                where=spec.name,
                mend=f"options are {', '.join(sorted(OPTIONS))}",
            )
        self.name = spec.name
        self.channel = channel
        self.pace = Pace.USUAL
        self.recording = Recording(spec.channel, dialect=spec.options.get("dialect"))
        self._counters = BusCounters(state=BusState.UP)
        self._batches = recording_batches(self._counted(spec.options.get("log_channel")), None, channel)

    def _counted(self, log_channel: int | None) -> Iterator[LoggedFrame]:
        counters = self._counters
        for frame in self.recording:
            if log_channel is not None and frame.channel != log_channel:
                continue
            counters.received += 1
            counters.errors += frame.error
            counters.remote += frame.remote and not frame.error
            yield frame

    def recv_batch(self, timeout_s: float) -> FrameBatch | None:
        del timeout_s  # nothing is ever waited for
        batch = next(self._batches, None)
        malformed = sum(self.recording.damaged_count.values())
        self._counters.received += malformed - self._counters.malformed
        self._counters.malformed = malformed
        if batch is None:
            self._counters.state = BusState.GONE
        return batch

    def send(self, frame: CanSend) -> None:
        self._counters.send_failed += 1
        raise BusError(f"frame {frame.can_id:X} was not sent: a recording takes none", where=self.name)

    def counters(self) -> BusCounters:
        return self._counters.copy()

    def close(self) -> None:
        self._batches = iter(())
