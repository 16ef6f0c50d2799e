"""Boot control on the medium: two alternating, CRC'd copies of `boot.BootControl`. Decides nothing.

A write is durable when `commit` returns; a cut anywhere leaves the old control or the new one, whole.
"""

from __future__ import annotations

import msgspec

from tbox.durable import Storage, TwoCopies
from tbox.errors import TboxError
from tbox.ota.boot import PRIORITY_ACTIVE, BootControl, SlotState

STEM = "bootctl"


class BootControlError(TboxError):
    """Boot control is missing or damaged in both copies, so nothing says what may boot."""

    exit_code = 1


def encode(control: BootControl) -> bytes:
    return msgspec.msgpack.encode(control)


def decode(payload: bytes) -> BootControl:
    """Return the control. Raises BootControlError on anything but a well-formed one."""
    try:
        control = msgspec.msgpack.decode(payload, type=BootControl)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise BootControlError(
            f"boot control is malformed: {error}", mend="run `tbox boot --recover`"
        ) from None
    if encode(control) != payload:
        raise BootControlError("boot control is not in its one form", mend="run `tbox boot --recover`")
    entries = (control.a, control.b)
    if any(entry.successful and (entry.priority == 0 or entry.tries_left) for entry in entries):
        raise BootControlError("boot control contradicts itself", mend="run `tbox boot --recover`")
    if [entry.priority for entry in entries].count(PRIORITY_ACTIVE) > 1:
        raise BootControlError("boot control has two active slots", mend="run `tbox boot --recover`")
    if any(entry.state is SlotState.EMPTY and entry.priority for entry in entries):
        raise BootControlError("boot control would start an empty slot", mend="run `tbox boot --recover`")
    return control


class BootCtl:
    """The boot control of one device, in `<directory>/bootctl.0` and `.1`."""

    def __init__(self, storage: Storage, directory: str) -> None:
        self._copies = TwoCopies(storage, directory, STEM)
        self._where = f"{directory}/{STEM}.0"

    def read(self) -> BootControl:
        """Return the newest whole control. Raises BootControlError, OSError."""
        newest = self._copies.read()
        if newest is None:
            raise BootControlError(
                "no whole copy of boot control" if self._copies.damaged() else "no boot control here",
                where=self._where,
                mend="provision the device or run `tbox boot --recover`",
            )
        return decode(newest[1])

    def commit(self, control: BootControl) -> BootControl:
        """Make `control` the one that counts, durable before this returns; return it. Raises OSError."""
        self._copies.write(encode(control))
        return control
