"""What it costs to take a frame off SocketCAN: recv_batch against python-can's two ways, and what is dropped.

A figure is user-mode time plus system calls at SYSCALL_US each, per frame. On a kernel with vcan0 all of it
is taken there. Elsewhere drops and system calls are counted in the guest of scripts/vcan, where a system call
costs forty times its due and is booked as user time; so user-mode time is then taken on this kernel, by the
same code over a UDP socket, which knows the same calls, time stamps and drop count. Every line says which.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import can
import msgspec
import numpy as np

from tbox import log
from tbox.bus.socketcan import (
    CAN_RAW_FD_FRAMES,
    HEADER_DTYPE,
    SO_RCVBUFFORCE,
    SOL_CAN_RAW,
    VECTOR_DTYPE,
    SocketCanReader,
)
from tbox.bus.spec import BusSpec
from tbox.model import FRAME_DTYPE
from tests.bench.harness import Result, interleaved
from tests.bench.stand_in import INTERFACE as STAND_IN_INTERFACE
from tests.bench.stand_in import StandIn

log.set_up("warning")  # standard output is for the figures

ROOT = Path(__file__).resolve().parents[2]
INTERFACE = "vcan0"
SYSCALL_US = 0.3  # on a plain kernel, entry and exit and a little work
FILL_FRAMES = 2048  # what is put into the receive buffer before it is read and timed
OURS_FRAMES = 400 * FILL_FRAMES  # CPU time is counted in ticks of 10 ms: each run must take many
PEER_FRAMES = 40 * FILL_FRAMES
COUNTED_FRAMES = 2 * FILL_FRAMES  # under strace
# The filling, and reading the clock, which is no system call on a plain kernel but is one in the guest.
UNCOUNTED = "sendmmsg,clock_gettime,gettimeofday,time"
RUNS = 5
STALL_S = 0.2
STALL_SECONDS = 2
TIMEOUT_S = 600.0


class Flood:
    """Puts FILL_FRAMES FD frames of 64 bytes on the bus with few system calls."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None
        self._frames = np.zeros(FILL_FRAMES, FRAME_DTYPE)
        self._frames["id"] = 0x100 + np.arange(FILL_FRAMES) % 50
        self._frames["len"] = 64
        self._frames["data"] = np.arange(64)
        index = np.arange(FILL_FRAMES, dtype=np.uintp)
        self._vectors = np.zeros(FILL_FRAMES, VECTOR_DTYPE)
        self._vectors["base"] = self._frames.ctypes.data + index * FRAME_DTYPE.itemsize
        self._vectors["size"] = FRAME_DTYPE.itemsize
        self._headers = np.zeros(FILL_FRAMES, HEADER_DTYPE)
        self._headers["iov"] = self._vectors.ctypes.data + index * VECTOR_DTYPE.itemsize
        self._headers["iov_len"] = 1
        self._sendmmsg = ctypes.CDLL(None, use_errno=True).sendmmsg

    def aim(self) -> None:
        """Send to the reader that was opened last."""
        if has_vcan():
            self._sock = socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW)
            self._sock.setsockopt(SOL_CAN_RAW, CAN_RAW_FD_FRAMES, 1)
            self._sock.bind((INTERFACE,))
        else:
            self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._sock.connect(StandIn.address)

    def __call__(self) -> None:
        assert self._sock is not None
        sent = 0
        while sent < FILL_FRAMES:
            address = ctypes.c_void_p(self._headers.ctypes.data + sent * HEADER_DTYPE.itemsize)
            count = self._sendmmsg(self._sock.fileno(), address, FILL_FRAMES - sent, 0)
            if count < 0:
                raise OSError(ctypes.get_errno(), "sendmmsg")
            sent += count


def user_us_per_frame(flood: Flood, read: Callable[[int], None], frames: int) -> float:
    """Return the user-mode microseconds (all threads) that reading one frame takes."""
    user_s = 0.0
    flood.aim()
    for _ in range(frames // FILL_FRAMES):
        flood()
        begin_s = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        read(FILL_FRAMES)
        user_s += resource.getrusage(resource.RUSAGE_SELF).ru_utime - begin_s
    return user_s * 1e6 / frames


@contextlib.contextmanager
def can_sockets() -> Iterator[str]:
    """Name the interface to open; where there is no vcan0, CAN sockets opened meanwhile are stand-ins."""
    if has_vcan():
        yield INTERFACE
        return
    with mock.patch.object(socket, "socket", StandIn):
        StandIn.address = ("127.0.0.1", 0)
        yield STAND_IN_INTERFACE


# --- the three ways to read -----------------------------------------------------------------------------


@contextlib.contextmanager
def recv_batch() -> Iterator[Callable[[int], None]]:
    with can_sockets() as interface:
        reader = SocketCanReader(BusSpec(interface="socketcan", channel=interface, gather_ms=0), 0)

    def read(frames: int) -> None:
        while frames > 0:
            batch = reader.recv_batch(1.0)
            assert batch is not None and batch.t_ns[0] > 0
            frames -= len(batch)

    yield read
    reader.close()


def _bus() -> can.BusABC:
    with can_sockets() as interface:
        bus = can.Bus(interface="socketcan", channel=interface, fd=True, ignore_config=True)
    sock: socket.socket = bus.socket  # type: ignore[attr-defined]
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)  # as much room as ours has
    return bus


@contextlib.contextmanager
def bus_recv() -> Iterator[Callable[[int], None]]:
    with _bus() as bus:

        def read(frames: int) -> None:
            for _ in range(frames):
                message = bus.recv(1.0)
                assert message is not None

        yield read


@contextlib.contextmanager
def buffered_reader() -> Iterator[Callable[[int], None]]:
    with _bus() as bus:
        buffer = can.BufferedReader()
        notifier = can.Notifier(bus, [buffer])

        def read(frames: int) -> None:
            for _ in range(frames):
                message = buffer.get_message(1.0)
                assert message is not None

        yield read
        notifier.stop()


WAYS: dict[str, Callable[[], Any]] = {
    "recv_batch": recv_batch, "Bus.recv": bus_recv, "BufferedReader": buffered_reader
}  # fmt: skip


# --- system calls ---------------------------------------------------------------------------------------


def syscalls_per_frame(way: str) -> float:
    """Return the system calls one more frame costs, counted by strace in runs of two lengths."""
    if not shutil.which("strace"):
        raise SystemExit("bench ingest: needs strace (apt install strace)")
    few, many = (_count(way, fills) for fills in (1, 1 + COUNTED_FRAMES // FILL_FRAMES))
    return (many - few) / COUNTED_FRAMES


def _count(way: str, fills: int) -> int:
    """Count all system calls of a process that reads `fills` times FILL_FRAMES, the filling left out."""
    command = ["strace", "-f", "-qq", "-c", "-U", "calls,name", "-e", f"trace=!{UNCOUNTED}"]
    command += [sys.executable, "-m", "tests.bench.bench_ingest", way, str(fills)]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise SystemExit(f"bench ingest: {done.stderr.strip()[-500:]}")
    totals = [line.split() for line in done.stderr.splitlines() if line.split()[1:] == ["total"]]
    return int(totals[-1][0])


# --- cases ----------------------------------------------------------------------------------------------


def in_guest() -> bool:
    return "User Mode Linux" in Path("/proc/cpuinfo").read_text()


def where() -> str:
    if not has_vcan():
        return "taken on this kernel over UDP, for it has no CAN"
    return "taken in the guest" if in_guest() else "taken on vcan0 of this kernel"


def calls_case(way: str) -> Result:
    return Result(
        bench="ingest", case=f"system calls a frame, {way}", value=round(syscalls_per_frame(way), 4),
        unit="calls", note=f"{where()}; counted by strace",
    )  # fmt: skip


def cost_cases(calls: dict[str, float]) -> Iterator[Result]:
    flood = Flood()

    def cost(way: str, frames: int) -> Callable[[], float]:
        def run() -> float:
            with WAYS[way]() as read:
                return user_us_per_frame(flood, read, frames) + calls[way] * SYSCALL_US

        return run

    for peer, goal in (("Bus.recv", 8.0), ("BufferedReader", 15.0)):
        ours_us, peer_us, ratio = interleaved(cost("recv_batch", OURS_FRAMES), cost(peer, PEER_FRAMES), RUNS)
        yield Result(
            bench="ingest", case=f"one frame with its time, against {peer}", value=round(ours_us, 3),
            unit="us", peer=f"python-can {peer}", peer_value=round(peer_us, 2), ratio=round(ratio, 1),
            goal=f">= {goal:g} x", ok=ratio >= goal,
            note=f"user time {where()}; plus {SYSCALL_US} us for each system call",
        )  # fmt: skip


def stall_case(rate: int) -> Result:
    """Frames the kernel dropped while the reader stood still for 200 ms, four times in two seconds."""
    reader = SocketCanReader(BusSpec(interface="socketcan", channel=INTERFACE), 0)
    total = rate * STALL_SECONDS
    flood = [sys.executable, str(ROOT / "tests/vcan/flood.py"), INTERFACE, str(total), str(rate), "1"]
    with subprocess.Popen(flood, stdout=subprocess.DEVNULL):
        count = stalls = 0
        while count < total and (batch := reader.recv_batch(5.0)) is not None:
            count += len(batch)
            if stalls < 4 and count > (stalls + 1) * total // 5:
                stalls += 1
                time.sleep(STALL_S)
        reader.recv_batch(0.01)
    counters = reader.counters()
    reader.close()
    return Result(
        bench="ingest", case=f"dropped at {rate} frames/s with stalls of 200 ms", unit="frames",
        value=counters.kernel_dropped, goal="0", ok=counters.kernel_dropped == 0 and count == total,
        note=f"{where()}; the kernel's own count; {count} of {total} received; receive buffer "
        f"{counters.rcvbuf_bytes} bytes, {'privileged' if counters.rcvbuf_forced else 'unprivileged'}",
    )  # fmt: skip


def on_vcan() -> Iterator[Result]:
    """The part that needs a real interface."""
    for way in WAYS:
        yield calls_case(way)
    for rate in (10_000, 23_000):
        yield stall_case(rate)


def cases() -> Iterator[Result]:
    calls: dict[str, float] = {}
    for result in on_vcan() if has_vcan() else under_vcan():
        if result.unit == "calls":
            calls[result.case.rpartition(", ")[2]] = result.value
        yield result
    if len(calls) == len(WAYS) and not in_guest():  # whose clock books system calls as user time
        yield from cost_cases(calls)


def has_vcan() -> bool:
    try:
        with socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW) as sock:
            sock.bind((INTERFACE,))
    except (OSError, AttributeError):
        return False
    return True


def under_vcan() -> Iterator[Result]:
    """Run that part where there is a vcan0, and pass its lines on."""
    command = [str(ROOT / "scripts/vcan"), sys.executable, "-m", "tests.bench", "ingest"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield msgspec.json.decode(line, type=Result)
            else:
                print(line, end="", file=sys.stderr)
    if process.returncode not in (0, 1):  # 1: a figure missed its goal, and its line says so
        yield Result(
            bench="ingest", case="on a real vcan0", value=0, unit="", ok=False,
            note=f"scripts/vcan ended with {process.returncode}",
        )  # fmt: skip


def main(way: str, fills: int) -> None:
    """Read `fills` times one way: what strace looks at."""
    flood = Flood()
    with WAYS[way]() as read:
        flood.aim()
        for _ in range(fills):
            flood()
            read(FILL_FRAMES)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
