"""A recording played on a real interface as fast as it goes: every frame arrives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tbox.bus.python_can import open_bus
from tbox.bus.recordings import Recording, message_of_logged, write_recording
from tbox.bus.socketcan import SocketCanReader
from tbox.bus.spec import parse_bus_url
from tests.data import data_file


@pytest.mark.slow
def test_the_kona_recording_arrives_whole(reader: Callable[..., SocketCanReader], tmp_path: Path) -> None:
    source = data_file("can", "kona-pcan-ccan-power-on-ready-off.gvret.csv")
    ours = reader()
    command = [sys.executable, "-c", "from tbox.cli.main import main; main()", "replay", str(source)]
    command += ["--bus", "socketcan:vcan0", "--channel", "0", "--speed", "max"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        count, quiet = 0, 0
        while process.poll() is None or quiet < 3:
            batch = ours.recv_batch(0.2)
            quiet = 0 if batch else quiet + 1
            count += len(batch or ())
        assert process.stdout is not None
        assert json.loads(process.stdout.read())["frames"] == 24_263 == count
    assert ours.counters().kernel_dropped == 0


def test_what_candump_writes_is_what_was_played(
    reader: Callable[..., SocketCanReader],
    needs: Callable[..., None],
    wait_for: Callable[..., None],
    tmp_path: Path,
) -> None:
    needs("candump")
    played = tmp_path / "played.log"
    played.write_text("(1.0) can0 123#0102\n(1.0) can0 1ABCDEF0#\n(1.0) can0 321##1" + "AB" * 12 + "\n")
    ours = reader()
    listeners = Path("/proc/net/can/rcvlist_all")
    before = listeners.read_text().count("vcan0")
    command = ["candump", "-L", "-n", "3", "-T", "60000", "vcan0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as candump:
        wait_for(lambda: listeners.read_text().count("vcan0") > before, "candump's socket")
        with open_bus(parse_bus_url("socketcan:vcan0")) as bus:
            for frame in Recording(played):
                bus.send(message_of_logged(frame))
        dumped = tmp_path / "dumped.log"
        dumped.write_text(candump.communicate(timeout=60)[0])
    essence = [(f.can_id, f.fd, f.brs, f.data) for f in Recording(played)]
    assert [(f.can_id, f.fd, f.brs, f.data) for f in Recording(dumped)] == essence
    write_recording(tmp_path / "again.log", Recording(dumped), "candump")
    assert [f[2:-1] for f in Recording(tmp_path / "again.log")] == [f[2:-1] for f in Recording(dumped)]
    assert ours.recv_batch(1.0) is not None
