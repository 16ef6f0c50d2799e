"""What every reader does with the frames it took: count, leave out, put times in order. Reads no bus."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tbox.bus.frames import count_errors
from tbox.bus.spec import BusCounters
from tbox.model import CAN_ERR_FLAG, CAN_RTR_FLAG, FrameBatch

OVERFLOW_WRAP = 1 << 32  # the kernel counts drops in 32 bits


class Intake:
    """A core: one bus's counters and the time of its last frame."""

    def __init__(self, channel: int) -> None:
        self.channel = channel
        self.counters = BusCounters()
        self._last_ns = 0
        self._overflow = 0  # the kernel's drop count of the socket, as last seen

    def batch(
        self, frames: npt.NDArray[np.void], t_ns: npt.NDArray[np.int64], now_ns: int
    ) -> FrameBatch | None:
        """Return the data frames; error and remote frames are counted and left out.

        The arrays are kept, so they must be the caller's own. Times never run backwards from batch to batch
        nor beyond now_ns, whatever a jumping wall clock made of the stamps.
        """
        ids = frames["id"]
        if ids.size and int(np.bitwise_or.reduce(ids)) & (CAN_ERR_FLAG | CAN_RTR_FLAG):
            error = (ids & CAN_ERR_FLAG) != 0
            remote = ((ids & CAN_RTR_FLAG) != 0) & ~error
            self.counters.errors += int(error.sum())
            self.counters.remote += int(remote.sum())
            count_errors(ids[error], self.counters.error_frames)
            plain = ~(error | remote)
            frames, t_ns = frames[plain], t_ns[plain]
        if not len(frames):
            return None
        t_ns = np.maximum.accumulate(t_ns)
        if t_ns[0] < self._last_ns or t_ns[-1] > now_ns:  # seldom, so the usual batch need not be clipped
            t_ns = np.clip(t_ns, self._last_ns, max(self._last_ns, now_ns))
        self._last_ns = int(t_ns[-1])
        return FrameBatch(self.channel, frames, t_ns)

    def overflow(self, count: int) -> None:
        """Take the kernel's drop count, which wraps at 2^32; one that is older than the last is ignored."""
        step = (count - self._overflow) % OVERFLOW_WRAP
        if step < OVERFLOW_WRAP // 2:
            self.counters.kernel_dropped += step
            self._overflow = count

    def new_socket(self) -> None:
        """The kernel counts from 0 again."""
        self._overflow = 0
