"""Writes numbered frames to an interface at a given rate; imports nothing that is slow. Reads nothing.

flood.py INTERFACE FRAMES RATE FD: 64-byte FD frames, or 8-byte classic ones if FD is 0.
Prints how many it sent.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
import time

SLICE_S = 0.002  # frames due within it go out in one burst: a sleep in the guest is not finer


def main(interface: str, frames: int, rate: int, fd: bool) -> int:
    sock = socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW)
    sock.setsockopt(101, 5, 1)  # CAN_RAW_FD_FRAMES
    sock.bind((interface,))
    layout, size, flags = ("<IBBxxQ56x", 64, 1) if fd else ("<IBBxxQ", 8, 0)
    begin = time.monotonic()
    sent = 0
    while sent < frames:
        due = min(frames, int((time.monotonic() - begin) * rate) + 1)
        while sent < due:
            try:
                sock.send(struct.pack(layout, 0x100 + sent % 16, size, flags, sent))
                sent += 1
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                time.sleep(SLICE_S)
        time.sleep(SLICE_S)
    return sent


if __name__ == "__main__":
    print(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] != "0"))
