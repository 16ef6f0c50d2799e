"""Between python-can messages, single frames and batches of the kernel's frame layout. Knows no bus."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import can
import numpy as np
import numpy.typing as npt

from tbox.model import (
    CAN_EFF_FLAG,
    CAN_EFF_MASK,
    CAN_ERR_FLAG,
    CAN_RTR_FLAG,
    CAN_SFF_MASK,
    CANFD_BRS,
    CANFD_ESI,
    CANFD_FDF,
    FRAME_BYTES,
    FRAME_DTYPE,
    CanSend,
)

FRAME = struct.Struct("<IBBxx64s")  # FRAME_DTYPE, one at a time
DATA_BYTES_MAX = 64
CLASSIC_BYTES_MAX = 8
# Payload lengths a CAN-FD frame can have; a longer payload is padded to the next one by the sender.
FD_LENGTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 32, 48, 64)

# linux/can/error.h: the classes an error frame carries in its id.
ERROR_CLASSES = {
    0x001: "tx_timeout",
    0x002: "lost_arbitration",
    0x004: "controller",
    0x008: "protocol",
    0x010: "transceiver",
    0x020: "no_ack",
    0x040: "bus_off",
    0x080: "bus_error",
    0x100: "restarted",
    0x200: "counters",
}


def flagged_id(message: can.Message) -> int:
    """Return the id with SocketCAN's EFF, RTR and ERR flags."""
    return (
        message.arbitration_id
        | (CAN_EFF_FLAG if message.is_extended_id and not message.is_error_frame else 0)
        | (CAN_RTR_FLAG if message.is_remote_frame else 0)
        | (CAN_ERR_FLAG if message.is_error_frame else 0)
    )


def fd_flags(fd: bool, brs: bool = False, esi: bool = False) -> int:
    return (CANFD_FDF | (CANFD_BRS if brs else 0) | (CANFD_ESI if esi else 0)) if fd else 0


def pack_message(message: can.Message) -> bytes:
    """Return the 72 bytes of struct canfd_frame; struct.error when the message is none."""
    flags = fd_flags(message.is_fd, message.bitrate_switch, message.error_state_indicator)
    data = bytes(message.data)
    if len(data) > DATA_BYTES_MAX:
        raise struct.error(f"{len(data)} bytes in one frame")
    # A remote frame asks for dlc bytes and carries none.
    length = min(message.dlc, CLASSIC_BYTES_MAX) if message.is_remote_frame else len(data)
    return FRAME.pack(flagged_id(message), length, flags, data)


def pack_send(frame: CanSend, *, brs: bool = False) -> bytes:
    """Return the 72 bytes of struct canfd_frame, padded with zeros to a length CAN-FD can carry."""
    size = len(frame.data)
    if frame.fd and size <= DATA_BYTES_MAX:
        size = next(length for length in FD_LENGTHS if length >= size)
    assert size <= (DATA_BYTES_MAX if frame.fd else CLASSIC_BYTES_MAX), f"{size} bytes in one frame"
    return FRAME.pack(frame.can_id, size, fd_flags(frame.fd, brs), frame.data)


def message_of(frame: CanSend, *, brs: bool = False) -> can.Message:
    """Return the python-can message for a frame to be sent."""
    return unpack_message(pack_send(frame, brs=brs))


def unpack_message(raw: bytes, timestamp_s: float = 0.0, *, is_rx: bool = True) -> can.Message:
    """Return 72 bytes of struct canfd_frame as a python-can message."""
    can_id, length, flags, data = FRAME.unpack(raw)
    extended = bool(can_id & CAN_EFF_FLAG)
    remote = bool(can_id & CAN_RTR_FLAG)
    return can.Message(
        timestamp=timestamp_s,
        arbitration_id=can_id & (CAN_EFF_MASK if extended or can_id & CAN_ERR_FLAG else CAN_SFF_MASK),
        is_extended_id=extended,
        is_remote_frame=remote,
        is_error_frame=bool(can_id & CAN_ERR_FLAG),
        is_fd=bool(flags & CANFD_FDF),
        bitrate_switch=bool(flags & CANFD_BRS),
        error_state_indicator=bool(flags & CANFD_ESI),
        dlc=length,
        data=b"" if remote else data[:length],
        is_rx=is_rx,
    )


def frames_of(packed: Iterable[bytes]) -> npt.NDArray[np.void]:
    """Return packed frames as one (n,) FRAME_DTYPE array of its own memory."""
    return np.frombuffer(bytearray(b"".join(packed)), dtype=FRAME_DTYPE)


def concatenated(parts: Sequence[npt.NDArray[np.void]]) -> npt.NDArray[np.void]:
    """Return FRAME_DTYPE arrays as one. As bytes: numpy copies structs field by field, five times slower."""
    whole: npt.NDArray[np.void] = np.concatenate([part.view(f"V{FRAME_BYTES}") for part in parts])
    return whole.view(FRAME_DTYPE)


# KEEP[n] is 1 for the first n bytes of a payload: what is behind them is whatever was there before.
KEEP = (np.arange(DATA_BYTES_MAX) < np.arange(DATA_BYTES_MAX + 1)[:, None]).astype(np.uint8)


def count_errors(ids: npt.NDArray[np.uint32], counts: dict[str, int]) -> None:
    """Add error frames to the counts of each class they carry ("other" where they name none)."""
    for can_id in ids.tolist():
        classes = [name for bit, name in ERROR_CLASSES.items() if can_id & bit] or ["other"]
        for name in classes:
            counts[name] = counts.get(name, 0) + 1
