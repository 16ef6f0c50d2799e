"""The spool on a real ext4 whose device drops every write from some moment on, as a power cut does.

Runs in the guest of scripts/vcan, the only place where a block device may be pulled: dm-flakey, root.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tbox.ledger import Ledger
from tbox.model import Now
from tbox.spool.store import Spool
from tests.crash.filler import LIVE_QUOTA_BYTES, records_of_tick
from tests.crash.workload import Minter, settings

ROOT = Path(__file__).parents[2]
DEVICE_BYTES = 96 * 1024 * 1024
SECTORS = DEVICE_BYTES // 512
NAME = "tbox-flakey"
CUTS = 3


def _sh(*command: str, stdin: str = "") -> str:
    environment = {**os.environ, "DM_DISABLE_UDEV": "1", "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    run = subprocess.run(command, check=True, input=stdin, capture_output=True, text=True, env=environment)
    return run.stdout.strip()


class FlakyDisk:
    """An ext4 on a device that can stop taking writes without saying so."""

    def __init__(self, directory: Path) -> None:
        self.mount_point = directory / "mnt"
        self.mount_point.mkdir()
        image = directory / "disk"
        image.touch()
        os.truncate(image, DEVICE_BYTES)
        self._loop = _sh("losetup", "--find", "--show", str(image))
        _sh("mkfs.ext4", "-q", "-F", self._loop)
        _sh("dmsetup", "create", NAME, "--noudevsync", "--table", f"0 {SECTORS} linear {self._loop} 0")
        _sh("dmsetup", "mknodes")

    def mount(self) -> None:
        _sh("mount", "-t", "ext4", f"/dev/mapper/{NAME}", str(self.mount_point))

    def unmount(self) -> None:
        _sh("umount", str(self.mount_point))

    def drop_writes(self) -> None:
        self._table(f"0 {SECTORS} flakey {self._loop} 0 0 3600 1 drop_writes", "--nolockfs")

    def take_writes(self) -> None:
        self._table(f"0 {SECTORS} linear {self._loop} 0")

    def _table(self, table: str, *options: str) -> None:
        _sh("dmsetup", "suspend", "--noudevsync", *options, NAME)
        _sh("dmsetup", "load", NAME, "--table", table)
        _sh("dmsetup", "resume", "--noudevsync", NAME)

    def remove(self) -> None:
        subprocess.run(["umount", str(self.mount_point)], check=False, capture_output=True)
        _sh("dmsetup", "remove", "--noudevsync", NAME)
        _sh("losetup", "--detach", self._loop)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FlakyDisk]:
    search = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [tool for tool in ("dmsetup", "mkfs.ext4", "losetup") if not shutil.which(tool, path=search)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (apt install dmsetup e2fsprogs)")
    _sh("modprobe", "-a", "loop", "dm-flakey", "ext4")
    flaky = FlakyDisk(tmp_path)
    yield flaky
    flaky.remove()


def _live_until_cut(disk: FlakyDisk, ticks: int) -> tuple[int, int, set[int]]:
    """Live for some ticks, cut, live on in vain, die. Return the start, what was safe and what acked."""
    command = [sys.executable, "-m", "tests.crash.filler", str(disk.mount_point), "0", "run"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    start, safe, seen, acked = 0, 0, 0, set[int]()
    for line in process.stdout:
        what, *numbers = line.split()
        if what == "start":
            start = int(numbers[0])
        elif what == "acked":
            acked |= {int(one) for one in numbers}
        else:
            seen += 1
            safe = int(numbers[0]) if seen <= ticks else safe
            if seen == ticks:
                disk.drop_writes()
            if seen == ticks + 20:
                os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return start, safe, acked


def test_what_was_committed_before_a_power_cut_is_there_after_it(disk: FlakyDisk) -> None:
    rng = random.Random(3)
    safe: dict[int, int] = {}
    acked: set[int] = set()
    for _ in range(CUTS):
        disk.mount()
        start, last, done = _live_until_cut(disk, rng.randint(5, 40))
        assert start not in safe
        safe[start] = last
        acked |= done
        disk.unmount()
        disk.take_writes()
    disk.mount()
    made = {}
    for start, last in safe.items():
        minter = Minter(start, random.Random(start))
        while not minter.minted or minter.minted[-1].id < last:
            records_of_tick(minter)
        made.update({record.id: record for record in minter.minted if record.id <= last})
    newest = max(safe) + 1
    spool = Spool.open(
        str(disk.mount_point), settings(quota_bytes=LIVE_QUOTA_BYTES), start=newest,
        mint=Minter(newest, rng), now=Now(0), ledger=Ledger(),
    )  # fmt: skip
    got = {}
    while batch := spool.offer(Now(0), 500):
        got.update({record.id: record for record in batch})
    spool.close(Now(1), clean=True, ledger_totals={})
    assert not {one for one in made if one not in got and one not in acked}
    assert all(got[one] == made[one] for one in got if one in made)
