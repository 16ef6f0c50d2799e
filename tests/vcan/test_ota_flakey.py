"""An update on a real ext4 whose device drops every write from some operation on, as a power cut does.

Runs in the guest of scripts/vcan, the only place where a block device may be pulled: dm-flakey, root.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests.crash.flash import PowerCut
from tests.crash.ota_world import Disk, drive
from tests.crash.test_ota_cuts import SCENARIOS, check_rest, fresh
from tests.vcan.test_spool_flakey import FlakyDisk
from tests.vcan.test_spool_flakey import disk as disk  # the fixture

IN_VAIN = 3  # operations after the device stopped taking writes, before the power is gone


class CutDisk(Disk):
    """Pulls the device after so many operations, and the power a little later."""

    def __init__(self, flaky: FlakyDisk, top: Path, cut_at: int | None) -> None:
        super().__init__(str(top))
        self._flaky, self._cut_at = flaky, cut_at
        self.done = 0

    def _operation(self) -> None:
        if self._cut_at is not None and self.done == self._cut_at:
            self._flaky.drop_writes()
        if self._cut_at is not None and self.done >= self._cut_at + IN_VAIN:
            raise PowerCut
        self.done += 1

    def write(self, path: str, data: bytes, offset: int = 0, *, create: bool = True) -> None:
        self._operation()
        super().write(path, data, offset, create=create)

    def fsync(self, path: str) -> None:
        self._operation()
        super().fsync(path)

    def fsync_dir(self, path: str) -> None:
        self._operation()
        super().fsync_dir(path)

    def truncate(self, path: str, size: int) -> None:
        self._operation()
        super().truncate(path, size)


def prepared(flaky: FlakyDisk, scenario: str, name: str) -> Path:
    """Lay a device out in a directory of its own, durable."""
    flaky.mount()
    top = flaky.mount_point / name
    Disk(str(top)).put(SCENARIOS[scenario].start | SCENARIOS[scenario].world.staged)
    flaky.unmount()
    flaky.mount()
    return top


# Every operation was cut here once; a mount each makes that two minutes, so each run takes a part of them.
@pytest.mark.parametrize(("scenario", "first"), [("delta", 0), ("unhealthy", 2)])
def test_a_device_that_stops_taking_writes_is_recovered_from(
    disk: FlakyDisk, scenario: str, first: int
) -> None:
    top = prepared(disk, scenario, "whole")
    whole = CutDisk(disk, top, None)
    drive(fresh(SCENARIOS[scenario]), whole)
    disk.unmount()
    assert whole.done > 20
    for cut_at in range(first, whole.done, 4):
        top = prepared(disk, scenario, f"cut{cut_at}")
        with contextlib.suppress(PowerCut):
            drive(fresh(SCENARIOS[scenario]), CutDisk(disk, top, cut_at))
        disk.unmount()
        disk.take_writes()
        disk.mount()
        world, after = fresh(SCENARIOS[scenario]), Disk(str(top))
        _, running = drive(world, after)
        check_rest(SCENARIOS[scenario], after, running, world)
        disk.unmount()
