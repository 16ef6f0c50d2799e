"""Heartbeats: every thread shows that it advances; the watchdog is fed only while all do. Mends nothing."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from dataclasses import dataclass, field

from tbox.model import NS_PER_S

STALL_LIMIT_S = 30.0  # longer than any honest wait of a stage: a commit on a slow SD card takes seconds


@dataclass(slots=True)
class Heart:
    """One thread's counter. Only its own thread beats it."""

    name: str
    beats: int = 0
    _seen: int = -1
    _since_ns: int = 0

    def beat(self) -> None:
        self.beats += 1

    def silent_s(self, mono_ns: int) -> float:
        """Seconds since the last time anybody saw it advance."""
        if self.beats != self._seen:
            self._seen, self._since_ns = self.beats, mono_ns
        return (mono_ns - self._since_ns) / NS_PER_S


@dataclass(slots=True)
class Health:
    """All hearts of the process."""

    hearts: dict[str, Heart] = field(default_factory=dict)

    def heart(self, name: str) -> Heart:
        return self.hearts.setdefault(name, Heart(name))

    def stalled(self, mono_ns: int, limit_s: float = STALL_LIMIT_S) -> list[str]:
        """Return the names of the threads that have not advanced for longer than the limit."""
        return [name for name, heart in self.hearts.items() if heart.silent_s(mono_ns) > limit_s]


def notify_systemd(state: str) -> None:
    """Tell systemd ("READY=1", "WATCHDOG=1", "STOPPING=1"); nothing happens where there is none."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def process_figures() -> dict[str, int]:
    """Return this process's peak memory and CPU time, for health records."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"rss_peak_kib": usage.ru_maxrss, "cpu_ms": int((usage.ru_utime + usage.ru_stime) * 1000)}
