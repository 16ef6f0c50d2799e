"""The spool on a real ext4 of its own: filled by others, made read-only, closed to it, and mended again.

Needs root and loop devices; what a medium can do without them is in `test_faults`.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tbox.ledger import Ledger
from tbox.model import NS_PER_S, Draft, Level, Now, Record
from tbox.spool.store import Spool
from tests.crash.workload import Minter, settings

DISK_BYTES = 256 * 1024 * 1024
CAP_BYTES = 32 * 1024 * 1024


def _can_mount() -> bool:
    return os.geteuid() == 0 and Path("/dev/loop-control").exists()


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not _can_mount(), reason="needs root and loop devices")]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    image, mount_point = tmp_path / "disk", tmp_path / "mnt"
    image.touch()
    os.truncate(image, DISK_BYTES)
    mount_point.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    mount = ["mount", "-o", "loop,errors=remount-ro", str(image), str(mount_point)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("cannot mount a loop device here")
    yield mount_point
    subprocess.run(["umount", str(mount_point)], check=True)


class Rig:
    """A spool on the disk, a second a tick, whose ledger must always add up."""

    def __init__(self, disk: Path, start: int = 1) -> None:
        self.minter, self.ledger, self.second = Minter(start, random.Random(start)), Ledger(), 0
        self.spool = Spool.open(
            str(disk / "spool"), settings(quota_bytes=CAP_BYTES, ballast=True), start=start, mint=self.minter,
            now=Now(0), ledger=self.ledger,
        )  # fmt: skip

    def live(self, seconds: int, fill: int = 2000) -> None:
        for _ in range(seconds):
            self.second += 1
            self.spool.append([self.minter(Draft("telemetry", Level.INFO, 0, {"fill": fill}))])
            self.spool.tick(Now(self.second * NS_PER_S))
            self.ledger.check()

    @property
    def state(self) -> str:
        return str(self.spool.stat()["state"])

    def alarms(self) -> list[str]:
        bodies = [msgspec.msgpack.decode(one.payload) for one in self.minter.minted if one.kind == "alarm"]
        return [body["event"] for body in bodies]

    def everything_is_there(self) -> bool:
        """Whether another start finds every record that was made, and nothing else."""
        self.spool.close(Now((self.second + 1) * NS_PER_S), clean=True, ledger_totals={})
        again = Spool.open(
            str(Path(self.spool._directory)), settings(quota_bytes=CAP_BYTES), start=self.minter.start + 1,
            mint=self.minter, now=Now(0), ledger=Ledger(),
        )  # fmt: skip
        got: dict[int, Record] = {}
        while batch := again.offer(Now(0), 500):
            got |= {record.id: record for record in batch}
        again.close(Now(1), clean=True, ledger_totals={})
        return got == {record.id: record for record in self.minter.minted}


def _fill_up(disk: Path) -> None:
    """Be the neighbour whose log file takes all that is left."""
    block = bytes(1 << 20)
    with (disk / "stranger").open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(block[:size]):
                    pass
            except OSError:
                continue


def test_a_disk_that_others_fill_cannot_reach_the_spool(disk: Path) -> None:
    rig = Rig(disk)
    held = rig.spool.stat()["ballast_bytes"]
    assert held > CAP_BYTES // 2
    rig.live(5)
    _fill_up(disk)
    rig.live(40, fill=400_000)  # 16 MB: half of the cap
    assert rig.state == "flash" and not rig.alarms()
    assert rig.spool.stat()["ballast_bytes"] < held - (12 << 20)
    assert rig.everything_is_there()


def test_an_error_that_makes_the_disk_read_only_ends_in_ram_with_an_alarm(disk: Path) -> None:
    rig = Rig(disk)
    rig.live(5)
    made = {record.id: record for record in rig.minter.minted}
    find = ["findmnt", "-no", "SOURCE", str(disk)]
    source = subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip()
    trigger = Path("/sys/fs/ext4") / Path(source).name / "trigger_fs_error"
    if not trigger.exists():
        pytest.skip("this kernel cannot be told to fail an ext4")
    trigger.write_text("1")
    rig.live(20)
    assert rig.state == "ram" and rig.alarms() == ["raise"]
    live = rig.spool.offer(Now(rig.second * NS_PER_S), 500)
    assert {record.id for record in rig.minter.minted} - set(made) <= {record.id for record in live}
    rig.spool.close(Now(rig.second * NS_PER_S), clean=True, ledger_totals={})
    subprocess.run(["umount", str(disk)], check=True)
    subprocess.run(["mount", "-o", "loop", str(disk.parent / "disk"), str(disk)], check=True)
    again = Rig(disk, 2)
    got = {record.id: record for record in again.spool.offer(Now(0), 500)}
    assert got == made  # what RAM held went with the process, and the start's end says so
    assert again.spool.previous is not None and not again.spool.previous.clean
    assert again.spool.previous.last_committed_id == max(made)
    again.spool.close(Now(1), clean=True, ledger_totals={})


@pytest.mark.parametrize(
    ("take", "give_back"),
    [
        (["chattr", "+i", "{spool}/spool.db"], ["chattr", "-i", "{spool}/spool.db"]),  # root may do all else
        (["mount", "-o", "remount,ro", "{disk}"], ["mount", "-o", "remount,rw", "{disk}"]),
    ],
    ids=["permission", "read-only"],
)
def test_what_may_not_be_written_ends_in_ram_with_an_alarm_and_comes_back(
    disk: Path, take: list[str], give_back: list[str]
) -> None:
    def mend(command: list[str]) -> None:
        subprocess.run([part.format(disk=disk, spool=disk / "spool") for part in command], check=True)

    rig = Rig(disk)
    rig.live(5)
    rig.spool.close(Now(6 * NS_PER_S), clean=True, ledger_totals={})
    made = rig.minter.minted
    mend(take)
    rig = Rig(disk, 2)
    rig.live(5)
    assert rig.state == "ram" and rig.alarms() == ["raise"]
    mend(give_back)
    rig.live(60)
    assert rig.state == "flash" and rig.alarms() == ["raise", "clear"]
    rig.minter.minted = [*made, *rig.minter.minted]
    assert rig.everything_is_there()
