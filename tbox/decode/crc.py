"""CRCs over whole batches of frames, by profile (AUTOSAR E2E 1 and 5, any CRC-8). Knows no messages.

A CRC is linear: each byte adds a value that depends on the byte and its distance from the end only. With
those values tabled, the CRCs of all frames of a batch are one gather and one XOR-reduction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

PAYLOAD_BYTES_MAX = 64


@dataclass(frozen=True, slots=True)
class CrcModel:
    """A CRC as the catalogues describe it: width 8 or 16 bits."""

    width: int
    poly: int
    init: int
    xor_out: int
    reflect: bool = False


# AUTOSAR E2E (PRS E2E Protocol): profile 1 uses the polynomial of SAE J1850 with start and XOR value 0.
E2E_P1 = CrcModel(8, 0x1D, 0x00, 0x00)
E2E_P5 = CrcModel(16, 0x1021, 0xFFFF, 0x0000)
E2E_P1_COUNTER_VALUES = 15
E2E_P5_COUNTER_VALUES = 256


def crc_of(model: CrcModel, data: bytes) -> int:
    """Return the CRC of some bytes, bit by bit: the definition, and what the tables are made from."""
    register = model.init
    for byte in data:
        register = _step(model, register, byte)
    return register ^ model.xor_out


def _step(model: CrcModel, register: int, byte: int) -> int:
    top, full = 1 << (model.width - 1), (1 << model.width) - 1
    if model.reflect:
        register ^= byte
        mirrored = _mirror(model.poly, model.width)
        for _ in range(8):
            register = (register >> 1) ^ (mirrored if register & 1 else 0)
        return register
    register ^= byte << (model.width - 8)
    for _ in range(8):
        register = ((register << 1) ^ (model.poly if register & top else 0)) & full
    return register


def _mirror(value: int, width: int) -> int:
    return int(f"{value:0{width}b}"[::-1], 2)


@lru_cache(maxsize=16)
def _by_distance(model: CrcModel) -> npt.NDArray[np.uint16]:
    """Return (d, 256): what a byte adds to the CRC when d bytes follow it."""
    rows = np.zeros((PAYLOAD_BYTES_MAX + 4, 256), np.uint16)
    rows[0] = [_step(model, 0, byte) for byte in range(256)]
    for distance in range(1, len(rows)):
        rows[distance] = [_step(model, int(value), 0) for value in rows[distance - 1].tolist()]
    return rows


@dataclass(frozen=True, slots=True)
class CrcInput:
    """What a message's CRC runs over: constant bytes, the payload without the CRC's own, constant bytes."""

    model: CrcModel
    before: bytes
    payload_bytes: int  # of the message
    left_out: range  # the bytes that hold the CRC
    after: bytes

    def covered(self) -> list[int]:
        return [n for n in range(self.payload_bytes) if n not in self.left_out]


class CrcTable:
    """The CRCs of several messages, as one table for all.

    table: what bytes add, 256 values for each distance of each model. base: (messages, width) where in it
    those of a payload byte begin. constant: of each message, what is added to them. width: bytes of the
    longest message.
    """

    def __init__(self, inputs: list[CrcInput]) -> None:
        nothing = np.zeros((1, 256), np.uint16)
        blocks = [nothing]
        self.base = np.zeros((len(inputs), PAYLOAD_BYTES_MAX), np.int64)
        self.constant = np.zeros(len(inputs), np.uint16)
        starts: dict[CrcModel, int] = {}
        size = 1
        for n, one in enumerate(inputs):
            if one.model not in starts:
                starts[one.model] = size
                blocks.append(_by_distance(one.model))
                size += len(blocks[-1])
            covered = one.covered()
            for place, byte in enumerate(covered):
                distance = len(covered) - 1 - place + len(one.after)
                self.base[n, byte] = (starts[one.model] + distance) * 256
            zeros = bytes(len(covered))
            self.constant[n] = crc_of(one.model, one.before + zeros + one.after)
        self.table = np.concatenate(blocks).ravel()
        self.width = max((i.payload_bytes for i in inputs), default=0)
        self.base = np.ascontiguousarray(self.base[:, : self.width])

    def crcs(self, message: npt.NDArray[np.int64], payload: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
        """Return the CRC of each payload (n, 64), given which of the messages it is (n,)."""
        place = self.base.take(message, axis=0)
        place += payload[:, : self.width]
        crcs: npt.NDArray[np.uint16] = np.bitwise_xor.reduce(self.table.take(place), axis=1)
        return crcs ^ self.constant.take(message)
