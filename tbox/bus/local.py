"""A CAN-FD bus between processes of one machine (python-can interface "tbox"). Needs no root and no CAN.

The channel is a directory; every member keeps one socket in it, and each pair of members shares one Unix
stream. There is no hub, so killing any process takes nothing from the others but its own frames, and any
member may come first. A full pair makes the sender wait (back-pressure), but never longer than its limit:
then the frame is counted as dropped for that member, on both sides, since every frame carries its number.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import can
import numpy as np
import numpy.typing as npt
from can.typechecking import CanFilters, Channel

from tbox.bus.frames import DATA_BYTES_MAX, concatenated, pack_message, unpack_message
from tbox.model import FRAME_BYTES, FRAME_DTYPE, NS_PER_S

MEMBERS_MAX = 32  # each frame is written once for every other member
SEND_WAIT_S = 1.0  # a member that reads nothing for this long loses frames until it reads again
JOIN_WAIT_S = 5.0  # for the lock that lets members join one at a time
JOIN_POLL_S = 0.01
BACKLOG_MEMBERS = 1024  # joiners that a member has not looked at yet
PAIR_BUFFER_BYTES = 4 * 1024 * 1024  # asked for; without privilege the kernel grants less (net.core.wmem_max)
SO_SNDBUFFORCE = 32  # asm-generic/socket.h; Python does not name it
MEMBER_SUFFIX = ".v1.sock"  # the version of the record below
WRITE_ONLY_SUFFIX = "-w" + MEMBER_SUFFIX  # nobody sends to this one
LOCK_NAME = "join.lock"

# What travels: the frame's number on this pair, the monotonic time of sending (one clock for all processes of
# a machine), the frame. Linux writes that much to a Unix stream whole or not at all.
HEAD = struct.Struct("<Qq")
RECORD_BYTES = HEAD.size + FRAME_BYTES
LEN_AT = HEAD.size + 4  # of the frame's length byte in a record
READ_RECORDS_MAX = 2048


class _Peer:
    """One end of a pair."""

    __slots__ = ("expected", "lagging", "next_n", "sock")

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        _widen(sock)
        self.sock = sock
        self.next_n = 0  # number of the next frame we offer
        self.lagging = False  # it made us wait the full time: no more waiting until it reads
        self.expected = 0  # number of the next frame we should get


class LocalBus(can.BusABC):
    """python-can bus over a directory of Unix sockets; classic and FD frames.

    channel: directory of the bus, made if it is missing. receive=False: a member that only writes, to which
    nobody sends. Sending and receiving may each have a thread of their own.
    Counters: dropped_out (frames a member did not take in time), dropped_in (frames that were numbered for
    us and did not come), malformed (records that were no frames), unreached (members that did not answer),
    unheard (frames sent while nobody else was on the bus: gone, as on a wire with nothing at its end).
    buffer_bytes: what the kernel may hold of frames that a member has not read yet.
    """

    def __init__(
        self,
        channel: Channel,
        can_filters: CanFilters | None = None,
        *,
        fd: bool = True,
        receive: bool = True,
        receive_own_messages: bool = False,
        send_wait_s: float = SEND_WAIT_S,
        **_other: Any,
    ) -> None:
        self.channel_info = f"tbox:{channel}"
        self._can_protocol = can.CanProtocol.CAN_FD if fd else can.CanProtocol.CAN_20
        self._receives = receive
        self._send_wait_s = send_wait_s
        self.dropped_out = self.dropped_in = self.malformed = self.unreached = self.unheard = 0
        self._writers: dict[int, _Peer] = {}  # by file number: whom we send to
        self._readers: dict[int, _Peer] = {}  # whom we hear
        self._gone: list[_Peer] = []  # closed by whoever holds the send lock, so that no number is reused
        self._membership = threading.RLock()
        self._sending = threading.Lock()
        self._ready: deque[can.Message] = deque()
        self._buffer = bytearray(READ_RECORDS_MAX * RECORD_BYTES)
        self._records = np.frombuffer(self._buffer, np.uint8).reshape(-1, RECORD_BYTES)
        self._epoll = select.epoll()
        self._directory = Path(str(channel))
        self._own: Path | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self.buffer_bytes = _widen(self._listener)
        self._arrivals = select.poll()
        try:
            self._join()
        except OSError as error:
            self._release()
            raise can.CanInitializationError(
                f"tbox bus {channel}: {error.strerror or error}; its channel is a directory of its own"
            ) from error
        except can.CanInitializationError:
            self._release()
            raise
        if receive_own_messages:
            self._add_loopback()
        super().__init__(channel=channel, can_filters=can_filters)

    # --- joining and leaving ----------------------------------------------------------------------

    def _join(self) -> None:
        """Connect to every member that is there and take a place; one joiner at a time."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with _short_name(self._directory) as base, _join_lock(self._directory):
            for member in sorted(self._directory.glob(f"*{MEMBER_SUFFIX}")):
                self._connect(base, member)
            if len(self._readers) + self.unreached >= MEMBERS_MAX:
                raise can.CanInitializationError(
                    f"tbox bus {self._directory}: {MEMBERS_MAX} members are its limit; close one"
                )
            suffix = MEMBER_SUFFIX if self._receives else WRITE_ONLY_SUFFIX
            self._own = self._directory / f"{os.getpid()}-{uuid.uuid4().hex[:12]}{suffix}"
            self._listener.bind(f"{base}/{self._own.name}")
            self._listener.listen(BACKLOG_MEMBERS)
        self._arrivals.register(self._listener, select.POLLIN)
        self._epoll.register(self._listener, select.EPOLLIN)

    def _connect(self, base: str, member: Path) -> None:
        """Pair up with a member; a socket that nobody listens on is what a killed process left behind."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(f"{base}/{member.name}")
        except (ConnectionRefusedError, FileNotFoundError):
            sock.close()
            member.unlink(missing_ok=True)
        except BlockingIOError:  # it has not looked at its joiners for a thousand of them
            sock.close()
            self.unreached += 1
        else:
            self._add(sock, writes=not member.name.endswith(WRITE_ONLY_SUFFIX))

    def _add(self, sock: socket.socket, *, writes: bool = True, reads: bool = True) -> None:
        peer = _Peer(sock)
        with self._membership:
            if writes:
                self._writers[sock.fileno()] = peer
            if reads:
                self._readers[sock.fileno()] = peer
                self._epoll.register(sock, select.EPOLLIN if self._receives else 0)
        if not self._receives:
            sock.shutdown(socket.SHUT_RD)  # the other end gets EPIPE and stops sending to us

    def _add_loopback(self) -> None:
        ours, echo = socket.socketpair()
        self._add(ours, reads=False)
        self._add(echo, writes=False)
        self._loopback = echo.fileno()

    def _accept(self) -> None:
        """Take in members that came after us."""
        with self._membership:
            while True:
                try:
                    sock, _ = self._listener.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    return
                self._add(sock)

    def _part(self, peer: _Peer) -> None:
        """The other end is gone, or spoke nonsense."""
        with self._membership:
            self._writers.pop(peer.sock.fileno(), None)
            if self._readers.pop(peer.sock.fileno(), None):
                self._epoll.unregister(peer.sock)
            self._gone.append(peer)

    def _bury(self) -> None:
        """Close the pairs that are gone; the caller holds the send lock."""
        while self._gone:
            self._gone.pop().sock.close()

    def _release(self) -> None:
        if self._own is not None:
            self._own.unlink(missing_ok=True)
        self._listener.close()
        for peer in {**self._writers, **self._readers}.values():
            peer.sock.close()
        self._writers.clear()
        self._readers.clear()
        self._bury()
        self._epoll.close()

    def shutdown(self) -> None:
        """Leave the bus. What was sent stays readable for the others."""
        if self._is_shutdown:
            return
        super().shutdown()
        with self._sending, self._membership:
            self._release()

    # --- sending ----------------------------------------------------------------------------------

    def send(self, msg: can.Message, timeout: float | None = None) -> None:
        """Give one frame to every other member; waits for slow ones up to `timeout` (default SEND_WAIT_S).

        Raises CanOperationError when the bus is closed or the frame is not one. A frame that a member did not
        take in time is counted in `dropped_out`, and the member sees the gap in its `dropped_in`.
        """
        try:
            frame = pack_message(msg)
        except struct.error as error:
            raise can.CanOperationError(f"not a frame: {error}") from error
        if msg.is_fd and self._can_protocol is can.CanProtocol.CAN_20:
            raise can.CanOperationError("a CAN-FD frame on a bus opened with fd=False")
        self.send_packed(frame, timeout)

    def send_packed(self, frame: bytes, timeout: float | None = None) -> None:
        """Do the same for one packed struct canfd_frame."""
        deadline_s = time.monotonic() + (self._send_wait_s if timeout is None else timeout)
        with self._sending:
            if self._is_shutdown:
                raise can.CanOperationError("the bus is closed")
            if self._arrivals.poll(0):
                self._accept()
            t_ns = time.monotonic_ns()
            self.unheard += not self._writers
            for peer in tuple(self._writers.values()):
                # The number is used up whether the frame is taken or not: a gap is what shows a drop.
                record = HEAD.pack(peer.next_n, t_ns) + frame
                peer.next_n += 1
                try:
                    self.dropped_out += not _write(peer, record, deadline_s)
                except (BrokenPipeError, ConnectionResetError):
                    self._stop_writing_to(peer)
            self._bury()

    def wait_for_listener(self, timeout_s: float) -> bool:
        """Wait until some member takes frames; False if none came in time."""
        if not self._writers and self._arrivals.poll(timeout_s * 1000):
            self._accept()
        return bool(self._writers)

    def _stop_writing_to(self, peer: _Peer) -> None:
        """It takes no more frames: gone, or a member that only writes. Its end of file will say which."""
        with self._membership:
            self._writers.pop(peer.sock.fileno(), None)
            if not self._receives:
                self._part(peer)

    # --- receiving --------------------------------------------------------------------------------

    def recv_frames(
        self, timeout_s: float | None, gather_s: float = 0.0
    ) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64], npt.NDArray[np.bool_]] | None:
        """Return what the other members sent: frames (n,) FRAME_DTYPE, monotonic ns, whether it is our own.

        Waits up to timeout_s for the first frame (None: for ever), then gather_s for more: one wait and one
        read, for on a busy bus waking up costs more than reading. None on time-out.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if until_s is None else max(0.0, until_s - time.monotonic())
            peers = self._events(left_s)
            if peers and gather_s > 0:
                time.sleep(gather_s)
                # Asking one pair costs less than asking which of them has something.
                peers = peers if len(self._readers) == 1 else self._events(0)
            parts = [part for part in map(self._drain, peers) if part is not None]
            if len(parts) == 1:  # in order already
                frames, t_ns, mine = parts[0]
                return frames, t_ns, np.full(len(t_ns), mine)
            if parts:
                frames = concatenated([part[0] for part in parts])
                t_ns = np.concatenate([part[1] for part in parts])
                own = np.repeat([mine for *_, mine in parts], [len(part[1]) for part in parts])
                order = np.argsort(t_ns, kind="stable")
                return frames[order], t_ns[order], own[order]
            if left_s is not None and left_s <= 0:
                return None

    def _events(self, timeout_s: float | None) -> list[_Peer]:
        """Wait; take in new members; return the pairs that have something to read."""
        if self._is_shutdown:
            raise can.CanOperationError("the bus is closed")
        events = self._epoll.poll(timeout_s)
        if any(number == self._listener.fileno() for number, _ in events):
            self._accept()
            events = self._epoll.poll(0)  # what new members have sent already is there to be read
        return [self._readers[number] for number, _ in events if number in self._readers]

    def _drain(self, peer: _Peer) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64], bool] | None:
        """Read what one pair holds and count what is missing in it; None when it holds no frame.

        The buffer is kept and worked as bytes: a fresh one would be mapped and unmapped by every read, and
        numpy copies structs field by field.
        """
        try:
            count, rest = divmod(peer.sock.recv_into(self._buffer), RECORD_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            count, rest = 0, 0
        if not count or rest:
            self.malformed += bool(count or rest)
            self._part(peer)
            if self._sending.acquire(blocking=False):
                self._bury()
                self._sending.release()
            return None
        records = self._records[:count]
        last = int.from_bytes(records[-1, :8], "little")
        self.dropped_in += max(0, last + 1 - peer.expected - count)
        peer.expected = last + 1
        sound = records[:, LEN_AT] <= DATA_BYTES_MAX
        if not sound.all():
            self.malformed += count - int(np.count_nonzero(sound))
            records = records[sound]
        frames = records[:, HEAD.size :].copy().view(FRAME_DTYPE).reshape(-1)
        t_ns = records[:, 8 : HEAD.size].copy().view(np.int64).reshape(-1)
        return frames, t_ns, peer.sock.fileno() == getattr(self, "_loopback", -1)

    def _recv_internal(self, timeout: float | None) -> tuple[can.Message | None, bool]:
        if not self._ready and (got := self.recv_frames(timeout)):
            frames, t_ns, own = got
            # python-can's time stamps are Unix time.
            offset_ns = time.time_ns() - time.monotonic_ns()
            self._ready.extend(
                unpack_message(frame.tobytes(), (t + offset_ns) / NS_PER_S, is_rx=not mine)
                for frame, t, mine in zip(frames, t_ns.tolist(), own.tolist(), strict=True)
            )
        return (self._ready.popleft(), False) if self._ready else (None, False)

    def fileno(self) -> int:
        """Return a number to poll; frames that recv() has read ahead do not show on it."""
        return self._epoll.fileno()


def _widen(sock: socket.socket) -> int:
    """Raise a socket's send buffer; return what the kernel granted, to this one as to any other member's."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, PAIR_BUFFER_BYTES)
    except PermissionError:  # then up to net.core.wmem_max
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PAIR_BUFFER_BYTES)
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def _write(peer: _Peer, record: bytes, deadline_s: float) -> bool:
    """Write one record, waiting for room while the member still reads. False: it was not taken in time."""
    while True:
        try:
            sent = peer.sock.send(record)
        except BlockingIOError:
            left_s = deadline_s - time.monotonic()
            if peer.lagging or left_s <= 0 or not _room(peer.sock, left_s):
                peer.lagging = True
                return False
        else:
            if sent != RECORD_BYTES:  # half a record: nothing after it could be read
                raise ConnectionResetError
            peer.lagging = False
            return True


def _room(sock: socket.socket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return bool(poll.poll(timeout_s * 1000))


@contextlib.contextmanager
def _short_name(directory: Path) -> Iterator[str]:
    """Name a directory in few characters: the path of a Unix socket holds 107 at most."""
    number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{number}"
    finally:
        os.close(number)


@contextlib.contextmanager
def _join_lock(directory: Path) -> Iterator[None]:
    """Let one process join at a time, so that every pair meets exactly once; dies with its process."""
    with (directory / LOCK_NAME).open("w") as file:
        until_s = time.monotonic() + JOIN_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until_s:
                    raise can.CanInitializationError(
                        f"tbox bus {directory}: another process has been joining for {JOIN_WAIT_S:g} s"
                    ) from None
                time.sleep(JOIN_POLL_S)
        yield
