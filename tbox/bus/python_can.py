"""Reads any python-can bus in batches, without its Notifier, and reopens it. Never decodes a frame."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import can
import numpy as np
import numpy.typing as npt
import structlog

from tbox.bus.backoff import Backoff
from tbox.bus.frames import frames_of, message_of, pack_message
from tbox.bus.intake import Intake
from tbox.bus.local import RECORD, LocalBus
from tbox.bus.spec import BATCH_FRAMES_MAX, BusCounters, BusError, BusSpec, Pace
from tbox.model import NS_PER_S, BusState, CanSend, FrameBatch

log = structlog.get_logger()

# A driver's time stamp further than this from the wall clock is a clock of its own, and not believed.
STAMP_AGE_NS_MAX = NS_PER_S

# What drivers raise when the world fails them; anything else is a bug and passes.
DRIVER_ERRORS = (can.CanError, OSError)


def open_bus(spec: BusSpec, **more: Any) -> can.BusABC:
    """Open the python-can bus; BusError says why not. `more` goes to the interface beside spec.options."""
    arguments = {"interface": spec.interface, "channel": spec.channel, "fd": spec.fd, **spec.options, **more}
    if spec.bitrate is not None:
        arguments["bitrate"] = spec.bitrate
    if spec.data_bitrate is not None:
        arguments["data_bitrate"] = spec.data_bitrate
    try:
        return can.Bus(**arguments, ignore_config=True)
    except (*DRIVER_ERRORS, ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise BusError(f"cannot open the bus: {error}", where=spec.name, mend=_mend(spec, error)) from error


def _mend(spec: BusSpec, error: Exception) -> str:
    if isinstance(error, NotImplementedError | ImportError):
        return f"interfaces are {', '.join(sorted(can.VALID_INTERFACES))}, if their driver is installed"
    if spec.interface == "socketcan":
        return f"is {spec.channel} there and up? ip link show {spec.channel}"
    return "check the channel and the options of the interface"


class PythonCanReader:
    """Any python-can bus behind `recv_batch` (spec.BusReader)."""

    def __init__(
        self, spec: BusSpec, channel: int, *, mono_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.name = spec.name
        self.channel = channel
        self.pace = Pace.USUAL
        self._spec = spec
        self._mono_ns = mono_ns
        self._intake = Intake(channel)
        self._counters = self._intake.counters
        self._backoff = Backoff()
        self._closed = threading.Event()
        self._bus: can.BusABC | None = None
        self._before = {"dropped_in": 0, "malformed": 0}  # of the bus before it was reopened
        self._opened_once = False
        if spec.interface not in can.VALID_INTERFACES:
            open_bus(spec)  # says what is wrong with it
        self._open()

    # --- reading ----------------------------------------------------------------------------------

    def recv_batch(self, timeout_s: float) -> FrameBatch | None:
        bus = self._bus or self._reopen(timeout_s)
        if bus is None:
            return None
        try:
            frames, t_ns = (
                self._gather_local(bus, timeout_s)
                if isinstance(bus, LocalBus)
                else self._gather(bus, timeout_s)
            )
        except DRIVER_ERRORS as error:
            self._lose(error)
            return None
        return self._intake.batch(frames, t_ns, self._mono_ns())

    def _gather(
        self, bus: can.BusABC, timeout_s: float
    ) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64]]:
        """Take the first message and all that follow within the gathering time."""
        packed: list[bytes] = []
        stamps_s: list[float] = []
        message = bus.recv(timeout_s)
        until_ns = self._mono_ns() + int(self._spec.gather_s(self.pace) * NS_PER_S)
        try:
            while message is not None:
                self._counters.received += 1
                try:
                    packed.append(pack_message(message))
                    stamps_s.append(message.timestamp)
                except struct.error:
                    self._counters.malformed += 1
                if len(packed) >= BATCH_FRAMES_MAX:
                    break
                message = bus.recv(max(0.0, (until_ns - self._mono_ns()) / NS_PER_S))
        except DRIVER_ERRORS as error:
            self._lose(error)  # what was read before it broke is still handed on
        return frames_of(packed), self._monotonic(np.array(stamps_s))

    def _gather_local(
        self, bus: LocalBus, timeout_s: float
    ) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64]]:
        """Do the same without a Python object a frame; the bus's stamps are monotonic already."""
        gather_s = self._spec.gather_s(self.pace, bus.buffer_bytes // RECORD.size)
        got = bus.recv_frames(timeout_s, gather_s)
        counters = self._counters
        counters.kernel_dropped = self._before["dropped_in"] + bus.dropped_in
        malformed = self._before["malformed"] + bus.malformed
        counters.received += malformed - counters.malformed
        counters.malformed = malformed
        if got is None:
            return frames_of([]), np.empty(0, np.int64)
        frames, t_ns, _ = got
        counters.received += len(frames)
        return frames, t_ns

    def _monotonic(self, stamps_s: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Turn a driver's Unix stamps into monotonic time; where they are no Unix time, it is now."""
        now_ns, wall_ns = self._mono_ns(), time.time_ns()
        age_ns = wall_ns - np.rint(stamps_s * NS_PER_S).astype(np.int64)
        return now_ns - np.where(np.abs(age_ns) > STAMP_AGE_NS_MAX, 0, age_ns)

    # --- sending ----------------------------------------------------------------------------------

    def send(self, frame: CanSend) -> None:
        bus = self._bus
        try:
            if bus is None:
                raise can.CanOperationError("the bus is down")
            bus.send(message_of(frame, brs=frame.fd))
        except DRIVER_ERRORS as error:
            self._counters.send_failed += 1
            raise BusError(f"frame {frame.can_id:X} was not sent: {error}", where=self.name) from error
        self._counters.sent += 1

    # --- up and down ------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            self._bus = open_bus(self._spec)
        except BusError as error:
            if not self._opened_once and self._counters.state is not BusState.GONE:
                log.warning("bus_not_open", bus=self.name, reason=str(error))
            self._counters.state = BusState.GONE
            self._backoff.failed(self._mono_ns())
            return
        self._backoff.worked()
        self._counters.state = BusState.UP
        self._counters.reopened += self._opened_once
        self._opened_once = True
        log.info("bus_open", bus=self.name, reopened=self._counters.reopened)

    def _reopen(self, timeout_s: float) -> can.BusABC | None:
        """Wait until the next attempt is due, at most timeout_s, and make it."""
        wait_s = self._backoff.wait_ns(self._mono_ns()) / NS_PER_S
        self._closed.wait(min(wait_s, timeout_s))
        if not self._closed.is_set() and not self._backoff.wait_ns(self._mono_ns()):
            self._open()
        return self._bus

    def _lose(self, error: Exception) -> None:
        """The driver gave up: close it and try again later."""
        if self._closed.is_set():
            return
        log.warning("bus_lost", bus=self.name, reason=str(error))
        self._counters.state = BusState.DOWN
        self._backoff.failed(self._mono_ns())
        self._shut()

    def _shut(self) -> None:
        bus, self._bus = self._bus, None
        if bus is None:
            return
        if isinstance(bus, LocalBus):
            for name in self._before:
                self._before[name] += cast(int, getattr(bus, name))
        try:
            bus.shutdown()
        except DRIVER_ERRORS as error:
            log.debug("bus_shutdown", bus=self.name, reason=str(error))

    def counters(self) -> BusCounters:
        return self._counters.copy()

    def close(self) -> None:
        self._closed.set()
        self._shut()
