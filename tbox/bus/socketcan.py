"""Reads SocketCAN with recvmmsg: no Python per frame, kernel time stamps, the kernel's own drop count.

The frames are the kernel's struct canfd_frame and are viewed, not parsed. An interface that goes down is
waited for on the same socket, so that nothing it still holds is lost; one that is removed is reopened.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection

import numpy as np
import numpy.typing as npt
import structlog

from tbox.bus.backoff import Backoff
from tbox.bus.frames import KEEP, pack_send
from tbox.bus.intake import Intake
from tbox.bus.spec import BusCounters, BusError, BusSpec, Pace
from tbox.model import (
    CAN_EFF_FLAG,
    CAN_EFF_MASK,
    CAN_SFF_MASK,
    CANFD_BRS,
    CANFD_ESI,
    CANFD_FDF,
    FRAME_BYTES,
    FRAME_DTYPE,
    NS_PER_S,
    BusState,
    CanSend,
    FrameBatch,
)

log = structlog.get_logger()

# From linux/can.h, linux/can/raw.h and asm-generic/socket.h; Python 3.11 lacks some of them.
SOL_CAN_RAW = 101
CAN_RAW_FILTER = 1
CAN_RAW_ERR_FILTER = 2
CAN_RAW_FD_FRAMES = 5
CAN_ERR_MASK = 0x1FFF_FFFF
CAN_RAW_FILTER_MAX = 512
CAN_MTU = 16
CANFD_MTU = FRAME_BYTES
RING_FRAMES = 4096  # what the highest rate of a CAN-FD bus brings while a calm reader gathers
KERNEL_FRAME_BYTES = 832  # what the kernel books in the receive buffer for a frame it holds
SO_RCVBUFFORCE = 33
SO_RXQ_OVFL = 40
SO_MEMINFO = 55
SK_MEMINFO_DROPS = 8
SK_MEMINFO_VARS = 9
# The stamp as two 64-bit numbers: SO_TIMESTAMPNS where a long has 64 bits, else SO_TIMESTAMPNS_NEW.
SO_TIMESTAMPNS = 35 if ctypes.sizeof(ctypes.c_long) == 8 else 64
MSG_DONTWAIT = 0x40
SIOCGIFFLAGS = 0x8913
IFF_UP = 1


# struct mmsghdr and the two control messages, laid over plain memory: every field is one machine word
# further, and control data follows a header of one word and two ints.
WORD = ctypes.sizeof(ctypes.c_size_t)
HEADER_DTYPE = np.dtype(
    {
        "names": ["iov", "iov_len", "control", "control_len", "received"],
        "formats": [np.uintp, np.uintp, np.uintp, np.uintp, np.uint32],
        "offsets": [2 * WORD, 3 * WORD, 4 * WORD, 5 * WORD, 7 * WORD],
        "itemsize": 8 * WORD,
    }
)
VECTOR_DTYPE = np.dtype([("base", np.uintp), ("size", np.uintp)])
CONTROL_HEAD_BYTES = WORD + 8
STAMP_SPACE_BYTES = CONTROL_HEAD_BYTES + 16
CONTROL_DTYPE = np.dtype(
    {
        "names": ["kind", "s", "ns", "kind2", "drops"],
        "formats": [np.int32, np.int64, np.int64, np.int32, np.uint32],
        "offsets": [
            WORD + 4,
            CONTROL_HEAD_BYTES,
            CONTROL_HEAD_BYTES + 8,
            STAMP_SPACE_BYTES + WORD + 4,
            STAMP_SPACE_BYTES + CONTROL_HEAD_BYTES,
        ],
        "itemsize": 64,
    }
)


class _Ring:
    """The preallocated block that recvmmsg fills, and the views of it. One thread's."""

    def __init__(self, frames_max: int) -> None:
        self.frames_max = frames_max
        self.frames = np.zeros(frames_max, FRAME_DTYPE)
        self.control = np.zeros(frames_max, CONTROL_DTYPE)
        self._vectors = np.zeros(frames_max, VECTOR_DTYPE)
        self.headers = np.zeros(frames_max, HEADER_DTYPE)
        index = np.arange(frames_max, dtype=np.uintp)
        self._vectors["base"] = self.frames.ctypes.data + index * FRAME_DTYPE.itemsize
        self._vectors["size"] = CANFD_MTU
        self.headers["iov"] = self._vectors.ctypes.data + index * VECTOR_DTYPE.itemsize
        self.headers["iov_len"] = 1
        self.headers["control"] = self.control.ctypes.data + index * CONTROL_DTYPE.itemsize
        self.headers["control_len"] = CONTROL_DTYPE.itemsize
        self._recvmmsg = ctypes.CDLL(None, use_errno=True).recvmmsg
        self._address = ctypes.c_void_p(self.headers.ctypes.data)

    def fill(self, number: int) -> int:
        """Receive what the socket holds, at most frames_max, without waiting; OSError as the kernel says."""
        count = int(self._recvmmsg(number, self._address, self.frames_max, MSG_DONTWAIT, None))
        if count < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return count

    def take(self, count: int) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64], int | None]:
        """Return copies of the first `count` frames, their wall-clock ns, and the drop count if told."""
        headers, control = self.headers[:count], self.control[:count]
        told = np.flatnonzero(headers["control_len"] > STAMP_SPACE_BYTES)
        drops = int(control["drops"][told[-1]]) if told.size else None
        headers["control_len"] = CONTROL_DTYPE.itemsize  # the kernel wrote what it used
        frames = self.frames[:count].copy()
        flexible = headers["received"] == CANFD_MTU
        # A classic frame is 16 bytes: what stands in place of its flags and behind its data is not its own.
        flags = frames["flags"]
        flags[:] = np.where(flexible, (flags & (CANFD_BRS | CANFD_ESI)) | CANFD_FDF, 0)
        frames["pad"] = 0
        frames["data"] *= KEEP[np.minimum(frames["len"], 64)]
        return frames, control["s"] * NS_PER_S + control["ns"], drops


class SocketCanReader:
    """A SocketCAN interface behind `recv_batch` (spec.BusReader)."""

    def __init__(
        self,
        spec: BusSpec,
        channel: int,
        *,
        ids: Collection[int] | None = None,
        mono_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.name = spec.name
        self.channel = channel
        self.pace = Pace.USUAL
        self._spec = spec
        self._ids = sorted(ids) if spec.filter and ids else []
        self._mono_ns = mono_ns
        self._intake = Intake(channel)
        self._counters = self._intake.counters
        self._ring = _Ring(RING_FRAMES)
        self._backoff = Backoff()
        self._closed = threading.Event()
        self._sock: socket.socket | None = None
        self._more = False  # the last read filled the ring: there is more, no need to gather
        self._opened_once = False
        if len(self._ids) > CAN_RAW_FILTER_MAX:
            log.warning("no_kernel_filter", bus=self.name, ids=len(self._ids), limit=CAN_RAW_FILTER_MAX)
            self._ids = []
        try:
            socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW).close()
        except (OSError, AttributeError) as error:
            raise BusError(
                f"this system has no SocketCAN ({error})",
                where=self.name,
                mend="modprobe can_raw, or run it under scripts/vcan, or use a tbox: bus",
            ) from error
        self._open()

    # --- reading ----------------------------------------------------------------------------------

    def recv_batch(self, timeout_s: float) -> FrameBatch | None:
        if self._sock is None:
            self._reopen(timeout_s)
            return None
        if self._counters.state is BusState.DOWN:
            timeout_s = min(timeout_s, self._wait_down_s())
        if not self._more and self._counters.state is not BusState.GONE:
            if not self._poll.poll(timeout_s * 1000):
                self._ask_overflow(self._sock)
                return None
            borne = (self._counters.rcvbuf_bytes or 0) // KERNEL_FRAME_BYTES
            time.sleep(self._spec.gather_s(self.pace, borne))
        return self._read(self._sock)

    def _read(self, sock: socket.socket) -> FrameBatch | None:
        try:
            count = self._ring.fill(sock.fileno())
        except OSError as error:
            self._more = False
            self._failed(error, sock)
            return None
        self._more = count == self._ring.frames_max
        now_ns, wall_ns = self._mono_ns(), time.time_ns()
        frames, stamps_ns, drops = self._ring.take(count)
        if drops is not None:
            self._intake.overflow(drops)
        if self._counters.state is BusState.DOWN and _is_up(sock, self._spec.channel):
            self._up()
        self._counters.received += count
        return self._intake.batch(frames, stamps_ns - (wall_ns - now_ns), now_ns)

    # --- sending ----------------------------------------------------------------------------------

    def send(self, frame: CanSend) -> None:
        packed = pack_send(frame, brs=frame.fd)
        sock = self._sock
        try:
            if sock is None:
                raise OSError(errno.ENODEV, "the interface is gone")
            sock.send(packed if frame.fd else packed[:CAN_MTU], socket.MSG_DONTWAIT)
        except OSError as error:
            self._counters.send_failed += 1
            raise BusError(
                f"frame {frame.can_id:X} was not sent: {error.strerror}", where=self.name
            ) from error
        self._counters.sent += 1

    # --- up and down ------------------------------------------------------------------------------

    def _open(self) -> None:
        sock = None
        try:
            sock = socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW)
            sock.setblocking(False)
            self._set_options(sock)
            sock.bind((self._spec.channel,))
        except OSError as error:
            if sock is not None:
                sock.close()
            if self._counters.state is not BusState.GONE:
                log.warning("bus_gone", bus=self.name, reason=error.strerror)
            self._counters.state = BusState.GONE
            self._backoff.failed(self._mono_ns())
            return
        self._intake.new_socket()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._sock = sock
        self._backoff.worked()
        if _is_up(sock, self._spec.channel):
            self._up()
        else:
            self._down("it is down")

    def _set_options(self, sock: socket.socket) -> None:
        granted = _set_rcvbuf(sock, self._spec.rcvbuf_bytes)
        self._counters.rcvbuf_bytes, self._counters.rcvbuf_forced = granted
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        sock.setsockopt(socket.SOL_SOCKET, SO_RXQ_OVFL, 1)
        sock.setsockopt(SOL_CAN_RAW, CAN_RAW_ERR_FILTER, CAN_ERR_MASK)
        if self._spec.fd:
            sock.setsockopt(SOL_CAN_RAW, CAN_RAW_FD_FRAMES, 1)
        if self._ids:
            sock.setsockopt(SOL_CAN_RAW, CAN_RAW_FILTER, _filters(self._ids))

    def _up(self) -> None:
        self._counters.state = BusState.UP
        self._counters.reopened += self._opened_once
        self._opened_once = True
        self._backoff.worked()
        counters = self._counters
        log.info(
            "bus_open", bus=self.name, reopened=counters.reopened, rcvbuf_bytes=counters.rcvbuf_bytes,
            privileged=counters.rcvbuf_forced,
        )  # fmt: skip

    def _down(self, reason: str | None) -> None:
        """The interface is there and down: the socket stays, and so does what it holds."""
        log.warning("bus_down", bus=self.name, reason=reason)
        self._counters.state = BusState.DOWN
        self._backoff.failed(self._mono_ns())

    def _failed(self, error: OSError, sock: socket.socket) -> None:
        if error.errno == errno.EINTR or self._closed.is_set():
            return
        if error.errno == errno.EAGAIN:
            if self._counters.state is BusState.GONE:
                self._abandon(sock)
        elif error.errno == errno.ENETDOWN:
            if self._counters.state is BusState.UP:
                self._down(error.strerror)
        else:  # ENODEV: it was removed. What the socket still holds is read first, then it is closed
            log.warning("bus_gone", bus=self.name, reason=error.strerror)
            self._counters.state = BusState.GONE

    def _abandon(self, sock: socket.socket) -> None:
        """Nothing is left in the socket of an interface that was removed."""
        self._ask_overflow(sock)
        self._sock = None
        sock.close()
        self._backoff.failed(self._mono_ns())

    def _ask_overflow(self, sock: socket.socket) -> None:
        """Ask for the drop count: drops after the last frame are told with no frame."""
        with contextlib.suppress(OSError):
            raw = sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 4 * SK_MEMINFO_VARS)
            self._intake.overflow(struct.unpack("=9I", raw)[SK_MEMINFO_DROPS])

    def _wait_down_s(self) -> float:
        """Seconds until the next look whether the interface is up again; looks when it is time."""
        now_ns = self._mono_ns()
        if not self._backoff.wait_ns(now_ns) and self._sock is not None:
            if _is_up(self._sock, self._spec.channel):
                self._up()
            else:
                self._backoff.failed(now_ns)
        return self._backoff.wait_ns(now_ns) / NS_PER_S

    def _reopen(self, timeout_s: float) -> None:
        """Wait until the next attempt is due, at most timeout_s, and make it."""
        self._closed.wait(min(self._backoff.wait_ns(self._mono_ns()) / NS_PER_S, timeout_s))
        if not self._closed.is_set() and not self._backoff.wait_ns(self._mono_ns()):
            self._open()

    def counters(self) -> BusCounters:
        return self._counters.copy()

    def close(self) -> None:
        self._closed.set()
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()


def _filters(ids: Collection[int]) -> bytes:
    """Return struct can_filter for each id: the same id, of the same length; remote frames of it pass too."""
    return b"".join(
        struct.pack("=II", can_id, CAN_EFF_FLAG | (CAN_EFF_MASK if can_id & CAN_EFF_FLAG else CAN_SFF_MASK))
        for can_id in ids
    )


def _set_rcvbuf(sock: socket.socket, wanted_bytes: int) -> tuple[int, bool]:
    """Raise the receive buffer; return what the kernel granted and whether it was by privilege."""
    forced = True
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, wanted_bytes)
    except PermissionError:  # then up to net.core.rmem_max
        forced = False
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted_bytes)
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF), forced


def _is_up(sock: socket.socket, interface: str) -> bool:
    try:
        answer = fcntl.ioctl(sock, SIOCGIFFLAGS, struct.pack("16s24x", interface.encode()))
    except OSError:
        return False
    return bool(struct.unpack_from("16xH", answer)[0] & IFF_UP)
