"""Physical values to frame bytes, whole batches at once, with CRC. Knows layouts, no physics and no time.

A layout is compiled once into one flat table of (signal, shift, mask, byte); packing is then a gather, a
shift and an OR over it, for any number of frames. Tests hold it against cantools.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tbox.model import CANFD_BRS, CANFD_FDF, FRAME_DTYPE
from tbox.sim.layout import COUNTER_NAME, CRC_NAME, Msg, Sig

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

# --- CRC-8/SAE-J1850: polynomial 0x1D, start 0xFF, final XOR 0xFF, check("123456789") = 0x4B --------------

_POLYNOMIAL = 0x1D
_CRC_START = 0xFF
_CRC_FINAL = 0xFF
_FRAME_BYTES_MAX = 64


def _step_table() -> Bytes:
    table = np.arange(256, dtype=np.uint8)
    for _ in range(8):
        table = np.where(table & 0x80, (table << 1) ^ _POLYNOMIAL, table << 1).astype(np.uint8)
    return table


_STEP = _step_table()


def _distance_tables() -> Bytes:
    """Row d: what a byte adds to the CRC when d more bytes follow it; a CRC is linear, so they XOR."""
    rows = [_STEP]
    for _ in range(_FRAME_BYTES_MAX):
        rows.append(_STEP[rows[-1]])
    return np.stack(rows)


_DISTANCE = _distance_tables()


def crc8(data: bytes) -> int:
    """Return the CRC-8/SAE-J1850 of `data`."""
    crc = _CRC_START
    for byte in data:
        crc = int(_STEP[crc ^ byte])
    return crc ^ _CRC_FINAL


def frame_crcs(data: Bytes, length: int, data_ids: Bytes) -> Bytes:
    """Return the CRC of each row of data (n, >= length): over bytes 1..length-1, then its data id."""
    distance = np.arange(length - 1, 0, -1)
    crc = np.bitwise_xor.reduce(_DISTANCE[distance, data[:, 1:length]], axis=1)
    start = _DISTANCE[length - 1, _CRC_START]  # the start value, as if XORed into the first byte
    crcs: Bytes = (crc ^ start ^ _STEP[data_ids] ^ _CRC_FINAL).astype(np.uint8)
    return crcs


# --- packing --------------------------------------------------------------------------------------------


def signal_bits(msg: Msg, sig: Sig) -> list[tuple[int, int]]:
    """Return (byte, bit in it) of every bit of a signal, least significant first."""
    if not msg.motorola:
        return [divmod(sig.start + i, 8) for i in range(sig.bits)]
    byte, bit = divmod(sig.start, 8)  # a DBC gives a Motorola signal's most significant bit
    first = byte * 8 + (7 - bit)  # the same bit counted from the frame's front
    return [(position // 8, 7 - position % 8) for position in range(first + sig.bits - 1, first - 1, -1)]


@dataclass(frozen=True, slots=True)
class _Pieces:
    """A compiled layout: bits (raw[signal] >> right) & mask, moved left, go into one byte each."""

    signal: Ints
    right: Ints
    mask: Ints
    left: Ints
    starts: Ints  # where the pieces of the next byte begin
    byte: Ints  # the byte each group goes into


def _compile(msg: Msg, signals: Sequence[Sig]) -> _Pieces:
    rows: list[tuple[int, int, int, int, int]] = []  # byte, signal, right, mask, left
    for index, sig in enumerate(signals):
        bits = signal_bits(msg, sig)
        for at in sorted({at for at, _ in bits}):
            held = [i for i, (its, _) in enumerate(bits) if its == at]
            rows.append((at, index, held[0], (1 << len(held)) - 1, bits[held[0]][1]))
    rows.sort()
    byte, signal, right, mask, left = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    filled, starts = np.unique(byte, return_index=True)
    return _Pieces(signal, right, mask, left, starts.astype(np.int64), filled)


class Packer:
    """Packs the frames of messages that share one layout (say, the cell frames of all modules).

    signals: the columns `pack` takes, in order; CRC and counter are the packer's own.
    """

    def __init__(self, msg: Msg, mux: int | None = None) -> None:
        every = [sig for sig in msg.signals if sig.mux in (None, mux) and sig.name != CRC_NAME]
        self.signals = tuple(sig for sig in every if sig.name != COUNTER_NAME)
        counter = next(sig for sig in every if sig.name == COUNTER_NAME)
        self.length = msg.length
        self.fd = msg.fd
        self._pieces = _compile(msg, (*self.signals, counter))
        self._scale = np.array([sig.scale for sig in self.signals])
        self._offset = np.array([sig.offset for sig in self.signals])
        # The SNA value is never reached by saturation: it lies at an end of the raw range.
        self._raw_min = np.array([sig.raw_min + (sig.sna == sig.raw_min) for sig in self.signals])
        self._raw_max = np.array([sig.raw_max - (sig.sna == sig.raw_max) for sig in self.signals])
        self._sna = np.array([0 if sig.sna is None else sig.sna for sig in self.signals])

    def raw(self, values: Floats) -> Ints:
        """Return raw integers of values (n, signals): rounded, saturated, NaN as "signal not available"."""
        missing = np.isnan(values)
        scaled = np.rint((np.where(missing, 0.0, values) - self._offset) / self._scale)
        raw = np.clip(scaled, self._raw_min, self._raw_max).astype(np.int64)
        return np.where(missing, self._sna, raw)

    def pack(self, ids: npt.NDArray[np.uint32], counters: Ints, values: Floats) -> npt.NDArray[np.void]:
        """Return (n,) frames of FRAME_DTYPE. ids, counters (n,); values (n, len(signals)), physical."""
        pieces = self._pieces
        raw = np.concatenate([self.raw(values), counters[:, None]], axis=1)
        parts = ((raw[:, pieces.signal] >> pieces.right) & pieces.mask) << pieces.left
        frames = np.zeros(len(ids), dtype=FRAME_DTYPE)
        frames["id"] = ids
        frames["len"] = self.length
        frames["flags"] = CANFD_FDF | CANFD_BRS if self.fd else 0
        data = frames["data"]
        data[:, pieces.byte] = np.bitwise_or.reduceat(parts, pieces.starts, axis=1)
        data[:, 0] = frame_crcs(data, self.length, (ids & 0xFF).astype(np.uint8))
        return frames
