"""A Pi updated by its own firmware: raw images on real block devices, autoboot.txt, one-shot tryboot.

`Pi` is the edge of the world: what the `reboot` command and the firmware do with the boot partition.
"""

from __future__ import annotations

import struct
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tbox.config import OtaConfig
from tbox.durable import OsStorage, TwoCopies
from tbox.errors import Refused
from tbox.model import NS_PER_S, Now
from tbox.ota.boot import TRIES, SlotName, SlotState
from tbox.ota.bootctl import BootCtl
from tbox.ota.device import JOURNAL_STEM, OtaDevice, load_journal
from tbox.ota.engine import Device, Engine, State
from tbox.ota.install import Job, install
from tbox.ota.slots import PiSlot, SlotError, TrybootSettings
from tbox.update import started_from
from tests.crash.ota_world import HEALTHY, SETTINGS, manifest_of, target_of
from tests.io.test_ota_device import NEW, OLD, Ports, Real

DEVICE_BYTES = 512 * 1024
PARTITIONS: dict[SlotName, int] = {"a": 2, "b": 3}
TURNS = 30


class Pi:
    """A board with two boot partitions, its firmware, and the kernel's word on both."""

    def __init__(self, real: Real, top: Path, devices: dict[SlotName, str]) -> None:
        self.real, self.devices = real, devices
        self.boot, self.node, self.boot_id = top / "boot", top / "partition", top / "boot_id"
        self.boot.mkdir()
        tryboot = TrybootSettings(
            directory=str(real.fw),
            boot_directory=str(self.boot),
            a=PiSlot(device=devices["a"], partition=PARTITIONS["a"]),
            b=PiSlot(device=devices["b"], partition=PARTITIONS["b"]),
            firmware_node=str(self.node),
            boot_id_file=str(self.boot_id),
        )
        self.backend, self.slots = started_from(OtaConfig(rpi_tryboot=tryboot), OsStorage(), {})
        self.slots.write("a", 0, OLD)
        self.backend.settle("a")
        self.reset()

    @property
    def starts(self) -> SlotName:
        """The slot that any reset starts."""
        return self._slot("[all]")

    def _slot(self, section: str) -> SlotName:
        """Read autoboot.txt as the firmware does."""
        text = (self.boot / "autoboot.txt").read_text()
        assert len(text) <= 512 and "tryboot_a_b=1" in text
        at = text.index("boot_partition=", text.index(section)) + len("boot_partition=")
        number = int(text[at : text.index("\n", at)])
        return next(name for name, partition in PARTITIONS.items() if partition == number)

    def _power_on(self, section: str) -> None:
        self.node.write_bytes(struct.pack(">I", PARTITIONS[self._slot(section)]))
        self.boot_id.write_text(f"{uuid.uuid4()}\n")

    def reset(self) -> None:
        self._power_on("[all]")

    def obey(self, command: list[str]) -> None:
        """Do as `reboot` and the firmware's flag say."""
        assert command in (["reboot"], ["reboot", "0 tryboot"])
        self._power_on("[tryboot]" if command[1:] else "[all]")

    def agent(self, ports: Ports) -> OtaDevice:
        """Start the agent's update thread on what runs now."""
        ctl, journal = BootCtl(OsStorage(), self.slots.directory), self.journal
        device = Device(
            "vehicle", b"key", self.backend.running(), lambda requires: "",
            loader_decides=self.backend.counts_tries, boot_id=self.backend.boot_id(), kind=self.backend.kind,
        )  # fmt: skip
        engine = Engine(SETTINGS, device, ctl.read(), load_journal(journal))
        return OtaDevice(engine, ctl, self.slots, journal, self.backend, ports)

    @property
    def journal(self) -> TwoCopies:
        return TwoCopies(OsStorage(), str(self.real.data), JOURNAL_STEM)

    def run(self, ports: Ports) -> OtaDevice:
        """Run the agent until it wants a restart, and not for ever."""
        agent = self.agent(ports)
        for second in range(1, TURNS):
            agent.turn(Now(second * NS_PER_S))
            if agent.restarting:
                break
        return agent

    def device_bytes(self, name: SlotName, length: int) -> bytes:
        with Path(self.devices[name]).open("rb") as device:
            return device.read(length)


@pytest.fixture(params=["files", "block devices"])
def pi(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pi]:
    paths: dict[SlotName, str] = {}
    for name in PARTITIONS:
        path = tmp_path / f"device_{name}"
        path.write_bytes(bytes(DEVICE_BYTES))
        paths[name] = str(path)
    if request.param == "files":
        yield Pi(Real(tmp_path), tmp_path, paths)
        return
    loops: dict[SlotName, str] = {}
    try:
        for name, backing in paths.items():
            loops[name] = _loop(backing)
        yield Pi(Real(tmp_path), tmp_path, loops)
    finally:
        for loop in loops.values():
            subprocess.run(["losetup", "--detach", loop], check=True)


def _loop(backing: str) -> str:
    try:
        done = subprocess.run(
            ["losetup", "--find", "--show", backing], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no loop devices here (needs root and losetup)")
    return done.stdout.strip()


def installed(pi: Pi) -> Ports:
    """Bring the new image into slot b and let the firmware try it."""
    ports = Ports(pi.real)
    pi.run(ports)
    assert ports.restarts == [["reboot", "0 tryboot"]]
    return ports


def test_a_raw_image_is_tried_once_proves_itself_and_becomes_the_default(pi: Pi) -> None:
    ports = installed(pi)
    assert pi.device_bytes("b", len(NEW)) == NEW and pi.device_bytes("a", len(OLD)) == OLD
    assert pi.starts == "a", "a power cut must start the old image"
    pi.obey(ports.restarts[-1])
    assert pi.backend.running() == "b"
    trial = pi.run(ports)
    assert trial.engine.state is State.IDLE and "passed" in [d.body["event"] for d in ports.drafts]
    pi.reset()
    assert pi.backend.running() == "b"
    assert pi.real.ctl.read().floor == 2


def test_an_image_that_does_not_start_gets_its_tries_and_is_given_up(pi: Pi) -> None:
    ports = installed(pi)
    for _ in range(10):
        pi.reset()  # whatever was tried, the board came up with its default
        ports.restarts.clear()
        if not pi.run(ports).restarting:
            break
        assert ports.restarts == [["reboot", "0 tryboot"]]
    control = pi.real.ctl.read()
    assert control.b.state is SlotState.UNBOOTABLE and pi.starts == "a"
    assert control.failed[0].reason == "did not start in any of its tries"


def test_an_unhealthy_image_is_left_by_a_plain_reboot_whose_default_is_the_old_one(pi: Pi) -> None:
    ports = installed(pi)
    pi.obey(ports.restarts.pop())
    ports.now_proof = msgspec.structs.replace(HEALTHY, ledger_clean=False)
    pi.run(ports)
    assert ports.restarts == [["reboot"]] and pi.starts == "a"
    pi.obey(ports.restarts.pop())
    assert pi.backend.running() == "a" and pi.agent(ports).engine.state is State.ROLLED_BACK


def test_an_agent_that_crashes_on_trial_uses_its_tries_up_one_boot_each(pi: Pi) -> None:
    ports = installed(pi)
    boots = 0
    while ports.restarts and boots <= TRIES:
        pi.obey(ports.restarts.pop())
        if pi.backend.running() == "b":
            boots += 1
            pi.agent(ports).turn(Now(NS_PER_S))  # crashes, and systemd starts it again
            assert ports.restarts == []
        pi.run(ports)
    assert boots == TRIES
    assert pi.real.ctl.read().b.state is SlotState.UNBOOTABLE and pi.backend.running() == "a"


def test_an_image_that_is_bigger_than_the_device_is_refused(pi: Pi) -> None:
    big = bytes(DEVICE_BYTES + 1)
    target = target_of(big, 2)
    with pytest.raises(Refused, match="does not fit"):
        install(Job(pi.real.ctl, pi.slots, "b", target, manifest_of(target), [big]))
    assert pi.real.ctl.read().b.state is SlotState.EMPTY


def test_a_board_started_from_neither_slot_says_so(pi: Pi) -> None:
    pi.node.write_bytes(struct.pack(">I", 1))
    with pytest.raises(SlotError, match=r"\[ota.rpi_tryboot\]"):
        pi.backend.running()
