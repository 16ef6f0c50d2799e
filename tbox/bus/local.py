"""A CAN-FD bus between processes of one machine (python-can interface "tbox"). Needs no root and no CAN.

The channel is a directory; every member reads one pipe in it, its inbox, and writes into those of the others.
There is no hub, so killing any process takes nothing from the others but its own frames, and any member may
come first. Linux writes a record whole or not at all and packs them into pages, so a frame costs the kernel
a copy and no message of its own. A full inbox makes the sender wait (back-pressure), but never longer than
its limit: then the frame is counted as dropped for that member, on both sides, since the next record says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import mmap
import os
import select
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

from tbox.bus.frames import DATA_BYTES_MAX, pack_message, unpack_message
from tbox.model import FRAME_BYTES, FRAME_DTYPE, NS_PER_S

MEMBERS_MAX = 32  # each frame is written once for every other member
SEND_WAIT_S = 1.0  # a member that reads nothing for this long loses frames until it reads again
JOIN_WAIT_S = 5.0  # for the lock that lets members join one at a time
POLL_S = 0.01  # of whoever waits for that lock, or for a member to come
# Half a second of a CAN-FD bus at its highest rate; what anybody may ask for (fs.pipe-max-size). A user with
# many pipes (fs.pipe-user-pages-soft) is granted less.
INBOX_BYTES = 1024 * 1024
INBOX_MODE = 0o622  # less the umask: who else may write may not read
MEMBER_SUFFIX = ".v2.fifo"  # the version of the record below
EARLIER_SUFFIX = ".v1.sock"  # members of releases that spoke through sockets
# Locked by whoever joins. Holds how often somebody did, which tells a sender to look for new members.
REGISTER_NAME = "members.v2"
REGISTER = struct.Struct("<Q")

# What travels: a mark; how many frames of the same sender this member missed since its last record, and
# whether it is the sender itself; the monotonic time of sending (one clock for all processes of a machine);
# the frame.
HEAD = struct.Struct("<4sIq")
RECORD = struct.Struct(f"<qq{FRAME_BYTES}s")  # with mark and notes in one number, negative for our own
RECORD_DTYPE = np.dtype([("head", "<i8"), ("t_ns", "<i8"), ("frame", f"V{FRAME_BYTES}")])
MARK = b"\xf7tb2"
OWN = 1 << 31  # a note
MISSED_MAX = OWN - 1
LEN_AT = HEAD.size + 4  # of the frame's length byte in a record
READ_RECORDS_MAX = 4096


class _Member:
    """A member as its sender sees it."""

    __slots__ = ("fd", "lagging", "missed", "notes")

    def __init__(self, fd: int, notes: int = 0) -> None:
        self.fd = fd
        self.notes = notes  # OWN for the sender itself
        self.missed = 0  # frames it was too slow for and has not been told of
        self.lagging = False  # it made us wait the full time: no more waiting until it reads


class LocalBus(can.BusABC):
    """python-can bus over a directory of pipes; classic and FD frames.

    channel: directory of the bus, made if it is missing. receive=False: a member that only writes, to which
    nobody sends. Sending and receiving may each have a thread of their own.
    Counters: dropped_out (frames a member did not take in time), dropped_in (frames that we did not take in
    time, as their senders say), malformed (stretches of what was no record, and records that hold no frame),
    unreached (how often a member that came after us did not let us write to it), unheard (frames sent while
    nobody else was on the bus: gone, as on a wire with nothing at its end).
    buffer_bytes: what the kernel may hold of records (RECORD.size each) that we have not read yet.
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
        self._send_wait_s = send_wait_s
        self.dropped_out = self.dropped_in = self.malformed = self.unreached = self.unheard = 0
        self._directory = Path(str(channel))
        self._own = self._directory / f"{os.getpid()}-{uuid.uuid4().hex[:12]}{MEMBER_SUFFIX}"
        self._others: dict[str, _Member] = {}  # by the name of their inbox
        self._sending = threading.Lock()
        self._ready: deque[can.Message] = deque()
        # Kept, and looked at in columns: a fresh buffer would be mapped and unmapped by every read.
        self._buffer = memoryview(bytearray(READ_RECORDS_MAX * RECORD.size))
        self._records = np.frombuffer(self._buffer, RECORD_DTYPE)
        self._heads = self._buffer.cast("q")[:: RECORD.size // 8]
        self._ordinary = memoryview(bytearray(MARK + bytes(4)) * READ_RECORDS_MAX).cast("q")
        self._lengths = np.frombuffer(self._buffer, np.uint8)[LEN_AT :: RECORD.size]
        self._cut = b""  # the beginning of a record whose end is still in the inbox
        self._arrivals = select.poll()
        with contextlib.ExitStack() as opened:
            opened.callback(self._forget)
            try:
                self._join(opened, receive=receive)
            except OSError as error:
                raise can.CanInitializationError(
                    f"tbox bus {channel}: {error.strerror or error}; its channel is a directory of its own"
                ) from error
            self._opened = opened.pop_all()
        self._echo = _Member(self._inbox.fileno(), OWN) if receive_own_messages else None
        super().__init__(channel=channel, can_filters=can_filters)

    # --- joining and leaving ----------------------------------------------------------------------

    def _join(self, opened: contextlib.ExitStack, *, receive: bool) -> None:
        """Meet every member that is there and take a place; one joiner at a time."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with _register(self._directory) as register:
            self._refuse_earlier_releases()
            self._meet(joining=True)
            if len(self._others) >= MEMBERS_MAX:
                raise can.CanInitializationError(
                    f"tbox bus {self._directory}: {MEMBERS_MAX} members are its limit; close one"
                )
            if receive:
                os.mkfifo(self._own, INBOX_MODE)
                opened.callback(self._own.unlink, missing_ok=True)
            # Opened for both ways, it never ends, whoever comes and goes.
            inbox = os.open(self._own, os.O_RDWR | os.O_NONBLOCK) if receive else _nameless_pipe()
            self._inbox = opened.enter_context(io.FileIO(inbox, "r+"))
            self.buffer_bytes = _widen(inbox)
            self._arrivals.register(inbox, select.POLLIN)
            # Last of all: who sees the new number finds a member that is ready.
            (joins,) = REGISTER.unpack(os.pread(register, REGISTER.size, 0).ljust(REGISTER.size, b"\0"))
            os.pwrite(register, REGISTER.pack(joins + 1), 0)
            self._joins = opened.enter_context(mmap.mmap(register, REGISTER.size, prot=mmap.PROT_READ))
            self._seen = self._joins[:]

    def _refuse_earlier_releases(self) -> None:
        """We and members that speak through sockets would not hear each other."""
        for path in self._directory.glob(f"*{EARLIER_SUFFIX}"):
            pid = path.name.partition("-")[0]
            if Path("/proc", pid).exists():
                raise can.CanInitializationError(
                    f"tbox bus {self._directory}: process {pid} is of an earlier release, which this one "
                    f"does not understand; end it (or remove {path.name}, if it is not on this bus)"
                )

    def _meet(self, *, joining: bool = False) -> None:
        """Open the inboxes of members that are new to us. Joiners clear away what killed ones left behind."""
        for path in self._directory.glob(f"*{MEMBER_SUFFIX}"):
            if path.name in self._others or path == self._own:
                continue
            try:
                self._others[path.name] = _Member(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            except FileNotFoundError:
                continue  # it has just left
            except OSError as error:
                if error.errno == errno.ENXIO:  # nobody reads it: killed, or not quite here yet
                    if joining:
                        path.unlink(missing_ok=True)
                elif joining:
                    raise
                else:
                    self.unreached += 1

    def _forget(self) -> None:
        for member in self._others.values():
            os.close(member.fd)
        self._others.clear()

    def shutdown(self) -> None:
        """Leave the bus. What was sent stays readable for the others."""
        if self._is_shutdown:
            return
        super().shutdown()
        with self._sending:
            self._opened.close()

    # --- sending ----------------------------------------------------------------------------------

    def send(self, msg: can.Message, timeout: float | None = None) -> None:
        """Give one frame to every other member; waits for slow ones up to `timeout` (default SEND_WAIT_S).

        Raises CanOperationError when the bus is closed or the frame is not one. A frame that a member did not
        take in time is counted in `dropped_out`, and in the member's `dropped_in` with the next it takes.
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
        assert len(frame) == FRAME_BYTES, f"{len(frame)} bytes are no frame"
        deadline_s = time.monotonic() + (self._send_wait_s if timeout is None else timeout)
        with self._sending:
            self._look()
            self.unheard += not self._others
            record = HEAD.pack(MARK, 0, time.monotonic_ns()) + frame
            for name, member in tuple(self._others.items()):
                try:
                    self._offer(member, record, deadline_s)
                except BrokenPipeError:  # it is gone
                    os.close(self._others.pop(name).fd)
            if self._echo is not None:
                self._offer(self._echo, record, deadline_s)

    def _look(self) -> None:
        """Meet who joined since we last looked; the caller holds the send lock."""
        if self._is_shutdown:
            raise can.CanOperationError("the bus is closed")
        joins = self._joins[:]
        if joins != self._seen:
            self._meet()
            self._seen = joins  # as it was before we looked: who came meanwhile is looked for next time

    def _offer(self, member: _Member, record: bytes, deadline_s: float) -> None:
        """Write a record, waiting for room while the member still reads; else count it, on both sides."""
        told = min(member.missed, MISSED_MAX)
        if notes := told | member.notes:
            record = MARK + notes.to_bytes(4, "little") + record[8:]
        while True:
            try:
                os.write(member.fd, record)
            except BlockingIOError:
                left_s = deadline_s - time.monotonic()
                if member.lagging or left_s <= 0 or not _room(member.fd, left_s):
                    member.lagging = True
                    member.missed += 1
                    self.dropped_out += 1
                    return
            else:
                member.missed -= told
                member.lagging = False
                return

    def wait_for_listener(self, timeout_s: float) -> bool:
        """Wait until some member takes frames; False if none came in time."""
        until_s = time.monotonic() + timeout_s
        while True:
            with self._sending:
                self._look()
            left_s = until_s - time.monotonic()
            if self._others or left_s <= 0:
                return bool(self._others)
            time.sleep(min(POLL_S, left_s))

    # --- receiving --------------------------------------------------------------------------------

    def recv_frames(
        self, timeout_s: float | None, gather_s: float = 0.0
    ) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int64], npt.NDArray[np.bool_]] | None:
        """Return what the other members sent: frames (n,) FRAME_DTYPE, monotonic ns, whether it is our own.

        In the order in which they came; the times of two senders may cross by the moment between stamping and
        writing. Waits up to timeout_s for the first frame (None: for ever), then gather_s for more: one wait
        and one read, for on a busy bus waking up costs more than reading. None on time-out.
        """
        count = self._receive(timeout_s, gather_s)
        if not count:
            return None
        records = self._records[:count]
        return records["frame"].copy().view(FRAME_DTYPE), records["t_ns"].copy(), records["head"] < 0

    def _receive(self, timeout_s: float | None, gather_s: float = 0.0) -> int:
        """Wait, gather, read; return how many frames are in the buffer, 0 on time-out."""
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if self._is_shutdown:
                raise can.CanOperationError("the bus is closed")
            left_s = None if until_s is None else max(0.0, until_s - time.monotonic())
            if self._arrivals.poll(None if left_s is None else left_s * 1000):
                if gather_s > 0:
                    time.sleep(gather_s)
                if count := self._read():
                    return count
            if left_s is not None and left_s <= 0:
                return 0

    def _read(self) -> int:
        """Read from the inbox; return how many sound records are at the buffer's head, and count the rest."""
        begin = len(self._cut)
        self._buffer[:begin] = self._cut
        try:
            size = begin + (self._inbox.readinto(self._buffer[begin:]) or 0)
        except ValueError:  # closed meanwhile
            raise can.CanOperationError("the bus is closed") from None
        count, rest = divmod(size, RECORD.size)
        # Without numpy, whose first comparison after a wait costs more than reading.
        plain = not rest and self._heads[:count] == self._ordinary[:count]
        if plain and (self._lengths[:count] <= DATA_BYTES_MAX).all():
            self._cut = b""
            return count
        return self._sift(size)

    def _sift(self, size: int) -> int:
        """Count what records note and what is none: another program's words may stand between them."""
        raw = bytes(self._buffer[:size])
        sound = []
        at = 0
        while (begin := raw.find(MARK, at)) >= 0:
            self.malformed += begin > at
            at = begin + RECORD.size
            if at > size:
                break
            _, notes, _ = HEAD.unpack_from(raw, begin)
            self.dropped_in += notes & MISSED_MAX
            if raw[begin + LEN_AT] <= DATA_BYTES_MAX:
                sound.append(raw[begin:at])
            else:
                self.malformed += 1
        else:
            self.malformed += at < size
            begin = size
        self._cut = raw[begin:]
        self._buffer[: len(sound) * RECORD.size] = b"".join(sound)
        return len(sound)

    def _recv_internal(self, timeout: float | None) -> tuple[can.Message | None, bool]:
        if not self._ready and (count := self._receive(timeout)):
            # python-can's time stamps are Unix time.
            offset_ns = time.time_ns() - time.monotonic_ns()
            self._ready.extend(
                unpack_message(frame, (t_ns + offset_ns) / NS_PER_S, is_rx=head >= 0)
                for head, t_ns, frame in RECORD.iter_unpack(self._buffer[: count * RECORD.size])
            )
        return (self._ready.popleft(), False) if self._ready else (None, False)

    def fileno(self) -> int:
        """Return a number to poll; frames that recv() has read ahead do not show on it."""
        return self._inbox.fileno()


def _nameless_pipe() -> int:
    """Return a pipe that nobody finds, opened for both ways as an inbox is."""
    ends = os.pipe()
    try:
        return os.open(f"/proc/self/fd/{ends[0]}", os.O_RDWR | os.O_NONBLOCK)
    finally:
        for end in ends:
            os.close(end)


def _widen(fd: int) -> int:
    """Raise what a pipe holds as far as the kernel grants it; return what it did."""
    size = INBOX_BYTES
    while size > fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ):
        try:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)
        except PermissionError:
            size //= 2
    return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)


def _room(fd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(timeout_s * 1000))


@contextlib.contextmanager
def _register(directory: Path) -> Iterator[int]:
    """Open the register and let one process join at a time; the lock dies with its process."""
    fd = os.open(directory / REGISTER_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        until_s = time.monotonic() + JOIN_WAIT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until_s:
                    raise can.CanInitializationError(
                        f"tbox bus {directory}: another process has been joining for {JOIN_WAIT_S:g} s"
                    ) from None
                time.sleep(POLL_S)
        yield fd
        fcntl.flock(fd, fcntl.LOCK_UN)  # what maps the register would keep it locked
    finally:
        os.close(fd)
