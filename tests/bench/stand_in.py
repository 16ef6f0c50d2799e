"""Sockets that take themselves for CAN sockets, for a kernel that has none: UDP on the loopback.

It knows the same calls, time stamps and drop count, so that readers and writers run as they are. As a
program: stand_in.py PORT receive|send PROGRAM ARGUMENTS runs `tbox` or a script whose CAN sockets are such.
"""

from __future__ import annotations

import runpy
import socket
import sys
from typing import Any

INTERFACE = "lo"  # is up, as an interface of CAN would be
CAN_FAMILY = getattr(socket, "AF_CAN", 29)
SOL_CAN_RAW = 101


class StandIn(socket.socket):
    """A CAN socket in name; of any other family the real thing. address: where those that send reach it."""

    address: tuple[str, int] = ("127.0.0.1", 0)
    sends = False

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: Any = None) -> None:  # noqa: A002
        self._is_can = family == CAN_FAMILY
        if self._is_can:
            family, type, proto = socket.AF_INET, socket.SOCK_DGRAM, 0  # noqa: A001
        super().__init__(family, type, proto, fileno)

    def setsockopt(self, level: int, *rest: Any) -> None:
        if level != SOL_CAN_RAW or not self._is_can:
            super().setsockopt(level, *rest)

    def bind(self, address: Any) -> None:
        if not self._is_can:
            super().bind(address)
        elif StandIn.sends:
            super().connect(StandIn.address)
        else:
            super().bind(StandIn.address)
            StandIn.address = self.getsockname()


def main(port: str, way: str, program: str, *arguments: str) -> None:
    StandIn.address, StandIn.sends = ("127.0.0.1", int(port)), way == "send"
    socket.socket = StandIn  # type: ignore[misc]
    sys.argv = [program, *arguments]
    if program == "tbox":
        runpy.run_module("tbox", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
