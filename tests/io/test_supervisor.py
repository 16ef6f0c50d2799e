"""The boot loader with real processes and real files: starts, watches, falls back, ends in last resort."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import msgspec
import pytest

import tbox
from tbox.durable import OsStorage
from tbox.errors import Refused, TboxError
from tbox.ota import boot, image
from tbox.ota.boot import BootControl, LastResort, SlotEntry, SlotName, SlotState
from tbox.ota.bootctl import BootCtl
from tbox.ota.install import Job, install
from tbox.ota.model import Full, VerifiedTarget
from tbox.ota.slots import Slots
from tbox.ota.supervisor import RESTART_EXIT, BootSettings, Supervisor, prepare_run_directory, restore
from tests.crash.ota_world import manifest_of, sha256, verify

QUICK = BootSettings(
    ready_s=20,
    watchdog_s=20,
    stop_s=20,
    abort_s=5,
    trial_pause_s=0.01,
    crash_pause_s=0.01,
    quick_crashes_max=3,
)
APP = """
import os, signal, socket, sys, time
def say(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(text, os.environ["NOTIFY_SOCKET"])
def main():
    with open(sys.argv[1], "a") as out:
        print(VERSION, os.environ["TBOX_SLOT"], os.environ["TBOX_BOOT_NOTE"], file=out)
    BODY
"""


class Bench:
    """A device in a directory, whose images write a line to `out` when they start."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "firmware"
        self.directory.mkdir()
        self.out = directory / "out"
        self.run = prepare_run_directory(directory / "run")
        storage = OsStorage()
        self.ctl = BootCtl(storage, str(self.directory))
        self.slots = Slots(storage, str(self.directory))

    def image(self, version: int, body: str) -> tuple[bytes, VerifiedTarget]:
        tree = self.directory.parent / f"tree{version}"
        tree.mkdir(exist_ok=True)
        code = APP.replace("BODY", textwrap.indent(body, "    ").strip()).replace("VERSION", str(version))
        (tree / "app.py").write_text(code)
        header = image.ImageHeader(name="app", version=str(version), entry="app:main")
        data = b"".join(image.build(tree, header))
        return data, self.target_of(data, version)

    def target_of(self, data: bytes, version: int) -> VerifiedTarget:
        values = {
            "name": f"app-{version}",
            "version": str(version),
            "kind": "app",
            "length": len(data),
            "sha256": sha256(data),
            "security_counter": version,
            "hardware_ids": ("tbox-sim",),
            "full": Full(name=f"app-{version}", length=len(data), sha256=sha256(data), codec="identity"),
        }
        return msgspec.convert(values, VerifiedTarget)

    def provision(self, version: int, body: str) -> None:
        self.put(*self.image(version, body))

    def put(self, data: bytes, target: VerifiedTarget) -> None:
        """Leave the factory with this image in slot a."""
        self.slots.write("a", 0, data)
        entry = SlotEntry(
            priority=boot.PRIORITY_ACTIVE,
            successful=True,
            sha256=target.sha256,
            length=target.length,
            version=target.version,
            security_counter=target.security_counter,
            manifest_sha256=self.slots.put_manifest("a", manifest_of(target)),
        )
        self.ctl.commit(BootControl(floor=target.security_counter).with_slots("a", entry))

    def update(
        self, version: int, body: str, slot: SlotName = "b", tries: int = boot.TRIES
    ) -> VerifiedTarget:
        data, target = self.image(version, body)
        install(Job(self.ctl, self.slots, slot, target, manifest_of(target), [data], tries))
        self.ctl.commit(boot.activate(self.ctl.read(), slot))
        return target

    def supervisor(self, settings: BootSettings = QUICK) -> Supervisor:
        return Supervisor(self.ctl, self.slots, verify, self.run, [str(self.out)], settings)

    @property
    def started(self) -> list[str]:
        return self.out.read_text().splitlines() if self.out.exists() else []


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_starts_the_good_slot_from_its_image_and_ends_when_the_agent_has_finished(bench: Bench) -> None:
    bench.provision(1, "say(b'READY=1')")
    assert bench.supervisor().run() is None
    assert bench.started == ["1 a "]


def test_an_image_that_crashes_on_trial_gets_its_tries_and_then_the_old_one_runs(bench: Bench) -> None:
    bench.provision(1, "say(b'READY=1')")
    target = bench.update(2, "os.kill(os.getpid(), signal.SIGSEGV)")
    assert bench.supervisor().run() is None
    assert bench.started == ["2 b "] * boot.TRIES + ["1 a "]
    control = bench.ctl.read()
    assert control.b.state is SlotState.UNBOOTABLE and control.floor == 1
    assert control.failure(target.sha256) is not None


@pytest.mark.slow
def test_an_image_that_never_becomes_ready_is_ended(bench: Bench) -> None:
    bench.provision(1, "pass")
    bench.update(2, "time.sleep(600)", tries=1)
    assert bench.supervisor(msgspec.structs.replace(QUICK, ready_s=5)).run() is None
    assert bench.started == ["2 b ", "1 a "]
    assert bench.ctl.read().b.state is SlotState.UNBOOTABLE


def test_an_image_that_stops_feeding_the_watchdog_is_ended(bench: Bench) -> None:
    bench.provision(1, "pass")
    bench.update(2, "say(b'READY=1'); time.sleep(600)", tries=1)
    assert bench.supervisor(msgspec.structs.replace(QUICK, watchdog_s=0.3)).run() is None
    assert bench.started == ["2 b ", "1 a "]


def test_ending_without_a_verdict_on_trial_counts_as_a_failure(bench: Bench) -> None:
    bench.provision(1, "pass")
    bench.update(2, "pass")
    assert bench.supervisor().run() is None
    assert bench.started == ["2 b "] * boot.TRIES + ["1 a "]


def test_the_agent_asks_for_a_restart_and_boot_control_is_read_anew(bench: Bench) -> None:
    bench.provision(1, f"sys.exit({RESTART_EXIT} if len(open(sys.argv[1]).readlines()) < 3 else 0)")
    assert bench.supervisor().run() is None
    assert bench.started == ["1 a "] * 3


def test_a_good_image_that_keeps_crashing_is_left_for_the_other_good_one_which_is_told_why(
    bench: Bench,
) -> None:
    bench.provision(1, "pass")
    bench.update(2, "sys.exit(3)")
    bench.ctl.commit(boot.confirm(bench.ctl.read(), "b"))
    before = bench.ctl.read()
    assert bench.supervisor().run() is None
    assert bench.started == ["2 b "] * 3 + ["1 a slot b: crashed 3 times in a row: exit code 3"]
    assert bench.ctl.read() == before


def test_a_flipped_byte_in_a_good_slot_is_found_and_the_fallback_starts(bench: Bench) -> None:
    bench.provision(1, "pass")
    bench.update(2, "pass")
    bench.ctl.commit(boot.confirm(bench.ctl.read(), "b"))
    path = bench.directory / "slot_b.img"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    assert bench.supervisor().run() is None
    assert bench.started == ["1 a slot b: the image on the medium is not the signed one"]


def test_last_resort_names_both_reasons_and_recovery_leads_out_of_it(bench: Bench) -> None:
    bench.provision(1, "pass")
    (bench.directory / "slot_a.img").write_bytes(b"rotten")
    end = bench.supervisor().run()
    assert isinstance(end, LastResort)
    assert end.reasons == {"a": "the image on the medium is not the signed one", "b": "slot is empty"}
    assert bench.started == []

    older, older_target = bench.image(1, "print('older')")
    rescue = bench.directory.parent / "rescue.img"
    rescue.write_bytes(older)
    slot, _ = restore(bench.ctl, bench.slots, verify, str(rescue), manifest_of(older_target))
    assert slot == "a" and bench.supervisor().run() is None
    assert bench.started == ["1 a "]
    with pytest.raises(Refused, match="not a manifest"):
        restore(bench.ctl, bench.slots, verify, str(rescue), b"not a manifest")


def test_recovery_holds_the_floor_even_when_boot_control_is_lost(bench: Bench) -> None:
    bench.provision(5, "pass")
    for copy in bench.directory.glob("bootctl.*"):
        copy.write_bytes(b"")
    (bench.directory / "slot_a.img").write_bytes(b"rotten")
    data, target = bench.image(4, "pass")
    rescue = bench.directory.parent / "rescue.img"
    rescue.write_bytes(data)
    with pytest.raises(Refused, match="below the floor 5"):
        restore(bench.ctl, bench.slots, verify, str(rescue), manifest_of(target))


def test_a_new_device_is_provisioned_by_the_same_command(bench: Bench) -> None:
    data, target = bench.image(1, "pass")
    factory = bench.directory.parent / "factory.img"
    factory.write_bytes(data)
    assert restore(bench.ctl, bench.slots, verify, str(factory), manifest_of(target))[0] == "a"
    assert bench.ctl.read().a.state is SlotState.GOOD and bench.ctl.read().floor == 1
    assert bench.supervisor().run() is None and bench.started == ["1 a "]


def test_stopping_ends_the_agent_in_order(bench: Bench) -> None:
    bench.provision(
        1, "say(b'READY=1')\ntry:\n    time.sleep(600)\nfinally:\n    open(sys.argv[1] + '.bye', 'w')"
    )
    code = bench.directory.parent / "tree1" / "app.py"
    assert code.exists()
    loader = bench.supervisor()
    thread = threading.Thread(target=loader.run)
    thread.start()
    _until(lambda: bench.started == ["1 a "])
    loader.stop()
    thread.join(30)
    assert not thread.is_alive()


MAIN = """
import sys
from pathlib import Path
from tests.io.test_supervisor import QUICK, Bench, verify
from tbox.durable import OsStorage
from tbox.ota.bootctl import BootCtl
from tbox.ota.slots import Slots
from tbox.ota.supervisor import Supervisor
top = Path(sys.argv[1])
where = str(top / "firmware")
ctl, slots = BootCtl(OsStorage(), where), Slots(OsStorage(), where)
Supervisor(ctl, slots, verify, top / "run", sys.argv[2:] or [str(top / "out")], QUICK).run()
"""


@pytest.mark.slow
def test_the_agent_dies_with_a_supervisor_that_was_killed(bench: Bench) -> None:
    bench.provision(
        1, "say(b'READY=1')\nprint(os.getpid(), file=open(sys.argv[1], 'a'), flush=True)\ntime.sleep(600)"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", MAIN, str(bench.directory.parent)], cwd=root) as process:
        _until(lambda: len(bench.started) == 2)
        process.send_signal(signal.SIGKILL)
    agent = int(bench.started[1])
    _until(lambda: not _alive(agent))


def test_the_run_directory_must_be_ours_alone(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(TboxError, match="not ours alone"):
        prepare_run_directory(tmp_path / "open")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(TboxError, match="not ours alone"):
        prepare_run_directory(tmp_path / "link")


def _until(fact: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not fact():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_the_real_agent_boots_as_an_app_image(bench: Bench) -> None:
    """The whole `tbox` package runs out of the slot, not out of what is installed beside it."""
    tree = bench.directory.parent / "package"
    shutil.copytree(Path(tbox.__file__).parent, tree / "tbox")
    (tree / "tbox" / "__init__.py").write_text("print('from', __file__)\n")
    header = image.ImageHeader(name="tbox", version="9", entry="tbox.cli.main:main")
    data = b"".join(image.build(tree, header))
    bench.put(data, bench.target_of(data, 9))
    entry = [sys.executable, "-c", MAIN, str(bench.directory.parent), "payload", "--help"]
    done = subprocess.run(entry, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert f"from {bench.run}/slot_a/tbox/__init__.py" in done.stdout
    assert "payload" in done.stdout
