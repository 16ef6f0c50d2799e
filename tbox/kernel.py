"""The compiled hot loops (kernel.c) where there are any. Decides nothing, and knows no stage.

`compiled` is the extension module, or None where no C compiler was at hand when tbox was installed. Every
caller has a twin of each function in numpy, equal to the last bit, and runs it then.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]
Halves = npt.NDArray[np.uint16]


class Kernel(Protocol):
    """What kernel.c offers; its comments say what each function does. Arrays are C-contiguous.

    All raise ValueError where an array is shorter than another one asks for, IndexError where a table leads
    out of another, TypeError for anything else but arrays and numbers.
    """

    def plans(
        self, frames: Bytes, keys: npt.NDArray[np.uint32], roots: Ints, selector_row: Ints,
        selector_base: Ints, selector_size: Ints, selector_plan: Ints, byte: Ints, shift: Words, mask: Words,
        big: Flags, need_bytes: Bytes, length: Bytes, count: Ints, needs: Bytes, plan: Ints, short: Flags, /,
    ) -> tuple[int, int, int, int, int]: ...  # fmt: skip

    def decode(
        self, frames: Bytes, t_ns: Ints, plan: Ints, start: Ints, count: Ints, byte: Ints, shift: Words,
        mask: Words, half: Words, big: Flags, need_bytes: Bytes, scale: Floats, add: Floats, column: Ints,
        low: Ints, span: Words, value_out: Floats, column_out: Ints, t_out: Ints, /,
    ) -> tuple[int, bool]: ...  # fmt: skip

    def details(
        self, frames: Bytes, plan: Ints, start: Ints, count: Ints, byte: Ints, shift: Words, mask: Words,
        half: Words, big: Flags, need_bytes: Bytes, frame_out: Ints, row_out: Ints, raw_out: Ints, /,
    ) -> int: ...  # fmt: skip

    def calm(self, column: Ints, value: Floats, believed: Floats, half_step: Floats, /) -> bool: ...

    def guard(
        self, frames: Bytes, t_ns: Ints, plan: Ints, short: Flags, message_of: Ints, byte: Ints, shift: Words,
        mask: Words, big: Flags, crc_base: Ints, crc_table: Halves, crc_constant: Halves, has_crc: Flags,
        has_counter: Flags, modulo: Ints, last: Ints, last_ns: Ints, last_payload: Bytes, lost: Ints,
        code: Bytes, gap_ns: int, /,
    ) -> tuple[int, int]: ...  # fmt: skip

    def settle(
        self, column: Ints, value: Floats, validity: Bytes, t_ns: Ints, slot_of: Ints, upper: Floats,
        lower: Floats, counts: Ints, heard: Flags, pack_value: Floats, pack_t_ns: Ints, touched: Flags,
        now_ns: int, laps: int, /,
    ) -> int: ...  # fmt: skip

    def fold(
        self, t_ns: Ints, column: Ints, value: Floats, validity: Bytes, base: Ints, stride: Ints,
        is_other: Flags, cell: Ints, counts: Ints, low: Floats, high: Floats, total: Floats, last: Floats,
        places: Ints, reach: float, begin_ns: int, end_ns: int, fine_start_ns: int, other_start_ns: int,
        fine_ns: int, other_ns: int, /,
    ) -> int: ...  # fmt: skip


def _load() -> Kernel | None:
    try:
        return cast(Kernel, import_module("tbox._kernel"))
    except ImportError:
        return None


compiled = _load()
