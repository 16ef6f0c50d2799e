"""Plays the simulated vehicle on a real bus in real time: the only part of it that reads a clock.

Frames are counted where they are written. What others send is handed to the vehicle's ECUs.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import can
import structlog

from tbox.bus.frames import flagged_id, unpack_message
from tbox.bus.local import LocalBus
from tbox.model import FRAME_BYTES, NS_PER_S, CanSend, FrameBatch
from tbox.sim.layout import ISOLATION_REQUEST_ID
from tbox.sim.simulator import CHANNEL, Simulator

log = structlog.get_logger()

PASS_S = 0.005  # frames are up to this late
LATE_S_MAX = 1.0  # further behind (the process was stopped), the vehicle's clock waits instead of bursting
SEND_WAIT_S_MAX = 1.0  # for a full transmit queue; then the bus counts as down until it takes a frame
SEND_RETRY_S = 0.001
HEARD_PER_PASS_MAX = 256
DRIVER_ERRORS = (can.CanError, OSError)
DOWN_ERRNOS = frozenset({errno.ENETDOWN, errno.ENODEV, errno.ENXIO})  # waiting a little will not help


class Player:
    """One run of a simulator on an open bus. `run` belongs to one thread; `stop` may be called by any.

    written: frames the bus took, by id. unwritten: frames it would not take. heard: frames of others.
    """

    def __init__(
        self,
        bus: can.BusABC,
        simulator: Simulator,
        *,
        speed: float = 1.0,
        mono_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._bus = bus
        self._simulator = simulator
        self._speed = speed
        self._mono_ns = mono_ns
        self._stop = threading.Event()
        self._down = False
        self.t_ns = 0  # the vehicle's time
        self.written: Counter[int] = Counter()
        self.unwritten = 0
        self.heard = 0
        bus.set_filters([{"can_id": ISOLATION_REQUEST_ID, "can_mask": 0x7FF, "extended": False}])

    def stop(self) -> None:
        """End the run after the frames of the present pass."""
        self._stop.set()

    def run(self, seconds: float | None = None) -> None:
        """Play until `seconds` of the vehicle's time have passed (None: until stopped)."""
        end_ns = None if seconds is None else round(seconds * NS_PER_S)
        origin_ns = self._mono_ns() - round(self.t_ns / self._speed)
        while not self._stop.is_set():
            now_ns = self._mono_ns()
            target_ns = round((now_ns - origin_ns) * self._speed)
            if target_ns - self.t_ns > LATE_S_MAX * NS_PER_S * max(1.0, self._speed):
                target_ns = self.t_ns
                origin_ns = now_ns - round(self.t_ns / self._speed)
            self.t_ns = target_ns if end_ns is None else min(target_ns, end_ns)
            for batch in self._simulator.frames_until(self.t_ns):
                self._write(batch)
            self._listen()
            if self.t_ns == end_ns:
                return
            self._stop.wait(max(0.0, PASS_S - (self._mono_ns() - now_ns) / NS_PER_S))

    def report(self) -> dict[str, Any]:
        """Return what was written, as plain values.

        not_taken: frames, times members, that a member of a local bus was too slow for.
        """
        truth = self._simulator.truth()
        return {
            "frames": self.written.total(),
            "unwritten": self.unwritten,
            "not_taken": getattr(self._bus, "dropped_out", 0),
            "lost": truth.frames_lost,
            "damaged": truth.frames_damaged,
            "seconds": round(self.t_ns / NS_PER_S, 3),
            "ids": {f"0x{can_id:X}": n for can_id, n in sorted(self.written.items())},
            "requests": {"accepted": truth.requests_accepted, "refused": truth.requests_refused},
            "contactors_opened_s": [round(t_ns / NS_PER_S, 3) for t_ns in truth.opened_on_request_ns],
        }

    def _write(self, batch: FrameBatch) -> None:
        raw = batch.frames.tobytes()
        for index, can_id in enumerate(batch.frames["id"].tolist()):
            if self._send(raw[index * FRAME_BYTES : (index + 1) * FRAME_BYTES]):
                self.written[can_id] += 1
            else:
                self.unwritten += 1

    def _send(self, frame: bytes) -> bool:
        """Put one frame on the bus, waiting for room in its queue; not at all while it is down."""
        until_ns = self._mono_ns() + round(SEND_WAIT_S_MAX * NS_PER_S)
        while True:
            try:
                if isinstance(self._bus, LocalBus):
                    self._bus.send_packed(frame)
                else:
                    self._bus.send(unpack_message(frame))
            except DRIVER_ERRORS as error:
                hopeless = self._down or _number(error) in DOWN_ERRNOS or self._mono_ns() >= until_ns
                if not hopeless and not self._stop.wait(SEND_RETRY_S):
                    continue
                if not self._down:
                    log.warning("bus_down", bus=str(self._bus.channel_info), reason=str(error))
                self._down = True
                return False
            if self._down:
                log.info("bus_up", bus=str(self._bus.channel_info))
                self._down = False
            return True

    def _listen(self) -> None:
        """Hand what others sent to the ECUs."""
        for _ in range(HEARD_PER_PASS_MAX):
            try:
                message = self._bus.recv(0)
            except DRIVER_ERRORS:
                return  # the bus is down; sending says so
            if message is None:
                return
            if not (message.is_error_frame or message.is_remote_frame):
                self.heard += 1
                frame = CanSend(CHANNEL, flagged_id(message), bytes(message.data), fd=message.is_fd)
                self._simulator.receive(frame, self.t_ns)


def _number(error: Exception) -> int | None:
    """Return the errno of a driver's error, however it carries it."""
    return error.error_code if isinstance(error, can.CanError) else getattr(error, "errno", None)
