"""Judges samples before any threshold sees them. Changes no value, drops none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tbox.decode.batch import Decoded
from tbox.decode.database import DecodeSettings
from tbox.decode.roles import Binding, RoleMap
from tbox.decode.table import SignalTable
from tbox.model import FrameBatch, Signal


class Judge:
    """The validity of every sample, and the state it takes."""

    def __init__(
        self,
        table: SignalTable,
        bindings: Sequence[Binding],
        roles: RoleMap,
        catalog: Sequence[Signal],
        settings: DecodeSettings,
    ) -> None:
        self._table = table

    def judge(
        self, batch: FrameBatch, decoded: Decoded
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
        """Return the values and their validity."""
        return decoded.value, np.zeros(len(decoded.value), np.uint8)
