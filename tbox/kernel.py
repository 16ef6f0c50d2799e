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

# kernel.c's Plan and Row: what decode/table.py keeps in parallel arrays.
PLAN = np.dtype(
    {
        "names": [
            "start", "count", "selector_row", "selector_base", "selector_size", "length", "needs",
        ],
        "formats": ["i4", "i4", "i4", "i4", "i4", "u1", "u1"],
    },
    align=True,
)  # fmt: skip
ROW = np.dtype(
    {
        "names": [
            "mask", "half", "low", "span", "scale", "add", "column", "byte", "shift", "big", "need_bytes",
        ],
        "formats": ["u8", "u8", "i8", "u8", "f8", "f8", "i4", "u1", "u1", "u1", "u1"],
    },
    align=True,
)  # fmt: skip


class Kernel(Protocol):
    """What kernel.c offers; its comments say what each function does. Arrays are C-contiguous.

    All raise ValueError where an array is shorter than another one asks for, IndexError where a table leads
    out of another, TypeError for anything else but arrays and numbers.
    """

    def plans(
        self, frames: Bytes, keys: npt.NDArray[np.uint32], roots: Ints, plans: Bytes, rows: Bytes,
        selector_plan: Ints, plan: Ints, short: Flags, /,
    ) -> tuple[int, int, int, int, int]: ...  # fmt: skip

    def decode(
        self, frames: Bytes, t_ns: Ints, plan: Ints, plans: Bytes, rows: Bytes, value_out: Floats,
        column_out: Ints, t_out: Ints, /,
    ) -> tuple[int, bool]: ...  # fmt: skip

    def details(
        self, frames: Bytes, plan: Ints, plans: Bytes, rows: Bytes, frame_out: Ints, row_out: Ints,
        raw_out: Ints, /,
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
